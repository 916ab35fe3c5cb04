"""`acorn serve` asked by the real `openai` client, and by hand where a client would not ask such a thing."""

import asyncio
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from transformers import GPT2LMHeadModel

from inference import serve
from inference.serving.listening import listen

from . import tiny_bases
from .served import ASKED, KEY, Served, chat_model, streamed, written
from .tiny_runs import refused


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return chat_model(tmp_path_factory.mktemp("serve") / "chat")


@pytest.fixture(scope="module", params=[False, True], ids=["one_by_one", "batched"])
def served(request, directory):
    server = Served(directory, is_batched=request.param, api_key=KEY)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def single(directory):
    server = Served(directory, api_key=KEY)
    yield server
    server.stop()


def test_completions_are_what_generate_writes(served, directory, capsys) -> None:
    client = served.client()
    for prompt in ("the fox", "Zebra ", ""):
        ask = {"model": "tiny", "prompt": prompt, "max_tokens": 40, "temperature": 0}
        expected = written(capsys, directory, prompt, 40)
        assert client.completions.create(**ask).choices[0].text == expected
        assert streamed(client.completions.create(**ask, stream=True)) == expected


def test_chats_are_answered_by_the_template(served, directory, capsys) -> None:
    client = served.client()
    ask = {"model": "tiny", "messages": ASKED, "max_completion_tokens": 30, "temperature": 0}
    expected = written(capsys, directory, f"User: {ASKED[0]['content']}\nAssistant:", 30).lstrip()
    whole = client.chat.completions.create(**ask)
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (expected, "length")
    assert (whole.usage.completion_tokens, whole.usage.prompt_tokens) == (30, 46)
    pieces = [piece.choices[0].delta.content or "" for piece in client.chat.completions.create(**ask, stream=True)]
    assert "".join(pieces) == expected
    assert sum(map(bool, pieces)) > 10


def test_many_at_once_and_none_is_lost(served) -> None:
    def ask(client, number: int, stream: bool):
        prompt = f"{number}: the fox"
        return client.completions.create(model="tiny", prompt=prompt, max_tokens=6, temperature=0, stream=stream)

    alone = [ask(served.client(), number, False).choices[0].text for number in range(16)]

    async def all_at_once() -> list[str]:
        client = openai.AsyncOpenAI(base_url=served.client().base_url, api_key=KEY, max_retries=0)

        async def one(number: int) -> str:
            answer = await ask(client, number % 16, number >= 16)
            return "".join([p.choices[0].text async for p in answer]) if number >= 16 else answer.choices[0].text

        async with client:
            return await asyncio.gather(*map(one, range(32)))

    assert asyncio.run(all_at_once()) == alone * 2


def test_models(served) -> None:
    client = served.client()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="'gpt2' is not served here"):
        client.models.retrieve("gpt2")


def test_sampling_is_by_request(served) -> None:
    client = served.client()

    def draw(**sampling) -> str:
        ask = {"model": "tiny", "prompt": "the fox", "max_tokens": 40, **sampling}
        return client.completions.create(**ask).choices[0].text

    greedy = draw(temperature=0)
    assert draw(temperature=2, extra_body={"top_k": 1}) == draw(temperature=2, top_p=1e-6) == greedy
    assert len({draw(), draw(extra_body={"top_k": 10**9}), draw(temperature=0.9)}) == 3


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_it_stops_before_a_text(served, stream: bool) -> None:
    client = served.client()
    ask = {"model": "tiny", "prompt": "the fox", "max_tokens": 40, "temperature": 0}
    text = client.completions.create(**ask).choices[0].text
    stop = text[20:23]
    found = client.completions.create(**ask, stop=[stop, "not in there"], stream=stream)
    found = streamed(found) if stream else found.choices[0].text
    assert found == text[: text.index(stop)]


def test_a_seed_repeats_itself_alone(single) -> None:
    client = single.client()
    ask = {"model": "tiny", "prompt": "the fox", "max_tokens": 30}
    first = client.completions.create(**ask, seed=7).choices[0].text
    assert client.completions.create(**ask, seed=7).choices[0].text == first
    assert client.completions.create(**ask, seed=8).choices[0].text != first


def test_penalties_and_biases_are_the_protocols(single) -> None:
    client = single.client()
    ask = {"model": "tiny", "prompt": "the fox", "max_tokens": 60, "temperature": 0}

    def repeats(**more) -> int:
        text = client.completions.create(**ask, **more).choices[0].text
        return len(text) - len(set(text))

    assert repeats(frequency_penalty=2) < repeats()
    assert repeats(presence_penalty=2) < repeats()
    assert repeats(presence_penalty=0.1, extra_body={"no_repeat_ngram_size": 1}) < repeats()
    assert client.completions.create(**ask, logit_bias={"97": 100}).choices[0].text == "a" * 60


def test_the_snippet_of_the_readme(single, capsys) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    snippet = next(block for block in blocks if "from openai" in block)
    for old, new in (
        ("127.0.0.1:8000", f"127.0.0.1:{single.port}"),
        ('"none"', repr(KEY)),
        ("runs/first-chat", "tiny"),
        ("stream=True", "stream=True, seed=7"),  # a tiny model's answer may be empty by chance
    ):
        assert old in snippet
        snippet = snippet.replace(old, new)
    exec(compile(snippet, "README.md", "exec"), {})
    question = [{"role": "user", "content": "What is 47 + 25?"}]
    whole = single.client().chat.completions.create(model="tiny", messages=question, seed=7)
    assert capsys.readouterr().out == whole.choices[0].message.content != ""


def test_tools_and_their_turns_are_shown(single) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}, "id": "1"}
    turns = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "2"}]
    turns.append({"role": "user", "content": [{"type": "text", "text": "and"}, {"type": "text", "text": "now"}]})
    ask = {"messages": [{"role": "developer", "content": "Add."}, *ASKED, *turns], "max_tokens": 3}
    tools = [{"type": "function", "function": {"name": "f"}}]
    without, with_tools = (single.post("/v1/chat/completions", body) for body in (ask, {**ask, "tools": tools}))
    assert (without[0], with_tools[0]) == (200, 200)
    assert with_tools[1]["usage"]["prompt_tokens"] > without[1]["usage"]["prompt_tokens"] > 60


def test_a_client_that_leaves_stops_its_answer_and_not_the_server(served, monkeypatch) -> None:
    steps = []
    forward = served.model.forward

    def slow(*args, **kwargs):
        steps.append(time.sleep(0.02))
        return forward(*args, **kwargs)

    monkeypatch.setattr(served.model, "forward", slow)
    for stream in (True, False):
        connection = http.client.HTTPConnection("127.0.0.1", served.port)
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        ask = {"prompt": "a", "max_tokens": 150, "temperature": 0, "stream": stream}
        connection.request("POST", "/v1/completions", json.dumps(ask), headers)
        while len(steps) < 5:
            time.sleep(0.01)
        connection.sock.close()
        assert served.post("/v1/completions", {"prompt": "b", "max_tokens": 20})[0] == 200
        assert len(steps) < 100
        steps.clear()
        time.sleep(0.1)
        assert len(steps) <= 1  # the one that was under way


def test_a_model_without_a_template_is_asked_for_completions(tmp_path_factory, capsys) -> None:
    folder = tiny_bases.save(tiny_bases.stock_model(), tmp_path_factory.mktemp("stock") / "gpt2")
    server = Served(folder)
    try:
        status, answer = server.post("/v1/chat/completions", {"messages": ASKED})
        assert (status, answer["error"]["code"]) == (400, "no_chat_template")
        assert isinstance(server.model, GPT2LMHeadModel)
        found = server.client().completions.create(model="tiny", prompt="the", max_tokens=20, temperature=0)
        assert found.choices[0].text == written(capsys, folder, "the", 20)
    finally:
        server.stop()


# ---- the verb


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--port", "70000"], "port=70000"),
        (["--host", "no such host"], "host=no such host"),
        (["--host", "203.0.113.7"], "host=203.0.113.7"),
        (["--api_key", ""], "--api_key: must be"),
        (["--api_key", "ü"], "--api_key: must be"),
    ],
)
def test_flags_that_can_not_be(directory, flags: list[str], said: str) -> None:
    assert said in refused(serve.main, str(directory), *flags)


def test_a_port_in_use_is_said(directory) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        assert f"port={port}: Address already in use" in refused(serve.main, str(directory), "--port", port)


def test_missing_packages_are_said(directory, monkeypatch) -> None:
    monkeypatch.setattr("inference.serve.find_spec", lambda name: None)
    assert "acorn serve: needs fastapi" in refused(serve.main, str(directory))
    assert "pip install -e '.[serve]'" in refused(serve.main, str(directory))


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_the_server_as_a_process(directory, tmp_path, stop: signal.Signals) -> None:
    """Its key is in the environment alone; a signal ends it within seconds, though an answer is under way."""
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", serve.KEY_VARIABLE: KEY}
    command = [sys.executable, "-m", "inference.serve", str(directory), "--port", "0", "--log_level", "info"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    first = process.stderr.readline()
    address = re.search(r"http://\S+/v1", first)[0]
    client = openai.OpenAI(base_url=address, api_key=KEY, max_retries=0)
    asked = {"model": str(directory), "prompt": "a", "max_tokens": 20}
    assert client.completions.create(**asked).usage.completion_tokens == 20
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=address, api_key="another", max_retries=0).models.list()
    with pytest.raises(openai.APIError), ThreadPoolExecutor(64) as pool:
        answers = [pool.submit(client.completions.create, **{**asked, "max_tokens": 150}) for _ in range(64)]
        answers[0].result()
        process.send_signal(stop)
        [answer.result() for answer in answers]
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0
    assert error.endswith("stopped.\n")
    assert "Traceback" not in error
    assert KEY not in first + out + error
