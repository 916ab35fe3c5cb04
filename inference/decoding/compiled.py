"""A compiled decoding step: `generate()` over a cache of a fixed size, its passes of one token compiled by torch."""

import functools

import torch
from transformers import StaticCache

from training.model.loading import without_adapter
from training.model.sizes import text_config
from training.model.windows import rope_types
from training.system.errors import UserError, log, one_line

# torch.compile's arguments by device: on a GPU launching kernels is what costs, on a CPU calling them from Python.
SETTINGS = {"cuda": {"mode": "reduce-overhead"}, "cpu": {"options": {"cpp_wrapper": True}}}


class StaticCaches:
    """Caches of one fixed size, which grows when a text needs more: another size compiles the step anew."""

    def __init__(self, config):
        self.config, self.length = text_config(config), 0

    def __call__(self, length: int) -> StaticCache:
        """An empty cache for a text of `length` tokens."""
        self.length = max(self.length, length)
        return StaticCache(config=self.config, max_cache_len=self.length)


class CompiledStep:
    """A model's forward whose passes of one token a row are compiled; a prompt is read by the forward as it was.

    generate() would compile a prompt that is read again, in another window, too, once for each of its lengths.
    """

    def __init__(self, forward, **options):
        self.plain, self.step = forward, torch.compile(forward, fullgraph=True, **options)
        functools.update_wrapper(self, forward)  # generate() looks at the signature

    def __call__(self, *args, **kwargs):
        ids = kwargs.get("input_ids")
        is_step = ids is not None and ids.shape[1] == 1
        return (self.step if is_step else self.plain)(*args, **kwargs)


def compiled(model, **options) -> dict:
    """Let a model decode by a compiled step from now on; `continue_ids()`'s arguments for that.

    options: torch.compile's, in place of SETTINGS. Raises UserError for what cannot be compiled, and where nothing can.
    """
    base = without_adapter(model)
    refuse_uncompilable(model, base)
    refuse_without_compiler(base.device)
    log("compiling the step that writes a token: the first one takes a while")
    base.forward = CompiledStep(base.forward, **(options or SETTINGS.get(base.device.type, {})))
    return {"make_cache": StaticCaches(base.config), "disable_compile": True}  # not a second time, by generate()


def refuse_uncompilable(model, base) -> None:
    """Refuse what has no static cache, or no step that is one graph."""
    adapter = getattr(model, "active_peft_config", None)
    if adapter is not None and adapter.is_prompt_learning:
        kind = getattr(adapter.peft_type, "value", adapter.peft_type)
        raise UserError(f"compile: not with virtual tokens (peft_type={kind}), which come with a cache of their own")
    if not base._can_compile_fullgraph:
        raise UserError(f"compile: transformers has no fixed cache or no compiled step for {type(base).__name__}")
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
