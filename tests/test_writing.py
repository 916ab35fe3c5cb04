"""What the playground's page shows of a text: each token with its probability, its rivals and what was looked at."""

import ast
import json
import sys
import threading
from pathlib import Path

import pytest
import torch

from inference.playground import AcornWriter
from inference.serving import writing
from inference.serving.drawing import attention_html, chat_html, heads_html, message_html, passage_html
from inference.serving.writing import Passage, Refused, Token, Writer
from training.data.tokenizers import build_tokenizer

from .chat_fixture import CHATML
from .variants import random_model, tiny_config

CONTEXT = 32
GREEDY = {"do_sample": False}


@pytest.fixture(scope="module")
def tokenizer():
    found = build_tokenizer("byte")
    found.chat_template = CHATML
    return found


@pytest.fixture(params=[Writer, AcornWriter], ids=["transformers", "acorn"])
def writer(request, tokenizer) -> Writer:
    """A model of random weights that writes on until it is told to end, by transformers alone and as Acorn does."""
    model = random_model(tiny_config(vocab_size=len(tokenizer), max_position_embeddings=CONTEXT))
    model.generation_config.eos_token_id = None
    return request.param(model, tokenizer, CONTEXT)


def written(writer: Writer, prompt: str = "the fox", length: int = 9, seed: int = 1, **sampling) -> Passage:
    passage = Passage(writer.encode(prompt))
    steps = list(writer.write(passage, length, seed, threading.Event(), **(sampling or GREEDY)))
    assert len(steps) == len(passage.tokens)
    return passage


@torch.no_grad()
def test_each_token_has_its_probability_and_its_rivals(writer) -> None:
    passage = written(writer)
    given = torch.tensor([passage.given])
    expected = writer.model.generate(given, max_new_tokens=9, do_sample=False, pad_token_id=0)
    assert passage.ids == expected[0].tolist()
    logits = writer.model(expected[:, :-1]).logits[0, len(passage.given) - 1 :].softmax(-1)
    for token, row in zip(passage.tokens, logits, strict=True):
        assert token.probability == pytest.approx(row[token.id].item(), rel=1e-4)
        assert [p for _, p in token.likely] == pytest.approx(row.topk(10).values.tolist(), rel=1e-4)
        assert token.rank == 0 and token.probability == token.likely[0][1]


def test_probabilities_are_those_before_temperature_and_top_k(writer) -> None:
    drawn = written(writer, length=4, do_sample=True, temperature=5.0, top_k=3, seed=3)
    for token in drawn.tokens:
        assert token.rank in (0, 1, 2) and sum(p for _, p in token.likely) < 0.9
    assert written(writer, length=4, do_sample=True, temperature=5.0, top_k=3, seed=3).ids == drawn.ids
    assert written(writer, length=4, do_sample=True, temperature=5.0, top_k=3, seed=4).ids != drawn.ids


def test_past_the_context(writer) -> None:
    passage = written(writer, "x" * 30, length=9)
    is_acorn = isinstance(writer, AcornWriter)
    assert len(passage.tokens) == (9 if is_acorn else 2)
    assert writer.why_it_ended(passage, 9) == ("as many as were asked for" if is_acorn else "the context is full")
    assert [token.seen for token in passage.tokens[:4]] == ([30, 31, 32, 16] if is_acorn else [30, 31])


def test_a_text_ends_at_its_end_and_says_so(writer) -> None:
    third = written(writer).tokens[2].id
    writer.ends = [third]
    passage = written(writer)
    assert passage.tokens[-1].id == third and len(passage.tokens) <= 3
    assert writer.why_it_ended(passage, 9) == "the model ended its text"


def test_a_text_ends_where_the_model_says_and_where_a_turn_does(writer) -> None:
    writer.model.generation_config.eos_token_id = 5
    assert type(writer)(writer.model, writer.tokenizer, CONTEXT, [7, 5]).ends == [5, 7]


def test_a_stopped_text_keeps_what_there_is(writer) -> None:
    passage, stop = Passage(writer.encode("a")), threading.Event()
    for _ in writer.write(passage, 25, 1, stop, **GREEDY):
        if len(passage.tokens) == 3:
            stop.set()
    assert 3 <= len(passage.tokens) < 25
    assert passage.ids == written(writer, "a", length=len(passage.tokens)).ids


def test_a_text_that_nobody_waits_for_ends(writer) -> None:
    stop, others = threading.Event(), set(threading.enumerate())
    steps = writer.write(Passage(writer.encode("a")), 31, 1, stop, **GREEDY)
    next(steps)
    assert set(threading.enumerate()) - others
    steps.close()
    assert stop.is_set() and not set(threading.enumerate()) - others


def test_an_error_in_the_model_reaches_the_page(writer) -> None:
    with pytest.raises(ValueError, match="temperature"):
        written(writer, do_sample=True, temperature=-1.0)


