"""TRL's DPOTrainer on the model directory that it is given, which it loads twice: to train, and as the reference."""

import json
import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

torch.set_num_threads(1)
pair = {"prompt": "the quick", "chosen": " fox", "rejected": " zz"}
settings = {"max_steps": 12, "per_device_train_batch_size": 8, "learning_rate": 5e-3, "logging_steps": 1}
quiet = {"use_cpu": True, "bf16": False, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
arguments = DPOConfig(output_dir="dpo", trust_remote_code=True, **settings, **quiet)
trainer = DPOTrainer(sys.argv[1], args=arguments, train_dataset=Dataset.from_list([pair] * 16))
trainer.train()
trainer.save_model("dpo")
ids = torch.tensor([[10, 20, 30, 40]])
again = AutoModelForCausalLM.from_pretrained("dpo", trust_remote_code=True).eval()(input_ids=ids).logits
rows = [row for row in trainer.state.log_history if "loss" in row]
facts = {
    "losses": [row["loss"] for row in rows],
    "margins": [row["rewards/margins"] for row in rows],
    "loaded again": (trainer.model.eval()(input_ids=ids).logits - again).abs().max().item(),
}
print(json.dumps(facts))
