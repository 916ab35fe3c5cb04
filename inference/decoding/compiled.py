"""A compiled decoding step: `generate()` over a cache of a fixed size, its forward pass compiled by torch."""

import torch
from transformers import CompileConfig, StaticCache

from training.model.sizes import text_config
from training.system.errors import UserError, one_line


class StaticCaches:
    """Caches of one fixed size, which grows when a text needs more: another size compiles the step anew."""

    def __init__(self, config):
        self.config, self.length = text_config(config), 0

    def __call__(self, length: int) -> StaticCache:
        """An empty cache for a text of `length` tokens."""
        self.length = max(self.length, length)
        return StaticCache(config=self.config, max_cache_len=self.length)


def compiled(model) -> dict:
    """`continue_ids()`'s arguments that let a model decode by a compiled step; the prompt is read uncompiled.

    Raises UserError where nothing can be compiled.
    """
    refuse_without_compiler(model.device)
    settings = CompileConfig(fullgraph=True, mode="default")
    settings._compile_all_devices = True  # generate() would compile on GPUs alone
    return {"compile_config": settings, "make_cache": StaticCaches(model.config)}


def refuse_without_compiler(device: torch.device) -> None:
    """Refuse a machine whose torch.compile does not work, which two numbers tell before a model is compiled."""
    try:
        torch.compile(torch.add)(torch.zeros(2, device=device), 1)
    except Exception as error:  # torch's and triton's, of many classes, for a compiler, headers or a driver not there
        needs = "a C++ compiler (on Debian: apt install g++)" if device.type == "cpu" else "triton and a C compiler"
        raise UserError(f"compile: torch.compile does not work here, it needs {needs}: {one_line(error)}") from error
