"""Rows of several documents that do not see each other: `position_ids` start anew with each.

transformers keeps documents apart where positions step back, as long as there is no attention mask and no cache.
"""

from bisect import bisect_left, insort
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from training.data.corpus import Corpus
from training.data.dataset import IGNORED, EvaluationRows, Rows, shuffled_starts
from training.loop.lanes import SeparatedRows
from training.model.sizes import text_config
from training.system.distributed import shares_weights_out
from training.system.errors import UserError

from .data import Example

PROBED = 8  # tokens in each of two documents


class ExampleRows(Rows):
    """Examples packed into rows, or one a row; a row is a pure function of its index.

    A row is {"input_ids", "shift_labels"} and, where packed, "position_ids": LongTensor[context_length] each; labels
    of what does not count, and of the filling at the end, are -100. num_rows: rows in all (training goes round in a new
    order each time), or None for each row once, in order.
    """

    def __init__(
        self,
        examples: list[Example],
        context_length: int,
        fill: int,
        packing: bool = True,
        num_rows: int | None = None,
        seed: int = 0,
    ):
        self.examples, self.context_length, self.fill, self.packing = examples, context_length, fill, packing
        self.seed, self.is_shuffled = seed, num_rows is not None
        lengths = [len(example.ids) - 1 for example in examples]
        self.bins = pack(lengths, context_length) if packing else [[number] for number in range(len(examples))]
        self.num_rows = len(self.bins) if num_rows is None else num_rows

    def _read(self, indices: np.ndarray) -> list[dict[str, torch.Tensor]]:
        if self.is_shuffled:
            indices = shuffled_starts(indices.astype(np.uint64), self.seed, len(self.bins) + 1, 1)
        return [self._row(self.bins[index]) for index in indices.tolist()]

    def _row(self, numbers: list[int]) -> dict[str, torch.Tensor]:
        inputs = np.full(self.context_length, self.fill, dtype=np.int64)
        labels = np.full(self.context_length, IGNORED, dtype=np.int64)
        positions, at = np.zeros(self.context_length, dtype=np.int64), 0
        for example in (self.examples[number] for number in numbers):
            end = at + len(example.ids) - 1
            inputs[at:end] = example.ids[:-1]
            labels[at:end] = np.where(example.counts[1:], example.ids[1:], IGNORED)
            positions[at:end] = np.arange(end - at)
            at = end
        positions[at:] = np.arange(self.context_length - at)
        row = {"input_ids": torch.from_numpy(inputs), "shift_labels": torch.from_numpy(labels)}
        return row | ({"position_ids": torch.from_numpy(positions)} if self.packing else {})


def pack(lengths: list[int], capacity: int) -> list[list[int]]:
    """Bins of indices whose lengths sum to at most `capacity`: longest first, each where it fits most closely."""
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    bins: list[list[int]] = []
    rooms: list[int] = []  # the sizes of room that some bin has left, sorted
    with_room: dict[int, list[int]] = {}
    for number in order:
        if lengths[number] > capacity:
            raise UserError(f"block_size={capacity}: a document of {lengths[number]} tokens was not split")
        place = bisect_left(rooms, lengths[number])
        if place == len(rooms):
            bins.append([])
            index, room = len(bins) - 1, capacity
        else:
            room = rooms[place]
            index = with_room[room].pop()
            if not with_room[room]:
                rooms.pop(place)
        bins[index].append(number)
        left = room - lengths[number]
        if left and not with_room.get(left):
            insort(rooms, left)
        if left:
            with_room.setdefault(left, []).append(index)
    return bins


def held_out_rows(corpus, context_length: int, packing: bool) -> Dataset:
    """The rows of one evaluation on a Corpus of text or on Examples; each document once, in order."""
    end = corpus.tokenizer.eos_token_id
    if isinstance(corpus, Corpus) and packing:
        return SeparatedRows(EvaluationRows(corpus.tokens("validation"), context_length), end)
    return ExampleRows(documents_in(corpus, "validation", context_length), context_length, end, packing)


