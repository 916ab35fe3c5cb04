"""The other half of the cases of bad_inputs.py: places that cannot be written, streams, recipes and data."""

import ctypes
import io
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from shlex import split as words

from .bad_input_cases import FINETUNE, PRETRAIN, TINY, Case

# ---- places and streams


def without_rights(world: Path) -> None:
    """In folders that are for reading only, and without the powers of a superuser, who may write there (capset(2))."""
    for folder in [world, *(path for path in world.rglob("*") if path.is_dir())]:
        folder.chmod(0o555)
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    ctypes.CDLL(None, use_errno=True).capset(header, none)


def small_files(world: Path) -> None:
    """No file beyond 4 kB, as on a disk that is full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


def no_stdout(world: Path) -> None:
    os.close(1)
    sys.stdout = None


def full_stdout(world: Path) -> None:
    sys.stdout = io.TextIOWrapper(io.FileIO("/dev/full", "w"), "utf-8")


def broken_stdout(world: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    sys.stdout = io.TextIOWrapper(io.FileIO(writer, "w"), "utf-8")


def ascii_streams(world: Path) -> None:
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(n, "w", closefd=False), "ascii") for n in (1, 2))


PLACES = ("/proc/new", "/sys/new", "/dev/null/new", "a" * 300, "x/" * 3000, "text.txt", "text.txt/new", "run", "")
WRITERS = {
    "pretrain": [*PRETRAIN[:-1]],
    "finetune": [*FINETUNE[:-1]],
    "tokenizer": words("tokenizer --tokenizer byte --text_files text.txt --output_dir"),
    "prepare": words("prepare shakespeare-char-cpu --text_files text.txt --data_dir"),
    "convert": ["convert", "run", "--to", "nanogpt"],
    "merge": ["merge", "lora"],
}
SPOKEN = {
    "pretrain": PRETRAIN,
    "finetune": FINETUNE,
    "resume": ["resume", "run", "--max_steps", "6"],
    "generate": ["generate", "run", "--max_new_tokens", "8"],
    "evaluate": ["evaluate", "run"],
    "estimate": ["estimate", "quickstart"],
    "recipes": ["recipes"],
    "help": ["pretrain", "--help"],
    "convert": ["convert", "run", "converted", "--to", "nanogpt"],
    "merge": ["merge", "lora", "merged"],
    "push": ["push", "run", "me/gpt", "--dry_run"],
    "prepare": words("prepare shakespeare-char-cpu --text_files text.txt --data_dir made"),
    "tokenizer": words("tokenizer --tokenizer byte --text_files text.txt --output_dir made"),
}
STREAMS = {"closed stdout": no_stdout, "full stdout": full_stdout, "broken pipe": broken_stdout, "ASCII": ascii_streams}


def place_cases() -> Iterator[Case]:
    """Places that cannot be written, and streams that cannot be spoken to."""
    for verb, argv in WRITERS.items():
        for place in PLACES:
            yield Case(f"{verb} into {place[:20]!r}", "places", [*argv, place], must_refuse=True)
        yield Case(f"{verb} without rights", "places", [*argv, "made"], True, setup=without_rights)
        yield Case(f"{verb} onto a full disk", "places", [*argv, "made"], setup=small_files)
    for verb in ("resume", "generate", "evaluate", "push", "estimate"):
        yield Case(f"{verb} without rights", "places", SPOKEN[verb], verb == "resume", setup=without_rights)
    for verb, argv in SPOKEN.items():
        for what, setup in STREAMS.items():
            yield Case(f"{verb} with {what}", "places", argv, setup=setup, is_mute=what != "ASCII")


# ---- files that a person writes


RECIPES = {
    "empty": "",
    "a list": "- 1\n",
    "a word": "nonsense",
    "a tab": "data:\n\ttext_files: [text.txt]\n",
    "not UTF-8": b"\xff\xfe\x00",
    "two documents": "data: {}\n---\ndata: {}\n",
    "a tag": "data: !!python/object/apply:os.system ['touch hacked']\n",
    "an unknown tag": "data: !nonsense 1\n",
    "an unknown section": "nonsense: {}\n",
    "an unknown key": "training: {nonsense: 1}\n",
    "a section of one word": "data: nonsense\n",
    "a key that is a number": "data: {1: 2}\n",
    "a key that is a list": "? [a]\n: 1\n",
    "a key twice": "training: {max_steps: 1}\ntraining: {max_steps: 2}\n",
    "nested anchors": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(
        f"{b}: &{b} [{','.join(f'*{a}' for _ in range(9))}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    ),
    "itself": "data: &a\n  mixture: [*a]\n",
    "a date": "training: {seed: 2020-01-01}\n",
    "text for a number": "training: {max_steps: many}\n",
    "a list for a number": "training: {max_steps: [1]}\n",
    "a mapping for a word": "data: {tokenizer: {a: 1}}\n",
    "an empty mixture": "data: {mixture: [{}]}\n",
    "a mixture of words": "data: {mixture: [nonsense]}\n",
    "a negative weight": "data: {mixture: [{text_files: [text.txt], weight: -1}]}\n",
    "no word for the name": "name: {a: 1}\n",
    "a NUL in a path": 'training: {output_dir: "a\\0b"}\ndata: {data_dir: "a\\0b"}\n',
    "a path for the name": "name: ../../x\n",
}
DATA = {
    "empty.txt": b"",
    "binary.txt": b"\0\1\2" * 999,
    "latin.txt": b"caf\xe9 " * 999,
    "short.txt": b"ab",
    "mark.txt": b"\xef\xbb\xbf" + b"a b c\n" * 500,
    "surrogate.txt": b"\xed\xa0\x80" * 300,
    "empty.jsonl": b"",
    "broken.jsonl": b'{"text": "a"}\n{"text": ',
    "numbers.jsonl": b'{"text": 1}\n{"text": 2}\n',
    "no_column.jsonl": b'{"other": "a"}\n',
    "null.jsonl": b'{"text": null}\n{"text": "a"}\n',
    "list.jsonl": b"[1]\n[2]\n",
    "deep.jsonl": b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
    "broken.parquet": b"PAR1nonsense",
    "broken.csv": b'text\n"a\n',
    "broken.jsonl.gz": b"\x1f\x8bnonsense",
    "nonsense.xyz": b"a",
}


def file_cases() -> Iterator[Case]:
    """Recipes and data as a person may hand them over."""
    for what, text in RECIPES.items():
        raw = text if isinstance(text, bytes) else text.encode()
        for verb in ("pretrain", "finetune", "estimate", "prepare"):
            argv = [verb, "bad.yaml", *(["--output_dir", "new"] if verb in ("pretrain", "finetune") else [])]
            argv += ["--data_dir", "made"] if verb == "prepare" else []
            argv += ["--max_steps", "2", *TINY] if verb == "pretrain" else []
            yield Case(f"{verb} a recipe that holds {what}", "files", argv, spoil=writer("bad.yaml", raw))
    for name, raw in DATA.items():
        flag = "--text_files" if name.endswith(".txt") else "--data_files"
        for argv in (
            ["prepare", "shakespeare-char-cpu", flag, name, "--data_dir", "made"],
            ["evaluate", "run", flag, name],
            ["finetune", "run", flag, name, *FINETUNE[4:]],
            ["tokenizer", "--tokenizer", "char", flag, name, "--output_dir", "made"],
        ):
            may = name in ("short.txt", "mark.txt", "null.jsonl", "broken.csv")
            yield Case(f"{argv[0]} of {name}", "files", argv, must_refuse=not may, spoil=writer(name, raw))


def writer(name: str, raw: bytes) -> Callable[[Path], object]:
    return lambda world: (world / name).write_bytes(raw) and None
