"""The tutorial's byte-level checkpoint: nanoGPT without `wpe`, its heads rotated in neighbouring pairs."""

import torch

from modeling import GPTConfig, GPTForCausalLM

from .base import Loaded, Source
from .layout import joints
from .nanogpt import MODEL_ARGS, NanoGPT

BASES = ("rope_theta", "rope_base")  # the model_args that may name the base of the angles
DEFAULT_BASE = 10000.0


class ByteRope(NanoGPT):
    """Rotary positions by head (RoFormer, arXiv 2104.09864, equation 34): the pairs are (0, 1), (2, 3), …"""

    title = "nanoGPT with rotary positions"
    is_written = False
    known_args = {*MODEL_ARGS, *BASES}

    def recognises(self, source: Source) -> bool:
        return bool(source.checkpoint) and not super().recognises(source)

    def base(self, loaded: Loaded) -> float:
        """Base of the angles: pair i turns by base ** (-2 i / head size) a position."""
        named = (loaded.model.args.get(name) for name in BASES)
        return float(next((base for base in named if base is not None), DEFAULT_BASE))

    def positions(self, loaded: Loaded) -> dict:
        parameters = {"rope_type": "default", "rope_theta": self.base(loaded)}
        return {"position_encoding": "rope", "rope_parameters": parameters}

    def weights(self, loaded: Loaded) -> dict[str, torch.Tensor]:
        """Ours, with the rows of queries and keys in another order: our pairs are (i, i + head size / 2)."""
        weights = super().weights(loaded)
        heads = loaded.model.args["n_head"]
        for (query, key, _), _ in joints(loaded.model.args["n_layer"]):
            for name in (f"{linear}.{kind}" for linear in (query, key) for kind in ("weight", "bias")):
                if name in weights:
                    pairs = weights[name].unflatten(0, (heads, -1, 2))
                    weights[name] = pairs.transpose(1, 2).flatten(0, 2)
        return weights

    def place(self, loaded: Loaded, states: torch.Tensor) -> torch.Tensor:
        return states

    def turn(self, loaded: Loaded, states: torch.Tensor) -> torch.Tensor:
        """Each neighbouring pair, read as a complex number, times e^(i · position · frequency)."""
        tokens, size = states.shape[-2:]
        frequencies = 1.0 / self.base(loaded) ** (torch.arange(0, size, 2) / size)
        angles = torch.outer(torch.arange(tokens), frequencies)
        pairs = torch.view_as_complex(states.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)

    def obstacles(self, config: GPTConfig) -> list[str]:
        raise NotImplementedError("this format is read, not written")

    def write(self, model: GPTForCausalLM, tokenizer, directory, destination) -> list[str]:
        raise NotImplementedError("this format is read, not written")
