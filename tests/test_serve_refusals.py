"""What `acorn serve` does not answer: the protocol's error object, never a crash."""

import openai
import pytest

from .served import ASKED, CONTEXT, KEY, Served, chat_model, streamed


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return chat_model(tmp_path_factory.mktemp("serve") / "chat")


@pytest.fixture(scope="module")
def single(directory):
    server = Served(directory, api_key=KEY)
    yield server
    server.stop()


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
    "top_p": [0, 1.5, "x", "\ud800"],
    "top_k": [-1, 1.5, 10**13],
    "min_p": [2, -1, "0.1"],
    "no_repeat_ngram_size": [-1, "x", 1.5],
    "suppress_tokens": [[], "[5]", [257], 5, [5] * 1025],
    "min_new_tokens": [CONTEXT + 1],
    "repetition_penalty": [0, 1e9],
    "frequency_penalty": [3, "x"],
    "logit_bias": [[1], {"a": 1}, {"5": 101}, {"5": "x"}, {"257": 1}, {"٣": 1}, {"0" * 5000: 1}],
    "stop": [5, [], [""], "", [1], "\ud800", ["a"] * 17, "a" * 1001],
    "seed": [1.5, "x", 2**70],
    "stream": ["yes", 1],
    "stream_options": [True, {"a": 1}, {"\ud800": 1}],
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


def test_settings_that_leave_nothing_to_draw(single) -> None:
    for more in ({"suppress_tokens": [*range(257)]}, {"begin_suppress_tokens": [*range(257)], "top_h": 0.5}):
        status, answer = single.post("/v1/completions", {"prompt": "a", "max_tokens": 2, **more})
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error")


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
