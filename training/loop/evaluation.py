"""The one evaluation loop: a whole split once, in non-overlapping windows, the same for every contender."""

from contextlib import nullcontext

import torch
from torch import nn

from ..data.dataset import IGNORED, EvaluationRows, collate_rows
from .chunked_logits import chunked_logits
from .metrics import language_metrics


@torch.no_grad()
def evaluate_rows(
    model: nn.Module,
    rows: EvaluationRows,
    num_bytes: int,
    batch_size: int,
    autocast=nullcontext,
    rank: int = 0,
    world_size: int = 1,
    on_batch=None,
) -> dict[str, float]:
    """Loss, perplexity, bits per byte and token accuracy of `model` on `rows`, in float32 from the logits on.

    num_bytes: UTF-8 bytes of the text the rows hold. autocast: a context-manager factory for the forward. Of several
    processes each takes every world_size-th batch and all return the same. on_batch is called after each batch.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    sums, batches = [], -(-len(rows) // batch_size)
    # The blocks may be compiled for training shapes; one pass over the split is not worth a second compilation.
    with torch.compiler.set_stance("force_eager"):
        for number in range(rank, -(-batches // world_size) * world_size, world_size):
            # Where the batches do not come out even a process goes through another's, uncounted: a sharded model's
            # forward is everyone's.
            start = number % batches * batch_size
            batch = collate_rows(rows.__getitems__(range(start, min(start + batch_size, len(rows)))))
            batch = {key: value.to(device) for key, value in batch.items()}
            counted = _batch_sums(model, batch, autocast, batch_size)
            sums += [counted] if number < batches else []
            if on_batch is not None:
                on_batch()
    model.train(was_training)
    # Float64 on the CPU: some devices (MPS) have none.
    sums = torch.stack(sums).double().cpu() if sums else torch.zeros(0, 3, dtype=torch.float64)
    if world_size > 1:
        sums = _gather(sums, world_size)
    nats, right, tokens = sums.T.tolist()
    return language_metrics(nats, right, tokens, num_bytes)


def _batch_sums(model: nn.Module, batch: dict[str, torch.Tensor], autocast, full_batch: int) -> torch.Tensor:
    """Summed nats, right predictions and counted tokens of one batch: (3,)."""
    labels, inputs = batch["shift_labels"], {key: value for key, value in batch.items() if key != "shift_labels"}
    sums, start = torch.zeros(3, device=labels.device), 0
    with autocast():  # one for all chunks: it keeps the weights that it has rounded until it ends
        for logits in chunked_logits(model, inputs, labels.shape[1], full_batch):
            sums += _chunk_sums(logits, labels.flatten()[start : start + len(logits)])
            start += len(logits)
    return sums


def _chunk_sums(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    nats = nn.functional.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
    right = (logits.argmax(-1) == labels).sum()
    return torch.stack((nats, right.float(), (labels != IGNORED).sum().float()))


def _gather(sums: torch.Tensor, world_size: int) -> torch.Tensor:
    """Every process's batches, in the order of ranks."""
    parts: list = [None] * world_size
    torch.distributed.all_gather_object(parts, sums)
    return torch.cat(parts)
