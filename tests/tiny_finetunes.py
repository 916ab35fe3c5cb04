"""Whole finetuning runs in a second or two: a place with bases and data, and the verbs called in it."""

import contextlib
import json
from pathlib import Path

from finetune import finetune
from training import resume

from .chat_fixture import chat_text
from .tiny_bases import BASES, TINY, save, stock_model
from .tiny_runs import latest, write_text

CHAT = ["--text_files", "chat.txt"]
TEXT = ["--text_files", "text.txt"]
PAIRS = ["--data_files", "pairs.jsonl"]


def make_place(place: Path) -> Path:
    """Put tiny bases, a text, a chat and pairs into a folder, and return it."""
    for name, build in BASES.items():
        save(build(), place / name)
    save(stock_model(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1), place / "gpt2-dropout")
    write_text(place)
    write_text(place, chat_text(), "chat.txt")
    pairs = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(8) for b in range(8)]
    (place / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    return place


def tune(folder: Path, base: str, *flags: str, name: str) -> Path:
    """Finetune in `folder` and return the run directory; later flags win."""
    with contextlib.chdir(folder):
        finetune.main(latest(base, *TINY, "--output_dir", name, *flags))
    return folder / name


def go_on(run: Path, *flags: str) -> None:
    with contextlib.chdir(run.parent):
        resume.main([run.name, *flags])


def facts(run: Path) -> dict:
    return json.loads((run / "finetune.json").read_text(encoding="utf-8"))
