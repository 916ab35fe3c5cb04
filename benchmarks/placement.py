"""Does every tensor lie on the device? A training step and two ways of decoding of every variant, watched op by op.

On the meta device, which holds shapes and no numbers, this finds what would fail on a GPU, or copy to it, on any
machine; on a GPU it also counts what waits for the device.
"""

import sys
import traceback

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import Cache, DynamicCache, StaticCache

from modeling import GPTConfig, GPTForCausalLM
from training.loop.evaluation import chunked_logits

DROPOUT = {"attention_dropout": 0.1, "residual_dropout": 0.1, "embedding_dropout": 0.1}
TOKENS = 8
ITEM = torch.ops.aten._local_scalar_dense.default


class Watch(TorchDispatchMode):
    """Notes every tensor that is made on another device than `device_type`, and every look at a number.

    strays, looks: "op file:line" of the innermost frame outside torch. Tensors without dimensions may be anywhere, as
    torch has it. On meta a look sees 1.
    """

    def __init__(self, device_type: str):
        super().__init__()
        self.device_type, self.strays, self.looks = device_type, [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is ITEM:
            self.looks.append(_where(func))
            if args[0].is_meta:
                return True if args[0].dtype == torch.bool else 1
        results = func(*args, **(kwargs or {}))
        for result in tree_iter(results):
            if isinstance(result, torch.Tensor) and result.dim() and result.device.type != self.device_type:
                self.strays.append(_where(func))
        return results


def _where(func) -> str:
    """The operation, and the line outside torch that asked for it."""
    frame = sys._getframe(2)
    while frame.f_back is not None and "/torch/" in frame.f_code.co_filename.replace("\\", "/"):
        frame = frame.f_back
    return f"{func} {'/'.join(frame.f_code.co_filename.replace(chr(92), '/').split('/')[-2:])}:{frame.f_lineno}"


def build(config: GPTConfig, device: torch.device, attention: str = "sdpa") -> GPTForCausalLM:
    """A model made where it will live."""
    with torch.device(device):
        model = GPTForCausalLM(config)
    model.set_attn_implementation(attention)
    return model


def train_step(model: GPTForCausalLM, device: torch.device, is_packed: bool) -> None:
    """Forward and backward of rows that hold one document, or two."""
    ids = torch.zeros(2, TOKENS, dtype=torch.long, device=device)
    positions = torch.arange(TOKENS // 2, device=device).repeat(2).expand(2, -1) if is_packed else None
    model.train()
    model(input_ids=ids, shift_labels=ids, position_ids=positions).loss.backward()


@torch.no_grad()
def evaluate(model: GPTForCausalLM, device: torch.device) -> None:
    """The logits of a batch, as evaluation has them."""
    model.eval()
    ids = torch.zeros(2, TOKENS, dtype=torch.long, device=device)
    for _ in chunked_logits(model, {"input_ids": ids}, TOKENS, 2):
        pass


@torch.no_grad()
def decode(model: GPTForCausalLM, device: torch.device, cache: Cache) -> None:
    """A prompt, and a token after it."""
    model.eval()
    ids = torch.zeros(2, TOKENS, dtype=torch.long, device=device)
    for tokens in (ids, ids[:, :1]):
        model(input_ids=tokens, past_key_values=cache, use_cache=True)


def sample(model: GPTForCausalLM, device: torch.device) -> None:
    """Two drawn tokens by transformers' generate(), which on meta stops after the first."""
    ids = torch.zeros(2, TOKENS, dtype=torch.long, device=device)
    how = {"do_sample": True, "top_k": 5, "top_p": 0.9, "max_new_tokens": 2, "eos_token_id": None, "pad_token_id": None}
    model.eval().generate(ids, attention_mask=torch.ones_like(ids), **how)


def watch(config: GPTConfig, device: torch.device, attention: str = "sdpa", in_full: bool = True) -> Watch:
    """What was noted while a model of this shape trained and decoded; an error of torch's comes through.

    in_full: also rows of one document, a cache that grows, and generate().
    """
    model = build(config, device, attention)
    with Watch(device.type) as watched:
        for is_packed in (True, False)[: 1 + in_full]:
            train_step(model, device, is_packed)
        evaluate(model, device)
        for cache in (StaticCache(config, max_cache_len=2 * TOKENS), DynamicCache(config=config))[: 1 + in_full]:
            decode(model, device, cache)
        if in_full:
            sample(model, device)
    return watched


def watch_all(variants: dict[str, GPTConfig], device: torch.device, attention: str = "sdpa") -> dict:
    """The figures of all variants together: how many, what went wrong, and what looked at numbers."""
    wrong, looks = {}, set()
    for name, config in variants.items():
        try:
            watched = watch(config, device, attention)
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            wrong[name] = f"{type(error).__name__} at {frame.filename}:{frame.lineno}: {error}"[:300]
            continue
        looks.update(watched.looks)
        if strays := sorted(set(watched.strays)):
            wrong[name] = strays
    return {"variants": len(variants), "attention": attention, "wrong": wrong, "looks": sorted(looks)}
