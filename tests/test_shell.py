"""A printed command is taken by bash as it was meant, whatever a path or a prompt holds."""

import os
import re
import subprocess
from pathlib import Path

import pytest

import acorn
from finetune.run import summary
from training.share.report import next_steps
from training.system.shell import shell

ROOT = Path(__file__).parent.parent
HOSTILE = [
    "plain",
    "",
    "\n",
    "two words",
    'it\'s "quoted"',
    "$(touch HACKED)",
    "`touch HACKED`",
    "a; touch HACKED",
    "a\ntouch HACKED\n",
    "!! !$ ~ * ? [a] {a,b} #",
    "\\n is no line break, \t is a tab, \x1b[31m is red",
    "--dashes",
    "-x",
    "Größe 漢字 🌰",
    "\u202egnp.exe\u2028\x85",
    "$'x'",
    os.fsdecode(b"not-utf8-\xff"),
]


def pasted(command: str, folder: Path) -> list[str]:
    """The words that bash hands to `acorn` (a stand-in) for this line."""
    stand_in = folder / "bin" / "acorn"
    if not stand_in.exists():
        stand_in.parent.mkdir()
        stand_in.write_text('#!/bin/sh\nprintf "%s\\0" "$@"\n')
        stand_in.chmod(0o755)
    path = f"{stand_in.parent}:{os.environ['PATH']}"
    done = subprocess.run(["bash", "-c", command], cwd=folder, env={"PATH": path}, capture_output=True, timeout=20)
    assert (done.returncode, done.stderr) == (0, b""), done.stderr
    assert {entry.name for entry in folder.iterdir()} == {"bin"}, "nothing ran but acorn"
    return [os.fsdecode(word) for word in done.stdout.split(b"\0")[:-1]]


@pytest.mark.parametrize("text", HOSTILE)
def test_bash_hands_over_every_word_as_it_is(text: str, tmp_path) -> None:
    line = shell("acorn", "generate", Path(text or "run"), text, prompt=text)
    assert len(line.splitlines()) == 1
    path = f"./{text}" if text.startswith("-") else str(Path(text or "run"))
    flag = [f"--prompt={text}"] if text.startswith("-") else ["--prompt", text]
    assert pasted(line, tmp_path) == ["generate", path, text, *flag]


def test_what_needs_no_quotes_has_none() -> None:
    line = shell("acorn", "resume", Path("runs/mine"), max_steps=9)
    assert line == "acorn resume runs/mine --max_steps 9"


def test_every_command_is_printed_by_it() -> None:
    """A value between braces in a command that is written out by hand would reach the shell unquoted."""
    verbs = "|".join(verb for verb in acorn.VERBS if verb != "recipes")
    by_hand = re.compile(rf"acorn ({verbs}) [^\"'`(]*\{{")
    for room in ("training", "finetune", "inference"):
        for path in (ROOT / room).rglob("*.py"):
            found = [line for line in path.read_text(encoding="utf-8").splitlines() if by_hand.search(line)]
            assert [line for line in found if "{{ placeholder }}" not in line and "{example}" not in line] == [], path
    assert by_hand.search('f"acorn resume {run_dir}"')


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_what_to_type_next_can_be_pasted(kind: str, tmp_path, monkeypatch) -> None:
    """A data row is the prompt of what finetuning prints: it must not run."""
    monkeypatch.setattr("training.share.report.list_checkpoints", lambda run_dir: [run_dir / "checkpoint-4"])
    run_dir, prompt = Path("my runs/$(touch HACKED)"), "`touch HACKED`\n$(touch HACKED) it's"
    facts = {"perplexity_before": 3.0, "perplexity_after": 2.0, "best_step": 4, "trained_parameters": 1}
    facts |= {
        "parameters": 2,
        "peak_memory_bytes": 9,
        "device": "cpu",
        "seconds": 1,
        "adapter": "lora",
        "base_model": "gpt2",
    }
    text = next_steps(run_dir, prompt, 4) if kind == "pretrain" else summary(run_dir, facts, prompt, 4)
    commands = [line.strip() for line in text.splitlines() if line.startswith("  acorn ")]
    said = [pasted(command, tmp_path) for command in commands]
    assert {words[0] for words in said} >= {"generate", "resume", "push"}
    assert ["generate", str(run_dir), "--prompt", prompt] in said
    assert all(words[1] == str(run_dir) for words in said)
