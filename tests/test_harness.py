"""`acorn evaluate --tasks`: EleutherAI's harness on tasks made here, against transformers alone."""

import functools
import json
import math
from importlib.util import find_spec

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import acorn

from .hub_server import card_errors
from .tiny_bases import our_model, save, stock_model
from .tiny_runs import grow, refused, write_text

TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
target_delimiter: ""
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: {target}
metadata: {{version: 2.0}}
{more}
"""
QUESTIONS = [
    {"question": f"{word} is", "choices": [" good", " bad", " neither"], "answer": number % 3, "text": f"the {word}"}
    for number, word in enumerate(["fox", "dog", "zebra", "quick", "lazy"])
]


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """Tasks of three kinds on a file of questions, and models to ask."""
    place = tmp_path_factory.mktemp("harness")
    tasks = place / "tasks"
    tasks.mkdir()
    write_text(tasks, "\n".join(map(json.dumps, QUESTIONS)), "questions.jsonl")
    kinds = {
        "acorn_choice": ("multiple_choice", "answer", "doc_to_choice: choices\nmetric_list: [{metric: acc}]"),
        "acorn_rolling": ("loglikelihood_rolling", '"{{text}}"', "metric_list: [{metric: bits_per_byte}]"),
        "acorn_write": (
            "generate_until", '" good"',
            "generation_kwargs: {until: ['.'], max_gen_toks: 6}\nmetric_list: [{metric: exact_match}]",
        ),
        "acorn_long": (
            "generate_until", '" good"', "generation_kwargs: {max_gen_toks: 64}\nmetric_list: [{metric: exact_match}]",
        ),
    }  # fmt: skip
    for name, (kind, target, more) in kinds.items():
        data = json.dumps(str(tasks / "questions.jsonl"))
        write_text(tasks, TASK.format(name=name, data=data, kind=kind, target=target, more=more), f"{name}.yaml")
    save(stock_model(), place / "gpt2")
    save(our_model(position_encoding="rope"), place / "gpt")
    adapted = get_peft_model(stock_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    adapted.peft_config["default"].base_model_name_or_path = str(place / "gpt2")
    adapted.save_pretrained(place / "prompt")
    grow(place)
    return place


@functools.cache
def managers(**options):
    from lm_eval.tasks.manager import TaskManager

    return TaskManager(**options)


@pytest.fixture
def folder(grown, monkeypatch):
    monkeypatch.chdir(grown)
    if find_spec("lm_eval") is not None:
        import lm_eval.tasks

        monkeypatch.setattr(lm_eval.tasks, "TaskManager", managers)  # reading 14,000 tasks takes five seconds
    return grown


def evaluate(capsys, *argv: str) -> dict:
    capsys.readouterr()
    acorn.call_verb(["evaluate", *argv, "--include_path", "tasks"])
    return json.loads(capsys.readouterr().out)  # the one line, whatever lm_eval prints


@torch.no_grad()
def nats(model, ids: list[int], count: int) -> float:
    """Of the last `count` tokens."""
    logits = model(torch.tensor([ids[:-1]])).logits[0, -count:].log_softmax(-1)
    return -logits.gather(1, torch.tensor(ids[-count:])[:, None]).sum().item()


@pytest.mark.clients
@pytest.mark.parametrize("name", ["gpt2", "gpt", "prompt"])
def test_the_figures_are_those_of_the_model(folder, capsys, name: str) -> None:
    found = evaluate(capsys, name, "--tasks", "acorn_choice, acorn_r*,acorn_write", "--num_fewshot", "0")
    if name == "prompt":
        from peft import AutoPeftModelForCausalLM

        wrapped = AutoPeftModelForCausalLM.from_pretrained(name)
        model, home = (lambda ids: SimpleLogits(wrapped(ids).logits[:, 5:])), "gpt2"
    else:
        model, home = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True), name
    tokenizer = AutoTokenizer.from_pretrained(home, trust_remote_code=True)
    right, bits, size = 0, 0.0, 0
    for question in QUESTIONS:
        asked = tokenizer(question["question"])["input_ids"]
        answers = [tokenizer(choice)["input_ids"] for choice in question["choices"]]
        losses = [nats(model, asked + answer, len(answer)) for answer in answers]
        right += losses.index(min(losses)) == question["answer"]
        text = tokenizer(question["text"])["input_ids"]
        bits += nats(model, [tokenizer.eos_token_id, *text], len(text)) / math.log(2)
        size += len(question["text"])
    assert found["results"]["acorn_choice"]["acc,none"] == pytest.approx(right / len(QUESTIONS))
    assert found["results"]["acorn_rolling"]["bits_per_byte,none"] == pytest.approx(bits / size, rel=1e-5)
    assert 0 <= found["results"]["acorn_write"]["exact_match,none"] <= 1
    assert found["n-samples"]["acorn_choice"] == {"original": 5, "effective": 5}
    assert found["n-shot"]["acorn_choice"] == 0 and found["lm_eval_version"]


class SimpleLogits:
    def __init__(self, logits):
        self.logits = logits


@pytest.mark.clients
def test_a_runs_results_are_kept_and_reach_its_card(folder, capsys) -> None:
    """A character model, which has no token that ends a text."""
    argv = "run --tasks acorn_choice --update_card --per_device_eval_batch_size 2 --num_fewshot 1".split()
    found = evaluate(capsys, *argv, "--save", "kept.json")
    evaluate(capsys, *argv)
    text = (folder / "run" / "README.md").read_text(encoding="utf-8")
    assert card_errors(text) == []
    results = [result for result in ModelCard(text).data.eval_results if result.dataset_name == "acorn_choice"]
    assert [(result.metric_type, result.metric_args) for result in results] == [("acc", {"num_few_shot": 1})]
    assert results[0].metric_value == pytest.approx(found["results"]["acorn_choice"]["acc,none"], abs=1e-6)
    assert "lm-evaluation-harness" in results[0].source_url
    kept = json.loads((folder / "kept.json").read_text())
    assert kept["results"] == found["results"] and kept["tasks"] == "acorn_choice" and kept["_timestamp"]
    assert (
        evaluate(capsys, "run", "--tasks", "acorn_choice", "--limit", "2")["n-samples"]["acorn_choice"]["effective"]
        == 2
    )


@pytest.mark.clients
@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--tasks", "acorn_choise"], "unknown task 'acorn_choise': did you mean 'acorn_choice' or"),
        (["--tasks", "hellaswagg"], "did you mean 'hellaswag"),
        (["--tasks", "acorn_choice,,nonsense_of_mine_"], "unknown task 'nonsense_of_mine_'"),
        (["--tasks", ","], "--tasks: names no task"),
        (["--tasks", "lambada_openai"], "what a task reads must be here, or be reached on the Hub"),
        (["--tasks", "acorn_odd*"], "unknown task 'acorn_odd*'"),
        (["--tasks", "acorn_long"], "--tasks acorn_long: AssertionError: Invalid configuration: requested max tokens"),
        (["--tasks", "acorn_choice", "--apply_chat_template"], "--apply_chat_template: gpt2 has no chat template"),
        (["--tasks", "acorn_choice", "--block_size", "65"], "block_size=65"),
    ],
)
def test_what_the_harness_cannot_do_is_one_line(folder, argv: list[str], named: str) -> None:
    assert named in refused(acorn.call_verb, "evaluate", "gpt2", *argv, "--include_path", "tasks")


@pytest.mark.clients
def test_a_text_that_a_vocabulary_lacks(folder, tmp_path) -> None:
    odd = [question | {"question": "Ω is"} for question in QUESTIONS]
    data = write_text(tmp_path, "\n".join(map(json.dumps, odd)), "odd.jsonl")
    more = "doc_to_choice: choices\nmetric_list: [{metric: acc}]"
    task = TASK.format(name="odd", data=json.dumps(str(data)), kind="multiple_choice", target="answer", more=more)
    write_text(tmp_path, task, "odd.yaml")
    message = refused(acorn.call_verb, "evaluate", "run", "--tasks", "odd", "--include_path", str(tmp_path))
    assert "cannot encode a text of the task" in message


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--tasks", "x", "--text_files", "a.txt"], "--text_files: cannot be combined with --tasks"),
        (["--tasks", "x", "--stride", "4"], "--stride: cannot be combined with --tasks"),
        (["--tasks", "x", "--data_dir", "a"], "--data_dir: cannot be combined with --tasks"),
        (["--tasks", "x", "--by_position", "a.png"], "--by_position: cannot be combined with --tasks"),
        (["--tasks", "x", "--limit", "0"], "limit=0.0: must be a share between 0 and 1, or a whole number from 1"),
        (["--tasks", "x", "--limit", "2.5"], "limit=2.5"),
        (["--tasks", "x", "--num_fewshot", "-1"], "num_fewshot=-1: must be a whole number from 0"),
        (["--num_fewshot", "1"], "--num_fewshot: has no effect without --tasks"),
        (["--limit", "5"], "--limit: has no effect without --tasks"),
        (["--tasks", "x", "--limit", "5", "--update_card"], "--update_card: results on a part"),
    ],
)
def test_flags_that_do_not_go_together(folder, argv: list[str], named: str) -> None:
    assert named in refused(acorn.call_verb, "evaluate", "gpt2", *argv)


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm_eval is installed")
def test_a_missing_package_names_the_extra(folder) -> None:
    assert "pip install -e '.[harness]'" in refused(acorn.call_verb, "evaluate", "gpt2", "--tasks", "hellaswag")
