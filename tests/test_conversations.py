"""Conversations: read from every format, refused by file and line, rendered by the template, masked but for answers."""

import json
import sys

import pytest
import torch
from transformers import AutoTokenizer

from finetune.arguments import FinetuneDataArguments
from finetune.chat_files import (
    Conversation,
    Pair,
    check_turns,
    conversations_of_text,
    find_format,
    read_conversations,
    read_pairs,
)
from finetune.data import (
    PLAIN_TEMPLATE,
    Example,
    encode_conversation,
    encode_messages,
    encode_pair,
    with_template,
)
from finetune.finetune import preview
from training.data.tokenizers import build_tokenizer, tokenizer_hash
from training.system.errors import UserError

from .chat_fixture import CHATML, chat_text, many_conversations

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is an acorn?"},
    {"role": "assistant", "content": "The nut of an oak."},
    {"role": "user", "content": "And a walnut, é?"},
    {"role": "assistant", "content": "The seed of a walnut tree.\n\nIt is eaten."},
]


def byte():
    return with_template(build_tokenizer("byte"))


def bpe():
    return with_template(build_tokenizer("bpe", lambda: iter([chat_text()]), 400))


def chatml():
    tokenizer = build_tokenizer("byte")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


TOKENIZERS = {"byte": byte, "bpe": bpe, "chatml": chatml}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    """Tokenizers with the plain template, and one with a template of its own."""
    return TOKENIZERS[request.param]()


# the template and the mask


def test_the_template_round_trips(tokenizer, tmp_path) -> None:
    """What we encode is what apply_chat_template gives, also by the tokenizer that was saved, and it reads back."""
    example = encode_messages(tokenizer, Conversation("here", MESSAGES))
    tokenizer.save_pretrained(tmp_path)
    for its in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert its.apply_chat_template(MESSAGES, return_dict=True)["input_ids"] == example.ids.tolist()
        assert its.decode(example.ids) == its.apply_chat_template(MESSAGES, tokenize=False)


def test_the_loss_is_on_the_answers_and_their_ends_alone(tokenizer) -> None:
    example = encode_messages(tokenizer, Conversation("here", MESSAGES))
    end = "<|im_end|>" if "im_end" in tokenizer.chat_template else tokenizer.eos_token
    counted = tokenizer.decode(example.ids[example.counts])
    answers = [message["content"] for message in MESSAGES if message["role"] == "assistant"]
    assert counted.replace(f"{end} ", end).strip() == end.join([*answers, ""])
    assert 0 < example.counts.sum() < len(example.counts)


def test_the_mask_is_transformers_own() -> None:
    """Our template marks the answers by {% generation %}, so that other trainers mask the same tokens."""
    tokenizer = bpe()
    example = encode_messages(tokenizer, Conversation("here", MESSAGES))
    its = tokenizer.apply_chat_template(MESSAGES, return_dict=True, return_assistant_tokens_mask=True)
    assert its["assistant_masks"] == example.counts.astype(int).tolist()


