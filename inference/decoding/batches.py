"""Samples of many prompts: which of them go into one batch, so that each is what it would be alone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
import transformers
from packaging import version
from transformers import LogitsProcessor, LogitsProcessorList

from training.model.loading import without_adapter
from training.model.sampling import DRAFTS, Sample, Stops, context_left, continue_ids, cut_sample, reads_on
from training.model.sizes import text_config
from training.system.errors import UserError, one_line

from .drafts import Passes, counting_passes

# Strategies for which the padding on the left would be text: they go into one batch with prompts of their length.
READ_THE_PROMPT = (
    "repetition_penalty", "no_repeat_ngram_size", "encoder_repetition_penalty", "encoder_no_repeat_ngram_size",
    "bad_words_ids",
)  # fmt: skip


# Strategies that forbid tokens, and what is said where they forbid all.
FORBIDDING = ("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "suppress_tokens", "bad_words_ids")
NONE_LEFT = (
    "too few tokens are left to choose from; shorten --max_new_tokens, or loosen what forbids and cuts off tokens"
)


@dataclass
class Job:
    """How every prompt is continued. ends: the tokens that end a text. generation: generate()'s arguments."""

    model: Any
    tokenizer: Any
    max_new_tokens: int
    ends: Sequence[int]
    stop_strings: Sequence[str] = ()
    num_samples: int = 1
    seed: int = 0
    beyond_context: str = "window"
    generation: dict = field(default_factory=dict)
    passes: Passes = field(default_factory=Passes)

    @property
    def has_beams(self) -> bool:
        return self.generation.get("num_beams", 1) > 1

    @property
    def has_drafts(self) -> bool:
        return any(name in self.generation for name in DRAFTS)

    @property
    def is_one_by_one(self) -> bool:
        """Drafts are for one row; beams that are drawn come from one stream of random numbers."""
        return self.has_drafts or (self.has_beams and self.generation["do_sample"])

    def alone(self, number: int) -> "Job":
        """The job of a prompt's sample of that number."""
        return replace(self, num_samples=1, seed=self.seed + number)


def grow(job: Job, prompts: list[list[int]], streamer=None) -> list[list[Sample]]:
    """The samples of each prompt (its ids), in their order.

    The n-th sample of a prompt is drawn with the seed + n, whatever else is in the batch.
    """
    found: dict[int, list[Sample]] = {}
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    for _, same in groupby(order, key=lambda place: _key(job, place, len(prompts[place]))):
        places = list(same)
        batch = [prompts[place] for place in places]
        found |= zip(places, _grow_batch(job, batch, streamer), strict=True)
    return [found[place] for place in range(len(prompts))]


def _key(job: Job, place: int, length: int) -> int:
    """What is the same for prompts that may go into one batch."""
    if job.is_one_by_one:
        return place
    reads_padding = any(name in job.generation for name in READ_THE_PROMPT)
    # PEFT counts the padding's positions before virtual tokens; some rotary scalings follow the longest row.
    reads_padding |= has_virtual_tokens(job.model) or job.beyond_context == "extrapolate"
    reads_padding |= getattr(job.generation.get("make_cache"), "is_bounded", False)  # it loses track of padding
    reads_padding |= reads_on(job.model, job.generation)  # its segments begin where the padding does
    return length if reads_padding else 0


def has_virtual_tokens(model) -> bool:
    """Whether the model is a prompt or prefix adapter on its base."""
    return getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)


def _grow_batch(job: Job, prompts: list[list[int]], streamer) -> list[list[Sample]]:
    if job.has_beams:
        torch.manual_seed(job.seed)  # for beams that are drawn, one prompt at a time
        rows = _continue(job, prompts, {"num_return_sequences": job.num_samples}, streamer)
    elif job.is_one_by_one or len(prompts) * job.num_samples == 1:
        rows = []
        for number in range(job.num_samples):
            torch.manual_seed(job.seed + number)
            rows += _continue(job, prompts, {}, streamer)
    else:
        seeds = [job.seed + number for _ in prompts for number in range(job.num_samples)]
        with drawing_by_seed(job.model, seeds if job.generation["do_sample"] else []):
            rows = _continue(job, [prompt for prompt in prompts for _ in range(job.num_samples)], {}, streamer)
    return [rows[first : first + job.num_samples] for first in range(0, len(rows), job.num_samples)]