def documents_in(corpus, split: str, limit: int) -> list[Example]:
    """The documents of "train" or "validation", cut every `limit` tokens."""
    if not isinstance(corpus, Corpus):
        return getattr(corpus, split)
    tokens = corpus.tokens(split)
    return documents_of(tokens.sequence(0, len(tokens)), corpus.tokenizer.eos_token_id, limit)


def documents_of(tokens: np.ndarray, end_of_text: int, limit: int) -> list[Example]:
    """The documents of a text's tokens as examples, each begun by an end-of-text token and cut every `limit` tokens."""
    stream = np.concatenate(([end_of_text], tokens.astype(np.int64)))
    starts = np.flatnonzero(stream == end_of_text)
    pieces = []
    for start, end in zip(starts, [*starts[1:] + 1, len(stream)], strict=True):
        document = stream[start:end]  # with the end-of-text token that closes it
        for at in range(0, len(document) - 1, limit):
            ids = document[at : at + limit + 1]
            pieces.append(Example(ids, np.ones(len(ids), dtype=bool), "text"))
    return pieces


# ---- does the model keep packed documents apart?


@torch.no_grad()
def keeps_documents_apart(model: nn.Module, name: str, args=None) -> bool:
    """Whether `position_ids` that start anew hide one document from the next; changes one and looks at the other.

    With `args` it is asked as it will be trained: where the model will lie, with its attention, so many rows at once
    (flash attention tells documents apart in single rows only) and in the run's precision. Raises UserError where later
    tokens change earlier predictions: such a model is no causal LM.
    """
    rows, autocast = (3, nullcontext) if args is None else place_as_trained(model, args)
    was_training = model.training
    model.eval()
    size = min(text_config(model.config).vocab_size, 1000)
    drawn = torch.randint(5, max(6, size), (3, 2 * PROBED), generator=torch.Generator().manual_seed(0))
    ids = drawn[:1].repeat(3, 1)
    ids[1, :PROBED], ids[2, PROBED:] = drawn[1, :PROBED], drawn[2, PROBED:]  # another first, another second document
    ids = ids.to(next(model.parameters()).device)
    positions = torch.arange(PROBED, device=ids.device).repeat(2).expand(3, -1)
    with autocast():
        plain = _logits(model, rows, input_ids=ids)
        try:
            packed = _logits(model, rows, input_ids=ids, position_ids=positions)
        except TypeError:  # models with ALiBi take no positions
            packed = plain
    model.train(was_training)
    tolerance = 1e-5 if plain.dtype == torch.float32 and autocast is nullcontext else 1e-2

    def is_same(first: torch.Tensor, second: torch.Tensor) -> bool:
        return bool((first - second).abs().max() <= tolerance * first.abs().max())

    if not is_same(plain[0, :PROBED], plain[2, :PROBED]):
        raise UserError(f"model {name!r}: is not a causal language model: later tokens change its earlier predictions")
    return is_same(packed[0, PROBED:], packed[1, PROBED:])


def place_as_trained(model: nn.Module, args) -> tuple[int, Callable]:
    """Move the model to its device, and return (rows at once, autocast) of the training that comes.

    Weights that will be shared out over devices stay where they are, unless their attention runs on a GPU alone.
    """
    stays = shares_weights_out(args) and "flash" not in str(model.config._attn_implementation)
    if not stays and next(model.parameters()).device.type != args.device.type:
        model.to(args.device)
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    device = next(model.parameters()).device.type
    autocast = nullcontext if dtype is None else partial(torch.autocast, device, dtype)
    return max(args.train_batch_size, args.eval_batch_size), autocast


def _logits(model: nn.Module, rows: int, **inputs) -> torch.Tensor:
    batches = zip(*(value.split(rows) for value in inputs.values()), strict=True)
    return torch.cat([model(**dict(zip(inputs, batch, strict=True)), use_cache=False).logits for batch in batches])
