"""nanoGPT's ckpt.pt (https://github.com/karpathy/nanoGPT): GPT-2's layout with exact GELU and, by choice, no biases.

And its rotary sibling, the tutorial's byte-level checkpoint: without `wpe`, heads rotated in neighbouring pairs.
"""

from pathlib import Path

import torch
from torch.nn import functional as F

from modeling import GPTConfig, GPTForCausalLM
from training.system.errors import UserError
from training.system.shell import shell

from .base import CHECKPOINT, SPECIAL_IDS, Format, Source, check_tensors, config_of
from .gpt2 import MASKS, OBSTACLES, to_ours, to_theirs
from .vocabulary import META, checkpoint_tokenizer, is_gpt2s, write_meta

SIZES = {  # ours: nanoGPT's
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "hidden_size": "n_embd",
    "max_position_embeddings": "block_size",
    "vocab_size": "vocab_size",
}
MODEL_ARGS = {*SIZES.values(), "bias", "dropout"}
BASES = ("rope_theta", "rope_base")  # the model_args that may name the base of the angles
DEFAULT_BASE = 10000.0
# Around a model: of torch, of Fabric, and the attribute of a LightningModule.
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "model"}
EPS = 1e-5
NANOGPT_OBSTACLES = {
    **OBSTACLES,
    "hidden_act": (lambda c: c.hidden_act != "gelu", "it computes the exact GELU, our 'gelu'"),
    "norm_eps": (lambda c: c.norm_eps != EPS, f"its epsilon is {EPS}"),
    "intermediate_size": (lambda c: c.intermediate_size != 4 * c.hidden_size, "its MLP is 4 * hidden_size wide"),
    "tie_word_embeddings": (lambda c: not c.tie_word_embeddings, "its head is its embedding"),
}


