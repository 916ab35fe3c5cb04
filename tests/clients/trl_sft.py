"""TRL's SFTTrainer on the model directory that it is given: in full, then a LoRA."""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

torch.set_num_threads(1)
directory = sys.argv[1]
# Without task_type PEFT writes down the class, and AutoPeft refuses a class that transformers has not.
LORA = LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
data = Dataset.from_list([{"prompt": "the quick", "completion": f" {word} dog"} for word in ("fox", "hen")] * 8)
ids = torch.tensor([[10, 20, 30, 40]])
facts = {}
for name, adapter in {"full": None, "lora": LORA}.items():
    settings = {"max_steps": 12, "per_device_train_batch_size": 8, "learning_rate": 5e-3, "logging_steps": 1}
    quiet = {"use_cpu": True, "bf16": False, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    arguments = SFTConfig(output_dir=name, trust_remote_code=True, **settings, **quiet)
    trainer = SFTTrainer(directory, arguments, train_dataset=data, peft_config=adapter)
    before = {key: p.detach().clone() for key, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    trainer.save_model(name)
    loader = AutoModelForCausalLM if adapter is None else AutoPeftModelForCausalLM
    trained = trainer.model.eval()(input_ids=ids).logits
    again = loader.from_pretrained(name, trust_remote_code=True).eval()(input_ids=ids).logits
    facts[name] = {
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "moved": [key for key, p in trainer.model.named_parameters() if key in before and not p.equal(before[key])],
        "trained": list(before),
        "loaded again": (trained - again).abs().max().item(),
        "files": sorted(path.name for path in Path(name).iterdir()),
    }
print(json.dumps(facts))
