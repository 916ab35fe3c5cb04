"""Where samples go: to the terminal as they grow, as text when complete, or as lines of JSON."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch

from modeling.compat import CACHE_NAME
from modeling.segment_memory import SegmentMemory
from training.model.loading import without_adapter
from training.model.sampling import Sample, context_left, reads_on
from training.system.errors import UserError

from .batches import Job
from .prompts import Prompt


def separator(number: int) -> str:
    """A line between samples."""
    return "─" * 50 + "\n" if number else ""


def refuse_taken(name: str) -> None:
    """Refuse a file that is there already: what it holds is not touched."""
    if Path(name).exists():
        raise UserError(f"--output {name}: is there already; choose another name")


@contextmanager
def open_output(name: str | None) -> Iterator[IO[str]]:
    """The new file of that name, or standard output."""
    if name is None:
        yield sys.stdout
        return
    try:
        file = Path(name).open("x", encoding="utf-8")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UserError(f"--output {name}: {error.strerror}; choose another name") from error
    with file:
        yield file


def json_line(prompt: Prompt, number: int, sample: Sample, logprobs: list[float] | None) -> str:
    """A sample as a line of JSON: what came with its prompt, and what was generated."""
    more = {} if logprobs is None else {"logprobs": logprobs}
    own = {"sample": number, "text": sample.text, "tokens": sample.tokens, **more}
    fields = {"prompt": prompt.text, **prompt.fields, **own, "finish_reason": sample.finish_reason}
    return json.dumps(fields, ensure_ascii=False)


@torch.no_grad()
def log_probabilities(job: Job, prompt: list[int], sample: Sample) -> list[float]:
    """The natural logarithm of each token's probability, as the model gives it: before temperature and penalties.

    Read in the windows, or with the memory, that they were generated in.
    """
    ids = torch.tensor([*prompt, *sample.tokens], device=job.model.device)
    context = len(ids) if job.beyond_context == "extrapolate" else context_left(job.model)
    if len(ids) > context and reads_on(job.model, job.generation):
        memory = SegmentMemory(without_adapter(job.model).config)
        pieces = [job.model(piece, **{CACHE_NAME: memory}).logits[0] for piece in ids[None, :-1].split(context, dim=1)]
        found = torch.cat(pieces)[len(prompt) - 1 :].float().log_softmax(-1)
        return [round(value, 6) for value in found.gather(1, ids[len(prompt) :, None])[:, 0].tolist()]
    found: list[float] = []
    start, first = 0, len(prompt)
    while first < len(ids):
        if first - start > context:
            start = first - max(1, context // 2)
        end = min(start + context + 1, len(ids))
        logits = job.model(input_ids=ids[None, start : end - 1]).logits[0, first - 1 - start :].float()
        found += logits.log_softmax(-1).gather(1, ids[first:end, None])[:, 0].tolist()
        first = end
    return [round(value, 6) for value in found]
