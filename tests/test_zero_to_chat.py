"""Zero to chat: what is asked is in no training conversation, and the README's commands lead to answers over HTTP."""

import json
import re
import sys
from itertools import islice
from random import Random

import pytest

from benchmarks import zero_to_chat
from finetune import chat_files, finetune
from finetune.arguments import FinetuneDataArguments
from finetune.chat_files import check_turns, find_format, read_conversations
from finetune.synthetic_chat import KINDS, conversations, converse, held_out_questions, is_held_out
from inference import evaluate
from training import prepare, pretrain

from .tiny_bases import our_model, save
from .tiny_finetunes import facts, tune
from .tiny_runs import refused

WORDS, NUMBERS = re.compile(r"[A-Za-z]+"), re.compile(r"\d+")
NAMED = {"dataset": "synthetic-chat"}


def said(found: list[list[dict]]) -> list[str]:
    return [message["content"] for messages in found for message in messages]


def test_the_conversations_are_the_same_for_a_seed_and_others_for_another() -> None:
    assert list(conversations(20, seed=3)) == list(conversations(20, seed=3))
    assert list(conversations(20, seed=3)) != list(conversations(20, seed=4))
    assert list(held_out_questions(20, seed=3)) == list(held_out_questions(20, seed=3))
    assert list(islice(conversations(), 5)) == list(conversations(5)), "more of them begin with the same"


def test_no_conversation_has_what_is_asked() -> None:
    found = said(list(conversations(3000)))
    words = {word.lower() for text in found for word in WORDS.findall(text)}
    pairs = {tuple(sorted(map(int, numbers))) for text in found if len(numbers := NUMBERS.findall(text)) == 2}
    questions = list(held_out_questions(200))
    assert len({str(messages) for _, messages, _ in questions}) > 150
    for skill, messages, expected in questions:
        if skill == "add":
            assert tuple(sorted(map(int, NUMBERS.findall(messages[0]["content"])))) not in pairs
        else:
            asked = {"repeat": expected, "spell": expected.replace("-", "")}
            word = asked.get(skill) or expected.removeprefix("Your name is ").removesuffix(".").lower()
            assert word not in words and is_held_out(word)
            assert word in messages[0]["content"].lower()
    assert len(pairs) > 1000 and len(words) > 2000


def test_a_sum_is_worked_out_right() -> None:
    for skill, messages, expected in held_out_questions(400):
        if skill == "add":
            a, b = map(int, NUMBERS.findall(messages[0]["content"]))
            steps = re.fullmatch(r"(\d) \+ (\d) = (\d+), (\d) \+ (\d) \+ ([01]) = (\d+), so (\d+)", expected)
            assert int(steps[8]) == a + b
            assert [int(number) for number in steps.groups()[:3]] == [a % 10, b % 10, a % 10 + b % 10]
            assert int(steps[7]) * 10 + (a + b) % 10 == a + b


def test_conversations_are_well_formed_and_have_every_kind() -> None:
    found = list(islice(read_conversations(FinetuneDataArguments(**NAMED), {}), 500))
    assert find_format(FinetuneDataArguments(**NAMED)) == "chat"
    for conversation in found[:200]:
        assert check_turns(conversation).messages == conversation.messages
    texts = said([conversation.messages for conversation in found])
    for start in ("Hello! Your name is ", "Your name is ", "You have not told me", "I do not know", "I am Acorn"):
        assert any(text.startswith(start) for text in texts), start


def test_the_name_that_was_said_last_is_remembered() -> None:
    asked = ["recall", "introduce", "add", "introduce", "recall"]
    exchanges = next(found for seed in range(99) if (found := list(converse(Random(seed), asked)))[0][1][0] == "Y")
    assert exchanges[0][1] == "You have not told me your name."
    assert exchanges[4][1] == exchanges[3][1].removeprefix("Hello! ")
    assert exchanges[1][1] != exchanges[3][1]
    assert set(KINDS) >= {"recall", "introduce", "add"}


@pytest.mark.parametrize(
    ("main", "argv", "words"),
    [
        (pretrain.main, ["quickstart", "--dataset", "synthetic-chat"], "only `acorn finetune` reads it"),
        (prepare.main, ["quickstart", "--dataset", "synthetic-chat"], "only `acorn finetune` reads it"),
        (finetune.main, ["first-chat"], "`acorn pretrain chat-base` grows it"),
        (finetune.main, ["base", "--dataset", "synthetic-chat", "--data_format", "pairs"], "is a chat; leave it out"),
        (finetune.main, ["base", "--dataset", "synthetic-chat", "--dataset_config", "en"], "has no effect on"),
        (
            finetune.main,
            ["base", "--dataset", "synthetic-chat", "--text_files", "base/config.json"],
            "two sources at once",
        ),
    ],
)
def test_what_it_is_not_for(main, argv: list[str], words: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(our_model(), tmp_path / "base")
    assert words in refused(main, *argv)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_model_is_taught_it_and_asked_what_it_held_out(tmp_path, monkeypatch, capsys) -> None:
    save(our_model("gpt-rope-gqa"), tmp_path / "base")
    monkeypatch.setattr(chat_files, "conversations", lambda: conversations(30))
    run = tune(tmp_path, "base", "--adapter", "full", "--dataset", "synthetic-chat", name="taught")
    printed = capsys.readouterr().out
    assert "30 documents: the loss is on " in printed and "acorn chat taught\n  acorn serve taught\n" in printed
    assert facts(run)["perplexity_after"] < facts(run)["perplexity_before"]
    card = (run / "README.md").read_text(encoding="utf-8")
    assert "`synthetic-chat`" in card and "datasets:" not in card, "it is on no Hub"
    evaluate.main([str(run)])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["loss"] > 0


@pytest.mark.slow
def test_the_readme_s_commands_lead_to_a_server_that_answers(tmp_path, monkeypatch, capsys) -> None:
    argv = ["--output_dir", str(tmp_path / "zero"), "--max_steps", "2", "--questions", "8"]
    monkeypatch.setattr(sys, "argv", ["zero_to_chat.py", *argv])
    zero_to_chat.main()
    line = json.loads(capsys.readouterr().out)
    assert list(line["seconds"]) == [" ".join(command) for command in zero_to_chat.readme_commands()]
    assert line["questions"] == 8 and 0 <= line["exact"] <= 1
    assert len(line["conversation"]) == 2 * len(zero_to_chat.SAID)
