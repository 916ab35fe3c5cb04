"""Two questions that only the model itself can answer: is it causal, and does it keep packed documents apart?"""

from contextlib import nullcontext
from functools import partial

import torch
from torch import nn

from training.model.hardware import text_config
from training.system.distributed import shares_weights_out
from training.system.errors import UserError

TOKENS = 8  # in each of two documents


@torch.no_grad()
def keeps_documents_apart(model: nn.Module, name: str, batch_size: int = 3, autocast=nullcontext) -> bool:
    """Whether `position_ids` that start anew hide one document from the next; changes one and looks at the other.

    It is asked as it will be trained: where the model lies, with its attention, so many rows at once (flash attention
    tells documents apart in single rows only) and in the precision of `autocast`. Raises UserError where later tokens
    change earlier predictions: such a model is no causal LM.
    """
    was_training = model.training
    model.eval()
    size = min(text_config(model.config).vocab_size, 1000)
    drawn = torch.randint(5, max(6, size), (3, 2 * TOKENS), generator=_generator())
    ids = drawn[:1].repeat(3, 1)
    ids[1, :TOKENS], ids[2, TOKENS:] = drawn[1, :TOKENS], drawn[2, TOKENS:]  # another first, another second document
    ids = ids.to(next(model.parameters()).device)
    positions = torch.arange(TOKENS, device=ids.device).repeat(2).expand(3, -1)
    with autocast():
        plain = _logits(model, batch_size, input_ids=ids)
        try:
            packed = _logits(model, batch_size, input_ids=ids, position_ids=positions)
        except TypeError:  # models with ALiBi take no positions
            packed = plain
    model.train(was_training)
    tolerance = 1e-5 if plain.dtype == torch.float32 and autocast is nullcontext else 1e-2
    if not _same(plain[0, :TOKENS], plain[2, :TOKENS], tolerance):
        raise UserError(f"model {name!r}: is not a causal language model: later tokens change its earlier predictions")
    return _same(packed[0, TOKENS:], packed[1, TOKENS:], tolerance)


def as_trained(model: nn.Module, args) -> dict:
    """What `keeps_documents_apart` needs to know of the training that comes; the model goes to its device.

    Weights that will be shared out over devices stay where they are, unless their attention runs on a GPU alone.
    """
    stays = shares_weights_out(args) and "flash" not in str(model.config._attn_implementation)
    if not stays and next(model.parameters()).device.type != args.device.type:
        model.to(args.device)
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    device = next(model.parameters()).device.type
    autocast = nullcontext if dtype is None else partial(torch.autocast, device, dtype)
    return {"batch_size": max(args.train_batch_size, args.eval_batch_size), "autocast": autocast}


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _logits(model: nn.Module, batch_size: int, **inputs) -> torch.Tensor:
    batches = zip(*(value.split(batch_size) for value in inputs.values()), strict=True)
    return torch.cat([model(**dict(zip(inputs, batch, strict=True)), use_cache=False).logits for batch in batches])


def _same(first: torch.Tensor, second: torch.Tensor, tolerance: float) -> bool:
    return bool((first - second).abs().max() <= tolerance * first.abs().max())
