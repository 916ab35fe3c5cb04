"""The EleutherAI harness's own command on the model directory that it is given, and a task of its own."""

import json
import sys
from pathlib import Path

import torch
from lm_eval.__main__ import cli_evaluate

torch.set_num_threads(1)
directory, texts = sys.argv[1:]
TASK = {
    "task": "tiny_texts",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": texts}},
    "test_split": "test",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "bits_per_byte", "higher_is_better": False}],
}
Path("tasks").mkdir()
Path("tasks/tiny_texts.yaml").write_text(json.dumps(TASK))  # JSON is YAML
command = f"lm_eval run --model hf --model_args pretrained={directory} --trust_remote_code --device cpu --batch_size 1"
sys.argv = [*command.split(), "--tasks", "tiny_texts", "--include_path", "tasks", "--output_path", "scores"]
cli_evaluate()
results = json.loads(next(Path("scores").rglob("results*.json")).read_text())["results"]["tiny_texts"]
print(json.dumps({"bits per byte": results["bits_per_byte,none"]}))