def test_a_prompt_is_the_beginning_of_the_conversation(tokenizer) -> None:
    """What the model is asked with is, token by token, what it was trained on before the answer."""
    whole = encode_messages(tokenizer, Conversation("here", MESSAGES)).ids.tolist()
    asked = tokenizer.apply_chat_template(MESSAGES[:2], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert whole[: len(asked)] == asked


def test_no_new_tokens() -> None:
    """The plain template is added to the tokenizer's copy and changes nothing that it does."""
    plain = build_tokenizer("byte")
    templated = with_template(plain)
    assert plain.chat_template is None
    assert templated.chat_template == PLAIN_TEMPLATE
    assert tokenizer_hash(plain) == tokenizer_hash(templated)
    assert len(plain) == len(templated)


def test_a_template_of_its_own_is_kept() -> None:
    assert with_template(chatml()).chat_template == CHATML


def test_the_preview_marks_each_token(tokenizer) -> None:
    example = encode_messages(tokenizer, Conversation("chat.txt, line 3", MESSAGES))
    head, _, *lines = preview(example, tokenizer).splitlines()
    assert head.startswith("chat.txt, line 3")
    assert len(lines) == len(example.ids)
    assert ["●" in line.split("'")[0] for line in lines] == example.counts.tolist()


# long ones


@pytest.mark.parametrize("limit", [60, 90, 150])
def test_long_conversations_are_split_between_exchanges(limit: int) -> None:
    tokenizer = byte()
    messages = MESSAGES[:1] + MESSAGES[1:3] * 6
    pieces = encode_conversation(tokenizer, Conversation("here", messages), limit)
    assert len(pieces) > 1
    assert all(len(piece.ids) <= limit + 1 for piece in pieces)
    texts = [tokenizer.decode(piece.ids) for piece in pieces]
    if limit > 60:  # there one exchange with the system message fits
        assert all(text.startswith("System: Be brief.\nUser: What is an acorn?") for text in texts)
    counted = sum(int(piece.counts[1:].sum()) for piece in pieces)
    assert counted == encode_messages(tokenizer, Conversation("here", messages)).counts.sum()


def test_an_exchange_that_does_not_fit_is_cut() -> None:
    messages = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "1 2 3 4 5 6 7 8 9 " * 20}]
    pieces = encode_conversation(byte(), Conversation("here", messages), 100)
    whole = encode_messages(byte(), Conversation("here", messages))
    assert all(len(piece.ids) <= 101 for piece in pieces)
    assert sum(int(piece.counts[1:].sum()) for piece in pieces) == whole.counts.sum()


def test_pairs_count_the_completion_and_its_end() -> None:
    tokenizer = build_tokenizer("byte")
    (example,) = encode_pair(tokenizer, Pair("here", "2 + 2 =", " 4"), 64)
    assert tokenizer.decode(example.ids) == "2 + 2 = 4<|endoftext|>"
    assert tokenizer.decode(example.ids[example.counts]) == " 4<|endoftext|>"


# reading


def test_a_text_file_of_many_turns() -> None:
    found = [check_turns(found) for found in conversations_of_text(chat_text(), "chat.txt")]
    assert [found.messages for found in found] == many_conversations()
    assert sum(len(found.messages) for found in found) >= 200


def test_lines_of_dashes_separate_where_there_are_any() -> None:
    text = "User: a\nAssistant: b\n\nmore\n\nUser: c\nAssistant: d\n---\nSystem: s\nUser: e\nAssistant: f\n"
    first, second = conversations_of_text(text, "x")
    assert [message["content"].strip() for message in first.messages] == ["a", "b\n\nmore", "c", "d"]
    assert (second.where, len(second.messages)) == ("x, line 9", 3)


FORMATS = {
    "messages": lambda turns: {"messages": turns},
    "sharegpt": lambda turns: {
        "conversations": [
            {"from": {"user": "human", "assistant": "gpt"}.get(turn["role"], turn["role"]), "value": turn["content"]}
            for turn in turns
        ]
    },
    "parts": lambda turns: {
        "messages": [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    },
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_tables_of_messages(tmp_path, form: str, ending: str) -> None:
    rows = [FORMATS[form](turns) for turns in many_conversations()[:5]]
    path = tmp_path / f"chat.{ending}"
    path.write_text(json.dumps(rows) if ending == "json" else "\n".join(map(json.dumps, rows)), encoding="utf-8")
    data = FinetuneDataArguments(data_files=[str(path)])
    assert find_format(data) == "chat"
    assert [found.messages for found in read_conversations(data, {})] == many_conversations()[:5]


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("User: hi\nAssistant: ho\n", "chat"),
        ("\n\nSystem: s\nUser: hi\nAssistant: ho\n", "chat"),
        ("First Citizen:\nSpeak.\n", "text"),
        ("User: alone\n", "text"),
    ],
)
def test_what_a_text_file_is(tmp_path, text: str, form: str) -> None:
    path = tmp_path / "some.txt"
    path.write_text(text, encoding="utf-8")
    assert find_format(FinetuneDataArguments(text_files=[str(path)])) == form
    assert find_format(FinetuneDataArguments(text_files=[str(path)], data_format="text")) == "text"


