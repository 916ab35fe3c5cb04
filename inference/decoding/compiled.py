"""A compiled decoding step: `generate()` over a cache of a fixed size, its passes of one token compiled by torch."""

import functools
import itertools
import weakref

import torch
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from modeling import GPTConfig
from modeling.compat import CACHE_NAME
from training.model.loading import without_adapter
from training.model.sampling import reads_on
from training.model.sizes import text_config
from training.model.windows import rope_types
from training.system.errors import UserError, log, one_line

from .weights import in_huge_pages


def not_of_the_model(guards) -> list[bool]:
    """Which of a step's guards torch is to look at for each token: those of its inputs, not the thousands of the model.

    The model that a step was compiled for does not change any more, and steps of other models have other names.
    """
    return ["__self__" not in guard.name for guard in guards]


# torch.compile's options by device: on a GPU launching kernels is what costs, on a CPU calling them from Python.
SETTINGS = {"cuda": {"triton.cudagraphs": True}, "cpu": {"cpp_wrapper": True}}
NUMBERS = itertools.count()


class StaticCaches:
    """Caches of one fixed size, which grows when a text needs more: another size compiles the step anew."""

    def __init__(self, config):
        self.config, self.length = text_config(config), 0

    def __call__(self, length: int) -> StaticCache:
        """An empty cache for a text of `length` tokens."""
        self.length = max(self.length, length)
        return StaticCache(config=self.config, max_cache_len=self.length)


class CompiledStep:
    """A model's forward whose passes of one token a row, after a prompt, are compiled; it reads prompts as it was.

    generate() would compile a prompt that is read again, in another window, too, once for each of its lengths.
    """

    def __init__(self, forward, **options):
        self.plain, self.name = forward, f"step {next(NUMBERS)}"
        self.step = torch.compile(self._named(), fullgraph=True, **options)
        self.begun = None  # a reference to the cache that a prompt was read into
        functools.update_wrapper(self, forward)  # generate() looks at the signature

    def _named(self):
        """The forward under a name that torch looks at: it keeps the steps of all models together, by their code."""
        forwards = {self.name: self.plain}
        return lambda name, *args, **kwargs: forwards[name](*args, **kwargs)

    def __call__(self, *args, **kwargs):
        ids, cache = kwargs.get("input_ids"), kwargs.get(CACHE_NAME)
        has_begun = cache is not None and self.begun is not None and self.begun() is cache
        if ids is not None and ids.shape[1] == 1 and has_begun:
            return self.step(self.name, *args, **kwargs)
        self.begun = None if cache is None else weakref.ref(cache)
        return self.plain(*args, **kwargs)


def has_full_length(cache) -> bool:
    """Whether every layer of a cache knows the length of the whole text as a tensor, which no graph is made for."""
    return isinstance(cache, StaticCache) and all(type(layer) is StaticLayer for layer in cache.layers)


class StepInputs:
    """`prepare_inputs_for_generation` that leaves mask and positions of a single token to the compiled step.

    They follow from the length of a full-length cache where no row is padded; generate() would make them anew for each
    token, from tensors that grow.
    """

    LEFT_OUT = ("position_ids", "inputs_embeds", "is_first_iteration")

    def __init__(self, prepare):
        self.prepare = prepare

    def __call__(self, input_ids, next_sequence_length=None, attention_mask=None, **kwargs) -> dict:
        """input_ids: (rows, tokens), the whole text. attention_mask: (rows, tokens), zero where a row is padded."""
        is_step = next_sequence_length == 1 and not kwargs.get("is_first_iteration")
        if is_step and has_full_length(kwargs.get(CACHE_NAME)) and (attention_mask is None or attention_mask.all()):
            inputs = {name: value for name, value in kwargs.items() if name not in self.LEFT_OUT}
            last = input_ids[:, -1:].clone(memory_format=torch.contiguous_format)  # strides are guarded too
            return {**inputs, "input_ids": last}
        return self.prepare(
            input_ids, next_sequence_length=next_sequence_length, attention_mask=attention_mask, **kwargs
        )


def compiled(model, **options) -> dict:
    """Let a model decode by a compiled step from now on; `continue_ids()`'s arguments for that.

    options: torch.compile's, in place of SETTINGS. Raises UserError for what cannot be compiled, and where nothing can.
    """
    base = without_adapter(model)
    refuse_uncompilable(model, base)
    refuse_without_compiler(base.device)
    log("compiling the step that writes a token: the first one takes a while")
    in_huge_pages(model)
    settings = {"guard_filter_fn": not_of_the_model, **SETTINGS.get(base.device.type, {})}
    base.forward = CompiledStep(base.forward, **(options or {"options": settings}))
    if base.config.model_type == GPTConfig.model_type:
        base.prepare_inputs_for_generation = StepInputs(base.prepare_inputs_for_generation)
    return {"make_cache": StaticCaches(base.config), "disable_compile": True}  # not a second time, by generate()


def refuse_uncompilable(model, base) -> None:
    """Refuse what has no static cache, or no step that is one graph."""
    adapter = getattr(model, "active_peft_config", None)
    if adapter is not None and adapter.is_prompt_learning:
        kind = getattr(adapter.peft_type, "value", adapter.peft_type)
        raise UserError(f"compile: not with virtual tokens (peft_type={kind}), which come with a cache of their own")
    if not base._can_compile_fullgraph:
        raise UserError(f"compile: transformers has no fixed cache or no compiled step for {type(base).__name__}")
    if reads_on(model, {}):
        memory = base.config.memory_length
        raise UserError(f"compile: not with memory_length={memory}: a memory has no fixed cache; leave --compile out")
    for kind in rope_types(base.config):
        if kind in ("dynamic", "longrope"):
            why = "its frequencies depend on how long the text is, which a compiled step does not know"
            raise UserError(f"compile: not with rope_parameters.rope_type={kind}: {why}")


def refuse_without_compiler(device: torch.device) -> None:
    """Refuse a machine whose torch.compile does not work, which two numbers tell before a model is compiled."""
    try:
        torch.compile(torch.add)(torch.zeros(2, device=device), 1)
    except Exception as error:  # torch's and triton's, of many classes, for a compiler, headers or a driver not there
        needs = "a C++ compiler (on Debian: apt install g++)" if device.type == "cpu" else "triton and a C compiler"
        raise UserError(f"compile: torch.compile does not work here, it needs {needs}: {one_line(error)}") from error
