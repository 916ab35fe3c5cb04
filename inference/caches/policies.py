"""The cache policies by name: what each is, which flags it reads, and a cache for a model from them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache

from modeling import GPTConfig
from training.model.sizes import context_of, text_config
from training.model.windows import rope_types
from training.system.errors import UserError, log_once, unknown
from training.system.flags import check_number

from .base import EvictingLayer, PolicyCache, PolicyLayer, Store
from .h2o import SCORES
from .quantized import ROTATIONS, quantized
from .random_choice import RandomLayer
from .tova import LastAttentionLayer
from .window import POSITIONS, SlidingLayer, WindowLayer


class Flag(NamedTuple):
    """A setting of policies: its type, what the help says of it, and its values where they are few."""

    type: type
    help: str
    choices: tuple[str, ...] = ()


FLAGS = {
    "cache_budget": Flag(int, "tokens that a policy which drops some holds in all, sinks and recent ones included"),
    "cache_window": Flag(int, "newest tokens, which stay"),
    "cache_sinks": Flag(int, "first tokens, which stay too (default: 4 of window, else 0)"),
    "cache_positions": Flag(
        str,
        "of what is held: slot, right before the next token (window's default), or absolute, where it was",
        POSITIONS,
    ),
    "cache_rotation": Flag(
        str, "of int4 and its like: keys and values are turned before they are coded (default: hadamard)", ROTATIONS
    ),
    "cache_group": Flag(int, "of int4 and its like: channels of a head that share a scale (default: up to 32)"),
    "cache_scores": Flag(str, "of h2o: sum of the attention that a token got, or its mean (default: sum)", (*SCORES,)),
    "cache_seed": Flag(int, "of random (default: 0)"),
}


class Eviction(NamedTuple):
    """A policy that drops tokens. build: (settings, layer index, store) to a layer; takes: the flags that it reads."""

    help: str
    build: Callable[[dict[str, Any], int, Store], EvictingLayer]
    takes: tuple[str, ...]
    defaults: dict[str, Any]


class Storing(NamedTuple):
    """A policy that keeps tokens in fewer bits. build: (config, settings, dtype of what is not coded) to a store."""

    help: str
    build: Callable[[Any, dict[str, Any], torch.dtype | None], Store]
    takes: tuple[str, ...]
    defaults: dict[str, Any]


def window(settings: dict[str, Any], layer: int, store: Store) -> EvictingLayer:
    return WindowLayer(settings["cache_budget"], settings["cache_sinks"], by_slot(settings), store)


def h2o(settings: dict[str, Any], layer: int, store: Store) -> EvictingLayer:
    return SCORES[settings["cache_scores"]](**scored(settings), store=store)


def tova(settings: dict[str, Any], layer: int, store: Store) -> EvictingLayer:
    return LastAttentionLayer(**scored(settings), store=store)


def random_choice(settings: dict[str, Any], layer: int, store: Store) -> EvictingLayer:
    return RandomLayer(**scored(settings), store=store, seed=settings["cache_seed"], layer=layer)


def scored(settings: dict[str, Any]) -> dict[str, Any]:
    """What every layer that scores tokens is built with; half of the budget is recent where nothing else is said."""
    budget, sinks, recent = (settings.get(flag) for flag in ("cache_budget", "cache_sinks", "cache_window"))
    recent = (budget - sinks) // 2 if recent is None else recent
    return {"budget": budget, "sinks": sinks, "recent": recent, "is_by_slot": by_slot(settings)}


def by_slot(settings: dict[str, Any]) -> bool:
    return settings["cache_positions"] == "slot"


EVICTIONS = ("cache_budget", "cache_window", "cache_sinks", "cache_positions")  # flags that all of them read
CODED = (("cache_window", "cache_rotation", "cache_group"), {})
POLICIES: dict[str, Eviction | Storing] = {
    "window": Eviction(
        "the newest tokens, and the first ones as sinks (StreamingLLM)", window, EVICTIONS,
        {"cache_sinks": 4, "cache_positions": "slot"},
    ),
    "h2o": Eviction(
        "those attended to most since they came, and the newest", h2o, (*EVICTIONS, "cache_scores"),
        {"cache_scores": "sum"},
    ),
    "tova": Eviction("those that the newest token attends to most", tova, EVICTIONS, {"cache_window": 0}),
    "random": Eviction(
        "any, and the newest: the control", random_choice, (*EVICTIONS, "cache_seed"), {"cache_seed": 0}
    ),
    "full": Storing("every token as it is", lambda config, settings, dtype: Store(dtype), (), {}),
    "int8": Storing("all tokens in codes: 8.25 bits a number, scales included", quantized("int8"), *CODED),
    "fp8": Storing("as int8, the codes floating point numbers (e4m3)", quantized("fp8"), *CODED),
    "int4": Storing("all tokens in codes: some 4.4 bits a number", quantized("int4"), *CODED),
    "int3": Storing("all tokens in codes: some 3.5 bits a number", quantized("int3"), *CODED),
    "int2": Storing("all tokens in codes: some 2.5 bits a number", quantized("int2"), *CODED),
}  # fmt: skip
HELD = ("full_attention", "sliding_attention")  # the layers whose keys a policy can hold


def build_cache(config, name: str, dtype: torch.dtype | None = None, **given) -> PolicyCache:
    """An empty cache for the model of this configuration, for one call of generate(); arguments as Caches has them."""
    return Caches(config, name, dtype, **given)()


class Caches:
    """Makes the caches of one policy for the model of a configuration, a fresh one for each text.

    name: of POLICIES, or an eviction over what quantizes, as in "window+int4". dtype: of what is held in full
    precision; None: the model's. given: settings of FLAGS; None is the policy's default. Raises UserError for what
    cannot be.
    """

    def __init__(self, config, name: str, dtype: torch.dtype | None = None, **given):
        self.config, self.name, self.dtype = text_config(config), name, dtype
        self.eviction, self.storing, self.settings = settle(name, given)
        refuse_model(self.config, f"cache={name}")
        if self.storing is not None and self.config.kv_quantization is not None:
            held = self.config.kv_quantization
            raise UserError(f"cache={name}: the model's own cache holds {held} already; leave it out")
        budget, context = self.settings.get("cache_budget"), context_of(self.config)
        if self.eviction is not None and budget >= context:
            log_once(f"cache_budget={budget}: is not below the model's context of {context}: the full cache is used")
            self.eviction = None
        self()

    def __call__(self, length: int | None = None) -> PolicyCache:
        """An empty cache, of whatever length the text will be."""
        plain = DynamicCache(config=self.config).layers  # one for a layer that reuses another's keys stays: it is empty
        modes = self.config.kv_sharing_modes or [None] * len(plain)
        for index, mode in enumerate(modes):
            if mode != "reuse":
                plain[index] = self._layer(index)
        return PolicyCache(layers=plain)

    @property
    def is_bounded(self) -> bool:
        """Whether a cache stops growing at its budget, which is below the model's context."""
        return self.eviction is not None

    @property
    def may_go_on(self) -> bool:
        """Whether the model, by slot, never is at positions that it was not trained on, however long the text."""
        is_rotary = self.config.position_encoding == "rope" and "dynamic" not in rope_types(self.config)
        return self.is_bounded and (is_rotary or self.config.position_encoding == "none")

    @property
    def goes_on(self) -> bool:
        """Whether that is so with these settings."""
        is_by_slot = self.settings.get("cache_positions") == "slot" or self.config.position_encoding == "none"
        return self.may_go_on and is_by_slot

    def _layer(self, index: int) -> PolicyLayer:
        budget = self.settings.get("cache_budget")
        store = self.storing.build(self.config, self.settings, self.dtype) if self.storing else Store(self.dtype)
        if self.config.layer_types[index] == "sliding_attention":
            own = self.config.sliding_window - 1  # the mask lets a token see itself and so many before it
            return SlidingLayer(min(own, budget) if self.is_bounded else own, store)
        return self.eviction.build(self.settings, index, store) if self.is_bounded else PolicyLayer(store)