# what is refused, by file and line


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("User: a\nAssistant: b\n\nUser: a\nUser: b\nAssistant: c\n", 5, "the user's where the assistant's turn is"),
        ("User: a\nAssistant: b\nAssistant: c\n", 3, "the assistant's where the user's turn is"),
        ("User: a\nAssistant:\n", 2, "(assistant) is empty"),
        ("User: a\nAssistant: b\n\nUser: c\n", 4, "no assistant turn"),
        ("User: a\nSystem: s\nAssistant: b\n", 2, "system's where the assistant's"),
        ("hello\nUser: a\nAssistant: b\n", 1, "begins with User:"),
    ],
)
def test_turns_that_are_wrong_are_refused(tmp_path, text: str, line: int, words: str) -> None:
    path = tmp_path / "chat.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        list(read_conversations(FinetuneDataArguments(text_files=[str(path)]), {}))
    assert str(path) in str(caught.value) and f"line {line}" in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"messages": []}', "no assistant turn"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no assistant turn"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}', "is empty"),
        ('{"messages": [{"role": "robot", "content": "a"}]}', "unknown role 'robot'"),
        ('{"messages": [{"role": "user", "content": 7}]}', "is int, not text"),
        ('{"messages": "hello"}', "no list of messages"),
        ('{"text": "hello"}', "the row has text"),
        ("{", "is not JSON"),
        ("[1]", "not an object"),
    ],
)
def test_rows_that_are_wrong_are_refused(tmp_path, row: str, words: str) -> None:
    good = json.dumps({"messages": MESSAGES})
    path = tmp_path / "chat.jsonl"
    path.write_text(f"{good}\n\n{row}\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        list(read_conversations(FinetuneDataArguments(data_files=[str(path)]), {}))
    assert f"{str(path)!r}: line 3: " in str(caught.value)
    assert words in str(caught.value)


def test_what_the_template_refuses_is_refused_with_its_place() -> None:
    tokenizer = build_tokenizer("byte")
    tokenizer.chat_template = "{{ raise_exception('no systems here') }}"
    with pytest.raises(UserError, match=r"chat\.txt, line 9.*no systems here"):
        encode_messages(tokenizer, Conversation("chat.txt, line 9", MESSAGES))


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    tokenizer = build_tokenizer("byte")
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match="rewrites earlier turns"):
        encode_messages(tokenizer, Conversation("here", MESSAGES))


def test_a_character_tokenizer_that_does_not_know_a_letter() -> None:
    tokenizer = with_template(build_tokenizer("char", lambda: iter(["abc"])))
    with pytest.raises(UserError, match="here: the tokenizer cannot encode it"):
        encode_messages(tokenizer, Conversation("here", MESSAGES))


def test_masks_are_boolean_arrays_of_the_ids_length(tokenizer) -> None:
    example = encode_messages(tokenizer, Conversation("here", MESSAGES))
    assert example.ids.shape == example.counts.shape
    assert torch.from_numpy(example.ids).dtype == torch.int64
    assert isinstance(example, Example)


# turns of tools, and templates that are no good


TOOL_TURNS = [
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "add(2, 3)"},
    {"role": "tool", "content": "RESULT 5"},
    {"role": "assistant", "content": "It is 5."},
]


def test_turns_of_tools_are_context_and_not_in_the_loss(tokenizer) -> None:
    example = encode_messages(tokenizer, Conversation("here", TOOL_TURNS))
    assert "RESULT 5" in tokenizer.decode(example.ids)
    counted = tokenizer.decode(example.ids[example.counts])
    assert "add(2, 3)" in counted and "It is 5." in counted and "RESULT" not in counted


