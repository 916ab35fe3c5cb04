"""The one evaluation loop: a whole split once, in sequences side by side, with a few tokens' logits at a time."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from accelerate.utils import gather_object
from torch import nn

from modeling.loss import CHUNK_ELEMENTS
from modeling.segment_memory import SegmentMemory

from ..data.dataset import IGNORED, Rows, collate_rows
from ..model.loading import without_adapter
from .lanes import HeldOutLanes
from .memory import warm_up, with_memory


class PositionSums:
    """Nats, right predictions and counted tokens by how many tokens of its context the model had read before one.

    sums: float64 (3, context_length), on the CPU. A packed document's context begins with the document.
    """

    def __init__(self, context_length: int):
        self.sums = torch.zeros(3, context_length, dtype=torch.float64)

    def add(self, counted: torch.Tensor, batch: dict[str, torch.Tensor]) -> None:
        """Add what `_token_sums` says of a batch's labels: (3, rows × labels)."""
        labels = batch["shift_labels"]
        positions = batch.get("position_ids", torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"]))
        self.sums.index_add_(1, positions[:, -labels.shape[1] :].flatten().cpu(), counted.cpu().double())


@torch.no_grad()
def evaluate_rows(
    model: nn.Module,
    rows: Rows,
    num_bytes: int,
    batch_size: int,
    autocast=nullcontext,
    rank: int = 0,
    world_size: int = 1,
    on_batch=None,
    by_position: PositionSums | None = None,
    memory_length: int = 0,
) -> dict[str, float]:
    """Loss, perplexity, bits per byte and token accuracy of `model` on `rows`, in float32 from the logits on.

    num_bytes: UTF-8 bytes of the text the rows hold. autocast: a context-manager factory for the forward. Of several
    processes each takes every world_size-th batch and all return the same. on_batch is called after each batch.
    by_position: takes the sums of this process's batches apart. memory_length: tokens of memory with which adjacent
    rows are read, in as many lanes as a batch has rows; the model is one of ours.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    memory, processes = None, world_size
    if memory_length:
        memory = SegmentMemory(without_adapter(model).config, memory_length)
        rows = HeldOutLanes(rows, batch_size, warm_up(memory), rank, world_size)
        batch_size, rank, world_size = rows.lanes, 0, 1  # its lanes are this process's own
    sums, batches = [], -(-len(rows) // batch_size)
    # The blocks may be compiled for training shapes; one pass over the split is not worth a second compilation.
    with torch.compiler.set_stance("force_eager"):
        for number in range(rank, -(-batches // world_size) * world_size, world_size):
            # Where the batches do not come out even a process goes through another's, uncounted: a sharded model's
            # forward is everyone's.
            start = number % batches * batch_size
            batch = collate_rows(rows.__getitems__(range(start, min(start + batch_size, len(rows)))))
            batch = {key: value.to(device) for key, value in batch.items()}
            inputs = batch if memory is None else with_memory(memory, batch)
            counted = _token_sums(model, inputs, autocast, batch_size)
            if number < batches:
                sums.append(counted.sum(1))
                if by_position is not None:
                    by_position.add(counted, batch)
            if on_batch is not None:
                on_batch()
    model.train(was_training)
    # Float64 on the CPU: some devices (MPS) have none.
    sums = torch.stack(sums).double().cpu() if sums else torch.zeros(0, 3, dtype=torch.float64)
    if processes > 1:
        sums = torch.cat(gather_object([sums]))  # in the order of ranks
    nats, right, tokens = sums.T.tolist()
    return language_metrics(nats, right, tokens, num_bytes)


def _token_sums(model: nn.Module, batch: dict[str, torch.Tensor], autocast, full_batch: int) -> torch.Tensor:
    """Nats, right prediction (0 or 1) and whether it counts, of each label of a batch: (3, rows × labels)."""
    labels, inputs = batch["shift_labels"], {key: value for key, value in batch.items() if key != "shift_labels"}
    sums, start = [], 0
    with autocast():  # one for all chunks: it keeps the weights that it has rounded until it ends
        for logits in chunked_logits(model, inputs, labels.shape[1], full_batch):
            sums.append(_chunk_sums(logits, labels.flatten()[start : start + len(logits)]))
            start += len(logits)
    return torch.cat(sums, dim=1)


def _chunk_sums(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    nats = nn.functional.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="none")
    return torch.stack((nats, (logits.argmax(-1) == labels).float(), (labels != IGNORED).float()))


def language_metrics(nats: list[float], right: list[float], tokens: list[float], num_bytes: float) -> dict[str, float]:
    """The metrics of batches, from each one's summed nats, right predictions and tokens, and the bytes of all text.

    loss: nats a token; bits_per_byte: comparable between tokenizers; token_accuracy: share of right predictions.
    """
    total, count = math.fsum(nats), math.fsum(tokens)
    if not count or not num_bytes:
        raise ValueError(f"nothing to evaluate: {count:.0f} tokens, {num_bytes} bytes")
    loss = total / count
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": total / num_bytes / math.log(2),
        "token_accuracy": math.fsum(right) / count,
    }


# ---- a model's logits, a chunk of tokens at a time: those of a whole batch are never there at once


def chunked_logits(
    model: nn.Module, inputs: dict[str, torch.Tensor], num_labels: int, full_batch: int
) -> Iterator[torch.Tensor]:
    """Yield the logits of each row's last `num_labels` tokens, (tokens, vocabulary), row after row.

    The blocks run once over the whole batch; what follows them (head, softcap, scale) is the model's own code, run on a
    chunk of their states at a time. A model whose blocks cannot be run apart gets a few rows at a time instead. The
    number of forwards follows from `full_batch` rows and not from those that are here: sharded processes keep in step.
    """
    decoder = decoder_of(model)
    logits = full_batch * num_labels * (model if decoder is None else decoder).config.vocab_size
    pieces = -(-logits // chunk_elements(inputs["input_ids"].device))
    output = None if pieces == 1 or decoder is None else _output(model, decoder, inputs)
    if output is None:
        for rows, count in _few_rows(inputs, min(pieces, full_batch)):
            yield model(**rows, use_cache=False).logits[:count, -num_labels:].flatten(0, 1)
        return
    # Virtual tokens have been read by now: their wrapper would put them before each chunk again.
    has_virtual = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    head = model.get_base_model() if has_virtual else model
    for states in output.last_hidden_state[:, -num_labels:].flatten(0, 1).tensor_split(pieces):
        output.last_hidden_state = states[None]
        with _answering(decoder, output):
            yield head(input_ids=torch.zeros_like(states[None, :, 0], dtype=torch.long), use_cache=False).logits[0]


def chunk_elements(device: torch.device) -> int:
    """Logits of one chunk: on a CPU few enough for its caches, elsewhere enough to keep it busy."""
    return CHUNK_ELEMENTS // 8 if device.type == "cpu" else CHUNK_ELEMENTS


def decoder_of(model: nn.Module) -> nn.Module | None:
    """The part of a causal LM that ends in hidden states, under an adapter too; None where there is none."""
    inner = without_adapter(model)
    decoder = inner.get_decoder() if hasattr(inner, "get_decoder") else None
    return None if decoder is inner else decoder


def _few_rows(inputs: dict[str, torch.Tensor], pieces: int) -> Iterator[tuple[dict[str, torch.Tensor], int]]:
    """Yield (rows, how many of them count) `pieces` times; none is run as one that does not count."""
    if pieces == 1:
        yield inputs, len(inputs["input_ids"])
        return
    split = {key: value.tensor_split(pieces) for key, value in inputs.items()}
    for index in range(pieces):
        count = len(split["input_ids"][index])
        yield {key: values[index] if count else inputs[key][:1] for key, values in split.items()}, count


def _output(model: nn.Module, decoder: nn.Module, inputs: dict[str, torch.Tensor]):
    """What the blocks give in one forward of the model, whose head sees a single token; None if it cannot be had."""
    found = []

    def shorten(module, args, output):
        states = getattr(output, "last_hidden_state", None)
        found.append((output, states))
        if states is not None:
            output.last_hidden_state = states[:1, :1]

    handle = decoder.register_forward_hook(shorten)
    try:
        model(**inputs, use_cache=False)
    finally:
        handle.remove()
    if len(found) != 1 or found[0][1] is None:
        return None
    output, output.last_hidden_state = found[0]
    return output


@contextmanager
def _answering(module: nn.Module, output) -> Iterator[None]:
    """Let a module's forward give `output`, whatever it is asked."""
    own = module.__dict__.get("forward")  # Accelerate puts its own there
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
