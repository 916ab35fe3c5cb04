"""What `transformers chat` asks of `acorn serve` beyond the protocol; the program runs in test_clients_serving.py."""

import http.client
import json

import pytest

from .test_serve import ASKED, KEY, directory, single  # noqa: F401 (fixtures)


def generation_config(**settings) -> dict:
    """A request as that program makes it."""
    return {"messages": ASKED, "generation_config": json.dumps({**settings, "transformers_version": "5.24.0"})}


def answer(served, body: dict) -> str:
    status, said = served.post("/v1/chat/completions", body)
    assert status == 200, said
    return said["choices"][0]["message"]["content"]


def test_a_generation_config_says_what_fields_say(single) -> None:  # noqa: F811
    folded = generation_config(do_sample=True, max_new_tokens=6, top_k=5) | {"seed": 3}
    assert answer(single, folded) == answer(single, {"messages": ASKED, "max_tokens": 6, "top_k": 5, "seed": 3})
    greedy = {"messages": ASKED, "max_tokens": 6, "temperature": 0}
    assert answer(single, generation_config(do_sample=False, max_new_tokens=6)) == answer(single, greedy)


@pytest.mark.parametrize(
    ("settings", "field"),
    [({"max_new_tokens": 0}, "max_tokens"), ({"num_beams": 4}, "num_beams"), ({"topk": 4}, "topk")],
)
def test_what_a_generation_config_can_not_say(settings: dict, field: str, single) -> None:  # noqa: F811
    status, said = single.post("/v1/chat/completions", generation_config(**settings))
    assert (status, said["error"]["param"]) == (400, field)


@pytest.mark.parametrize("value", ["{", "[1]", "3", 3, ["a"]])
def test_a_generation_config_that_is_none(value, single) -> None:  # noqa: F811
    body = {"messages": ASKED, "generation_config": value}
    status, said = single.post("/v1/chat/completions", body)
    assert (status, said["error"]["param"]) == (400, "generation_config")


@pytest.mark.parametrize(("name", "status"), [("tiny", "ready"), ("another", "error")])
def test_whether_the_model_is_ready(name: str, status: str, single) -> None:  # noqa: F811
    connection = http.client.HTTPConnection("127.0.0.1", single.port, timeout=60)
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    connection.request("POST", "/load_model", json.dumps({"model": name}), headers)
    line = connection.getresponse().read().decode()
    assert json.loads(line.removeprefix("data: "))["status"] == status
