"""One dial for size: what follows from a depth, what people may say otherwise, and the loss it foretells."""

import json
import re
import shutil
from dataclasses import replace

import pytest

from training import estimate, pretrain
from training.config.command_line import load_recipe
from training.config.depth import MOST_EPOCHS, batch_rows, block_parameters, micro_batch, shape_of, weight_decay
from training.config.recipe import load_recipe_file, load_run_recipe
from training.scaling import Point, fit, misfit, predict, read_points
from training.system.errors import UserError

from .tiny_runs import TEXT, go_on, latest, write_text

SMALL = "--depth 1 --tokens_per_parameter 0.1 --tokenizer byte --block_size 16 --max_new_tokens 0 --bf16 false".split()


def recipe_of(*words: str):
    return load_recipe("pretrain", list(words))


def refusal(function, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# the rule


def test_depth_twelve_is_gpt2_small() -> None:
    recipe = recipe_of("quickstart", "--depth", "12")
    config = recipe.model_config()
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (12, 768, 12)
    assert config.initializer_range == pytest.approx(0.5 / 768**0.5, rel=0.01)
    assert block_parameters(config) == 12 * 12 * 768**2
    tokens = recipe.training["max_steps"] * recipe.training["tokens_per_step"]
    assert tokens == pytest.approx(20 * 12 * 12 * 768**2, rel=0.01)


def test_batches_grow_with_the_tokens_and_are_shared_out_evenly() -> None:
    rows = [batch_rows(tokens, 128) for tokens in (1e3, 4.6e5, 4e6, 1.7e9)]
    assert rows == [1, 8, 32, 1024]
    assert [micro_batch(count, 128) for count in rows] == [1, 8, 32, 128]
    assert micro_batch(12, 128) == 4


def test_the_memory_of_a_weight_is_a_share_of_the_run_that_falls_with_the_tokens() -> None:
    assert weight_decay(0.03, 1000, 20) * 0.03 * 1000 == pytest.approx(20**0.527 / 1.084, rel=0.01)


@pytest.mark.parametrize("depth", [1, 4, 64])
def test_muons_rate_falls_with_the_layers_and_the_others_with_the_width(depth: int) -> None:
    first, other = (recipe_of("stdlib-depth", "--depth", str(count)).training for count in (1, depth))
    assert other["muon_learning_rate"] == pytest.approx(first["muon_learning_rate"] / depth**0.5, rel=0.01)
    assert other["learning_rate"] == pytest.approx(first["learning_rate"] / depth, rel=0.01)
    adamw = recipe_of("stdlib-depth", "--depth", str(depth), "--optimizer", "adamw").training
    assert adamw["learning_rate"] == pytest.approx(6e-4 * 12 / depth, rel=0.01)
    assert "muon_learning_rate" not in adamw


# what people say


def test_a_depth_by_flag_replaces_the_size_of_a_recipe_and_nothing_else() -> None:
    before, after = load_recipe_file("shakespeare-char-fast"), recipe_of("shakespeare-char-fast", "--depth", "3")
    assert after.model | shape_of(3) == after.model
    assert after.training["max_steps"] != before.training["max_steps"]
    kept = ("optimizer", "adam_beta2", "max_grad_norm", "per_device_eval_batch_size")
    assert [after.training[key] for key in kept] == [before.training[key] for key in kept]
    assert after.model_config().max_position_embeddings == before.model_config().max_position_embeddings


def test_flags_are_heard_and_what_follows_from_them_follows() -> None:
    words = ["--learning_rate", "1e-3", "--max_steps", "70", "--tokens_per_step", "256", "--n_head", "1"]
    training = (recipe := recipe_of("stdlib-depth", *words, "--lr_scheduler_type", "cosine")).training
    assert (training["learning_rate"], training["max_steps"], training["tokens_per_step"]) == (1e-3, 70, 256)
    assert (training["per_device_train_batch_size"], recipe.model_config().num_attention_heads) == (2, 1)
    assert "lr_scheduler_kwargs" not in training
    assert training["weight_decay"] == weight_decay(training["muon_learning_rate"], 70, 70 * 256 / 393_216)
    assert recipe_of("stdlib-depth", "--muon_learning_rate", "0").training["weight_decay"] == 0
    unsaid = recipe_of("stdlib-depth", "--tokens_per_step", "none")
    assert unsaid.training == recipe_of("stdlib-depth").training
    assert recipe_of("stdlib-depth", "--depth", "none", "--n_layer", "3").model_config().num_hidden_layers == 3


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("stdlib-depth --depth 0", "depth=0: must be a whole number from 1 to 64"),
        ("stdlib-depth --depth 1.5", "depth='1.5': expected int"),
        ("stdlib-depth --depth 1000000", "depth=1000000: must be a whole number"),
        ("stdlib-depth --depth", "--depth: needs a value"),
        ("stdlib-depth --depth 4 --n_layer 3", "n_layer=3: depth=4 makes it 4; leave one of them out"),
        ("stdlib-depth --n_embd 100", "n_embd=100: depth=2 makes it 128"),
        ("stdlib-depth --preset gpt2", "preset='gpt2': depth=2 sets the size"),
        ("quickstart --depth 4 --preset gpt2", "preset='gpt2': depth=4 sets the size"),
        ("stdlib-depth --model_name_or_path there", "depth=2: there has a size of its own"),
        ("quickstart --depth 4 --model_name_or_path there", "depth=4: there has a size of its own"),
        ("quickstart --tokens_per_parameter 3", "tokens_per_parameter: has no effect without depth"),
        ("stdlib-depth --tokens_per_parameter 0", "tokens_per_parameter=0.0: must be a finite number above 0"),
        ("stdlib-depth --tokens_per_parameter 3 --max_steps 9", "tokens_per_parameter=3: max_steps=9 sets the steps"),
        (
            "stdlib-depth --tokens_per_parameter 0.001",
            "tokens; raise tokens_per_parameter, lower block_size, or say --max",
        ),
        ("quickstart --depth 2 --tokens_per_parameter 1e300", "tokens_per_parameter=1e+300: are 3.93e+305 tokens"),
        (
            "quickstart --depth 64 --tokens_per_parameter 1e308 --streaming",
            "tokens_per_parameter=1e+308: are inf tokens",
        ),
        (
            "stdlib-depth --tokens_per_parameter 1e9 --tokens_per_step 128",
            "tokens_per_parameter=1e+09: are 3.93e+14 tokens",
        ),
        ("stdlib-depth --num_train_epochs 2", "num_train_epochs=2: depth=2 sets the steps"),
        ("stdlib-depth --tokens_per_parameter 0.001", "0.001 tokens for each of 393,216 parameters are 3 steps"),
        ("stdlib-depth --n_head 3", "hidden_size=128 is not divisible by num_attention_heads=3"),
    ],
)
def test_what_a_depth_does_not_go_with(words: str, named: str) -> None:
    assert named in refusal(recipe_of, *words.split())


