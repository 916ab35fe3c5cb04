"""The parts of benchmarks/gpu.py that train, by Acorn's own loops on drawn tokens."""

import contextlib
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import transformers
from torch import nn

from benchmarks import placement as placing
from modeling import GPTConfig, GPTForCausalLM
from tests.variants import VARIANTS, tiny_config
from training.config.presets import PRESETS
from training.model.devices import known_gpu
from training.model.sizes import flops_per_token

ROOT = Path(__file__).resolve().parent.parent


def sizes(device: str) -> dict:
    """GPT-2 124 M, or what a CPU can do."""
    if device == "cuda":
        return {**PRESETS["nanogpt"], "vocab_size": 50304}
    return {"vocab_size": 512, "n_layer": 2, "n_embd": 64, "n_head": 2, "block_size": 64}


def rows_at_once(device: str) -> int:
    """Rows of 1,024 tokens a micro-batch: 32 where there is memory for them."""
    if device != "cuda":
        return 4
    return 32 if torch.cuda.get_device_properties(0).total_memory > 60e9 else 8


def arguments(device: str, **flags):
    """GPTTrainingArguments that neither evaluate nor save, in a folder of their own."""
    from training.config.arguments import GPTTrainingArguments

    defaults = {
        "per_device_train_batch_size": rows_at_once(device),
        "warmup_steps": 5,
        "eval_steps": 10**6,
        "save_strategy": "no",
    }
    folder = tempfile.mkdtemp(prefix="acorn-gpu-")
    return GPTTrainingArguments(
        output_dir=folder, use_cpu=device != "cuda", **{**defaults, "bf16": device == "cuda", **flags}
    )


