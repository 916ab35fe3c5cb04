"""The model: what travels to the Hub."""

from .configuration_gpt import GPTConfig
from .modeling_gpt import GPTForCausalLM, GPTModel
from .presets import PRESETS

__all__ = ["PRESETS", "GPTConfig", "GPTForCausalLM", "GPTModel"]
