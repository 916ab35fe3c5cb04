"""The cache policies by name: what each is, which flags it reads, and a cache for a model from them."""

from collections.abc import Callable
from typing import Any, NamedTuple

from transformers.cache_utils import DummyLayer

from modeling import GPTConfig
from training.model.sizes import context_of, text_config
from training.system.errors import UserError, log_once, unknown
from training.system.flags import check_number

from .base import EvictingLayer, PolicyCache, PolicyLayer, Store
from .window import POSITIONS, SlidingLayer, WindowLayer


class Flag(NamedTuple):
    """A setting of policies: its type and what it says in the help."""

    type: type
    help: str
    choices: tuple[str, ...] = ()


FLAGS = {
    "cache_window": Flag(int, "recent tokens: those that window holds, or that int4 and its like hold unquantized"),
    "cache_budget": Flag(int, "tokens held in all, sinks and recent ones included"),
    "cache_sinks": Flag(int, "first tokens, which always stay (default: 4 of window, else 0)"),
    "cache_positions": Flag(
        str, "of what is held: slot, right before the next token, or absolute, where it was (default: slot)", POSITIONS
    ),
}


class Eviction(NamedTuple):
    """A policy that drops tokens. build: (settings, layer index, store) to a layer; takes: the flags that it reads."""

    help: str
    build: Callable[[dict[str, Any], int, Store], EvictingLayer]
    takes: tuple[str, ...]
    defaults: dict[str, Any]


class Storing(NamedTuple):
    """A policy that keeps all tokens in fewer bits. build: settings to a store; takes: the flags that it reads."""

    help: str
    build: Callable[[dict[str, Any]], Store]
    takes: tuple[str, ...]
    defaults: dict[str, Any]


def window(settings: dict[str, Any], layer: int, store: Store) -> WindowLayer:
    return WindowLayer(settings["cache_budget"], settings["cache_sinks"], by_slot(settings), store)


def by_slot(settings: dict[str, Any]) -> bool:
    return settings["cache_positions"] == "slot"


POLICIES: dict[str, Eviction | Storing] = {
    "window": Eviction(
        "the newest tokens, and the first ones as sinks (StreamingLLM)", window,
        ("cache_window", "cache_budget", "cache_sinks", "cache_positions"),
        {"cache_sinks": 4, "cache_positions": "slot"},
    ),
}  # fmt: skip
HELD = ("full_attention", "sliding_attention")  # the layers whose keys a policy can hold


def build_cache(config, name: str, dtype=None, **given) -> PolicyCache:
    """An empty cache for the model of this configuration, for one call of generate().

    name: of POLICIES, or an eviction over a storing one, as in "window+int4". given: settings of FLAGS; None is the
    policy's default. dtype: of what is held in full precision; None: the model's. Raises UserError.
    """
    config = text_config(config)
    eviction, storing = find(name)
    settings = settle(name, eviction, storing, given)
    refuse_model(config, name)
    if eviction is not None and settings["cache_budget"] >= context_of(config):
        said = f"cache_budget={settings['cache_budget']}: is not below the model's context of {context_of(config)}"
        log_once(f"{said}: the full cache is used")
        eviction = None

    def layer(index: int, layer_type: str) -> PolicyLayer | DummyLayer:
        if config.kv_sharing_modes and config.kv_sharing_modes[index] == "reuse":
            return DummyLayer()
        store = storing.build(settings) if storing else Store(dtype)
        if layer_type == "sliding_attention":
            own = config.sliding_window - 1  # the mask lets a token see itself and so many before it
            return SlidingLayer(min(own, settings["cache_budget"]) if eviction else own, store)
        return eviction.build(settings, index, store) if eviction else PolicyLayer(store)

    return PolicyCache(layers=[layer(*each) for each in enumerate(config.layer_types)])


def find(name: str) -> tuple[Eviction | None, Storing | None]:
    """The policies that a name stands for: one, or an eviction and what it is put over."""
    parts = name.split("+")
    for part in parts:
        if part not in POLICIES:
            raise unknown("cache", part, POLICIES)
    evictions = [POLICIES[part] for part in parts if isinstance(POLICIES[part], Eviction)]
    storings = [POLICIES[part] for part in parts if isinstance(POLICIES[part], Storing)]
    if len(evictions) > 1 or len(storings) > 1:
        raise UserError(f"cache={name}: one policy that drops tokens goes over one that quantizes, as in window+int4")
    return next(iter(evictions), None), next(iter(storings), None)


def settle(name: str, eviction: Eviction | None, storing: Storing | None, given: dict[str, Any]) -> dict[str, Any]:
    """All settings of a policy, the defaults among them; what it does not read, or cannot do, is refused."""
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
    settings: dict[str, Any] = {}
    for policy in policies:
        settings |= policy.defaults
    settings |= given
    return settings if eviction is None else settle_budget(name, settings, storing is not None)


def settle_budget(name: str, settings: dict[str, Any], is_over_storing: bool) -> dict[str, Any]:
    """The settings with the tokens that an eviction holds in all."""
    sinks, recent, budget = (settings.get(flag) for flag in ("cache_sinks", "cache_window", "cache_budget"))
    if budget is None and (recent is None or is_over_storing or not name.startswith("window")):
        raise UserError(f"cache={name}: give --cache_budget, the tokens that it may hold")
    if recent is not None and recent < sinks:
        raise UserError(f"cache_window={recent}: is smaller than cache_sinks={sinks}; take more recent tokens")
    if budget is None:
        return settings | {"cache_budget": recent + sinks}
    if budget < sinks + (recent or 1):
        raise UserError(f"cache_budget={budget}: does not hold cache_sinks={sinks} and the newest {recent or 1}")
    return settings


def refuse_model(config, name: str) -> None:
    """Refuse models whose layers hold something else than keys and values, or do not hand them over un-rotated."""
    if config.model_type != GPTConfig.model_type:
        raise UserError(f"cache={name}: is for Acorn's models, not for model_type={config.model_type}")
    for index, layer_type in enumerate(config.layer_types):
        if layer_type not in HELD:
            raise UserError(f"cache={name}: layer {index} is {layer_type}, and holds no keys that a policy could keep")