def find(name: str) -> tuple[Eviction | None, Storing | None]:
    """The policies that a name stands for: one, or an eviction and what it is put over."""
    parts = name.split("+")
    for part in parts:
        if part not in POLICIES:
            raise unknown("cache", part or name, POLICIES)
    evictions = [POLICIES[part] for part in parts if isinstance(POLICIES[part], Eviction)]
    storings = [POLICIES[part] for part in parts if isinstance(POLICIES[part], Storing)]
    if len(evictions) > 1 or len(storings) > 1:
        raise UserError(f"cache={name}: one policy that drops tokens goes over one that quantizes, as in window+int4")
    return next(iter(evictions), None), next(iter(storings), None)


def settle(name: str, given: dict[str, Any]) -> tuple[Eviction | None, Storing | None, dict[str, Any]]:
    """(eviction, storing, all settings) of a policy by name; what it does not read, or cannot do, is refused."""
    eviction, storing = find(name)
    policies = [policy for policy in (storing, eviction) if policy]
    given = {flag: value for flag, value in given.items() if value is not None}
    takes = [flag for policy in policies for flag in policy.takes]
    for flag, value in given.items():
        if flag not in FLAGS:
            raise unknown("setting of a cache", flag, FLAGS)
        if flag not in takes:
            raise UserError(f"{flag}={value}: has no effect with cache={name}")
        check_number(flag, value)
        if FLAGS[flag].choices and value not in FLAGS[flag].choices:
            raise unknown(flag, value, FLAGS[flag].choices)
    settings: dict[str, Any] = {"cache_sinks": 0, "cache_positions": "absolute"} if eviction else {}
    for policy in policies:
        settings |= policy.defaults
    settings |= given
    return eviction, storing, settings if eviction is None else settle_budget(name, settings)


def settle_budget(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with the tokens that an eviction holds in all, which alone `window` may leave to its window."""
    sinks, recent, budget = (settings.get(flag) for flag in ("cache_sinks", "cache_window", "cache_budget"))
    if name == "window" and (recent is None) == (budget is None):
        raise UserError("cache=window: give --cache_window, the newest tokens that it holds, or --cache_budget, all")
    if budget is None and name != "window":
        raise UserError(f"cache={name}: give --cache_budget, the tokens that it may hold")
    if name == "window" and recent is not None and recent < sinks:
        raise UserError(
            f"cache_window={recent}: is smaller than cache_sinks={sinks}; take more recent tokens, or fewer sinks"
        )
    if budget is None:
        return settings | {"cache_budget": recent + sinks}
    if budget < sinks + (recent or 1):
        raise UserError(f"cache_budget={budget}: does not hold cache_sinks={sinks} and the newest {recent or 1}")
    return settings


def refuse_model(config, asked: str) -> None:
    """Refuse models whose layers hold something else than keys and values, or do not hand them over un-rotated.

    asked: what is refused, as the message begins.
    """
    if config.model_type != GPTConfig.model_type:
        raise UserError(f"{asked}: is for Acorn's models, not for model_type={config.model_type}")
    if config.kv_lora_rank is not None:
        raise UserError(f"{asked}: layers hold latents (kv_lora_rank={config.kv_lora_rank}), not keys of heads")
    for index, layer_type in enumerate(config.layer_types):
        if layer_type not in HELD:
            raise UserError(f"{asked}: layer {index} is {layer_type}, and holds no keys that a policy could keep")
