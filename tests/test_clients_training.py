"""Clients that train an Acorn directory: each in a process where nothing of Acorn is installed."""

import contextlib
import os

import pytest

from modeling.compat import CACHE_NAME
from training import pretrain

from .client_runs import run_client
from .tiny_runs import metrics, tiny_argv

pytestmark = pytest.mark.clients
CODE = {"attention.py", "compat.py", "configuration_gpt.py", "loss.py", "modeling_gpt.py", "positions.py"}


def falls(numbers: list[float]) -> bool:
    """Whether the second half lies below the first."""
    half = len(numbers) // 2
    return sum(numbers[half:]) / len(numbers[half:]) < sum(numbers[:half]) / half


def test_trl_sft(grown, tmp_path) -> None:
    facts = run_client("trl_sft", grown, cwd=tmp_path)
    for name in ("full", "lora"):
        assert falls(facts[name]["losses"]), name
        assert facts[name]["moved"] == facts[name]["trained"]
        assert facts[name]["loaded again"] == 0
    assert set(facts["full"]["files"]) >= CODE
    assert all("lora_" in key for key in facts["lora"]["trained"])
    assert "adapter_model.safetensors" in facts["lora"]["files"]


def test_trl_dpo(grown, tmp_path) -> None:
    facts = run_client("trl_dpo", grown, cwd=tmp_path)
    assert falls(facts["losses"])
    assert facts["margins"][0] == 0
    assert facts["margins"][-1] > 0.5
    assert facts["loaded again"] == 0


def test_trl_grpo(grown, tmp_path) -> None:
    facts = run_client("trl_grpo", grown, cwd=tmp_path)
    assert falls([-reward for reward in facts["rewards"]])
    assert facts["divergence"][0] == pytest.approx(0, abs=1e-5)
    assert facts["divergence"][-1] > 0


def test_peft(grown, tmp_path) -> None:
    facts = run_client("peft_adapters", grown, cwd=tmp_path)
    for name, fact in facts.items():
        assert fact["losses"][-1] < fact["losses"][0], name
        assert fact["gradients"], name
        assert fact["on the base"] == fact["alone"] == 0, name
        # PEFT 0.21 knows the cache by its name of before transformers 5.24, for any model; `acorn generate` is right
        assert (fact["generate"] is True) == (name not in ("prompt", "prefix") or CACHE_NAME == "past_key_values")


def test_tensorboard_and_trackio_through_trainer(grown, tmp_path) -> None:
    facts = run_client("trackers", grown, cwd=tmp_path)
    assert falls(facts["losses"])
    assert facts["tensorboard"] == pytest.approx(facts["losses"])
    assert facts["trackio"] == pytest.approx(facts["losses"])


def test_optuna_through_trainer(grown, tmp_path) -> None:
    facts = run_client("search", grown, cwd=tmp_path)
    losses = {rate: loss for rate, loss in facts["losses"]}
    assert facts["objective"] == pytest.approx(min(losses.values()))
    assert losses[facts["best"]["learning_rate"]] == facts["objective"]


def test_optuna_over_acorn_pretrain(grown, tmp_path) -> None:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)

    def objective(trial) -> float:
        rate, name = trial.suggest_categorical("learning_rate", [1e-5, 1e-2]), f"trial-{trial.number}"
        pretrain.main(tiny_argv("--learning_rate", str(rate), name=name))
        return min(row["eval_loss"] for row in metrics(tmp_path / name) if "eval_loss" in row)

    os.symlink(grown.parent / "text.txt", tmp_path / "text.txt")
    study = optuna.create_study(sampler=optuna.samplers.GridSampler({"learning_rate": [1e-5, 1e-2]}))
    with contextlib.chdir(tmp_path):
        study.optimize(objective, n_trials=2)
    assert study.best_params == {"learning_rate": 1e-2}
