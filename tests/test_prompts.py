"""Prompts in files: what is read of them, and the line that a refusal names."""

import re

import pytest

from inference.decoding.prompts import Prompt, read_prompt, read_prompts
from training.data.tokenizers import build_tokenizer
from training.model.sampling import encode_prompt, prompt_tensor
from training.system.errors import UserError


def test_lines_of_json(tmp_path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes('\ufeff{"prompt": "caf\u00e9", "id": 1}\r\n\n{"prompt": ""}'.encode())
    first, second = read_prompts(str(path))
    assert first == Prompt("café", f"--prompts {path}, line 1", {"prompt": "café", "id": 1})
    assert second.name.endswith("line 3")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"prompt": "a"}\n{"prompt": 3}\n', "line 2: must be an object"),
        (b'{"prompt": "a"}\n\n"b"\n', "line 3: must be an object"),
        (b'{"text": "a"}\n', "line 1: must be an object"),
        (b'{"prompt": "a"}\n{"prompt": \n', "line 2: is not JSON"),
        (b'{"prompt": "caf\xe9"}\n', "line 1: not UTF-8 at byte"),
        (b'{"prompt": "a", "tokens": 3}\n', "line 1: tokens is a name"),
        (b"", "is empty"),
        (b"\n \n", "is empty"),
    ],
)
def test_bad_lines_are_named(content: bytes, said: str, tmp_path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        read_prompts(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_lone_surrogate_is_no_text() -> None:
    with pytest.raises(UserError, match="line 2: is not UTF-8"):
        prompt_tensor(build_tokenizer("byte"), "a\ud800", 16, "line 2")


def test_an_empty_prompt_needs_a_token_to_start_with() -> None:
    tokenizer = build_tokenizer("byte")
    assert encode_prompt(tokenizer, "") == [tokenizer.eos_token_id]
    tokenizer.eos_token = None
    assert encode_prompt(tokenizer, "") == tokenizer("\n")["input_ids"]
    tokenizer.get_vocab = lambda: {"a": 0}
    with pytest.raises(UserError, match="has no token that starts a text"):
        encode_prompt(tokenizer, "")


def test_a_prompt_is_read_to_its_end(tmp_path) -> None:
    (tmp_path / "prompt.txt").write_text("the fox\n", encoding="utf-8")
    assert read_prompt(f"FILE:{tmp_path / 'prompt.txt'}") == "the fox\n"
    assert read_prompt("the fox") == "the fox"
