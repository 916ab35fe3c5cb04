"""The line between a person's mistake (one line, no traceback) and a bug (a traceback)."""

import difflib
import functools
import os
import stat
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress

from .addresses import public_text

# Full disks, quotas and limits, as the operating system and safetensors tell them (the first), and torch.save, by where
# in a file it was; numpy's tofile counts what it could not write.
DISK_FULL = ("No space left on device", "Disk quota exceeded", "File too large", "file write failed")
DISK_FULL += ("iostream error", "unexpected pos", "requested and")
# Memory that is used up, as torch's allocators tell it: of CPUs, and of GPUs.
MEMORY_FULL = ("can't allocate memory", "not enough memory", "out of memory", "Unable to allocate")
FEW = 8  # names that an error lists beside the nearest one


class UserError(Exception):
    """A mistake the person can mend: one line with the field, the value and the mend; addresses without secrets."""

    def __init__(self, message: str = ""):
        line = str(message)
        if line.startswith("Caught UserError in DataLoader"):  # torch hands on a worker's error as its whole traceback
            line = line.strip().rpartition("UserError: ")[2]
        super().__init__(public_text(line))


class LostProcess(UserError):
    """Another process of the run is gone or silent; each one left says so, as the first may be the lost one."""


def unknown(what: str, value: object, known: Iterable[str], mend: str = "", most: int = 1) -> UserError:
    """Say that `value` is none of the `known` names of `what`: the `most` nearest ones, and all where they are few."""
    names = [str(name) for name in known]
    near = difflib.get_close_matches(str(value), names, n=most, cutoff=0.5)
    advice = [f"did you mean {' or '.join(map(repr, near))}?"] if near else []
    if len(names) <= FEW or not (near or mend):
        advice.append(f"choose from {', '.join(names)}." if names else "there are none.")
    return UserError(" ".join([f"unknown {what} {str(value)!r}:", *advice, *([mend] if mend else [])]))


def one_line(error: BaseException) -> str:
    """The words of an error, or of the cause that it wraps, on one line and at most 300 characters long."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or type(error).__name__


def log(line: str) -> None:
    """Print a line on stderr in the first process alone (torchrun sets RANK), above a progress bar if one is shown."""
    from tqdm.auto import tqdm  # here, because the door reads this module and must not wait

    if os.environ.get("RANK", "0") == "0":
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()


log_once = functools.cache(log)  # what is read several times, or pass after pass, is said about once


def run_main(main: Callable[[list[str] | None], object], argv: list[str] | None = None) -> None:
    """Call `main(argv)`; end the process with one line for whatever is not a bug, which passes with its traceback."""
    try:
        repair_streams()
        main(argv)
        sys.stdout.flush()  # a reader that went away is noticed here, not at the interpreter's exit
    except (Exception, KeyboardInterrupt) as error:
        known = explain(error)
        if known is None:
            raise
        _exit(*known, on_every_process=isinstance(error, LostProcess))


def explain(error: BaseException) -> tuple[int, str] | None:
    """(exit code, line to print) of an error; None for a bug.

    The code is 2 for a `UserError` and for what the operating system refuses, 130 for Ctrl-C, 1 for a full disk, for
    memory that is used up and, without a line, for a reader that went away (`acorn … | head`).
    """
    name = getattr(error, "filename", None)
    file = os.fsdecode(name) if isinstance(name, str | bytes | os.PathLike) else ""
    if isinstance(error, KeyboardInterrupt):
        return 130, "stopped by Ctrl-C."
    if isinstance(error, BrokenPipeError):
        return 1, ""
    if isinstance(error, UserError):
        return 2, f"error: {error}"
    if is_disk_full(error):
        where = f" while writing {file}" if file else ""  # open() knows its file, write() does not
        notes = "".join(f" {note}." for note in getattr(error, "__notes__", []))
        return 1, f"error: the disk is full{where}: free some space, or write to another disk with --output_dir.{notes}"
    if is_memory_full(error):
        mend = "lower batch size or context; `acorn estimate` says what a recipe needs"
        return 1, f"error: out of memory ({one_line(error)[:160]}): {mend}"
    if isinstance(error, OSError):  # of the operating system, or of transformers, which raises the same class
        return 2, f"error: {file}{': ' if file else ''}{error.strerror or one_line(error)}"
    return None


def is_disk_full(error: BaseException) -> bool:
    """Whether an error of the operating system, of safetensors or of torch.save means that the disk is full."""
    return any(words in str(error) for words in DISK_FULL)


def is_memory_full(error: BaseException) -> bool:
    """Whether an error of Python or of torch means that there is no memory left, on a CPU or a GPU."""
    used_up = isinstance(error, RuntimeError) and any(words in str(error) for words in MEMORY_FULL)
    return used_up or isinstance(error, MemoryError)


def _exit(code: int, line: str, on_every_process: bool) -> None:
    """Exit with `code` in every process, and print `line`, as a rule in the first one only (torchrun sets RANK)."""
    with suppress(AttributeError, ValueError):
        try:
            sys.stdout.flush()
        except OSError:  # full, or nobody reads: the flush at exit would fail again, and say so (docs, SIGPIPE)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if line and (on_every_process or os.environ.get("RANK", "0") == "0"):
        print(f"acorn: {' '.join(line.splitlines())}", file=sys.stderr)  # one line, whatever the value in it holds
    raise SystemExit(code)


def repair_streams() -> None:
    """Streams that are closed (`>&-`) lead nowhere, and what a stream's alphabet lacks is written as `?`."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free: or else the next file opened takes its place
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, "r" if name == "stdin" else "w", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def detach_closed_terminal() -> None:
    """Point at nothing those streams that led to a terminal which is closed: writing there would fail."""
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def quiet_libraries() -> None:
    """The table, the bar and the one line of an error say it all: the libraries' own notices would tear them."""
    import huggingface_hub
    import transformers  # here, because the door reads this module and must not wait for torch

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()