def test_prompts_that_cannot_be_are_refused_in_words(writer, monkeypatch) -> None:
    with pytest.raises(Refused, match=r"33 tokens.* 32"):
        written(writer, "x" * 33)
    assert writer.encode("") == [writer.tokenizer.eos_token_id]
    if type(writer) is Writer:
        monkeypatch.setattr(writer.tokenizer, "_special_tokens_map", {})
        with pytest.raises(Refused, match="empty"):
            writer.encode("")


def turns(*contents: str) -> list[dict]:
    return [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]


def test_the_oldest_turns_of_a_long_chat_fall_away(writer) -> None:
    writer.context = 260
    system = [{"role": "system", "content": "Be"}]
    short, long = turns("a", "b", "c"), turns("a" * 99, "b" * 99, "c")
    assert writer.fitted(system + short, 10) == (writer.encode_chat(system + short), 0)
    assert writer.fitted(system + long, 10) == (writer.encode_chat([*system, long[-1]]), 2)
    with pytest.raises(Refused, match="the model reads 260"):
        writer.fitted(turns("a" * 260), 10)


def test_a_template_that_refuses(writer) -> None:
    writer.tokenizer.chat_template, kept = "{{ raise_exception('no two of them') }}", writer.tokenizer.chat_template
    try:
        with pytest.raises(Refused, match="no two of them"):
            writer.fitted(turns("a"), 10)
    finally:
        writer.tokenizer.chat_template = kept


@torch.no_grad()
def test_attention_is_the_models_own(writer) -> None:
    passage, kept = written(writer), writer.model.config._attn_implementation
    place = len(passage.given) + 4
    maps = writer.attention(passage, place)
    assert writer.model.config._attn_implementation == kept != "eager"
    assert maps.shape == (2, 4, place)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 4))
    writer.model.set_attn_implementation("eager")
    whole = writer.model(torch.tensor([passage.ids]), output_attentions=True).attentions
    torch.testing.assert_close(maps, torch.stack([layer[0, :, place - 1, :place] for layer in whole]))
    with pytest.raises(Refused, match="before the first"):
        writer.attention(passage, 0)
    assert writer.attention(passage, 2).shape == (2, 4, 2)


def test_attention_of_what_a_moved_window_wrote(tokenizer) -> None:
    writer = AcornWriter(random_model(tiny_config(vocab_size=len(tokenizer))), tokenizer, CONTEXT)
    writer.model.generation_config.eos_token_id = None
    passage = written(writer, "x" * 30, length=9)
    assert writer.attention(passage, 32).shape[-1] == 32
    assert writer.attention(passage, 33).shape[-1] == 16
    assert writer.attention(passage, 38).shape[-1] == 21


@pytest.mark.parametrize("text", ["plain words\n here", "é€😀 ok", "<script>"])
def test_pieces_are_the_text(writer, text: str) -> None:
    ids = writer.encode(text)
    assert "".join(writer.pieces(ids)) == text
    assert len(writer.pieces(ids)) == len(ids)


HOSTILE = '<script>alert("1")</script>${1+1}{{value}}'


def hostile(text: str = HOSTILE) -> Passage:
    return Passage([1], [Token(2, text, 0.5, [(text, 0.5), ("'\"&", 0.2)], None, 1)])


def test_what_a_model_writes_is_no_html() -> None:
    made = passage_html(hostile(), ["<b>"]) + chat_html([("<i>", passage_html(hostile()))]) + message_html("<u>")
    made += attention_html([HOSTILE], [1.0], "<s>", 0, 0) + heads_html([[[1.0]]], [HOSTILE])
    assert not [word for word in ("<script", "<b>", "<i>", "<u>", "<s>") if word in made]
    assert "&lt;script&gt;" in made and '"1"' not in made


def test_a_card_is_json_within_its_attribute() -> None:
    import xml.etree.ElementTree as ElementTree

    made = ElementTree.fromstring(f"<p>{passage_html(hostile())}</p>")[0]
    assert made.text == HOSTILE
    assert json.loads(made.get("data-card")) == {"p": 0.5, "likely": [[HOSTILE, 0.5], ["'\"&", 0.2]], "rank": None}


@pytest.mark.parametrize("name", ["writing", "drawing", "page"])
def test_what_travels_with_a_space_imports_nothing_of_acorn(name: str) -> None:
    tree = ast.parse((Path(writing.__file__).parent / f"{name}.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name.split(".")[0] for alias in node.names]
            assert set(found) <= {"torch", "transformers", "gradio"} | sys.stdlib_module_names
        if isinstance(node, ast.ImportFrom):
            own = node.level == 1 and node.module in ("writing", "drawing")
            assert own or node.module.split(".")[0] in {"torch", "transformers", "gradio"} | sys.stdlib_module_names
