"""generate()'s strategies by their flags, against transformers' own; batches, drafts, stop strings, files."""

import io
import json
import re
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, set_seed

from inference import generate
from inference.decoding.batches import Job
from inference.decoding.batches import grow as grow_samples
from inference.decoding.strategies import DEFAULTS, STRATEGIES, generate_arguments, settle
from modeling import GPTConfig, GPTForCausalLM
from training.model.loading import load_model_and_tokenizer
from training.model.sampling import TextPrinter, stop_tokens

from .tiny_runs import TEXT, grow, refused

PROMPT, LENGTH, SEED = "the fox", 9, 7
DRAWN = {"do_sample": True, "temperature": 0.8, "top_k": 200}
WIDE = {"do_sample": True, "temperature": 1.5, "top_k": 0}
WIDE_FLAGS = ["--temperature", "1.5", "--top_k", "0"]
GREEDY = ["--temperature", "0"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with `run`, `small` (a smaller one with its tokenizer) and `other` (the same with another tokenizer)."""
    folder = tmp_path_factory.mktemp("strategies")
    grow(folder, "--max_steps", "40", "--eval_steps", "20")
    grow(folder, "--max_steps", "20", "--eval_steps", "20", "--n_layer", "1", name="small")
    shutil.copytree(folder / "small", folder / "other", ignore=shutil.ignore_patterns("checkpoint-*", "manifest.json"))
    path = folder / "other" / "tokenizer.json"
    path.write_text(path.read_text().replace('"q":', '"Q":'))
    return folder


@pytest.fixture(scope="module")
def oracle(runs):
    """(model, tokenizer) by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(runs / "run", trust_remote_code=True).eval()
    return model, AutoTokenizer.from_pretrained(runs / "run")


@pytest.fixture
def write(runs, capsys):
    """`write(*flags) -> str`: what `acorn generate RUN --prompt …` prints, less its last line break."""

    def call(*flags: str, prompt: str | None = PROMPT, length: int = LENGTH) -> str:
        capsys.readouterr()
        prompted = [] if prompt is None else ["--prompt", prompt]
        generate.main([str(runs / "run"), *prompted, "--max_new_tokens", str(length), "--seed", str(SEED), *flags])
        return capsys.readouterr().out.removesuffix("\n")

    return call


@pytest.fixture
def job(runs):
    """`job(**values) -> Job`: a job of these strategies."""
    model, tokenizer = load_model_and_tokenizer(str(runs / "run"))

    def build(**values) -> Job:
        own = {name: values.pop(name) for name in ("num_samples", "stop_strings", "max_new_tokens") if name in values}
        own = {"max_new_tokens": 20, "seed": SEED} | own
        arguments = generate_arguments(settle(values))
        return Job(model=model, tokenizer=tokenizer, ends=stop_tokens(model), generation=arguments, **own)

    return build


# ---- each strategy

CASES = {  # flags: generate()'s arguments
    "--temperature 0": {"do_sample": False},
    "--do_sample false": {"do_sample": False},
    "--seed 7": DRAWN,
    "--temperature 1.5 --top_k 0": WIDE,
    "--top_k 3 --temperature 1.5": WIDE | {"top_k": 3},
    "--top_p 0.7": DRAWN | {"top_p": 0.7},
    "--min_p 0.2": DRAWN | {"min_p": 0.2},
    "--top_h 0.5": DRAWN | {"top_h": 0.5},
    "--typical_p 0.6": DRAWN | {"typical_p": 0.6},
    "--epsilon_cutoff 0.05": DRAWN | {"epsilon_cutoff": 0.05},
    "--eta_cutoff 0.05": DRAWN | {"eta_cutoff": 0.05},
    "--num_beams 3": {"do_sample": False, "num_beams": 3},
    "--num_beams 3 --length_penalty -2": {"do_sample": False, "num_beams": 3, "length_penalty": -2.0},
    "--num_beams 3 --early_stopping never": {"do_sample": False, "num_beams": 3, "early_stopping": "never"},
    "--num_beams 3 --temperature 1.5 --top_k 0": WIDE | {"num_beams": 3},
    "--temperature 0 --repetition_penalty 1.7": {"do_sample": False, "repetition_penalty": 1.7},
    "--temperature 0 --no_repeat_ngram_size 1": {"do_sample": False, "no_repeat_ngram_size": 1},
    "--temperature 0 --encoder_repetition_penalty 5": {"do_sample": False, "encoder_repetition_penalty": 5.0},
    "--temperature 0 --encoder_no_repeat_ngram_size 1": {"do_sample": False, "encoder_no_repeat_ngram_size": 1},
    "--temperature 0 --suppress_tokens [2,5]": {"do_sample": False, "suppress_tokens": [2, 5]},
    "--temperature 0 --begin_suppress_tokens [2,5]": {"do_sample": False, "begin_suppress_tokens": [2, 5]},
    "--temperature 0 --bad_words_ids [[2],[5,6]]": {"do_sample": False, "bad_words_ids": [[2], [5, 6]]},
    "--temperature 0 --min_new_tokens 9": {"do_sample": False, "min_new_tokens": 9},
}


@pytest.mark.parametrize("flags", CASES)
def test_each_strategy_is_transformers_own(flags: str, write, oracle) -> None:
    model, tokenizer = oracle
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    set_seed(SEED)
    settings = {"max_new_tokens": LENGTH, "pad_token_id": tokenizer.eos_token_id, "top_k": 0} | CASES[flags]
    grown = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    expected = PROMPT + tokenizer.decode(grown[0, ids.shape[1] :], skip_special_tokens=True)
    flags = flags.removeprefix("--seed 7").split()
    assert write(*flags) == expected
    assert write(*flags, "--no_stream") == expected


def test_every_strategy_has_a_case_or_a_test_of_its_own() -> None:
    tested = " ".join(CASES)
    own = {"max_new_tokens", "max_time", "stop_strings", "num_return_sequences", "prompt_lookup_num_tokens"}
    own |= {name for name, strategy in STRATEGIES.items() if strategy.needs in ("lookup", "assistant")}
    assert {name for name in STRATEGIES if f"--{name} " not in f"{tested} "} == own


def test_the_best_beams(write, oracle) -> None:
    model, tokenizer = oracle
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    settings = {"num_beams": 4, "num_return_sequences": 3, "do_sample": False, "max_new_tokens": LENGTH}
    grown = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **settings)
    lines = write("--num_beams", "4", "--num_return_sequences", "3", "--json").splitlines()
    texts = [tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True) for row in grown]
    assert [json.loads(line)["text"] for line in lines] == texts


