"""Acorn's own: a run directory, one of its checkpoints, or any directory or Hub id with our `model_type`."""

from pathlib import Path

import torch

from modeling import GPTConfig, GPTForCausalLM
from training.model.loading import OUR_TYPES, without_further_heads

from .base import Format, Source, load_strictly, save_tokenizer


class Acorn(Format):
    """The format that all others are turned into and made from."""

    title = "Acorn"

    def recognises(self, source: Source) -> bool:
        return source.config.get("model_type") in OUR_TYPES

    def load(self, source: Source) -> GPTForCausalLM:
        return without_further_heads(source.name, load_strictly(GPTForCausalLM, source.name))

    def config(self, theirs: GPTForCausalLM, tokenizer=None) -> GPTConfig:
        return theirs.config

    def weights(self, theirs: GPTForCausalLM) -> dict[str, torch.Tensor]:
        return theirs.state_dict()

    def to_acorn(self, theirs: GPTForCausalLM, tokenizer=None) -> GPTForCausalLM:
        return theirs

    def write(self, model: GPTForCausalLM, tokenizer, directory: Path, destination: Path) -> list[str]:
        model.save_pretrained(directory)
        return save_tokenizer(tokenizer, directory)