def _continue(job: Job, prompts: list[list[int]], more: dict, streamer) -> list[Sample]:
    """The sample of each row, of which beams may give several a prompt."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=job.model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=ids.device)
    stops = Stops(job.tokenizer, job.stop_strings) if job.stop_strings else None
    if not job.has_beams and any(name in job.generation for name in FORBIDDING):
        more |= {"logits_processor": LogitsProcessorList([*job.generation.get("logits_processor", []), SomeLeft()])}
    options = {"attention_mask": mask, "ends": job.ends, "stops": stops, "beyond_context": job.beyond_context}
    try:
        with counting_passes(job.model, job.passes):
            grown = continue_ids(job.model, ids, job.max_new_tokens, streamer, **options, **(job.generation | more))
    except RuntimeError as error:
        if "multinomial" not in str(error) and "probability tensor" not in str(error):
            raise
        raise UserError(f"{NONE_LEFT} ({one_line(error)})") from error
    each = len(grown) // len(prompts)
    rows = zip(grown.tolist(), [prompt for prompt in prompts for _ in range(each)], strict=True)
    found = [
        cut_sample(job.tokenizer, row[width - len(prompt) :], len(prompt), job.ends, job.stop_strings)
        for row, prompt in rows
    ]
    job.passes.tokens += sum(len(sample.tokens) for sample in found)
    return found


class SomeLeft(LogitsProcessor):
    """Ends generate() where all tokens are forbidden: it would go on with the first one."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if (scores == -torch.inf).all(-1).any():
            raise UserError(NONE_LEFT)
        return scores


def refuse_drafts(job: Job, longest: int) -> None:
    """Refuse drafts where they cannot be right: past the context with what looks back at the whole text.

    longest: tokens of the longest prompt.
    """
    if has_virtual_tokens(job.model):
        raise UserError("drafts: do not go together with an adapter of virtual tokens (prompt, prefix); leave one out")
    config = text_config(job.model.config)
    layers, modes = (getattr(config, name, None) or () for name in ("layer_types", "kv_sharing_modes"))
    if "linear_attention" in layers:
        raise UserError("drafts: linear_attention holds a state, which no token can be taken back from; leave them out")
    for what, needed, is_there in (
        ("sliding windows", "5.18", "sliding_attention" in layers),
        ("shared keys and values", "5.23", "reuse" in modes),
    ):
        if is_there and version.parse(transformers.__version__) < version.parse(needed):
            raise UserError(f"drafts: with {what} they need transformers {needed}, not {transformers.__version__}")
    context = context_left(job.model) - job.generation.get("prompt_lookup_num_tokens", 0)
    if reads_on(job.model, {}) and longest + job.max_new_tokens > context:
        raise UserError("drafts: not past the context of a model with a memory, which cannot take them back; shorten "
                        "--max_new_tokens, or give no drafts")  # fmt: skip
    names = [name for name in (*READ_THE_PROMPT, "begin_suppress_tokens", "max_time") if name in job.generation]
    if names and job.beyond_context == "window" and longest + job.max_new_tokens > context:
        least = f"take --max_new_tokens {context - longest} or less" if context > longest else "shorten the prompt"
        raise UserError(f"{names[0]}: drafts past the model's context do not see the whole text; {least}, or no drafts")


# ---- random numbers


class DrawBySeed(LogitsProcessor):
    """Draws each row's token from a stream of random numbers of its own, and leaves generate() nothing else to draw."""

    def __init__(self, seeds: Sequence[int], device: torch.device):
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        rows = zip(scores.softmax(-1), self.generators, strict=True)
        drawn = torch.stack([torch.multinomial(row, 1, generator=generator) for row, generator in rows])
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)


@contextmanager
def drawing_by_seed(model, seeds: Sequence[int]) -> Iterator[None]:
    """Let generate() draw each row by its own seed; without seeds nothing changes.

    The draw has to come after all of generate()'s own processors, and what is handed to it comes before the last ones:
    so its (private) list of them is made longer.
    """
    if not seeds:
        yield
        return
    base = without_adapter(model)
    build, draw = base._get_logits_processor, DrawBySeed(seeds, model.device)
    base._get_logits_processor = lambda *args, **kwargs: LogitsProcessorList([*build(*args, **kwargs), draw])
    try:
        yield
    finally:
        del base._get_logits_processor
