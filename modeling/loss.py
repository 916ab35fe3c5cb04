"""The language-model loss, computed so that float32 logits exist for one chunk of tokens at a time."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 2**26  # float32 logits of a chunk stay under 256 MiB


def causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor | None = None,
    shift_labels: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> torch.Tensor:
    """Cross entropy of next-token prediction, in nats a token.

    logits: (batch, tokens, vocabulary) in any float type. labels: (batch, tokens), shifted here by one; shift_labels:
    the same shape, shifted already by whoever cut the windows. The sum is divided by `num_items_in_batch` (the count
    over all micro-batches and processes of a step) where given, else by the labels that count.
    """
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    logits, targets = logits.flatten(0, -2), shift_labels.flatten().to(logits.device)

    def summed(some_logits, some_targets):
        return nn.functional.cross_entropy(
            some_logits.float(),
            some_targets,
            reduction="sum",
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
        )

    rows = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    if logits.shape[0] <= rows:
        total = summed(logits, targets)
    else:  # the backward pass upcasts a chunk again instead of keeping every chunk's float32
        chunks = zip(logits.split(rows), targets.split(rows), strict=True)
        total = sum(checkpoint(summed, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks)
    if num_items_in_batch is None:
        num_items_in_batch = (targets != ignore_index).sum().clamp(min=1)
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch
