"""Two questions that only the model itself can answer: is it causal, and does it keep packed documents apart?"""

import torch
from torch import nn

from training.errors import UserError
from training.hardware import text_config

TOKENS = 8  # in each of two documents


@torch.no_grad()
def keeps_documents_apart(model: nn.Module, name: str) -> bool:
    """Whether `position_ids` that start anew hide one document from the next; changes one and looks at the other.

    Raises UserError where later tokens change earlier predictions: such a model is no causal LM.
    """
    was_training = model.training
    model.eval()
    drawn = torch.randint(
        5, max(6, min(text_config(model.config).vocab_size, 1000)), (3, 2 * TOKENS), generator=_generator()
    )
    ids = drawn[:1].repeat(3, 1)
    ids[1, :TOKENS], ids[2, TOKENS:] = drawn[1, :TOKENS], drawn[2, TOKENS:]  # another first, another second document
    ids = ids.to(next(model.parameters()).device)
    positions = torch.arange(TOKENS, device=ids.device).repeat(2).expand(3, -1)
    plain = _logits(model, ids)
    try:
        packed = _logits(model, ids, position_ids=positions)
    except TypeError:  # models with ALiBi take no positions
        packed = plain
    model.train(was_training)
    if not _same(plain[0, :TOKENS], plain[2, :TOKENS]):
        raise UserError(f"model {name!r}: is no causal language model: later tokens change its earlier predictions")
    return _same(packed[0, TOKENS:], packed[1, TOKENS:])


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _logits(model: nn.Module, ids: torch.Tensor, **positions) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False, **positions).logits


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    tolerance = 1e-5 if first.dtype == torch.float32 else 1e-2
    return bool((first - second).abs().max() <= tolerance * first.abs().max())
