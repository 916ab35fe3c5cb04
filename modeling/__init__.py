"""The model: what travels to the Hub."""

from .configuration_gpt import GPTConfig
from .modeling_gpt import GPTForCausalLM, GPTModel

__all__ = ["GPTConfig", "GPTForCausalLM", "GPTModel"]
