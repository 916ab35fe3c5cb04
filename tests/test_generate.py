"""Text and figures from a run directory, held against transformers' own generate() and figures worked out by hand."""

import json
import math
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from inference import evaluate, generate
from training.data.dataset import EvaluationRows, TokenArray
from training.loop.evaluation import evaluate_rows, language_metrics
from training.model.loading import load_causal_lm
from training.model.sampling import continue_ids, encode_prompt

from .tiny_runs import BATCH, CONTEXT, grow, metrics, refused, write_text

KEYS = ["loss", "perplexity", "bits_per_byte", "token_accuracy", "tokens", "bytes"]
PROMPT = "the fox"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 40 steps, so that its model has preferences."""
    return grow(tmp_path_factory.mktemp("generate"), "--max_steps", "40", "--eval_steps", "20")


@pytest.fixture
def write(run, capsys):
    """`write(*flags) -> str`: what `acorn generate RUN --prompt …` prints, less its last line break."""

    def call(*flags: str, where: str = ".", prompt: str = PROMPT, length: int = 9) -> str:
        capsys.readouterr()
        generate.main([str(run / where), "--prompt", prompt, "--max_new_tokens", str(length), *flags])
        return capsys.readouterr().out.removesuffix("\n")

    return call


@pytest.fixture
def figures(run, capsys):
    """`figures(*flags) -> dict`: the last line of `acorn evaluate RUN …`."""

    def call(*flags: str, where: str = ".") -> dict:
        capsys.readouterr()
        evaluate.main([str(run / where), *flags])
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return call


def transformers_text(run, prompt: str = PROMPT, length: int = 9, **keywords) -> str:
    """The same by transformers alone: AutoModel, AutoTokenizer and generate()."""
    model = AutoModelForCausalLM.from_pretrained(run, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(run)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    grown = model.generate(ids, max_new_tokens=length, pad_token_id=tokenizer.eos_token_id, **keywords)
    return prompt + tokenizer.decode(grown[0, ids.shape[1] :], skip_special_tokens=True)


# generate


@pytest.mark.parametrize("where", [".", "checkpoint-20", "checkpoint-40"])
def test_greedy_is_transformers_greedy(run, write, where: str) -> None:
    assert write("--temperature", "0", where=where) == transformers_text(run / where, do_sample=False)


def test_repetition_penalty_is_transformers(run, write) -> None:
    text = write("--temperature", "0", "--repetition_penalty", "1.7")
    assert text == transformers_text(run, do_sample=False, repetition_penalty=1.7)
    assert text != write("--temperature", "0")


def test_seeds_reproduce(write) -> None:
    flags = ["--temperature", "1.5", "--top_k", "0"]
    first = write(*flags, "--seed", "1")
    assert write(*flags, "--seed", "1") == first
    assert write(*flags, "--seed", "2") != first


HOT = ["--temperature", "2"]
NARROW = [[*HOT, "--top_k", "1"], [*HOT, "--top_p", "1e-9"], ["--temperature", "1e-6"]]


@pytest.mark.parametrize("flags", NARROW, ids=" ".join)
def test_narrow_sampling_is_greedy(write, flags: list[str]) -> None:
    assert write(*flags) == write("--temperature", "0")


@pytest.mark.parametrize("settings", [{"stop_strings": ["a"]}, {"num_beams": "x"}, {"num_beams": 2}], ids=str)
def test_of_a_foreign_generation_config_the_tokens_alone_are_read(run, write, settings: dict) -> None:
    path = run / "generation_config.json"
    kept, expected = path.read_text(), write("--temperature", "0")
    try:
        path.write_text(json.dumps(json.loads(kept) | settings))
        assert write("--temperature", "0") == expected
    finally:
        path.write_text(kept)


def test_a_prompt_from_a_file(write, tmp_path) -> None:
    path = write_text(tmp_path, "the lazy\ndog", "prompt.txt")
    assert write("--temperature", "0", prompt=f"FILE:{path}") == write("--temperature", "0", prompt="the lazy\ndog")


def test_an_empty_prompt_starts_a_document(run, write) -> None:
    text = write("--temperature", "0", prompt="")
    tokenizer = AutoTokenizer.from_pretrained(run)
    assert text
    assert encode_prompt(tokenizer, "") == [tokenizer.eos_token_id]
    assert text == transformers_text(run, tokenizer.eos_token, do_sample=False).removeprefix(tokenizer.eos_token)


def test_several_samples(write) -> None:
    flags = ["--num_samples", "3", "--temperature", "1.5", "--seed", "5"]
    samples = write(*flags).split("\n" + "─" * 50 + "\n")
    assert len(set(samples)) == 3
    assert all(sample.startswith(PROMPT) for sample in samples)
    assert len(write(*flags, "--no_stream").split("\n" + "─" * 50 + "\n")) == 3


@pytest.mark.parametrize("length", [5, 9, 10, 60])
def test_streamed_is_batched(write, length: int) -> None:
    greedy = ["--temperature", "0", "--num_samples", "2"]
    streamed = write(*greedy, length=length)
    assert streamed == write(*greedy, "--no_stream", length=length)
    assert streamed.split("\n" + "─" * 50 + "\n")[0] == streamed.split("\n" + "─" * 50 + "\n")[1]


@pytest.mark.parametrize("flag", [[], ["--no_stream"]], ids=["streamed", "batched"])
def test_the_end_of_text_is_not_written_out(write, flag: list[str]) -> None:
    text = write("--temperature", "9", "--top_k", "0", *flag, length=300)  # draws among 30 tokens, nearly evenly
    assert len(text) < 300
    assert "<|endoftext|>" not in text


def test_bfloat16(write) -> None:
    forced = "--force_precision"  # on a processor that only emulates it, it is refused else
    assert write("--temperature", "0", "--dtype", "bfloat16", forced).startswith(PROMPT)


@pytest.mark.parametrize("prompt_length", [1, 31, 32])
def test_past_the_context_it_goes_on_from_the_last_half(tiny_model, ids, prompt_length: int) -> None:
    model, context = tiny_model(), 32
    model.generation_config.eos_token_id = None
    start = torch.cat((ids, ids), dim=1)[:2, :prompt_length]
    grown = continue_ids(model, start, 70, do_sample=False)
    expected, first = start, 0
    for _ in range(70):
        if expected.shape[1] - first > context:
            first = expected.shape[1] - context // 2
        best = model(expected[:, first:]).logits[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat((expected, best), dim=1)
    assert torch.equal(grown, expected)


def test_each_sample_ends_at_its_end_of_text(tiny_model, ids) -> None:
    model = tiny_model()
    free = continue_ids(model, ids[:, :4], 60, do_sample=False)
    eos = int(free[0, 30])  # a token that the first sample surely writes
    model.generation_config.eos_token_id = eos
    grown = continue_ids(model, ids[:, :4], 60, do_sample=False)
    for sample, unended in zip(grown[:, 4:].tolist(), free[:, 4:].tolist(), strict=True):
        end = sample.index(eos) if eos in sample else len(sample)
        assert sample[:end] == unended[:end]
        assert set(sample[end:]) <= {eos}


@pytest.mark.parametrize("flag", [[], ["--no_stream"]], ids=["streamed", "batched"])
def test_it_stops_at_any_of_several_ends(run, write, tmp_path, flag: list[str]) -> None:
    """Llama 3, Qwen and Gemma name a list."""
    tokenizer = AutoTokenizer.from_pretrained(run)
    free = write("--temperature", "0", length=40)
    model = AutoModelForCausalLM.from_pretrained(run, trust_remote_code=True)
    last = free.removeprefix(PROMPT)[-1]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer(last)["input_ids"][0]]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ended = PROMPT + free.removeprefix(PROMPT).split(last)[0] + last
    assert write("--temperature", "0", *flag, where=str(tmp_path), length=40) == ended


@pytest.mark.parametrize(
    ("field", "value", "ends"),
    [("eos_token_id", [], None), ("eos_token_id", [-1, 5], [5]), ("eos_token_id", "x", "refused"),
     ("bos_token_id", "x", "refused")],
)  # fmt: skip
def test_special_tokens_of_a_foreign_generation_config(run, tmp_path, field: str, value, ends) -> None:
    shutil.copytree(run, tmp_path / "model", ignore=shutil.ignore_patterns("checkpoint-*", "manifest.json"))
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    if ends == "refused":
        assert f"{field}='x'" in refused(generate.main, str(tmp_path / "model"), "--prompt", PROMPT)
        return
    generate.main([str(tmp_path / "model"), "--prompt", PROMPT, "--max_new_tokens", "2"])
    assert load_causal_lm(str(tmp_path / "model")).generation_config.eos_token_id == ends


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("temperature", "-1"),
        ("top_k", "-1"),
        ("top_p", "1.5"),
        ("top_p", "-0.5"),
        ("repetition_penalty", "0"),
        ("max_new_tokens", "0"),
        ("num_samples", "0"),
        ("dtype", "float23"),
        ("prompt", "FILE:nowhere.txt"),
    ],
)
def test_values_that_can_not_be_are_refused(run, flag: str, value: str) -> None:
    message = refused(generate.main, str(run), f"--{flag}", value)
    assert flag in message
    assert value.removeprefix("FILE:") in message or flag in ("max_new_tokens", "num_samples")


def test_a_prompt_that_is_not_utf8_is_refused(run, write, tmp_path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9")
    assert "not UTF-8 at byte 3" in refused(generate.main, str(run), "--prompt", f"FILE:{path}")
    assert "is not UTF-8" in refused(generate.main, str(run), "--prompt", "a\udcff")
    path.write_bytes("\ufeffthe fox".encode())
    assert write("--temperature", "0", prompt=f"FILE:{path}") == write("--temperature", "0", prompt="the fox")


# evaluate


def test_a_table_without_rows_is_refused(run, tmp_path) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "none.parquet")
    message = refused(evaluate.main, str(run), "--data_files", str(tmp_path / "none.parquet"))
    assert "data_files: the source holds no text at all" in message


def test_the_best_model_has_the_loss_of_its_run(run, figures) -> None:
    found = figures()
    best = min(metrics(run), key=lambda row: row["eval_loss"])
    assert list(found) == KEYS
    assert found["loss"] == pytest.approx(best["eval_loss"], rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(best["bits_per_byte"], rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    manifest = json.loads(next(run.parent.glob("corpora/*/manifest.json")).read_text())["splits"]["validation"]
    assert (found["tokens"], found["bytes"]) == (manifest["tokens"] - 1, manifest["bytes"])
    assert figures(where=f"checkpoint-{best['step']}")["loss"] == found["loss"]


def test_figures_of_any_text(run, figures, tmp_path) -> None:
    text = "the quick brown fox jumps over a lazy dog, and how vexingly"
    found = figures("--text_files", str(write_text(tmp_path, text)))
    tokenizer = AutoTokenizer.from_pretrained(run)
    ids = torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id])
    model = AutoModelForCausalLM.from_pretrained(run, trust_remote_code=True).eval()
    nats, right = 0.0, 0
    for start in range(0, len(ids) - 1, CONTEXT):
        window = ids[start : start + CONTEXT + 1]
        logits = model(window[None, :-1]).logits[0].double()
        nats += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
        right += int((logits.argmax(-1) == window[1:]).sum())
    tokens = len(ids) - 1
    assert (found["tokens"], found["bytes"]) == (tokens, len(text))
    assert found["loss"] == pytest.approx(nats / tokens, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text), rel=1e-6)
    assert found["token_accuracy"] == right / tokens


def test_the_batch_size_changes_nothing(figures) -> None:
    expected = figures()
    for size in ("1", "7", "500"):
        assert figures("--per_device_eval_batch_size", size) == pytest.approx(expected, rel=1e-6)


def test_a_shorter_window_sees_less(run, figures) -> None:
    assert figures("--block_size", "1")["tokens"] == figures()["tokens"]
    assert figures("--block_size", "1")["loss"] != figures()["loss"]
    for size in ("-1", "17"):
        assert f"block_size={size}" in refused(evaluate.main, str(run), "--block_size", size)


def test_evaluation_leaves_the_mode_of_the_model(tiny_model) -> None:
    model = tiny_model(attention_dropout=0.5).train()
    rows = EvaluationRows(TokenArray(torch.arange(60).numpy()), CONTEXT)
    first = evaluate_rows(model, rows, 60, BATCH)
    assert model.training
    assert evaluate_rows(model, rows, 60, BATCH) == first  # without dropout


def test_metrics_by_hand() -> None:
    found = language_metrics(nats=[2.0, 4.0], right=[1, 2], tokens=[2, 4], num_bytes=12)
    assert found == pytest.approx(
        {"loss": 1.0, "perplexity": math.e, "bits_per_byte": 0.5 / math.log(2), "token_accuracy": 0.5}
    )
    assert math.isinf(language_metrics([1e4], [0], [1], 1)["perplexity"])


def test_nothing_to_evaluate_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to evaluate"):
        language_metrics([], [], [], 12)


def test_the_results_are_kept_where_asked(run, figures, tmp_path) -> None:
    results = figures("--save", str(tmp_path / "kept" / "results.json"))
    kept = json.loads((tmp_path / "kept" / "results.json").read_text(encoding="utf-8"))
    assert {name: kept[name] for name in KEYS} == results
    assert kept["model"] == str(run) and kept["_timestamp"] and kept["_evaluate_version"]
    assert "--save=" in refused(evaluate.main, str(run), "--save", str(run / "recipe.yaml" / "below"))
    assert "is there already" in refused(evaluate.main, str(run), "--save", str(run / "config.json"))
