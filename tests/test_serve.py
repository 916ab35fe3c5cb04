"""`acorn serve` asked by the real `openai` client, and by hand where a client would not ask such a thing."""

import asyncio
import http.client
import json
import re
import threading
import time
from pathlib import Path

import openai
import pytest
import uvicorn
from transformers import GPT2LMHeadModel

from finetune.data import PLAIN_TEMPLATE
from inference import generate, serve
from inference.serving.app import ServedModel, Server, build_app
from inference.serving.listening import listen
from training.data.tokenizers import build_tokenizer
from training.model.loading import load_model_and_tokenizer

from . import tiny_bases
from .tiny_runs import refused

KEY, CONTEXT = "a-key-of-the-tests", 160
ASKED = [{"role": "user", "content": "What is the fruit of the oak?"}]


class Served:
    """A server on a free port of loopback, in a thread of this process."""

    def __init__(self, directory, is_batched: bool = False, api_key: str | None = None):
        self.directory = directory
        self.model, tokenizer = load_model_and_tokenizer(str(directory))
        self.listening = listen("127.0.0.1", 0)
        self.port = self.listening.getsockname()[1]
        served = ServedModel("tiny", self.model, tokenizer, is_batched)
        config = uvicorn.Config(build_app(served, api_key), log_level="critical", lifespan="on")
        self.server = Server(config, served)
        self.thread = threading.Thread(target=lambda: self.server.run(sockets=[self.listening]))
        self.thread.start()

    def client(self, key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0)

    def post(self, path: str, body: bytes | dict, chunked: bool = False, **headers: str) -> tuple[int, dict]:
        """(status, body) of the answer to a request by hand."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"} | headers
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", path, iter([raw]) if chunked else raw, headers, encode_chunked=chunked)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A random model of 160 positions whose tokenizer has a chat template."""
    folder = tmp_path_factory.mktemp("serve") / "chat"
    tiny_bases.our_model("gpt", max_position_embeddings=CONTEXT, eos_token_id=None).save_pretrained(folder)
    tokenizer = build_tokenizer("byte")
    tokenizer.chat_template = PLAIN_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


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


def written(capsys, directory, prompt: str, length: int) -> str:
    """What `acorn generate` writes greedily after a prompt."""
    capsys.readouterr()
    generate.main([str(directory), "--prompt", prompt, "--temperature", "0", "--max_new_tokens", str(length)])
    return capsys.readouterr().out.removesuffix("\n").removeprefix(prompt)


def streamed(stream) -> str:
    return "".join(piece.choices[0].text for piece in stream)


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
    assert client.completions.create(**ask, logit_bias={"97": 100}).choices[0].text == "a" * 60


def test_the_snippet_of_the_readme(single, capsys) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    snippet = next(block for block in blocks if "from openai" in block)
    for old, new in (
        ("127.0.0.1:8000", f"127.0.0.1:{single.port}"),
        ('"none"', repr(KEY)),
        ("runs/first-chat", "tiny"),
    ):
        assert old in snippet
        snippet = snippet.replace(old, new)
    exec(compile(snippet, "README.md", "exec"), {})
    assert len(capsys.readouterr().out) > 9


# ---- bad input


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer another", f"Bearer {KEY}x", f"Basic {KEY}", KEY, "Bearer \xe9"]
)
def test_a_bad_key_is_refused(single, header: str) -> None:
    for path in ("/v1/completions", "/v1/models", "/health", "/nowhere"):
        status, answer = single.post(path, {"prompt": "a"}, Authorization=header)
        assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
    with pytest.raises(openai.AuthenticationError):
        single.client("another").models.list()


