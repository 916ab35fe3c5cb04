"""How far do LoRA, DoRA and full finetuning move a stock GPT-2 towards another text, and at what cost?

Pretrains a GPT-2-shaped base (5.3 M parameters: learned positions, biases, gelu_new, a BPE of 2,048 entries) on a text
and the standard library, converts it to stock GPT-2 format, finetunes that on another text with each adapter, merges
the adapters, and prints one JSON line. A base that is there already is used again.

    python benchmarks/finetune.py --base_text wikitext2-valid.txt --text tinyshakespeare.txt --output_dir runs/finetune
"""

import argparse
import json
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import yaml

RECIPE = {
    "model": {"n_layer": 6, "n_embd": 256, "n_head": 8, "block_size": 256, "hidden_act": "gelu_new", "bias": True},
    "data": {
        "tokenizer": "bpe",
        "tokenizer_vocab_size": 2048,
        "validation_fraction": 0.02,
        "validation_by": "documents",
    },
    "training": {
        "per_device_train_batch_size": 8,
        "optimizer": "muon",
        "muon_learning_rate": 0.02,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": 0.5, "decay_type": "linear", "min_lr_ratio": 0.0},
        "warmup_steps": 20,
        "max_grad_norm": 1.0,
        "eval_steps": 100,
    },
    "sample": {"max_new_tokens": 60},
}
FIGURES = "trained_parameters parameters perplexity_before perplexity_after seconds peak_memory_bytes"
ADAPTERS = {
    "lora": ["--r", "16", "--lora_alpha", "32", "--learning_rate", "3e-3"],
    "dora": ["--r", "16", "--lora_alpha", "32", "--learning_rate", "3e-3"],
    "full": ["--learning_rate", "1e-3"],
}


def main() -> None:
    """Build the base, finetune it three times, merge twice, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--base_text", required=True, help="text file that the base is pretrained on, beside the stdlib"
    )
    parser.add_argument("--text", required=True, help="text file that it is finetuned on")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/benchmark-finetune"))
    parser.add_argument("--base_steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=120)
    flags = parser.parse_args()
    flags.output_dir.mkdir(parents=True, exist_ok=True)
    base = flags.output_dir / "base-gpt2"
    if not base.exists():
        build_base(flags, base)
    results = {name: finetune(name, flags, base) for name in ADAPTERS}
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    report = {"base": {"model_type": config["model_type"], "architectures": config["architectures"]}, **results}
    print(json.dumps({"benchmark": "finetune", "steps": flags.steps, **report}))


def build_base(flags, base: Path) -> None:
    """Pretrain with Acorn, convert to stock GPT-2."""
    stdlib = str(Path(sysconfig.get_path("stdlib"), "*.py"))
    data = RECIPE["data"] | {
        "text_files": [str(Path(flags.base_text).absolute()), stdlib],
        "data_dir": str(flags.output_dir / "corpus"),
    }
    recipe = flags.output_dir / "base.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE | {"data": data}), encoding="utf-8")
    grown = flags.output_dir / "base-acorn"
    acorn("pretrain", recipe, "--output_dir", grown, "--max_steps", flags.base_steps)
    acorn("convert", grown, base, "--to", "gpt2")


def finetune(name: str, flags, base: Path) -> dict:
    """Finetune with one adapter and merge it; return the figures."""
    run = flags.output_dir / name
    acorn(
        *("finetune", base, "--text_files", flags.text, "--adapter", name, *ADAPTERS[name], "--output_dir", run),
        *("--max_steps", flags.steps, "--per_device_train_batch_size", 8, "--eval_steps", flags.steps // 4),
        *("--data_dir", flags.output_dir / "corpus-text", "--prompt", "ROMEO:\n", "--max_new_tokens", 60),
    )
    facts = json.loads((run / "finetune.json").read_text(encoding="utf-8"))
    result = {key: facts[key] for key in FIGURES.split()}
    if name != "full":
        printed = acorn("merge", run, flags.output_dir / f"{name}-merged")
        result["largest_logit_difference_of_merged"] = float(re.search(r"random ids: (\S+)", printed)[1])
    return result


def acorn(*words) -> str:
    """Run `acorn` on these words in a process of its own; return what it prints."""
    command = [sys.executable, "-m", "acorn", *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, file=sys.stderr)
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout


if __name__ == "__main__":
    main()
