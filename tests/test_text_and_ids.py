"""One way from text to ids and back, whoever asks: over a matrix of tokenizers."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from finetune.chat_files import Conversation, Pair
from finetune.data import as_prompt, encode_conversation, encode_pair, with_template
from inference import evaluate, generate
from training.data.encoding import encode_documents
from training.data.tokenizers import add_nothing, begin_ids
from training.model.sampling import Rendered, TextPrinter, continuations, decode_continuation, encode_prompt
from training.model.sizes import context_of

from .tiny_runs import grow, metrics
from .tokenizer_matrix import BEGINNING, LOSSY, TEXT, TOKENIZERS

PROMPTS = ["the quick", "the", "jumps over ", "lazy dog\n", "  and", "The END."]


@pytest.fixture(params=TOKENIZERS)
def name(request) -> str:
    return request.param


@pytest.fixture
def tokenizer(name: str):
    return TOKENIZERS[name]()


def raw(tokenizer, text: str) -> list[int]:
    """What pretraining makes of a document."""
    return encode_documents(tokenizer, [text])[0].tolist()


def test_a_prompt_begins_as_the_tokenizer_begins_and_never_ends(name: str, tokenizer) -> None:
    for prompt in PROMPTS:
        begin = [tokenizer.bos_token_id] if name in BEGINNING else []
        assert begin_ids(tokenizer) == begin
        assert encode_prompt(tokenizer, prompt) == begin + raw(tokenizer, prompt)
        assert encode_prompt(tokenizer, "<s>" * bool(begin) + prompt)[: len(begin)] == begin  # spelled out: once


def test_an_empty_prompt_starts_a_document(name: str, tokenizer) -> None:
    starts = tokenizer.bos_token_id if name in BEGINNING else tokenizer.eos_token_id
    assert encode_prompt(tokenizer, "") == [starts]


def test_a_tokenizer_that_adds_nothing_adds_nothing_after_it_was_saved(tokenizer, tmp_path) -> None:
    add_nothing(tokenizer).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for prompt in PROMPTS:
        expected = raw(tokenizer, prompt)
        assert loaded(prompt)["input_ids"] == tokenizer(prompt)["input_ids"] == expected
        assert encode_prompt(loaded, prompt) == expected


def test_pairs_begin_as_their_prompt_does_alone(tokenizer) -> None:
    (example,) = encode_pair(tokenizer, Pair("pairs:1", "the quick", " fox"), 1000)
    asked = encode_prompt(tokenizer, "the quick")
    assert example.ids.tolist() == asked + raw(tokenizer, " fox") + [tokenizer.eos_token_id]
    assert example.counts.tolist() == [False] * len(asked) + [True] * (len(example.ids) - len(asked))


def test_chats_begin_as_their_question_does_alone(name: str, tokenizer) -> None:
    if name == "char":
        pytest.skip("the template's words are not among its characters")
    tokenizer = with_template(tokenizer)
    messages = [{"role": "user", "content": "quick"}, {"role": "assistant", "content": "zebras"}]
    (example,) = encode_conversation(tokenizer, Conversation("chat:1", messages), 1000)
    question = as_prompt(tokenizer, "quick")
    asked = encode_prompt(tokenizer, question)
    assert example.ids[: len(asked)].tolist() == asked
    assert asked == encode_prompt(tokenizer, str(question))  # as `acorn generate` is given it
    assert encode_prompt(tokenizer, Rendered("zebras")) == raw(tokenizer, "zebras")


def test_a_continuation_is_what_follows(name: str, tokenizer) -> None:
    """The spaces where the two meet are kept, whatever the tokenizer."""
    ids = encode_prompt(tokenizer, TEXT)
    whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert whole == TEXT or name in LOSSY
    for start in range(1, len(ids)):
        before = tokenizer.decode(ids[:start], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert before.rstrip("\ufffd") + decode_continuation(tokenizer, ids, start) == whole


@pytest.mark.parametrize("start", [1, 3, 20])
def test_streamed_is_the_whole(tokenizer, start: int) -> None:
    """Token by token, over two windows of generate()."""
    ids = encode_prompt(tokenizer, TEXT)
    written: list[str] = []
    printer = TextPrinter(tokenizer, ids[:start], written.append)
    for window in (ids[start : start + 9], ids[start + 9 :]):
        printer.put(torch.tensor([ids[:start]]))  # generate() hands over the prompt first
        for number in window:
            printer.put(torch.tensor([number]))
        printer.end()
    printer.finish()
    assert "".join(written) == decode_continuation(tokenizer, ids, start)


def test_a_character_of_several_tokens_is_written_when_it_is_whole() -> None:
    tokenizer = TOKENIZERS["byte"]()
    ids, written = encode_prompt(tokenizer, "aé→b"), []
    printer = TextPrinter(tokenizer, ids[:1], written.append)
    for number in ids:
        printer.put(torch.tensor([number]))
    assert written == ["é", "→", "b"]


def test_rows_end_at_any_of_the_stops() -> None:
    tokenizer = TOKENIZERS["byte"]()
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[256, ord("!")]))
    rows = torch.tensor([[*b"ab!!!!"], [*b"abcdef"], [ord("a"), ord("b"), 256, 256, 256, 256]])
    assert continuations(model, tokenizer, rows, 1) == ["b!", "bcdef", "b"]


# whole runs


@pytest.mark.parametrize("name", ["adds_both", "sentence_piece_both"])
def test_a_run_reads_its_prompt_as_it_was_trained(name: str, tmp_path, capsys) -> None:
    """What travels with the model adds nothing, so that transformers, too, reads a prompt as training did."""
    TOKENIZERS[name]().save_pretrained(tmp_path / "tokenizer")
    run = grow(tmp_path, "--tokenizer", str(tmp_path / "tokenizer"))
    tokenizer = AutoTokenizer.from_pretrained(run)
    ids = tokenizer("the quick", return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == raw(TOKENIZERS[name](), "the quick")
    model = AutoModelForCausalLM.from_pretrained(run, trust_remote_code=True).eval()
    grown = model.generate(ids, max_new_tokens=6, do_sample=False)[0].tolist()
    expected = "the quick" + decode_continuation(tokenizer, grown, ids.shape[1])
    for flag in ([], ["--no_stream"]):
        capsys.readouterr()
        generate.main([str(run), "--prompt", "the quick", "--max_new_tokens", "6", "--temperature", "0", *flag])
        assert capsys.readouterr().out == expected + "\n"
    evaluate.main([str(run)])
    assert str(min(row["eval_loss"] for row in metrics(run)))[:6] in capsys.readouterr().out


# the context


@pytest.mark.parametrize("key", "max_position_embeddings n_positions n_ctx seq_length max_seq_len".split())
def test_the_context_has_many_names(key: str) -> None:
    config = PreTrainedConfig(**{key: 77})
    assert context_of(config) == context_of(config.to_dict()) == 77
    assert context_of(PreTrainedConfig()) == context_of({}) == 2048 and context_of({}, None) is None
    assert context_of({"text_config": {key: 77}}) == 77


def test_the_context_of_a_model_of_more_than_text() -> None:
    from transformers import Gemma3Config

    assert context_of(Gemma3Config(text_config={"max_position_embeddings": 99})) == 99
