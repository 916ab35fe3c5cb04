"""Acorn's own: a run directory, one of its checkpoints, or any directory or Hub id with our `model_type`."""

from pathlib import Path

import torch

from modeling import GPTConfig, GPTForCausalLM
from training.model.loading import OUR_TYPES

from .base import Format, Loaded, Source, load_strictly, save_tokenizer


class Acorn(Format):
    """The format that all others are turned into and made from."""

    title = "Acorn"

    def recognises(self, source: Source) -> bool:
        return source.config.get("model_type") in OUR_TYPES

    def load(self, source: Source) -> Loaded:
        return Loaded(load_strictly(GPTForCausalLM, source.name))

    @torch.no_grad()
    def logits(self, loaded: Loaded, ids: torch.Tensor) -> torch.Tensor:
        return loaded.model(ids, use_cache=False).logits

    def config(self, loaded: Loaded) -> GPTConfig:
        return loaded.model.config

    def to_acorn(self, loaded: Loaded) -> GPTForCausalLM:
        return loaded.model

    def obstacles(self, config: GPTConfig) -> list[str]:
        return []

    def write(self, model: GPTForCausalLM, tokenizer, directory: Path, destination: Path) -> list[str]:
        model.save_pretrained(directory)
        return save_tokenizer(tokenizer, directory)
