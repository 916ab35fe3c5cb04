"""Models of other houses, tiny and random: stock GPT-2, nanoGPT's checkpoints, and a rotary model written out."""

import os
import pickle
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from .variants import randomize

SHAPE = {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 24}
CHARACTERS = sorted(set("the quick brown fox, jumps over!\nA lazy dog: 'Oh?'"))
TEXT = "the lazy dog: 'Oh?'\nA quick fox jumps over the brown fox, Oh!\n" * 9


def stock_gpt2(vocab_size: int = 257, **overrides) -> GPT2LMHeadModel:
    """A GPT2LMHeadModel whose parameters are all random."""
    special = {"bos_token_id": vocab_size - 1, "eos_token_id": vocab_size - 1}
    model = GPT2LMHeadModel(GPT2Config(**{**SHAPE, "vocab_size": vocab_size, **special, **overrides})).eval()
    randomize(model)
    return model


def nanogpt_of(stock: GPT2LMHeadModel, bias: bool = True, prefix: str = "") -> dict:
    """What nanoGPT's train.py would save for a GPT-2 with the exact GELU; without `bias` its biases are zeroed."""
    weights = {}
    with torch.no_grad():
        for name, weight in stock.state_dict().items():
            if name.endswith("bias") and not bias:
                weight.zero_()
                continue
            is_linear = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
            weights[prefix + name] = weight.T.contiguous() if is_linear else weight
    config = stock.config
    sizes = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
    args = {**sizes, "block_size": config.n_positions, "bias": bias, "vocab_size": config.vocab_size, "dropout": 0.1}
    train_config = {"dataset": "letters", "out_dir": "out"}
    best = torch.tensor(1.5)  # train.py's best loss is a tensor
    return {"model": weights, "model_args": args, "config": train_config, "iter_num": 200, "best_val_loss": best}


def write_checkpoint(folder: Path, checkpoint: dict) -> Path:
    """Save as ckpt.pt in a folder made for it."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, folder / "ckpt.pt")
    return folder


def write_meta(folder: Path, entries: list[str] = CHARACTERS) -> Path:
    """Write what the prepare.py of a character data set writes."""
    folder.mkdir(parents=True, exist_ok=True)
    itos = dict(enumerate(entries))
    meta = {"vocab_size": len(entries), "itos": itos, "stoi": {entry: index for index, entry in itos.items()}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder / "meta.pkl"


class Trap:
    """An object whose pickle makes a folder when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (os.fspath(self.path),)


class RotaryBlock(nn.Module):
    """One block of the rotary model, with the names that nanoGPT gives its parts."""

    def __init__(self, width: int, heads: int, bias: bool):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width, bias=bias), nn.LayerNorm(width, bias=bias)
        self.attn = nn.ModuleDict(
            {"c_attn": nn.Linear(width, 3 * width, bias=bias), "c_proj": nn.Linear(width, width, bias=bias)}
        )
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(width, 4 * width, bias=bias), "c_proj": nn.Linear(4 * width, width, bias=bias)}
        )

    def forward(self, states: torch.Tensor, base: float) -> torch.Tensor:
        joint = self.attn["c_attn"](self.ln_1(states))
        query, key, value = joint.split(states.shape[-1], dim=-1)
        size = states.shape[-1] // self.heads
        attended = []
        for head in range(self.heads):
            part = slice(head * size, (head + 1) * size)
            scores = turned_pairs(query[..., part], base) @ turned_pairs(key[..., part], base).transpose(1, 2)
            future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            weights = (scores / size**0.5).masked_fill(future, -torch.inf).softmax(-1)
            attended.append(weights @ value[..., part])
        states = states + self.attn["c_proj"](torch.cat(attended, dim=-1))
        return states + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(states))))


def turned_pairs(states: torch.Tensor, base: float) -> torch.Tensor:
    """RoFormer's equation 34, pair by pair: (batch, tokens, head size) to the same shape."""
    tokens, size = states.shape[1:]
    turned = torch.empty_like(states)
    for pair in range(size // 2):
        angle = torch.arange(tokens) * base ** (-2 * pair / size)
        even, odd = states[..., 2 * pair], states[..., 2 * pair + 1]
        turned[..., 2 * pair] = even * angle.cos() - odd * angle.sin()
        turned[..., 2 * pair + 1] = odd * angle.cos() + even * angle.sin()
    return turned


class RotaryReference(nn.Module):
    """nanoGPT without wpe, over bytes, its heads rotated in neighbouring pairs."""

    def __init__(self, vocab_size: int = 256, bias: bool = False, base: float = 10000.0):
        super().__init__()
        width, heads, self.base = SHAPE["n_embd"], SHAPE["n_head"], base
        blocks = nn.ModuleList(RotaryBlock(width, heads, bias) for _ in range(SHAPE["n_layer"]))
        self.transformer = nn.ModuleDict(
            {"wte": nn.Embedding(vocab_size, width), "h": blocks, "ln_f": nn.LayerNorm(width, bias=bias)}
        )
        self.lm_head = nn.Linear(width, vocab_size, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight
        self.args = {key: SHAPE[key] for key in ("n_layer", "n_head", "n_embd")}
        self.args |= {"block_size": SHAPE["n_positions"], "vocab_size": vocab_size, "bias": bias, "dropout": 0.0}
        randomize(self)

    @torch.no_grad()
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        states = self.transformer["wte"](ids)
        for block in self.transformer["h"]:
            states = block(states, self.base)
        return self.lm_head(self.transformer["ln_f"](states))

    def checkpoint(self, **args) -> dict:
        """What its train.py would save."""
        return {"model": self.state_dict(), "model_args": {**self.args, **args}, "config": {}, "iter_num": 1}