# ---- batches

STARTS = [TEXT[place : place + 1 + place % 15] for place in range(0, 16 * 31, 31)]  # ragged, up to the whole context
STRATEGY = [
    {"temperature": 0},
    {"temperature": 1.5, "num_samples": 2},
    {"temperature": 1.5, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    {"num_beams": 3, "num_samples": 2},
]


@pytest.mark.parametrize("values", STRATEGY, ids=str)
def test_sixteen_ragged_prompts_are_each_what_they_are_alone(values: dict, job) -> None:
    """Past the context too: it has 16 tokens."""
    whole = job(**dict(values))
    rows = [whole.tokenizer(start)["input_ids"] for start in STARTS]
    assert len({len(row) for row in rows}) > 10
    together = grow_samples(whole, rows)
    assert together == [grow_samples(whole, [row])[0] for row in rows]
    assert all(len(samples) == values.get("num_samples", 1) for samples in together)


def test_the_nth_sample_has_the_nth_seed(write) -> None:
    three = write(*WIDE_FLAGS, "--num_samples", "3").split("\n" + "─" * 50 + "\n")
    assert write(*WIDE_FLAGS, "--num_samples", "3", "--no_stream").split("\n" + "─" * 50 + "\n") == three
    assert len(set(three)) == 3


# ---- drafts


@pytest.mark.parametrize("draft", ["lookup", "assistant", "assistant_constant"])
@pytest.mark.parametrize("length", [8, 60])
def test_drafts_write_what_greedy_writes(draft: str, length: int, runs, write, capsys) -> None:
    flags = {
        "lookup": ["--prompt_lookup_num_tokens", "3", "--max_matching_ngram_size", "3"],
        "assistant": ["--assistant_model", str(runs / "small")],
    }
    flags["assistant_constant"] = [*flags["assistant"], "--num_assistant_tokens", "3"]
    flags["assistant_constant"] += ["--assistant_confidence_threshold", "0"]
    greedy = write(*GREEDY, length=length)
    generate.main([str(runs / "run"), "--prompt", PROMPT, "--max_new_tokens", str(length), *GREEDY, *flags[draft]])
    printed = capsys.readouterr()
    assert printed.out == greedy + "\n"
    numbers = re.findall(r"drafts: (\d+) of (\d+) .*; (\d+) tokens in (\d+) forward passes", printed.err)[0]
    accepted, drafted, tokens, passes = map(int, numbers)
    assert accepted + passes == tokens == length
    assert 0 <= accepted <= drafted
    assert draft != "assistant_constant" or passes < length


def test_a_draft_of_another_vocabulary_is_refused(runs) -> None:
    message = refused(generate.main, str(runs / "run"), "--assistant_model", str(runs / "other"))
    assert "its vocabulary is another one" in message


def test_a_draft_of_a_shorter_context_is_refused(runs, tmp_path) -> None:
    shutil.copytree(runs / "small", tmp_path / "short", ignore=shutil.ignore_patterns("checkpoint-*", "manifest.json"))
    config = GPTConfig.from_pretrained(runs / "small")
    config.max_position_embeddings = 8
    GPTForCausalLM(config).save_pretrained(tmp_path / "short")
    message = refused(generate.main, str(runs / "run"), "--assistant_model", str(tmp_path / "short"))
    assert "its context of 8 tokens is shorter" in message


# ---- where a text ends


@pytest.mark.parametrize("length", [9, 60])
def test_stop_strings_over_token_borders(length: int, write) -> None:
    """The tokens are characters, so that every longer string lies over borders; 60 tokens pass the context."""
    free = write(*WIDE_FLAGS, length=length).removeprefix(PROMPT)
    for first in range(1, len(free) - 3, 1 + len(free) // 4):
        stops = [free[first : first + 3], "nowhere to be found"]
        expected = PROMPT + free[: free.find(stops[0])]
        for flags in ([], ["--no_stream"]):
            assert write(*WIDE_FLAGS, "--stop_strings", *stops, *flags, length=length) == expected
        line = json.loads(write(*WIDE_FLAGS, "--stop_strings", *stops, "--json", length=length))
        assert (PROMPT + line["text"], line["finish_reason"]) == (expected, "stop")
        assert len(line["tokens"]) == len(line["text"]) + 3


def test_a_stop_string_that_began_in_the_prompt_is_none(write) -> None:
    free = write(*GREEDY)
    border = PROMPT[-1] + free[len(PROMPT)]
    if border not in free[len(PROMPT) :]:
        assert write(*GREEDY, "--stop_strings", border) == free


def test_stop_strings_end_each_row_and_each_draft(job) -> None:
    free = grow_samples(job(temperature=0), [[5, 6], [9, 9, 9]])
    stop = free[0][0].text[4:6]
    for values in ({}, {"prompt_lookup_num_tokens": 3}):
        ended = grow_samples(job(temperature=0, stop_strings=[stop], **values), [[5, 6], [9, 9, 9]])
        for [sample], [whole] in zip(ended, free, strict=True):
            assert sample.text == whole.text.split(stop)[0]


def test_what_may_become_a_stop_string_is_held_back(oracle) -> None:
    tokenizer, written = oracle[1], []
    ids = tokenizer("a fox jumps")["input_ids"]
    printer = TextPrinter(tokenizer, ids[:1], written.append, stop_strings=["fog", "jx"])
    printer.is_prompt_next = False
    for token in ids[1:]:
        printer.put(torch.tensor([token]))
        assert "fo" not in written
    printer.finish()
    assert "".join(written) == " fox jumps"


def test_ignoring_the_end_of_text(write) -> None:
    hot = ["--temperature", "9", "--top_k", "0"]
    assert json.loads(write(*hot, "--json", length=300))["finish_reason"] == "stop"
    line = json.loads(write(*hot, "--json", "--ignore_eos", length=300))
    assert (len(line["tokens"]), line["finish_reason"]) == (300, "length")
    assert "<|endoftext|>" not in line["text"]


# ---- files


def test_a_generation_config_is_taken_as_transformers_takes_it(write, oracle, tmp_path) -> None:
    model, tokenizer = oracle
    config = {
        "do_sample": True,
        "temperature": 1.3,
        "top_p": 0.8,
        "eos_token_id": [0, 4],
        "transformers_version": "5.1",
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    set_seed(SEED)
    theirs = GenerationConfig.from_pretrained(tmp_path, max_new_tokens=LENGTH, pad_token_id=0)
    grown = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=theirs)
    expected = PROMPT + tokenizer.decode(grown[0, ids.shape[1] :], skip_special_tokens=True)
    given = ["--generation_config", str(tmp_path / "generation_config.json")]
    assert write(*given) == expected
    assert write(*given, *GREEDY).startswith(write(*GREEDY)[: len(PROMPT) + 1])
    assert write(*given, "--num_beams", "2")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"temprature": 1}', "did you mean 'temperature'?"),
        ('{"temperature": 0.5}', "generation_config: temperature=0.5: has no effect"),
        ('{"do_sample": true, "top_p": 1.5}', "top_p=1.5: must be"),
        ('{"top_k": "many"}', "top_k=many: must be a whole number"),
        ('{"num_beam_groups": 2}', "transformers-community/group-beam-search"),
        ('{"max_length": 20}', "give max_new_tokens"),
        ('{"watermarking_config": {}}', "does not do this"),
        ('{"eos_token_id": "x"}', "eos_token_id=x"),
        ("[]", "is damaged"),
        ("{", "is damaged"),
    ],
)
def test_a_bad_generation_config(content: str, said: str, runs, tmp_path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(content)
    message = refused(generate.main, str(runs / "run"), "--generation_config", str(path))
    assert said in message
    assert str(path) in message or "generation_config: " in message


def test_many_prompts_as_lines_of_json(write, tmp_path, monkeypatch) -> None:
    rows = [{"id": 3, "prompt": "the"}, {"prompt": ""}, {"prompt": "lazy dog, and ho", "topic": {"a": 1}}]
    lines = "\n\n".join(map(json.dumps, rows)) + "\n"
    (tmp_path / "prompts.jsonl").write_text(lines)
    flags, batched = ["--num_samples", "2"], ["--batch_size", "2"]
    write(
        "--prompts",
        str(tmp_path / "prompts.jsonl"),
        "--output",
        str(tmp_path / "out.jsonl"),
        *flags,
        *batched,
        prompt=None,
    )
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    expected = [json.loads(line) for row in rows for line in write("--json", *flags, prompt=row["prompt"]).splitlines()]
    assert found == [line | rows[place // 2] for place, line in enumerate(expected)]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    assert write("--prompts", "-", "--json", *flags, *batched, prompt=None).splitlines()[0] == json.dumps(found[0])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode())))
    assert write(*GREEDY, prompt="-") == write(*GREEDY)


@pytest.mark.parametrize("length", [5, 40])
def test_log_probabilities_are_the_models(length: int, write, oracle) -> None:
    line = json.loads(write(*WIDE_FLAGS, "--json", "--logprobs", length=length))
    ids = torch.tensor([*oracle[1](PROMPT)["input_ids"], *line["tokens"]])
    expected, first = [], 0
    for place in range(len(PROMPT), len(ids)):
        if place - first > 16:
            first = place - 8
        logits = oracle[0](ids[None, first:place]).logits[0, -1]
        expected.append(logits.log_softmax(-1)[ids[place]].item())
    assert line["logprobs"] == pytest.approx(expected, abs=1e-4)


def test_a_file_that_is_there_is_not_written_over(runs, tmp_path) -> None:
    path = tmp_path / "kept.jsonl"
    path.write_text("kept")
    assert "is there already" in refused(generate.main, str(runs / "run"), "--output", str(path))
    assert path.read_text() == "kept"
    assert "No such file" in refused(generate.main, str(runs / "run"), "--output", str(tmp_path / "no" / "x.jsonl"))


# ---- what does not go together


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--temperature 0 --top_p 0.9", "top_p=0.9: has no effect without sampling"),
        ("--temperature 0 --do_sample true", "leave one out"),
        ("--do_sample false --temperature 0.5", "temperature=0.5: has no effect without sampling"),
        ("--top_p 0", "top_p=0.0: must be above 0"),
        ("--top_p 1.5", "top_p=1.5: must be above 0"),
        ("--top_k x", "top_k=x: must be a whole number"),
        ("--length_penalty 2", "length_penalty=2.0: has no effect without beams"),
        ("--early_stopping maybe --num_beams 2", "must be true, false or never"),
        ("--num_beams 2 --num_return_sequences 3", "take more --num_beams"),
        ("--num_beams 2 --prompt_lookup_num_tokens 3", "do not go together"),
        ("--num_beams 2 --assistant_model x", "do not go together"),
        ("--prompt_lookup_num_tokens 3 --assistant_model x", "two kinds of drafts"),
        ("--num_assistant_tokens 3", "has no effect without a draft model"),
        ("--max_matching_ngram_size 3", "has no effect without prompt lookup"),
        ("--min_new_tokens 5 --max_new_tokens 4", "must be at least min_new_tokens=5"),
        ("--num_beam_groups 2", "group-beam-search"),
        ("--penalty_alpha 0.6", "contrastive-search"),
        ("--dola_layers high", "dola"),
        ("--max_length 9", "give max_new_tokens"),
        ("--logprobs", "has no effect on text"),
        ("--batch_size 2", "has no effect without --prompts"),
        ("--json --output x.jsonl", "give one of them"),
        ("--prompt a --prompts b", "give one of them"),
        ("--prompts nowhere.jsonl", "No such file"),
        ("--num_samples 2 --num_return_sequences 2", "two names of one number"),
        ("--beyond_context far", "choose from window, extrapolate"),
        ("--beyond_context extrapolate", "positions are learned"),
        ("--suppress_tokens [999]", "has no token 999"),
        ("--suppress_tokens 5", "must be a list of token ids"),
        ("--bad_words_ids [[]]", "must be a list of token ids"),
        ("--generation_config nowhere.json", "there is no such file"),
        ("--no_repeat_ngram_size 1 --ignore_eos", "too few tokens are left"),
        ("--no_repeat_ngram_size 1 --ignore_eos --temperature 0", "too few tokens are left"),
        ("--prompt_lookup_num_tokens 3 --repetition_penalty 1.2", "past the model's context"),
        ("--prompt thequickbrownfoxjumpsover", "25 tokens do not fit"),
        ("--tempreature 1", "did you mean '--temperature'?"),
    ],
)
def test_contradictions_are_refused(flags: str, said: str, runs) -> None:
    assert said in refused(generate.main, str(runs / "run"), *flags.split())


def test_the_defaults_are_nanogpts() -> None:
    assert settle({}) == DEFAULTS
    assert settle({"num_beams": 2})["do_sample"] is False
    assert settle({"num_beams": 2, "top_p": 0.9})["do_sample"] is True
