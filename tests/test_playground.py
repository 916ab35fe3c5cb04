"""The playground: its page asked by gradio's own client, opened in Chromium, and what the verb refuses."""

import json
import os
import signal
import subprocess
import sys
import threading
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from inference import playground
from inference.serving.listening import listen
from inference.serving.writing import Passage

from .browser import CHROMIUM, browser
from .chat_fixture import CHATML
from .tiny_runs import grow, refused

ROOT = Path(__file__).resolve().parent.parent
GREEDY = (9, 0, 0, 1, 1, 1)  # max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed
HOSTILE = "<script>hacked = 1</script>${hacked = 2}{{value}}<img src=x onerror='hacked = 3'>"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of the byte tokenizer, so that it reads anything, with a chat template; no token ends its texts."""
    flags = ["--tokenizer", "byte", "--block_size", "160", "--max_steps", "4"]
    folder = grow(tmp_path_factory.mktemp("playground"), *flags)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": None}))
    return folder


# what the verb refuses


@pytest.fixture
def with_gradio(monkeypatch) -> None:
    """As if gradio were there, which what is refused before never imports."""
    monkeypatch.setattr(playground, "gradio_version", lambda: "7.0.0")


@pytest.mark.parametrize(("found", "said"), [(None, ""), ("5.49.1", "; 5.49.1 is installed")])
def test_without_gradio_the_extra_is_named(monkeypatch, found: str | None, said: str) -> None:
    monkeypatch.setattr(playground, "gradio_version", lambda: found)
    needed = f"needs gradio 6.31.0 or newer{said}: .venv/bin/pip install -e '.[playground]'"
    assert needed in refused(playground.main, "any")


def test_a_port_in_use(with_gradio) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        assert f"port={port}: Address already in use" in refused(playground.main, "any", "--port", port)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--host", "nonsense.invalid"], "host=nonsense.invalid: there is no such address"),
        (["--host", "192.0.2.7"], "host=192.0.2.7: there is no such address"),  # of another machine (RFC 5737)
        (["--host", ""], "host="),
        (["--port", "65536"], "port=65536"),
        (["--port", "-1"], "port=-1"),
        (["--prompt", "a"], "unknown flag '--prompt': did you mean '--port'?"),
        (["--dtype", "float8"], "unknown dtype 'float8'"),
        (["--port", "0"], "'any'"),
    ],
)
def test_flags_that_cannot_be(with_gradio, flags: list[str], words: str) -> None:
    assert words in refused(playground.main, "any", *flags)


# the page, asked by gradio's own client

clients = pytest.mark.clients


@pytest.fixture(scope="module")
def page(run):
    """The page of the run, as the verb builds it."""
    from inference.serving.page import build_page, open_page

    model, tokenizer = playground.load_model_and_tokenizer(str(run))
    writer = playground.AcornWriter(model, tokenizer, playground.context_left(model))
    blocks = build_page(writer, "run")
    open_page(blocks, server_name="127.0.0.1", quiet=True)
    yield blocks
    blocks.close(verbose=False)


@pytest.fixture
def ask(page):
    """`ask(api_name, *values)`: the answer of a new visitor."""
    from gradio_client import Client

    client = Client(page.local_url, verbose=False)
    yield lambda name, *values: client.predict(*values, api_name=f"/{name}")
    client.close()


def spans(html: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(f"<p>{html}</p>").iter("span"))


def words(html: str, kind: str = "") -> str:
    return "".join(span.text or "" for span in spans(html) if kind in span.get("class").split() or not kind)


@clients
def test_what_is_written_is_what_generate_writes(run, ask) -> None:
    html, said = ask("write", "the fox", *GREEDY)
    model = AutoModelForCausalLM.from_pretrained(run, trust_remote_code=True).eval()
    ids = torch.tensor([list(b"the fox")])
    grown = model.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0)[0, 7:]
    shown = spans(html)
    assert words(html, "given") == "the fox" and len(shown) == 7 + len(grown)
    assert words(html) == AutoTokenizer.from_pretrained(run).decode([*b"the fox", *grown.tolist()])
    assert "9 tokens in" in said and "as many as were asked for" in said


@clients
def test_seeds_repeat(ask) -> None:
    hot = (9, 2, 0, 1, 1)
    first = words(ask("write", "the fox", *hot, 5)[0])
    assert words(ask("write", "the fox", *hot, 5)[0]) == first
    assert words(ask("write", "the fox", *hot, 6)[0]) != first


@clients
def test_no_prompt_and_one_too_long(ask) -> None:
    assert "9 tokens in" in ask("write", "", *GREEDY)[1]
    said = ask("write", "x" * 161, *GREEDY)[1]
    assert "refusal" in said and "161 tokens" in said and "160" in said
    assert "9 tokens in" in ask("write", "x" * 160, *GREEDY)[1]  # past the context


@clients
def test_what_a_person_types_is_no_html(ask) -> None:
    html, _ = ask("write", HOSTILE, *GREEDY)
    assert words(html, "given") == HOSTILE
    question, chat, _ = ask("answer", HOSTILE[:40], HOSTILE[:20], *GREEDY)
    assert question == "" and "<script" not in chat and "&lt;script&gt;" in chat


@clients
def test_a_conversation(ask) -> None:
    assert "empty" in ask("answer", "  ", "", *GREEDY)[2]
    for turns in (1, 2, 3, 4):
        _, chat, said = ask("answer", f"question {turns}", "", *GREEDY)
        assert [f"question {n}" in chat for n in range(1, 6)] == [n <= turns for n in range(1, 6)]
        assert "9 tokens in" in said
    assert "turns are no longer read" in said
    question, _, said = ask("answer", "x" * 161, "", *GREEDY)
    assert question == "x" * 161 and "refusal" in said


@clients
@pytest.mark.parametrize("place", range(6))
def test_settings_out_of_range_are_refused(ask, place: int) -> None:
    from gradio_client.exceptions import AppError

    values = [*GREEDY[:place], -1, *GREEDY[place + 1 :]]
    with pytest.raises(AppError, match="less than minimum"):
        ask("write", "the fox", *values)


@clients
def test_a_seed_that_was_deleted(ask) -> None:
    assert "seed is empty" in ask("write", "the fox", *GREEDY[:5], None)[1]


@clients
def test_visitors_take_turns(page) -> None:
    from gradio_client import Client

    found = {}

    def visit(prompt: str) -> None:
        client = Client(page.local_url, verbose=False)
        found[prompt] = client.predict(prompt, 60, 0, 0, 1, 1, 1, api_name="/write")[0]
        client.close()

    visitors = [threading.Thread(target=visit, args=(prompt,)) for prompt in ("the fox", "a dog", "lazy")]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    assert {prompt: words(html, "given") for prompt, html in found.items()} == {p: p for p in found} and len(found) == 3


@clients
def test_attention_of_a_token(run) -> None:
    from inference.serving.page import ALL_HEADS, Page

    model, tokenizer = playground.load_model_and_tokenizer(str(run))
    page = Page(playground.AcornWriter(model, tokenizer, 160))
    event = type("Event", (), {"at": "0:3"})
    look, heads, html = page.look_at_prompt([Passage(list(b"the fox"))], event, 2, ALL_HEADS)
    assert words(html, "seen") == "the" and words(html, "chosen") == " "
    assert look.maps.shape == (2, 2, 3)
    assert page.draw_look(look, 1, "1") != page.draw_look(look, 2, "1") != page.draw_look(look, 2, ALL_HEADS)
    cells = [cell.get("data-at") for cell in ElementTree.fromstring(f"<p>{heads}</p>").iter("i")]
    assert sorted(cells) == ["1:1", "1:2", "2:1", "2:2"]
    assert page.choose_head(type("Event", (), {"at": "2:1"})) == (2, "1")
    for at, words_ in (("0:0", "first"), ("0:9", "gone"), ("1:0", "gone")):
        assert words_ in page.look_at_prompt([Passage(list(b"the"))], type("Event", (), {"at": at}), 1, "1")[2]


# the page, in Chromium

VISIBLE = "e.offsetParent && !e.closest('[aria-hidden=true]')"  # gradio keeps a second row of tabs, to measure it
PROMPT = "[...document.querySelectorAll('textarea')].find(e => e.offsetParent)"
SAID = "[...document.querySelectorAll('.said')].map(e => e.innerText)"
TOKENS = "document.querySelectorAll('.token[data-card]')"


def button(name: str) -> str:
    return f"[...document.querySelectorAll('button')].find(e => e.innerText == '{name}' && {VISIBLE})"


@pytest.fixture
def address(run):
    """`acorn playground` in a process of its own, which Ctrl-C ends."""
    command = [sys.executable, "-m", "acorn", "playground", str(run), "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    yield process.stdout.readline().strip()
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130


@clients
@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here: apt-get install chromium")
def test_the_page_in_a_browser(address, tmp_path) -> None:
    with browser(tmp_path / "profile") as tab:
        tab.open(address)
        tab.wait(button("Prompt"))
        tab.click_until(button("Prompt"), f"{button('Write on')} && {PROMPT}")
        tab.type(PROMPT, HOSTILE)
        tab.click(button("Write on"))
        tab.wait(f"{SAID}.some(text => / a second: /.test(text))")
        given = "[...document.querySelectorAll('.token.given')].map(e => e.innerText).join('')"
        assert tab.run(given) == HOSTILE and tab.run("typeof hacked") == "undefined"

        tab.hover(f"{TOKENS}[3]")
        rows = "[...document.querySelectorAll('.token-card .row')].map(e => e.innerText)"
        tab.wait(f"{rows}.length >= 10")
        assert all("%" in row for row in tab.run(rows)) and tab.run("!!document.querySelector('.token-card .drawn')")

        tab.click(f"{TOKENS}[3]")
        tab.wait("document.querySelectorAll('.token.seen').length > 80")
        tab.picture(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 30_000
        tab.click("document.querySelector('.heads .head[data-at=\"1:2\"]')")
        tab.wait("document.querySelector('.attention input[type=number]').value == '1'")

        tab.type("document.querySelector('input[type=number]')", "1024")
        tab.type(PROMPT, "the fox")
        tab.click(button("Write on"))
        tab.wait(f"{given} == 'the fox'")
        tab.click(button("Stop"))
        tab.wait(f"{SAID}.some(text => /: stopped/.test(text))")
