"""What the loop makes of rows: their order from a step on, documents kept apart, and lanes.

The rows of a lane follow each other from step to step, for a memory.
"""

import numpy as np
import torch
from torch import nn
from torch.utils.data import Sampler

from ..data.dataset import IGNORED, LANES, Rows, TokenRows, Tokens, unit_points
from ..system.errors import UserError


class StepSampler(Sampler):
    """Row indices in order, from the first row of the trainer's current step on: resuming replays nothing."""

    def __init__(self, trainer):
        self.trainer = trainer

    def __len__(self) -> int:
        return len(self.trainer.train_dataset)

    def __iter__(self):
        return iter(range(self.trainer.state.global_step * self.trainer.rows_per_step, len(self)))


class SeparatedRows(Rows):
    """Sequences of a text, given the `position_ids` that keep its documents apart.

    An end-of-text token is the first token of the document after it, as it is of a prompt that starts one; so every
    token of the text is predicted, and from its own document alone (intra-document masking, arXiv 2402.13991).
    """

    def __init__(self, rows: Rows, end_of_text: int):
        self.rows, self.end_of_text, self.num_rows = rows, end_of_text, len(rows)

    def _read(self, indices: np.ndarray) -> list[dict[str, torch.Tensor]]:
        """The rows of a batch, each with LongTensor[context_length] `position_ids`."""
        return [row | {"position_ids": self._positions(row["input_ids"])} for row in self.rows.__getitems__(indices)]

    def _positions(self, ids: torch.Tensor) -> torch.Tensor:
        places = torch.arange(len(ids))
        starts = torch.where(ids == self.end_of_text, places, 0).cummax(0).values
        return places - starts


def documents_apart(rows: Rows, corpus, data) -> Rows:
    """The rows, with their documents kept apart where the DataArguments ask for it."""
    return SeparatedRows(rows, corpus.tokenizer.eos_token_id) if data.document_masking else rows


def tell_flash_attention(model: nn.Module) -> None:
    """Have each forward tell flash attention where documents begin, which it sees by itself in a single row only.

    As transformers' FlashAttentionKwargs: the rows follow each other as one, and every row and document ends somewhere.
    """

    def add_ends(module, args, kwargs):
        positions = kwargs.get("position_ids")
        if positions is None or not str(module.config._attn_implementation).startswith("flash"):
            return None
        starts = nn.functional.pad(positions.flatten() == 0, (0, 1), value=True).nonzero().flatten().int()
        longest = positions.shape[1]  # a bound, which no new batch changes
        ends = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}
        return args, {**kwargs, **ends}

    model.register_forward_pre_hook(add_ends, with_kwargs=True)


class LaneRows(TokenRows):
    """Rows to train on: row i is of lane i % lanes, and goes on in the text where that lane's row before it ended.

    The lanes begin at the same distance from each other, all of them moved on by what the seed draws, and go on at the
    text's beginning when they come to its end. A row has "begins" too, a LongTensor scalar: 1 where nothing that its
    lane read before belongs to it. That is so in its first row and past the text's end, and in any other with
    `reset_probability`, drawn from seed and index alone. Raises UserError for a text that is too short for its lanes.
    """

    def __init__(
        self,
        tokens: Tokens,
        context_length: int,
        seed: int,
        num_rows: int,
        lanes: int,
        reset_probability: float = 0.0,
    ):
        super().__init__(tokens, context_length, num_rows)
        self.span = len(tokens) - context_length  # places where a row can begin
        if self.span < lanes * context_length:
            need = f"{lanes} lanes of {context_length} tokens at a time need a text of {(lanes + 1) * context_length:,}"
            raise UserError(f"sampling='lanes': {need}, and it has {len(tokens):,}; lower tokens_per_step, or add text")
        self.seed, self.lanes, self.reset_probability = seed, lanes, reset_probability
        self.offset = int(unit_points(np.zeros(1, dtype=np.uint64), seed)[0] * self.span)

    def _read(self, indices: np.ndarray) -> list[dict[str, torch.Tensor]]:
        begins = torch.from_numpy(self._begins(indices).astype(np.int64)).unbind(0)
        return [row | {"begins": begin} for row, begin in zip(super()._read(indices), begins, strict=True)]

    def _inputs_and_labels(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sequences = self.tokens.sequences(self._places(indices) % self.span, self.context_length + 1)
        return sequences[:, :-1], sequences[:, 1:]

    def _places(self, indices: np.ndarray) -> np.ndarray:
        """Where each row begins, counted on past the text's end."""
        lane, step = indices % self.lanes, indices // self.lanes
        return self.offset + lane * (self.span // self.lanes) + step * self.context_length

    def _begins(self, indices: np.ndarray) -> np.ndarray:
        places = self._places(indices)
        has_turned = places // self.span != (places - self.context_length) // self.span
        by_chance = unit_points(indices.astype(np.uint64), self.seed + 1) < self.reset_probability
        return (indices < self.lanes) | has_turned | by_chance


class HeldOutLanes(Rows):
    """Adjacent rows in lanes side by side: row i is of lane i % lanes, and the lanes share the rows out in stretches.

    Each lane reads up to `warm_up` rows before its stretch, whose labels are ignored, so that it begins with the memory
    that one lane over all would have there. There are at most `most_lanes`, and so few that no more is read to warm up
    than is measured. A lane that has no row left reads the last one again, ignored. A row has "begins" as in LaneRows:
    1 where the text begins. process, processes: which part of the lanes these are.
    """

    def __init__(self, rows: Rows, most_lanes: int, warm_up: int, process: int = 0, processes: int = 1):
        self.rows = rows
        self.lanes = max(1, min(most_lanes, len(rows) // (max(1, warm_up) * processes)))
        self.stretch = -(-len(rows) // (self.lanes * processes))
        self.warm_up = min(warm_up, self.stretch * (self.lanes * processes - 1))
        self.first_lane = process * self.lanes
        self.num_rows = self.lanes * (self.warm_up + self.stretch)

    def _read(self, indices: np.ndarray) -> list[dict[str, torch.Tensor]]:
        lane, step = self.first_lane + indices % self.lanes, indices // self.lanes
        chosen = lane * self.stretch + step - self.warm_up
        counts = (step >= self.warm_up) & (chosen < len(self.rows))
        rows = self.rows.__getitems__(chosen.clip(0, len(self.rows) - 1))
        return [
            row
            | {"begins": torch.tensor(int(place <= 0))}
            | ({} if counted else {"shift_labels": torch.full_like(row["shift_labels"], IGNORED)})
            for row, place, counted in zip(rows, chosen, counts, strict=True)
        ]


def training_rows(tokens: Tokens, data, args, context_length: int, rows_per_step: int, num_rows: int) -> Rows:
    """The rows to train on, in the order that the arguments name: lanes are as many as a step has rows.

    data, args: DataArguments and GPTTrainingArguments.
    """
    if data.sampling == LANES:
        seed, probability = args.order_seed, args.memory_reset_probability
        return LaneRows(tokens, context_length, seed, num_rows, rows_per_step, probability)
    return tokens.training_rows(context_length, args.order_seed, num_rows, data.sampling)
