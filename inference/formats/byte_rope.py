"""The tutorial's byte-level checkpoint: nanoGPT without `wpe`, its heads rotated in neighbouring pairs."""

import torch

from .base import Source
from .nanogpt import MODEL_ARGS, Checkpoint, NanoGPT

BASES = ("rope_theta", "rope_base")  # the model_args that may name the base of the angles
DEFAULT_BASE = 10000.0


class ByteRope(NanoGPT):
    """Rotary positions by head (RoFormer, arXiv 2104.09864, equation 34): the pairs are (0, 1), (2, 3), …"""

    title = "nanoGPT with rotary positions"
    is_written = False
    known_args = {*MODEL_ARGS, *BASES}

    def recognises(self, source: Source) -> bool:
        return bool(source.checkpoint) and not super().recognises(source)

    def base(self, theirs: Checkpoint) -> float:
        """Base of the angles: pair i turns by base ** (-2 i / head size) a position."""
        named = (theirs.args.get(name) for name in BASES)
        return float(next((base for base in named if base is not None), DEFAULT_BASE))

    def positions(self, theirs: Checkpoint) -> dict:
        parameters = {"rope_type": "default", "rope_theta": self.base(theirs)}
        return {"position_encoding": "rope", "rope_parameters": parameters}

    def weights(self, theirs: Checkpoint) -> dict[str, torch.Tensor]:
        """Ours, with the rows of queries and keys in another order: our pairs are (i, i + head size / 2)."""

        def reordered(rows: torch.Tensor) -> torch.Tensor:
            return rows.unflatten(0, (theirs.args["n_head"], -1, 2)).transpose(1, 2).flatten(0, 2)

        return {
            name: reordered(weight) if ".q_proj." in name or ".k_proj." in name else weight
            for name, weight in super().weights(theirs).items()
        }

    def rotate(self, theirs: Checkpoint, states: torch.Tensor) -> torch.Tensor:
        """Each neighbouring pair, read as a complex number, times e^(i · position · frequency)."""
        tokens, size = states.shape[-2:]
        frequencies = 1.0 / self.base(theirs) ** (torch.arange(0, size, 2) / size)
        angles = torch.outer(torch.arange(tokens), frequencies)
        pairs = torch.view_as_complex(states.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
