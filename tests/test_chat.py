"""`acorn chat` through a pseudo-terminal and from a pipe, and what a conversation keeps and forgets."""

import io
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from finetune.data import PLAIN_TEMPLATE
from inference import chat, generate
from inference.serving.conversation import Chat, Continuation
from training.data.tokenizers import build_tokenizer
from training.model.chat_template import end_of_turn
from training.system.errors import UserError

from . import tiny_bases
from .chat_fixture import CHATML
from .tiny_runs import refused

pty = pytest.importorskip("pty")  # Windows has no pseudo-terminals
ROOT = Path(__file__).parent.parent
CONTEXT, LONG = 64, 1500  # so long that an interrupt comes in time on a busy machine too


def save(folder: Path, template: str | None, letter: str = "") -> Path:
    """A model and its tokenizer with the template; it writes one letter for ever, or what chance has given it."""
    model = tiny_bases.our_model("gpt-rope-gqa", lm_head_bias=True, eos_token_id=None)
    if letter:
        with torch.no_grad():
            model.lm_head.bias[ord(letter)] += 1e4
    model.save_pretrained(folder)
    tokenizer = build_tokenizer("byte")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    save(folder / "chat", PLAIN_TEMPLATE)
    save(folder / "base", None)
    save(folder / "aaa", PLAIN_TEMPLATE, letter="a")
    return folder


@pytest.fixture
def piped(monkeypatch, capsys):
    """`piped(directory, lines, *flags) -> (stdout, stderr)` of a chat whose turns come from a pipe."""

    def call(directory: Path, lines: str | bytes, *flags: str) -> tuple[str, str]:
        raw = lines if isinstance(lines, bytes) else lines.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))
        capsys.readouterr()
        chat.main([str(directory), *flags])
        return capsys.readouterr()

    return call


# In a session of its own it makes the terminal its controlling one. Ctrl-C, which all that scripts run in the
# background ignores, interrupts it as in a terminal.
OWN_TERMINAL = """
import fcntl, runpy, signal, termios
signal.signal(signal.SIGINT, signal.default_int_handler)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
runpy.run_module("inference.chat", run_name="__main__")
"""


class Terminal:
    """`python -m inference.chat` on the other side of a pseudo-terminal, of which it is the controlling process.

    Not by pty.fork(): the fork of a process with threads may wait for ever for a lock that one of them held.
    """

    def __init__(self, *flags: str):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", OWN_TERMINAL, *flags]
        self.end, theirs = pty.openpty()
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
        self.process = subprocess.Popen(command, env=environment, start_new_session=True, **streams)
        os.close(theirs)

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def wait_for(self, text: str, seconds: float = 120) -> str:
        """All that is shown up to `text`."""
        shown, until = b"", time.monotonic() + seconds
        while text.encode() not in shown:
            assert select.select([self.end], [], [], until - time.monotonic())[0], f"{text!r} has not come: {shown!r}"
            shown += os.read(self.end, 1)
        return shown.decode()

    def interrupt(self) -> str:
        """All that is shown up to the prompt that Ctrl-C brings; typed again where it came before anyone was ready."""
        shown = b""
        for _ in range(400):
            self.type("\x03")
            until = time.monotonic() + 0.3
            while (left := until - time.monotonic()) > 0 and select.select([self.end], [], [], left)[0]:
                shown += os.read(self.end, 1)
                if shown.endswith(b"> "):
                    return shown.decode()
        raise AssertionError(f"no prompt has come: {shown!r}")

    def exit_code(self) -> int:
        return self.process.wait(60)


def test_a_conversation_in_a_terminal(models, tmp_path) -> None:
    terminal = Terminal(str(models / "aaa"), "--max_new_tokens", str(LONG), "--temperature", "0")
    terminal.wait_for("> ")
    for text in ("Hello", "Hello again"):
        terminal.type(f"{text}\n")
        terminal.wait_for("a" * LONG)
        terminal.wait_for("> ")
    terminal.type("Stop\n")
    terminal.wait_for("a" * 5)
    assert terminal.interrupt().count("a") < LONG - 5
    terminal.interrupt()  # with nothing to stop
    terminal.type(f"/save {tmp_path}/whole.jsonl\n")
    terminal.wait_for("saved")
    terminal.wait_for("> ")
    terminal.type("/rest\n")
    terminal.wait_for("did you mean '/reset'?")
    terminal.wait_for("> ")
    terminal.type("/reset\n")
    terminal.wait_for("> ")
    terminal.type("Anew\n")
    terminal.wait_for("a")
    terminal.interrupt()
    terminal.type(f"/save {tmp_path}/anew.jsonl\n")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.exit_code() == 0

    whole, anew = (json.loads((tmp_path / f"{name}.jsonl").read_text())["messages"] for name in ("whole", "anew"))
    assert [turn["content"] for turn in whole[::2]] == ["Hello", "Hello again", "Stop"]
    assert [len(turn["content"]) for turn in whole[1:4:2]] == [LONG, LONG]
    assert 5 <= len(whole[5]["content"]) < LONG
    assert anew[0] == {"role": "user", "content": "Anew"}
    assert len(anew) == 2


GREEDY = ["--temperature", "0", "--max_new_tokens", "8"]


def test_an_answer_is_what_generate_writes(models, piped, capsys) -> None:
    out, _ = piped(models / "chat", "Hi\n", *GREEDY)
    generate.main([str(models / "chat"), "--prompt", "User: Hi\nAssistant:", *GREEDY])
    assert out.strip() == capsys.readouterr().out.removeprefix("User: Hi\nAssistant:").strip()


