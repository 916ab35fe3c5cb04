"""TRL's GRPOTrainer on the model directory that it is given: small letters are rewarded, one answer at a time."""

import json
import sys

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

torch.set_num_threads(1)


def share_of_letters(completions: list[str], **kwargs) -> list[float]:
    return [sum(letter in "abcdefghijklmnopqrstuvwxyz" for letter in text) / 6 for text in completions]


settings = {"max_steps": 10, "per_device_train_batch_size": 16, "learning_rate": 1e-2, "logging_steps": 1}
quiet = {"use_cpu": True, "bf16": False, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
sampling = {"num_generations": 16, "max_completion_length": 6, "beta": 0.01}
arguments = GRPOConfig(output_dir="grpo", trust_remote_code=True, **settings, **sampling, **quiet)
data = Dataset.from_list([{"prompt": "the quick"}] * 16)
trainer = GRPOTrainer(sys.argv[1], reward_funcs=share_of_letters, args=arguments, train_dataset=data)
trainer.train()
rows = [row for row in trainer.state.log_history if "reward" in row]
print(json.dumps({"rewards": [row["reward"] for row in rows], "divergence": [row["kl"] for row in rows]}))
