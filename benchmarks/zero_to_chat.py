"""How long is it from a finished installation to a model that answers over HTTP, and how often is it right?

Runs the commands of README.md, "Zero to chat", one after the other in a new directory, times each, and asks the server
questions about numbers and words that no training conversation has, greedily, by the `openai` client. An answer counts
where it is exactly the expected one. Prints one JSON line.

    python benchmarks/zero_to_chat.py --output_dir /tmp/zero
    python benchmarks/zero_to_chat.py --output_dir /tmp/zero-2 --seed 2
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import openai
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from finetune.synthetic_chat import held_out_questions  # noqa: E402 (from a script's own folder it is not found)

BLOCK = re.compile(r"<!-- zero to chat -->\n```bash\n(.*?)```", re.DOTALL)
SAID = ("Hello", "My name is robin.", "What is 47 + 25?", "Spell acorn.", "Where is Paris?", "What is my name?", "Bye")
PATIENCE = 120  # seconds for the server to answer


def main() -> None:
    """Grow, teach, talk, serve, ask; print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="a directory that is made for it")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--seed", type=int, help="of both trainings (default: the recipes')")
    parser.add_argument("--max_steps", type=int, help="of both trainings, to try this script")
    flags = parser.parse_args()
    flags.output_dir.mkdir(parents=True)
    seconds, conversation, asked = {}, [], {}
    for command in readme_commands():
        words = [*command, *more_flags(command, flags)]
        start = time.monotonic()
        if command[1] == "serve":
            asked = serve_and_ask(words, flags, seconds)
        else:
            printed = acorn(words, flags.output_dir)
            seconds[shlex.join(command)] = round(time.monotonic() - start, 1)
        if command[1] == "chat":
            conversation = [f"{who} {line}" for pair in zip(SAID, printed.splitlines(), strict=True)
                            for who, line in zip("><", pair, strict=True)]  # fmt: skip
    report = {"seconds": seconds, "seconds_in_all": round(sum(seconds.values()), 1), **asked}
    where = {"cpu": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
    print(json.dumps({"benchmark": "zero_to_chat", **where, **report, "conversation": conversation}))


def readme_commands() -> list[list[str]]:
    """The words of each command of the README's section."""
    block = BLOCK.search((ROOT / "README.md").read_text(encoding="utf-8"))[1]
    return [words for line in block.splitlines() if (words := shlex.split(line, comments=True))]


def more_flags(command: list[str], flags) -> list[str]:
    """What this script adds: the flags it was given, and a free port."""
    if command[1] in ("pretrain", "finetune"):
        seed = ["--seed", str(flags.seed)] if flags.seed is not None else []
        return seed + (["--max_steps", str(flags.max_steps), "--eval_steps", "1"] if flags.max_steps else [])
    return ["--port", "0"] if command[1] == "serve" else []


def start(words: list[str], folder: Path, **pipes) -> subprocess.Popen:
    """A process of a command in the new directory, with this checkout's code."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([sys.executable, "-m", *words], cwd=folder, env=environment, text=True, **pipes)


def acorn(words: list[str], folder: Path) -> str:
    """Run a command to its end with the conversation on standard input; return what it prints."""
    process = start(words, folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    printed, _ = process.communicate("".join(f"{line}\n" for line in SAID) if words[1] == "chat" else "")
    print(printed, file=sys.stderr)
    if process.returncode:
        raise SystemExit(process.returncode)
    return printed


def serve_and_ask(words: list[str], flags, seconds: dict) -> dict:
    """Start the server, time its start to the first answer, ask all questions, and stop it."""
    began = time.monotonic()
    process = start(words, flags.output_dir, stderr=subprocess.PIPE)
    try:
        client = openai.OpenAI(base_url=address_in(process.stderr), api_key="none", timeout=PATIENCE)
        answer(client, words[2], [{"role": "user", "content": "Hello"}])
        seconds[" ".join(words[:3])] = round(time.monotonic() - began, 1)
        return ask(client, words[2], flags.questions)
    finally:
        process.terminate()
        process.wait(PATIENCE)


def address_in(stream) -> str:
    """The address that the server says it is at; what it says instead ends the script."""
    said = ""
    for line in stream:
        said += line
        if found := re.search(r"http://\S+/v1", line):
            return found[0]
    raise SystemExit(said)


def answer(client: openai.OpenAI, model: str, messages: list[dict]) -> str:
    """The most likely answer."""
    done = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=60)
    return done.choices[0].message.content


def ask(client: openai.OpenAI, model: str, count: int) -> dict:
    """Ask what is held out; return the exact answers by skill, their share, and the first wrong ones."""
    began, right, asked, wrong = time.monotonic(), Counter(), Counter(), []
    for skill, messages, expected in held_out_questions(count):
        given = answer(client, model, messages)
        right[skill] += given == expected
        asked[skill] += 1
        if given != expected:
            wrong.append({"asked": messages[-1]["content"], "answer": given, "expected": expected})
    return {
        "questions": count,
        "exact": round(sum(right.values()) / count, 4),
        "exact_by_skill": {skill: f"{right[skill]} of {asked[skill]}" for skill in asked},
        "seconds_a_question": round((time.monotonic() - began) / count, 3),
        "wrong": wrong[:5],
    }


if __name__ == "__main__":
    main()