class Drawn(SimpleNamespace):
    """A corpus of random tokens with some order in them: each depends on the one before."""

    def __init__(self, vocab_size: int, length: int = 300_000):
        noise = np.random.default_rng(0).integers(0, 8, length)
        ids, token = np.empty(length, dtype=np.int64), 0
        for index, shift in enumerate(noise):
            ids[index] = token = (token * 31 + int(shift)) % vocab_size
        super().__init__(ids=ids, directory=None, tokenizer=None, inputs={})
        self.manifest = {"splits": {"validation": {"bytes": 4 * length // 10}}}

    def tokens(self, split: str):
        from training.data.dataset import TokenArray

        return TokenArray(self.ids[: len(self.ids) // 10] if split == "validation" else self.ids)


@contextlib.contextmanager
def trained(device: str, **flags) -> Iterator[tuple]:
    """(trainer, losses by step, seconds since the middle step) of a run of Acorn's own loop."""
    args = arguments(device, logging_steps=1, **flags)
    from training.loop.trainer import GPTTrainer

    torch.manual_seed(0)
    config = GPTConfig(**sizes(device))
    trainer = GPTTrainer(GPTForCausalLM(config), args, Drawn(config.vocab_size), config.max_position_embeddings)
    watch = clock(device, args.max_steps // 2)
    trainer.add_callback(watch)
    trainer.train()
    yield trainer, watch.losses, watch.seconds


def clock(device: str, start: int):
    """A callback that notes losses, and the time from step `start` to the last one."""

    class Clock(transformers.TrainerCallback):
        losses, seconds, started = [], None, None

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in (start, state.max_steps):
                if device == "cuda":
                    torch.cuda.synchronize()
                self.seconds = time.perf_counter() - (self.started or 0)
                self.started = time.perf_counter()

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in (logs or {}):
                self.losses.append(logs["loss"])

    return Clock()


def falls(losses: list[float], figures: dict) -> dict:
    """The figures with the first and last loss, and an error unless it fell."""
    figures = {"first_loss": losses[0], "last_loss": losses[-1], **figures}
    return figures if losses[-1] < losses[0] else figures | {"error": "the loss did not fall"}


def pretrain(device: str, scope: str) -> dict:
    """Thirty steps of the Trainer in bf16 and compiled, with an evaluation."""
    with trained(device, max_steps=30, torch_compile=device == "cuda", compile_scope=scope) as (trainer, losses, _):
        results = trainer.evaluate()
        precision = trainer.accelerator.mixed_precision
    return falls(losses, {"eval_loss": results["eval_loss"], "mixed_precision": precision})


def pretrain_blocks(device: str) -> dict:
    return pretrain(device, "blocks")


def pretrain_model(device: str) -> dict:
    return pretrain(device, "model")


def fsdp(device: str) -> dict:
    """Ten steps and an evaluation under FSDP2 on one GPU, saved and loaded as one model."""
    import yaml

    config = yaml.safe_load((ROOT / "training/launch/fsdp.yaml").read_text(encoding="utf-8"))["fsdp_config"]
    values = {key.upper(): str(value) for key, value in config.items()}
    values = {key: value.lower() if value in ("True", "False") else value for key, value in values.items()}
    ranks = dict.fromkeys(("RANK", "LOCAL_RANK"), "0") | dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "1")
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517", **values, **ranks}
    with trained(device, max_steps=10) as (trainer, losses, _):
        results = trainer.evaluate()
        folder = Path(trainer.args.output_dir, "saved")
        trainer.save_model(str(folder))
        is_sharded = trainer.is_fsdp_enabled
    loaded = GPTForCausalLM.from_pretrained(folder)
    figures = {"is_sharded": is_sharded, "eval_loss": results["eval_loss"], "loaded": loaded.num_parameters()}
    return falls(losses, figures) | ({} if is_sharded else {"error": "it did not run under FSDP"})


def optimizers(device: str) -> dict:
    """Two steps of each optimizer, and what their states lie on."""
    from training.model.optimizers import OPTIMIZERS, build_optimizer

    args, strays = arguments(device, max_steps=2), {}
    for name in OPTIMIZERS:
        args.optimizer = name
        model = placing.build(tiny_config(**VARIANTS["modern"]), torch.device(device))
        optimizer = build_optimizer(model, args)
        with placing.Watch(device) as watched:
            for _ in range(2):
                placing.train_step(model, torch.device(device), is_packed=False)
                optimizer.step()
                optimizer.zero_grad()
        if watched.strays:
            strays[name] = sorted(set(watched.strays))
    return {"optimizers": list(OPTIMIZERS)} | ({"error": strays} if strays else {})


# ---- finetuning


def adapted(device: str, adapter: str) -> dict:
    """Twenty steps of finetuning by Acorn's loop on a base that is loaded from disk, evaluated before and after."""
    args = arguments(device, max_steps=20, logging_steps=1, learning_rate=1e-3)
    from finetune.adapters import attach, quantization
    from finetune.arguments import AdapterArguments
    from finetune.trainer import FinetuneTrainer
    from training.model.loading import load_causal_lm

    config = GPTConfig(**sizes(device))
    torch.manual_seed(0)
    folder = str(Path(args.output_dir, "base"))
    GPTForCausalLM(config).save_pretrained(folder)
    options = quantization(adapter, args.precision)
    base = load_causal_lm(folder, "bfloat16" if adapter == "qlora" else "auto", False, **options)
    settings = AdapterArguments(adapter=adapter)
    corpus = Drawn(config.vocab_size)
    corpus.tokenizer = SimpleNamespace(eos_token_id=0, save_pretrained=lambda *args, **kwargs: ())
    model = attach(base, settings, folder)
    trainer = FinetuneTrainer(
        model, args, corpus, config.max_position_embeddings, packing=False, adapter=settings, base=(folder, None),
        data=None, sample=None,
    )  # fmt: skip
    losses = [trainer.evaluate()["eval_loss"]]
    trainer.train()
    losses.append(trainer.evaluate()["eval_loss"])
    return falls(losses, {"peak_bytes": torch.cuda.max_memory_allocated()} if device == "cuda" else {})


def lora(device: str) -> dict:
    return adapted(device, "lora")


def qlora(device: str) -> dict:
    if importlib.util.find_spec("bitsandbytes") is None:
        return {"skipped": "bitsandbytes is not installed"}
    return adapted(device, "qlora")


# ---- speed


def speed(device: str, tokens: int, seconds: float) -> dict:
    """Tokens a second, and their share of the peak."""
    per_second = tokens / seconds
    gpu = known_gpu(torch.cuda.get_device_name()) if device == "cuda" else None
    peak = gpu.peak("bf16") if gpu else None
    flops = flops_per_token(GPTConfig(**sizes(device))) * per_second
    return {"tokens_per_second": round(per_second), "mfu": flops / peak if peak else None, "rows": rows_at_once(device)}


def speed_bare(device: str) -> dict:
    """The same model, batch and optimizer in a loop of a few lines, compiled whole."""
    config, count = GPTConfig(**sizes(device)), 20
    model = GPTForCausalLM(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), fused=True)
    forward = torch.compile(model) if device == "cuda" else model
    shape = (rows_at_once(device), config.max_position_embeddings)
    ids = torch.randint(0, config.vocab_size, shape, device=device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = forward(input_ids=ids, shift_labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return speed(device, count * ids.numel(), timed(step, count, device))


def timed(step: Callable[[], None], count: int, device: str) -> float:
    """Seconds of `count` steps after as many others."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(count):
        step()
    wait()
    started = time.perf_counter()
    for _ in range(count):
        step()
    wait()
    return time.perf_counter() - started


def speed_trainer(device: str) -> dict:
    """Acorn's loop over the second half of forty steps, its blocks compiled."""
    with trained(device, max_steps=40, torch_compile=device == "cuda", dataloader_num_workers=2) as (
        trainer,
        losses,
        seconds,
    ):
        return falls(losses, speed(device, 20 * trainer.tokens_per_step, seconds))