def test_a_template_without_turns_of_tools_gives_them_as_the_users() -> None:
    tokenizer = build_tokenizer("byte")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role in ('user', 'assistant') %}{{ m.role }}: {{ m.content }}\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    example = encode_messages(tokenizer, Conversation("here", TOOL_TURNS))
    assert "user: RESULT 5\n" in tokenizer.decode(example.ids)
    assert "RESULT" not in tokenizer.decode(example.ids[example.counts])


OTHER_SHAPES = {
    "sharegpt": {"system": "s", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "openai calls": {
        "messages": [
            {"role": "developer", "content": "s"},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]},
            {"role": "ipython", "content": {"sum": 5}},
            {"role": "assistant", "content": "b"},
        ]
    },
    "sharegpt calls": {
        "conversations": [
            {"from": "human", "value": "a"},
            {"from": "function_call", "value": "add"},
            {"from": "observation", "value": "5"},
            {"from": "gpt", "value": "b"},
        ]
    },
    "trl": {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
    "a cell": {"messages": json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])},
}
ITS_ROLES = {
    "sharegpt": "system user assistant",
    "openai calls": "system user assistant tool assistant",
    "sharegpt calls": "user assistant tool assistant",
    "trl": "user assistant",
    "a cell": "user assistant",
}


@pytest.mark.parametrize("shape", OTHER_SHAPES)
def test_other_shapes_of_chats(tmp_path, shape: str) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps(OTHER_SHAPES[shape]) + "\n")
    data = FinetuneDataArguments(data_files=[str(path)])
    assert find_format(data) == "chat"
    (found,) = read_conversations(data, {})
    assert " ".join(message["role"] for message in found.messages) == ITS_ROLES[shape]
    assert found.messages[-1]["content"] == "b"


@pytest.mark.parametrize(
    ("row", "pair"),
    [
        ({"instruction": "i", "input": "x", "output": "o", "text": "t"}, ("i\n\nx\n\n", "o")),
        ({"instruction": "i", "input": None, "output": "o"}, ("i\n\n", "o")),
        ({"instruction": "i", "output": "o"}, ("i\n\n", "o")),
        ({"instruction": "i", "context": "c", "response": "o", "category": "k"}, ("i\n\nc\n\n", "o")),
        ({"question": "q", "answer": "a"}, ("q\n\n", "a")),
        ({"query": "q", "response": "a"}, ("q\n\n", "a")),
        ({"input": "q", "output": "a"}, ("q\n\n", "a")),
        ({"prompt": "p ", "response": "r"}, ("p ", "r")),
        ({"prompt": "p", "completion": " c", "instruction": "i", "output": "o"}, ("p", " c")),
    ],
)
def test_the_commonest_pairs_are_known(tmp_path, row: dict, pair: tuple) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(row) + "\n")
    data = FinetuneDataArguments(data_files=[str(path)])
    assert find_format(data) == "pairs"
    assert [tuple(found)[1:] for found in read_pairs(data, {})] == [pair]


def test_a_template_that_never_ends_is_stopped(monkeypatch) -> None:
    monkeypatch.setattr("training.model.chat_template.RENDER_SECONDS", 0.3)
    tokenizer = build_tokenizer("byte")
    tokenizer.chat_template = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(UserError, match=r"^here: the tokenizer's chat template has not come to an end in 0.3 seconds"):
        encode_messages(tokenizer, Conversation("here", MESSAGES))
    if sys.platform == "linux":
        tokenizer.chat_template = "{{ 'x' * 10**10 }}"
        with pytest.raises(UserError, match="here: the tokenizer's chat template refuses it: MemoryError"):
            encode_messages(tokenizer, Conversation("here", MESSAGES))
    tokenizer.chat_template = "{{ '' }}"
    with pytest.raises(UserError, match="here: the tokenizer's chat template leaves no answer"):
        encode_conversation(tokenizer, Conversation("here", MESSAGES), 40)
    tokenizer.chat_template = "{{ 1 // 0 }}"
    with pytest.raises(UserError, match=r"here: the tokenizer's chat template refuses it: .*zero"):
        encode_messages(tokenizer, Conversation("here", MESSAGES))
