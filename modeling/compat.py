"""What differs within the range of transformers that this model works with, and what that range is.

transformers 5.24 renamed `past_key_values` to `cache`, in what `generate()` passes, in the mask functions and in the
outputs. When the range begins at 5.24 or later, `CACHE_NAME`, `given_cache` and `layers_name` go, and their users just
say `cache`.
"""

import transformers
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging

try:
    from transformers.cache_utils import KVSharingDict
except ImportError:  # before transformers 5.20; like the real one it is no dict, which wrappers would copy
    from collections import UserDict as KVSharingDict

# `make test-versions` runs with both ends; pyproject.toml states the same range, which a test compares.
OLDEST_TRANSFORMERS, NEWEST_TRANSFORMERS = (5, 17), (5, 24)
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"

logger = logging.get_logger(__name__)


def given_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache, by whichever of its two names it came; ValueError for both."""
    if cache is not None and past_key_values is not None:
        raise ValueError("give the cache once: cache and past_key_values are two names of one argument")
    return past_key_values if cache is None else cache


def layers_name(cache: Cache | None) -> str:
    """By which name layers get this cache.

    Before transformers 5.24 the paged cache of continuous batching, which is no Cache, is for the attention function.
    """
    return CACHE_NAME if cache is None or isinstance(cache, Cache) else "cache"


def warn_beyond_range(version: str = transformers.__version__) -> None:
    """Say once a process that this version of transformers is newer or older than those this model was tested with."""
    if not OLDEST_TRANSFORMERS <= tuple(int(part) for part in version.split(".")[:2]) <= NEWEST_TRANSFORMERS:
        oldest, newest = (".".join(map(str, end)) for end in (OLDEST_TRANSFORMERS, NEWEST_TRANSFORMERS))
        logger.warning_once(
            f"This model was tested with transformers {oldest} to {newest}, and {version} is installed: "
            f"check what it generates, or install transformers=={newest}.*"
        )


__all__ = ["CACHE_NAME", "KVSharingDict", "given_cache", "layers_name", "warn_beyond_range"]
