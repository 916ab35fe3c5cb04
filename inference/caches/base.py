"""What the cache policies are made of: a store holds tokens, a layer decides which of them stay.

A layer that evicts does not know how its store holds tokens, and a store does not know why some are dropped; so each
eviction goes over each store.
"""

from abc import abstractmethod
from collections.abc import Callable

import torch

from modeling.segment_memory import HoldsRows, UnrotatedCache, UnrotatedLayer


class Rows:
    """Tensors with one row a sequence, which beams reorder and several samples repeat.

    ROWS: the names of the attributes that hold them, None while there is nothing; the batch is their first axis.
    """

    ROWS: tuple[str, ...] = ()

    def change_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Put `change` of each tensor in its place."""
        for name, tensor in Rows.state(self).items():
            setattr(self, name, change(tensor))

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that is held of the sequences, by name, as it lies in memory."""
        return {name: getattr(self, name) for name in self.ROWS if getattr(self, name) is not None}

    def clear(self) -> None:
        """Forget everything."""
        for name in self.ROWS:
            setattr(self, name, None)


class Store(Rows):
    """Holds keys and values as they come, in `dtype`: None is the model's own.

    A subclass that holds them otherwise overrides `length`, `extend` and `select`, and lists in ROWS what it holds.
    """

    ROWS = ("keys", "values")
    loses_tokens = False  # whether single tokens may go; a layer that evicts says so, before any is held

    def __init__(self, dtype: torch.dtype | None = None):
        self.dtype = dtype
        self.clear()

    @property
    def length(self) -> int:
        """The tokens held."""
        return 0 if self.keys is None else self.keys.shape[-2]

    def extend(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hold more tokens; returns what was held, as it is read back, followed by these as they come.

        keys, values: (batch, kv_heads, tokens, head_dim), and so are the two that are returned, in the same dtype.
        """
        if self.keys is None:
            self.keys, self.values = keys.to(self.dtype or keys.dtype), values.to(self.dtype or values.dtype)
            return keys, values
        all_keys, all_values = (
            torch.cat((held.to(new.dtype), new), dim=-2) for held, new in ((self.keys, keys), (self.values, values))
        )
        self.keys, self.values = all_keys.to(self.keys.dtype), all_values.to(self.values.dtype)
        return all_keys, all_values

    def select(self, places: torch.Tensor) -> None:
        """Keep only the tokens at these places, in ascending order: (kept,), or (batch, kv_heads, kept)."""
        self.keys, self.values = at_places(self.keys, places), at_places(self.values, places)


def at_places(states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The tokens of `states`, (batch, kv_heads, tokens, …), at places (kept,) or (batch, kv_heads, kept)."""
    if places.dim() == 1:
        return states.index_select(2, places)
    per_key = places.reshape(*places.shape, *[1] * (states.dim() - 3))
    return states.gather(2, per_key.expand(-1, -1, -1, *states.shape[3:]))


class PolicyLayer(Rows, HoldsRows, UnrotatedLayer):
    """All tokens of a layer, in a store: what the policies of a layer build on."""

    has_gaps = False  # whether tokens may be dropped from between those that stay, or lie elsewhere than they were

    def __init__(self, store: Store | None = None):
        super().__init__()
        self.store = store or Store()

    def lazy_initialization(self, key_states, value_states) -> None:
        self.device, self.is_initialized = key_states.device, True

    @property
    def length(self) -> int:
        return self.store.length

    def extend(self, key_states, value_states, **more):
        return self.store.extend(key_states, value_states)

    def state(self) -> dict[str, torch.Tensor]:
        """What the store holds, what was noted of the tokens, and how many were seen."""
        return {**self.store.state(), **Rows.state(self), "seen": torch.tensor(self.seen)}

    def change_rows(self, change) -> None:
        self.store.change_rows(change)
        super().change_rows(change)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError("a cache policy takes no tokens back: no assistant_model and no prompt lookup with it")

    def reset(self) -> None:
        self.store.clear()
        self.clear()
        self.seen, self.is_initialized = 0, False


class EvictingLayer(PolicyLayer):
    """Holds at most `budget` tokens, the first `sinks` among them; a subclass chooses (`places`) which.

    is_by_slot: keys are turned as if what is held lay right before the next token, so that no distance is above the
    budget however long the text is (StreamingLLM); else where each token was.
    """

    has_gaps = True

    def __init__(self, budget: int, sinks: int = 0, is_by_slot: bool = True, store: Store | None = None):
        super().__init__(store)
        self.budget, self.sinks, self.is_by_slot = budget, sinks, is_by_slot
        self.store.loses_tokens = True
        self.clear()

    def positions(self, length: int) -> torch.Tensor:
        return super().positions(length) if self.is_by_slot else self.birthplaces(length)

    @abstractmethod
    def birthplaces(self, length: int) -> torch.Tensor:
        """Where in the text so many tokens were: (length,), or (batch, kv_heads, length) where heads hold others."""

    def keep(self, turned, query_states, scaling):
        """Once more tokens are held than the budget, drop from the store those that are worth least."""
        scores = self.scores(turned, query_states, scaling)
        if self.store.length > self.budget:
            self.hold(self.places(self.store.length, self.budget, scores))

    def scores(self, turned, query_states, scaling) -> torch.Tensor | None:
        """What each token is worth now that the new ones attend, see `keep`: (batch or 1, kv_heads or 1, keys)."""
        return None

    @abstractmethod
    def places(self, length: int, kept: int, scores: torch.Tensor | None) -> torch.Tensor:
        """Which of `length` tokens stay: `kept` places in ascending order, (kept,) or (batch, kv_heads, kept)."""

    def hold(self, places: torch.Tensor) -> None:
        """Keep only the tokens at these places, and what was noted of them."""
        self.store.select(places)
        Rows.change_rows(self, lambda noted: at_places(noted, places))


class PolicyCache(UnrotatedCache):
    """A cache whose layers are PolicyLayers, or hold nothing."""

    @property
    def has_gaps(self) -> bool:
        """Whether a token's place in the cache may not tell its place in the text: no row may be padded on the left."""
        return any(layer.has_gaps for layer in self.holding.values())

    @property
    def holding(self) -> dict[int, PolicyLayer]:
        """The layers that hold something, by index."""
        return {place: layer for place, layer in enumerate(self.layers) if isinstance(layer, PolicyLayer)}

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that is held of the sequences, by layer and name."""
        held = self.holding.items()
        return {f"{place}.{name}": tensor for place, layer in held for name, tensor in layer.state().items()}

    def state_bits(self) -> int:
        """The size of `state()`, in bits: of all sequences and layers together."""
        return sum(layer.state_bits() for layer in self.holding.values())
