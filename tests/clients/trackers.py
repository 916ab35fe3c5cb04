"""transformers' own Trainer on the model directory that it is given, reporting to TensorBoard and trackio."""

import json
import os
import sys
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

os.environ["TENSORBOARD_LOGGING_DIR"] = "boards"
os.environ["TRACKIO_DIR"] = "trackio"
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
rows = [{"input_ids": [10, 20, 30, 40], "labels": [10, 20, 30, 40]}] * 16
settings = {"max_steps": 6, "learning_rate": 5e-3, "logging_steps": 1, "report_to": ["tensorboard", "trackio"]}
quiet = {"use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "project": "clients", "run_name": "one"}
trainer = Trainer(model, TrainingArguments("out", **settings, **quiet), train_dataset=rows)
trainer.train()

from trackio.sqlite_storage import SQLiteStorage  # noqa: E402 (it reads TRACKIO_DIR)

board = EventAccumulator(str(next(Path("boards").rglob("events.*")).parent)).Reload()
facts = {
    "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
    "tensorboard": [event.value for event in board.Scalars("train/loss")],
    "trackio": [row["train/loss"] for row in SQLiteStorage.get_logs("clients", "one") if "train/loss" in row],
}
print(json.dumps(facts))
