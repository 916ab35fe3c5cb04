"""A store of codes: each token is quantized once, when it leaves the newest ones that are held as they are."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from training.system.errors import UserError

from .base import Rows, Store, at_places
from .codes import Affine, ByChannel, ByToken, Coded, Float8, Symmetric

GROUP = 32  # numbers that share a scale: tokens of a channel of the keys, or at most so many channels of a token


class Kind(NamedTuple):
    """How keys and values are coded. are_keys_by_channel: as KIVI does, which a scale for each token's is cheaper than.

    At 8 bits a token's own scale is good enough, and needs no group of tokens to wait for.
    """

    keys: Callable[[], Any]
    values: Callable[[], Any]
    are_keys_by_channel: bool


KINDS = {
    "int8": Kind(lambda: Symmetric(8), lambda: Symmetric(8), False),
    "fp8": Kind(Float8, Float8, False),
    "int4": Kind(lambda: Affine(4), lambda: Symmetric(4), True),
    "int3": Kind(lambda: Affine(3), lambda: Affine(3), True),
    "int2": Kind(lambda: Affine(2), lambda: Affine(2), True),
}
ROTATIONS = ("hadamard", "none")


class QuantizedStore(Store):
    """Holds keys and values in codes of a kind, but the newest `recent` tokens in full.

    A token that is coded is never coded again. Where keys are coded by channel, they wait in full until a group of
    tokens is whole; where an eviction takes tokens out, each has scales of its own.
    """

    def __init__(self, kind: str, head_dim: int, group: int, recent: int, turned: int, dtype: torch.dtype | None):
        self.kind, self.shape, self.recent, self.dtype = KINDS[kind], (head_dim, group, turned), recent, dtype
        self.clear()

    def clear(self) -> None:
        self.parts: dict[str, Part] = {}

    @property
    def length(self) -> int:
        return self.parts["key"].length if self.parts else 0

    def extend(self, keys, values):
        """As Store's, but every token is read back as it is held, the new ones too."""
        self.parts = self.parts or self._empty()
        return self.parts["key"].extend(keys), self.parts["value"].extend(values)

    def select(self, places: torch.Tensor) -> None:
        for part in self.parts.values():
            part.select(places)

    def state(self) -> dict[str, torch.Tensor]:
        return {f"{name}_{what}": held for name, part in self.parts.items() for what, held in part.state().items()}

    def change_rows(self, change) -> None:
        for part in self.parts.values():
            part.change_rows(change)

    def _empty(self) -> dict[str, "Part"]:
        """A part without tokens for the keys, and one for the values."""
        head_dim, group, turned = self.shape
        keys, values = self.kind.keys(), ByToken(self.kind.values(), head_dim, group, turned)
        if self.kind.are_keys_by_channel and not self.loses_tokens:
            coder = ByChannel(keys, head_dim, GROUP, turned)
        else:
            coder = ByToken(keys, head_dim, group, turned)
        return {"key": Part(coder, self.recent, self.dtype), "value": Part(values, self.recent, self.dtype)}


class Part(Rows):
    """The keys or the values of a store: codes of the older tokens, and the newer ones in full."""

    ROWS = ("codes", "scales", "zeros", "full")

    def __init__(self, coder: ByToken | ByChannel, recent: int, dtype: torch.dtype | None):
        self.coder, self.recent, self.dtype = coder, recent, dtype
        self.clear()

    @property
    def coded_length(self) -> int:
        return 0 if self.codes is None else self.codes.shape[-2]

    @property
    def length(self) -> int:
        return self.coded_length + (0 if self.full is None else self.full.shape[-2])

    def extend(self, states: torch.Tensor) -> torch.Tensor:
        """Hold more tokens, (batch, kv_heads, tokens, head_dim); returns all as they are read back, in that dtype."""
        new = states.to(self.dtype or states.dtype)
        self.full = new if self.full is None else torch.cat((self.full, new), dim=-2)
        due = max(0, self.full.shape[-2] - self.recent)
        self._code(due - due % self.coder.tokens)
        full = self.full.to(states.dtype)
        return full if self.codes is None else torch.cat((self._decoded().to(states.dtype), full), dim=-2)

    def select(self, places: torch.Tensor) -> None:
        """Keep the tokens at these places; those in full that not all heads keep are coded before."""
        kept = places.shape[-1]
        newest = torch.arange(self.length - kept, self.length, device=places.device)
        all_keep = int((places == newest).flip(-1).long().cumprod(-1).sum(-1).min())
        in_full = min(all_keep, self.full.shape[-2])
        self._code(self.full.shape[-2] - in_full)
        for name in ("codes", "scales", "zeros"):
            if getattr(self, name) is not None:
                setattr(self, name, at_places(getattr(self, name), places[..., : kept - in_full]))

    def _code(self, tokens: int) -> None:
        """Code the oldest tokens of those in full."""
        if tokens == 0:
            return
        coded = self.coder.encode(self.full[:, :, :tokens])
        self.full = self.full[:, :, tokens:].clone()  # what is sliced alone keeps the memory of the whole
        held = self._coded()
        joined = (new if old is None else torch.cat((old, new), dim=2) for old, new in zip(held, coded, strict=True))
        self.codes, self.scales, self.zeros = joined

    def _coded(self) -> Coded:
        return Coded(self.codes, self.scales, self.zeros)

    def _decoded(self) -> torch.Tensor:
        return self.coder.decode(self._coded())


def quantized(kind: str) -> Callable[[Any, dict[str, Any], torch.dtype | None], QuantizedStore]:
    """What builds the store of a kind: (configuration, settings, dtype of what is held in full) to an empty store."""

    def build(config, settings: dict[str, Any], dtype: torch.dtype | None) -> QuantizedStore:
        head_dim, recent = config.head_dim, settings.get("cache_window") or 0
        return QuantizedStore(kind, head_dim, group_size(head_dim, settings), recent, turned(head_dim, settings), dtype)

    return build


def group_size(head_dim: int, settings: dict[str, Any]) -> int:
    """How many channels of a token share a scale."""
    given = settings.get("cache_group")
    if given is None:
        return next(size for size in range(min(head_dim, GROUP), 0, -1) if head_dim % size == 0)
    if head_dim % given:
        raise UserError(f"cache_group={given}: does not divide the model's head_dim={head_dim}; take a divisor")
    return given


def turned(head_dim: int, settings: dict[str, Any]) -> int:
    """How many channels a Hadamard matrix turns at a time: a power of two; of one there is nothing to turn."""
    most, given = head_dim & -head_dim, settings.get("cache_rotation")
    if given == "hadamard" and most == 1:
        raise UserError(f"cache_rotation=hadamard: turns pairs, and head_dim={head_dim} is odd; take none")
    return 1 if given == "none" else most
