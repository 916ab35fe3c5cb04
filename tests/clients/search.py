"""Trainer's hyperparameter_search by Optuna, on the model directory that it is given."""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

torch.set_num_threads(1)
rows = [{"input_ids": [10, 20, 30, 40], "labels": [10, 20, 30, 40]}] * 16
settings = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 4, "save_strategy": "no", "report_to": "none"}
trainer = Trainer(
    args=TrainingArguments("out", use_cpu=True, disable_tqdm=True, **settings),
    train_dataset=rows,
    eval_dataset=rows,
    model_init=lambda trial=None: AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True),
)
losses = {}


def objective(metrics: dict[str, float]) -> float:
    losses[trainer.args.learning_rate] = metrics["eval_loss"]
    return metrics["eval_loss"]


best = trainer.hyperparameter_search(
    hp_space=lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", [1e-6, 1e-2])},
    compute_objective=objective,
    direction="minimize",
    backend="optuna",
    n_trials=4,
)
print(json.dumps({"best": best.hyperparameters, "objective": best.objective, "losses": list(losses.items())}))