def test_a_pipe_is_a_turn_a_line(models, piped, tmp_path) -> None:
    path = tmp_path / "kept.jsonl"
    lines = f"/system Be brief.\nHi\n\n  Ho \n/save {path}\n/exit\nnever read"
    out, err = piped(models / "aaa", lines, *GREEDY)
    assert out == "aaaaaaaa\naaaaaaaa\n"
    assert "saved" in err
    kept = json.loads(path.read_text())["messages"]
    assert [turn["role"] for turn in kept] == ["system", "user", "assistant", "user", "assistant"]
    assert [turn["content"] for turn in kept] == ["Be brief.", "Hi", "a" * 8, "Ho", "a" * 8]


def test_help_and_messages_that_begin_with_a_slash(models, piped, tmp_path) -> None:
    out, err = piped(models / "aaa", f"/help\n//reset\n/reset\n//etc\n/save {tmp_path}/kept\n", *GREEDY)
    assert all(name in err for name in chat.COMMANDS)
    assert out == "aaaaaaaa\n" * 2
    assert json.loads((tmp_path / "kept").read_text())["messages"][0]["content"] == "/etc"


def test_a_base_model_continues(models, piped, capsys) -> None:
    out, err = piped(models / "base", "the fox\n\n", *GREEDY)
    assert "has no chat template: it continues text" in err
    generate.main([str(models / "base"), "--prompt", "the fox", *GREEDY])
    first = capsys.readouterr().out.removeprefix("the fox")
    assert out.startswith(first)
    assert len(out) > len(first)
    assert "no system message" in refused(chat.main, str(models / "base"), "--system", "Be brief.")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("/rest\n", "unknown command '/rest': did you mean '/reset'?"),
        ("/save\n", "/save: name a file"),
        ("/exit now\n", "/exit takes no more words"),
        (f"/save {ROOT}/README.md\n", "is there already"),
        (f"/save {ROOT}/README.md/below\n", "Not a directory"),
        ("/save a\0b\n", "null byte"),
        ("a" * 100 + "\n", "your message: is 61 tokens longer than fits the model's context of 64 tokens"),
        (b"caf\xe9\n", "is not UTF-8"),
    ],
)
def test_lines_that_are_refused_end_a_pipe(models, piped, lines, said: str) -> None:
    with pytest.raises(UserError, match=r"\w") as caught:
        piped(models / "aaa", lines, *GREEDY)
    assert said in str(caught.value)


@pytest.mark.parametrize("flags", [["--max_new_tokens", "0"], ["--temperature", "-1"], ["--seed", "x"]], ids=" ".join)
def test_flags_that_can_not_be(models, flags: list[str]) -> None:
    assert flags[0].removeprefix("--") in refused(chat.main, str(models / "aaa"), *flags)


def test_an_answer_ends_with_its_turn(piped, tmp_path) -> None:
    """A template's own token ends an answer, though the model's generation_config.json does not say so."""
    tokenizer = build_tokenizer("byte")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path)
    model = tiny_bases.our_model(lm_head_bias=True, vocab_size=len(tokenizer), eos_token_id=None)
    with torch.no_grad():
        model.lm_head.bias[tokenizer.convert_tokens_to_ids("<|im_end|>")] += 1e4
    model.save_pretrained(tmp_path)
    assert end_of_turn(tokenizer) == 258
    assert piped(tmp_path, "Hi\n/save " + str(tmp_path / "kept"), *GREEDY)[0] == "\n"
    assert json.loads((tmp_path / "kept").read_text())["messages"][1]["content"] == ""


# ---- what a conversation keeps


@pytest.fixture
def tokenizer():
    tokenizer = build_tokenizer("byte")
    tokenizer.chat_template = PLAIN_TEMPLATE
    return tokenizer


def test_the_oldest_turns_fall_away(tokenizer) -> None:
    talk = Chat(tokenizer, CONTEXT)
    talk.system = "Hm"
    for number in range(9):
        ids = talk.ask(f"Ask {number}", 16)
        assert len(ids) <= CONTEXT - 16
        text = tokenizer.decode(ids)
        assert text.startswith("System: Hm\nUser: Ask")
        assert text.endswith(f"User: Ask {number}\nAssistant:")
        talk.answered(" Yes ")
    assert len(talk.messages) == 19
    assert talk.messages[-1] == {"role": "assistant", "content": "Yes"}
    assert talk.fallen == 16
    talk.reset()
    assert (talk.messages, talk.fallen) == ([{"role": "system", "content": "Hm"}], 0)


def test_what_does_not_fit_is_not_kept(tokenizer) -> None:
    talk = Chat(tokenizer, CONTEXT)
    talk.ask("Hi", 16)
    talk.answered("Ho")
    with pytest.raises(UserError, match="longer than fits"):
        talk.ask("a" * CONTEXT, 16)
    assert (len(talk.turns), talk.fallen) == (2, 0)


def test_a_text_that_goes_on(tokenizer) -> None:
    text = Continuation(tokenizer, CONTEXT)
    assert tokenizer.decode(text.ask("the fox", 8)) == "the fox"
    text.answered(" is")
    assert tokenizer.decode(text.ask("", 8)) == "the fox is"
    text.answered(" red")
    assert tokenizer.decode(text.ask("and", 8)) == "the fox is red\nand"
    assert tokenizer.decode(text.ask("b" * 100, 8)) == "b" * (CONTEXT - 8)
    assert text.fallen == 119 - (CONTEXT - 8)