def unwrapped(name: str) -> str:
    """A weight's name without those of torch.compile, DDP and the like, in whatever order they were put around it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


class Checkpoint:
    """The tensors of a ckpt.pt in float32, under their plain names, and its model_args."""

    def __init__(self, source: Source):
        self.name, self.args = source.name, source.checkpoint.get("model_args")
        weights = {unwrapped(name): weight for name, weight in source.checkpoint["model"].items()}
        self.weights = {name: weight.float() for name, weight in weights.items() if not name.endswith(MASKS)}


class NanoGPT(Format):
    """nanoGPT's checkpoints, any of its options."""

    title = "nanoGPT"
    known_args = MODEL_ARGS
    obstructing = NANOGPT_OBSTACLES

    def recognises(self, source: Source) -> bool:
        return any(name.endswith("transformer.wpe.weight") for name in source.checkpoint.get("model", {}))

    def load(self, source: Source) -> Checkpoint:
        checkpoint = Checkpoint(source)
        self.check_args(checkpoint)
        with torch.device("meta"):
            model = GPTForCausalLM(self.config(checkpoint))
            expected = to_theirs(model, model.config.bias)
        check_tensors(source.name, checkpoint.weights, expected)
        return checkpoint

    def tokenizer(self, source: Source, theirs: Checkpoint, name: str | None, meta: str | None):
        tokenizer = checkpoint_tokenizer(source, theirs.args["vocab_size"], name, meta)
        tokenizer.model_max_length = theirs.args["block_size"]
        return tokenizer

    def check_args(self, checkpoint: Checkpoint) -> None:
        """Refuse model_args that are missing, unknown or no numbers."""
        args = checkpoint.args
        if not isinstance(args, dict):
            raise UserError(f"{checkpoint.name}: has no model_args, so its shape is not known")
        wrong = [name for name in SIZES.values() if type(args.get(name)) is not int or args[name] < 1]
        if wrong:
            raise UserError(f"{checkpoint.name}: model_args.{wrong[0]}={args.get(wrong[0])!r}: must be a whole number")
        if unknown := [name for name in args if name not in self.known_args]:
            what = f"model_args.{unknown[0]}={args[unknown[0]]!r}"
            raise UserError(f"{checkpoint.name}: {what}: {self.title} has no such thing, so what it does is not known")

    def config(self, theirs: Checkpoint, tokenizer=None) -> GPTConfig:
        args, weights = theirs.args, theirs.weights
        embedding, head = (weights.get(name) for name in ("transformer.wte.weight", "lm_head.weight"))
        is_tied = embedding is None or head is None or (embedding.shape == head.shape and torch.equal(embedding, head))
        return config_of(
            theirs.name,
            **{ours: args[name] for ours, name in SIZES.items()},
            **{name: getattr(tokenizer, name, None) for name in SPECIAL_IDS},
            **self.positions(theirs),
            bias=args.get("bias", "transformer.ln_f.bias" in weights),
            dropout=args.get("dropout", 0.0),
            hidden_act="gelu",
            norm_eps=EPS,
            tie_word_embeddings=is_tied,
        )

    def positions(self, theirs: Checkpoint) -> dict:
        """The config's fields that say how a position enters."""
        return {"position_encoding": "learned"}

    def weights(self, theirs: Checkpoint) -> dict[str, torch.Tensor]:
        return to_ours(theirs.weights, theirs.args["n_layer"])

    @torch.no_grad()
    def logits(self, theirs: Checkpoint, ids: torch.Tensor) -> torch.Tensor:
        """nanoGPT's forward from the checkpoint's own tensors, sharing no code with our model."""
        weights, args = theirs.weights, theirs.args

        def linear(name: str, states: torch.Tensor) -> torch.Tensor:
            return F.linear(states, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

        def norm(name: str, states: torch.Tensor) -> torch.Tensor:
            return F.layer_norm(states, states.shape[-1:], weights[f"{name}.weight"], weights.get(f"{name}.bias"), EPS)

        states = F.embedding(ids, weights["transformer.wte.weight"])
        if "transformer.wpe.weight" in weights:
            states = states + weights["transformer.wpe.weight"][: states.shape[1]]
        for block in (f"transformer.h.{layer}" for layer in range(args["n_layer"])):
            joint = linear(f"{block}.attn.c_attn", norm(f"{block}.ln_1", states))
            heads = (part.unflatten(-1, (args["n_head"], -1)).transpose(1, 2) for part in joint.chunk(3, dim=-1))
            query, key, value = heads
            query, key = self.rotate(theirs, query), self.rotate(theirs, key)
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
            states = states + linear(f"{block}.attn.c_proj", attended.transpose(1, 2).flatten(-2))
            inner = F.gelu(linear(f"{block}.mlp.c_fc", norm(f"{block}.ln_2", states)))
            states = states + linear(f"{block}.mlp.c_proj", inner)
        return linear("lm_head", norm("transformer.ln_f", states))

    def rotate(self, theirs: Checkpoint, states: torch.Tensor) -> torch.Tensor:
        """Turn queries or keys (batch, heads, tokens, head size) by their positions; not here."""
        return states

    def write(self, model: GPTForCausalLM, tokenizer, directory: Path, destination: Path) -> list[str]:
        config = model.config
        weights = {name: weight.contiguous() for name, weight in to_theirs(model, config.bias).items()}
        args = {name: getattr(config, ours) for ours, name in SIZES.items()}
        args |= {"bias": config.bias, "dropout": float(config.dropout)}
        lines, dataset = vocabulary_files(tokenizer, directory, destination)
        checkpoint = {
            "model": weights,
            "optimizer": fresh_optimizer(weights),
            "model_args": args,
            "iter_num": 0,
            "best_val_loss": 1e9,
            "config": dataset,
        }
        torch.save(checkpoint, directory / CHECKPOINT)
        command = shell("python", "sample.py", f"--out_dir={destination.absolute()}", "--device=cpu")
        return [*lines, f"In a checkout of nanoGPT: {command}"]


class ByteRope(NanoGPT):
    """Rotary positions by head (RoFormer, arXiv 2104.09864, equation 34): the pairs are (0, 1), (2, 3), …"""

    title = "nanoGPT with rotary positions"
    is_written = False
    known_args = {*MODEL_ARGS, *BASES}

    def recognises(self, source: Source) -> bool:
        return bool(source.checkpoint) and not super().recognises(source)

    def base(self, theirs: Checkpoint) -> float:
        """Base of the angles: pair i turns by base ** (-2 i / head size) a position."""
        named = (theirs.args.get(name) for name in BASES)
        return float(next((base for base in named if base is not None), DEFAULT_BASE))

    def positions(self, theirs: Checkpoint) -> dict:
        parameters = {"rope_type": "default", "rope_theta": self.base(theirs)}
        return {"position_encoding": "rope", "rope_parameters": parameters}

    def weights(self, theirs: Checkpoint) -> dict[str, torch.Tensor]:
        """Ours, with the rows of queries and keys in another order: our pairs are (i, i + head size / 2)."""

        def reordered(rows: torch.Tensor) -> torch.Tensor:
            return rows.unflatten(0, (theirs.args["n_head"], -1, 2)).transpose(1, 2).flatten(0, 2)

        return {
            name: reordered(weight) if ".q_proj." in name or ".k_proj." in name else weight
            for name, weight in super().weights(theirs).items()
        }

    def rotate(self, theirs: Checkpoint, states: torch.Tensor) -> torch.Tensor:
        """Each neighbouring pair, read as a complex number, times e^(i · position · frequency)."""
        tokens, size = states.shape[-2:]
        frequencies = 1.0 / self.base(theirs) ** (torch.arange(0, size, 2) / size)
        angles = torch.outer(torch.arange(tokens), frequencies)
        pairs = torch.view_as_complex(states.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def fresh_optimizer(weights: dict[str, torch.Tensor]) -> dict:
    """The state of nanoGPT's AdamW before its first step, with its defaults, which `--init_from=resume` loads."""
    own = [weight for name, weight in weights.items() if name != "lm_head.weight"]  # that is the embedding's
    groups = [
        {"params": [torch.zeros(1) for weight in own if weight.dim() >= 2], "weight_decay": 0.1},
        {"params": [torch.zeros(1) for weight in own if weight.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95)).state_dict()


def vocabulary_files(tokenizer, directory: Path, destination: Path) -> tuple[list[str], dict]:
    """Write the tokenizer, and meta.pkl where nanoGPT can read one; (lines to tell, the checkpoint's `config`).

    sample.py looks for data/<config.dataset>/meta.pkl, where an absolute `dataset` stands for itself.
    """
    if tokenizer is None:
        return ["No tokenizer came along: sample.py will take GPT-2's."], {}
    tokenizer.save_pretrained(directory)
    if write_meta(tokenizer, directory / META):
        place = destination.absolute()
        note = f"{place / META}: the vocabulary, which sample.py finds there; if you move it, copy it to data/NAME"
        return [note], {"dataset": str(place)}
    if is_gpt2s(tokenizer):
        return [], {}
    return ["sample.py will write nonsense: it knows characters and GPT-2's tokenizer, and this one is neither."], {}