def test_a_recipe_file_with_a_wrong_depth_is_named(tmp_path) -> None:
    (path := tmp_path / "mine.yaml").write_text("model: {depth: 3, n_layer: 2}\n")
    assert f"{path}: n_layer=2: depth=3 makes it 3" in refusal(load_recipe_file, str(path))


# a run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run of depth 1 on the small text."""
    folder = tmp_path_factory.mktemp("depth")
    write_text(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        pretrain.main(["stdlib-depth", *SMALL, "--text_files", "text.txt", "--output_dir", "run", "--eval_steps", "40"])
    return folder / "run"


def test_a_run_keeps_what_its_dial_chose(run_dir, capsys) -> None:
    recipe = load_run_recipe(run_dir)
    training = recipe.training
    assert training["max_steps"] * training["tokens_per_step"] == pytest.approx(0.1 * 49_152, rel=0.05)
    assert recipe.model | shape_of(1) == recipe.model
    again = load_recipe_file(str(run_dir / "recipe.yaml"))
    assert (again.training, again.model) == (training, recipe.model)  # a new run by the same file is the same run


def test_a_resumed_run_does_not_choose_again(run_dir, tmp_path, monkeypatch) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    before = load_run_recipe(run_dir).training
    monkeypatch.setattr("training.config.depth.MUON_RATE", 7.0)
    go_on(tmp_path / "run", "--max_steps", str(before["max_steps"] + 2))
    after = load_run_recipe(tmp_path / "run").training
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {"max_steps"}
    assert before["muon_learning_rate"] == after["muon_learning_rate"] == 0.085
    assert "--depth cannot change" in refusal(go_on, tmp_path / "run", "--depth", "2")


@pytest.mark.slow
def test_a_short_text_is_read_four_times_and_no_more(tmp_path, monkeypatch, capsys) -> None:
    write_text(tmp_path, TEXT[:2000])
    monkeypatch.chdir(tmp_path)
    words = ["stdlib-depth", *SMALL[:2], *SMALL[4:], "--text_files", "text.txt", "--validation_by", "position"]
    pretrain.main([*words, "--validation_fraction", "0.1", "--output_dir", "run"])
    printed, training = capsys.readouterr().out, load_run_recipe(tmp_path / "run").training
    tokens = training["max_steps"] * training["tokens_per_step"]
    assert tokens == pytest.approx(MOST_EPOCHS * 1800, rel=0.05)
    assert re.search(r"^depth 1: .* epochs of the text \(20 a parameter would be 546 epochs", printed, re.MULTILINE)
    message = refusal(pretrain.main, latest(*words, "--validation_fraction", "0.9", "--block_size", "128"))
    assert "depth=1: would read the" in message and "give more text" in message


# the loss that it foretells


LAW = [
    Point(f"d{d}", 49152 * d**3, 20 * 49152 * d**3, 1.1 + 90 * (120 * (49152 * d**3) ** 2) ** -0.154)
    for d in range(1, 6)
]


def test_a_law_is_found_again_and_what_it_foretells_is_within_its_bounds() -> None:
    law, compute = fit(LAW[:3]), LAW[4].compute
    assert (law.floor, law.scale) == (pytest.approx(1.1), pytest.approx(90))
    assert misfit(LAW[:3]) < 1e-6 < misfit([*LAW[:3], replace(LAW[3], loss=9.0)])
    loss, low, high = predict(LAW[:3], compute)
    assert loss == pytest.approx(LAW[4].loss)
    assert low < loss < high


def test_estimate_foretells_the_loss_of_a_larger_size(run_dir, tmp_path, monkeypatch, capsys) -> None:
    names = [str(copy_with(run_dir, tmp_path / f"run{times}", times)) for times in (1, 2, 4)]
    monkeypatch.chdir(tmp_path)
    shutil.copy(run_dir.parent / "text.txt", "moved.txt")  # which is known by what it holds
    said = "stdlib-depth --depth 2 --tokens_per_parameter 0.1".split()
    words = [*said, "--text_files", "moved.txt", "--tokenizer", "byte"]
    estimate.main([*words, "--from_runs", *names, "--picture", str(tmp_path / "fit.png")])
    printed = capsys.readouterr().out
    assert "loss at the end" in printed and "from                 3 runs" in printed
    assert (tmp_path / "fit.png").read_bytes().startswith(b"\x89PNG")
    message = refusal(estimate.main, [*words, "--from_runs", *names[:2]])
    assert "from_runs: 2 sizes are too few" in message
    assert "--picture a.png: draws a fit to --from_runs" in refusal(estimate.main, [*words, "--picture", "a.png"])
    text = ["--text_files", "text.txt"]  # by the run's own name it is not read again
    prepared = ["--data_dir", load_run_recipe(run_dir).data["data_dir"]]
    for same in ([*text, "--tokenizer", "byte"], [*text, "--tokenizer", str(run_dir)], prepared):
        estimate.main([*said, *same, "--from_runs", *names])
    (tmp_path / "moved.txt").write_text("another text")
    for words_of, why in (
        (said, "dataset='python-stdlib' of stdlib-depth is None in"),
        (["gpt2-openwebtext"], "dataset='Skylion007/openwebtext' of gpt2-openwebtext is None in"),
        (words, "text_files=['moved.txt'] of stdlib-depth is ['text.txt'] in"),
        ([*said, *text], "tokenizer='bpe' of stdlib-depth is 'byte' in"),
    ):
        assert why in refusal(estimate.main, [*words_of, "--from_runs", *names])
    for path, why in (("a.csv", "must end in .png"), ("no/a.png", "there is no directory"), (tmp_path, "must end in")):
        message = refusal(estimate.main, [*words, "--from_runs", "nowhere", "--picture", str(path)])
        assert message.startswith(f"--picture={path}: {why}")


def copy_with(run_dir, place, times: int):
    """A copy of a run which says that it had so many times the tokens."""
    shutil.copytree(run_dir, place)
    rows = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    lines = [json.dumps(row | {"tokens": row["tokens"] * times}) + "\n" for row in rows]
    (place / "metrics.jsonl").write_text("".join(lines))
    return place


def test_runs_that_do_not_compare_are_refused(run_dir, tmp_path) -> None:
    names = [str(copy_with(run_dir, tmp_path / f"run{times}", times)) for times in (1, 2, 4)]
    held = json.loads((tmp_path / "run2" / "inputs.json").read_text())
    (tmp_path / "run2" / "inputs.json").write_text(json.dumps(held | {"the tokenizer": "another"}))
    assert "the tokenizer of" in refusal(read_points, names)
    (tmp_path / "run1" / "README.md").unlink()
    assert "stopped at step" in refusal(read_points, names)
    assert "does not exist" in refusal(read_points, ["nowhere"])
