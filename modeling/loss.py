"""The language-model loss, whose float32 logits exist for one chunk of tokens at a time; and heads beside it."""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

IGNORED = -100  # the label that counts nowhere: cross_entropy's own
CHUNK_ELEMENTS = 2**26  # float32 logits of a chunk stay under 256 MiB
FURTHER_WEIGHT = 0.3  # of the loss of a token after the next, DeepSeek-V3's at first; measured in FRONTIER.md


def shifted(labels: torch.Tensor, by: int = 1) -> torch.Tensor:
    """labels: (batch, tokens). For each place what stands `by` places on, which at the end is nothing that counts."""
    return nn.functional.pad(labels, (0, by), value=IGNORED)[..., by:]


def causal_lm_loss(
    logits: torch.Tensor,
    shift_labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Cross entropy of next-token prediction, in nats a token.

    logits: (batch, tokens, vocabulary) in any float type. shift_labels: (batch, tokens), of each place the token after
    it. The sum is divided by `num_items_in_batch` (the count over all micro-batches and processes of a step) where
    given, else by the labels that count.
    """
    logits, targets = logits.flatten(0, -2), shift_labels.flatten().to(logits.device)

    def summed(some_logits, some_targets):
        return nn.functional.cross_entropy(
            some_logits.float(),
            some_targets,
            reduction="sum",
            label_smoothing=label_smoothing,
            ignore_index=IGNORED,
        )

    rows = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    if logits.shape[0] <= rows:
        total = summed(logits, targets)
    else:  # the backward pass upcasts a chunk again instead of keeping every chunk's float32
        chunks = zip(logits.split(rows), targets.split(rows), strict=True)
        total = sum(checkpoint(summed, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks)
    if num_items_in_batch is None:
        num_items_in_batch = (targets != IGNORED).sum().clamp(min=1)
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


class FurtherTokens(nn.ModuleList):
    """Heads that learn to predict the tokens after the next, as an auxiliary loss (arXiv 2404.19737, 2412.19437).

    As in DeepSeek-V3 each goes on from the states of the one before and the token that came, by one matrix here in
    place of a block, and all share the model's embedding and head.
    """

    def __init__(self, config):
        size = config.hidden_size
        super().__init__(nn.Linear(2 * size, size, bias=False) for _ in range(config.num_nextn_predict_layers))

    def forward(
        self,
        states: torch.Tensor,
        embed: Callable[[torch.Tensor], torch.Tensor],
        to_logits: Callable[[torch.Tensor], torch.Tensor],
        input_ids: torch.Tensor | None,
        shift_labels: torch.Tensor,
        position_ids: torch.Tensor | None,
        *how,
    ) -> torch.Tensor:
        """states: (batch, tokens, hidden_size), the model's last. Returns the weighted sum of the heads' losses.

        What came is read off the labels, and where those do not count off input_ids, (batch, tokens). Labels past a
        document's end, where positions start anew, do not count. how: causal_lm_loss's last arguments.
        """
        total = states.new_zeros(())
        next_ids = shift_labels if input_ids is None else shifted(input_ids).where(shift_labels < 0, shift_labels)
        for by, head in enumerate(self, 1):
            came = _normed(embed(next_ids.clamp(min=0))).to(states.dtype)
            next_ids = shifted(next_ids)
            states = _normed(states + head(torch.cat((states, came), dim=-1)))
            shift_labels = shifted(shift_labels)
            if position_ids is not None:
                shift_labels = shift_labels.masked_fill(shifted(position_ids, by) != position_ids + by, IGNORED)
            total = total + causal_lm_loss(to_logits(states), shift_labels, *how)
        return FURTHER_WEIGHT * total


def _normed(states: torch.Tensor) -> torch.Tensor:
    return nn.functional.rms_norm(states, states.shape[-1:])