BAD = {
    "prompt": [5, ["a", "b"], {"a": 1}, "\ud800", [1, 2]],
    "max_tokens": [0, -1, 1.5, "3", True, CONTEXT, 10**20],
    "temperature": ["hot", -1, [], True, 1e400, 10**400, 1e-40],
    "top_p": [0, 1.5, "x"],
    "top_k": [-1, 1.5, 10**13],
    "min_p": [2, -1, "0.1"],
    "no_repeat_ngram_size": [-1, "x", 1.5],
    "suppress_tokens": [[], "[5]", [257], 5],
    "min_new_tokens": [CONTEXT + 1],
    "repetition_penalty": [0, 1e9],
    "frequency_penalty": [3, "x"],
    "logit_bias": [[1], {"a": 1}, {"5": 101}, {"5": "x"}, {"257": 1}, {"٣": 1}],
    "stop": [5, [], [""], "", [1], ["a"] * 17],
    "seed": [1.5, "x", 2**70],
    "stream": ["yes", 1],
    "stream_options": [True, {"a": 1}],
    "model": [5, "gpt2", "../tiny", ""],
    "n": [2, True],
    "logprobs": [3, True],
    "echo": [True],
    "suffix": ["x"],
    "max_tokns": [5],
    "messages": [[]],
}


@pytest.mark.parametrize("field", BAD)
def test_what_a_completion_can_not_say(single, field: str) -> None:
    for value in BAD[field]:
        status, answer = single.post("/v1/completions", {"prompt": "a", "max_tokens": 2, field: value})
        assert status == (404 if field == "model" and isinstance(value, str) else 400), (value, answer)
        assert field in answer["error"]["message"], (value, answer)
        assert answer["error"]["type"] == "invalid_request_error"
        assert "\n" not in answer["error"]["message"]


BAD_MESSAGES = [
    None, "hi", [], [5], [{}], [{"role": "user"}], [{"role": "king", "content": "a"}],
    [{"role": ["user"], "content": ""}],
    [{"role": "user", "content": 5}], [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
    [{"role": "user", "content": "\ud800"}], [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": "assistant", "content": None, "tool_calls": [5]}],
    [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
    [{"role": "assistant", "content": None, "tool_calls": 5}],
]  # fmt: skip


@pytest.mark.parametrize("messages", BAD_MESSAGES, ids=str)
def test_messages_that_are_none(single, messages) -> None:
    status, answer = single.post("/v1/chat/completions", {"messages": messages, "max_tokens": 2})
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    assert "messages" in answer["error"]["message"]


def test_over_the_context(single) -> None:
    status, answer = single.post("/v1/completions", {"prompt": "a" * CONTEXT, "stream": True})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    with pytest.raises(openai.BadRequestError, match="context is 160 tokens"):
        single.client().chat.completions.create(model="tiny", messages=ASKED, max_tokens=CONTEXT)
    assert single.client().completions.create(model="tiny", prompt="a").usage.completion_tokens == CONTEXT - 1


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"a"', b"\xff", b'{"prompt": ' + b"[" * 10**5, b"null"])
def test_bodies_that_are_no_json_objects(single, body: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        status, answer = single.post(path, body)
        assert status == 400
        assert "JSON" in answer["error"]["message"] or "parsing" in answer["error"]["message"]


@pytest.mark.parametrize("path", ["/load_models", "/reset", "/v1/responses", "/v1/audio/transcriptions", "/docs", "/"])
def test_nothing_else_is_served(single, path: str) -> None:
    status, answer = single.post(path, {"model": "gpt2"})
    assert (status, answer["error"]["type"]) == (404, "invalid_request_error")


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


def test_a_bug_is_an_error_of_the_protocol(single, monkeypatch) -> None:
    def broken(*args, **kwargs):
        raise RuntimeError('with "quotes" and a \\\\')

    monkeypatch.setattr(single.model, "forward", broken)
    status, answer = single.post("/v1/completions", {"prompt": "a"})
    assert (status, answer["error"]["type"]) == (500, "server_error")
    with pytest.raises(openai.APIError, match="with 'quotes' and a"):
        streamed(single.client().completions.create(model="tiny", prompt="a", stream=True))


def test_only_this_machine_and_only_so_much(single) -> None:
    assert single.post("/v1/completions", {"prompt": "a"}, Host="evil.example")[1]["error"]["code"] == "not_local"
    assert single.post("/v1/completions", {"prompt": "a", "max_tokens": 1}, Host="LOCALHOST:1")[0] == 200
    for chunked in (False, True):
        status, answer = single.post("/v1/completions", {"prompt": "a" * (5 << 20)}, chunked=chunked)
        assert (status, answer["error"]["code"]) == (413, "too_large")


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
