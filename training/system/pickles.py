"""Files of torch.save and safetensors opened without trust: tensors, numbers and text come out, and nothing runs."""

import pickle
import re
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from .errors import UserError, one_line

# What damaged or hostile files of weights, and a config.json that is none, make their readers raise.
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, EOFError, SafetensorError)
UNREADABLE += (pickle.UnpicklingError, StrictDataclassError)
# What numpy's numbers and arrays are made of in a pickle, numpy 1's names and numpy 2's; each only holds numbers.
_MADE_OF = {"scalar": np._core.multiarray.scalar, "_reconstruct": np._core.multiarray._reconstruct}
_NUMBERS = [np.dtype, np.ndarray, *{type(np.dtype(code)) for code in "?bBhHiIlLqQefdgSU"}]
SAFE = [
    *_NUMBERS,
    *((made, f"numpy.{core}.multiarray.{name}") for name, made in _MADE_OF.items() for core in ("core", "_core")),
]


def read_pickle(path: Path) -> object:
    """What a torch.save file holds, tensors memory-mapped; UserError where it is damaged or would run code."""
    try:
        # about pickles of unusual kinds, which are refused
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(SAFE):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # there is no end to what damaged bytes make torch raise
        raise UserError(
            f"{path}: is damaged or unsafe: {why_unreadable(error)}; copy it again from a source you trust"
        ) from error


def why_unreadable(error: Exception) -> str:
    """What a reader of weights raised, in a line; of a refused pickle what it holds, for torch advises to trust it."""
    words = one_line(error)
    if not isinstance(error, pickle.UnpicklingError) and "Weights only load failed" not in words:
        return words.split(". ")[0]
    named = re.search(r"GLOBAL (\S+)|[Uu]nsupported (?:global|class) (\S+)", str(error))
    return f"its pickle holds {f'code ({named[1] or named[2]})' if named else 'more than tensors'}, and was refused"


def refuse_unreadable(path: Path) -> None:
    """UserError for a file of weights or of state that cannot be opened; only what describes its tensors is read."""
    if path.suffix != ".safetensors":
        read_pickle(path)
        return
    try:
        with safe_open(path, framework="numpy"):
            pass
    except Exception as error:
        raise UserError(f"{path}: is damaged: {why_unreadable(error)}; copy it again") from error
