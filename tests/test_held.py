"""`--cache`: past the context with bounded memory, batches without padding, and what does not go with a policy."""

from argparse import Namespace

import pytest
import torch

from inference import chat, generate
from inference.caches.policies import FLAGS
from inference.decoding.batches import Job, grow
from inference.decoding.held import add_cache
from training.model.sampling import continue_ids
from training.system.errors import UserError

from .variants import VARIANTS, random_model, tiny_config

CONTEXT = 32


class Letters:
    """A tokenizer whose tokens are letters."""

    def decode(self, ids: list[int], **options) -> str:
        return "".join(chr(ord("A") + token) for token in ids)


def job_with(variant: str, longest: int | None, max_new_tokens: int, beyond_context: str | None = None, **given) -> Job:
    """Greedy text of a variant of the model, with the cache of these flags."""
    flags = Namespace(**{**dict.fromkeys(("cache", *FLAGS)), "beyond_context": beyond_context, **given})
    model = random_model(tiny_config(**VARIANTS[variant]))
    job = Job(model, Letters(), max_new_tokens, ends=[], generation={"do_sample": False})
    job.beyond_context = beyond_context or "window"
    add_cache(job, flags, longest)
    return job


WINDOW = {"cache": "window", "cache_window": 10, "cache_sinks": 2}


def test_a_text_goes_on_past_the_context_and_what_is_held_does_not_grow() -> None:
    job = job_with("rope", 5, 200, **WINDOW)
    caches, made = job.generation["make_cache"], []
    job.generation["make_cache"] = lambda length: made.append(caches(length)) or made[-1]
    (samples,) = grow(job, [[1, 2, 3, 4, 5]])
    assert len(samples[0].tokens) == 200 and len(made) == 1
    assert made[0].get_seq_length() == 204 and made[0].layers[0].store.length == 12


@pytest.mark.parametrize(
    "cache",
    [WINDOW, {"cache": "h2o", "cache_budget": 12, "cache_positions": "slot"}, {"cache": "window", "cache_budget": 99}],
)
def test_a_prompt_is_continued_in_a_batch_as_alone(cache: dict, ids: torch.Tensor) -> None:
    job = job_with("rope", 16, 30, **cache)
    prompts = [ids[0, :16].tolist(), ids[1, :3].tolist(), ids[2].tolist(), ids[0, 7:].tolist()]
    alone = [grow(job, [prompt])[0] for prompt in prompts]
    assert grow(job, prompts) == alone


@pytest.mark.parametrize(
    ("variant", "given"),
    [("gpt2", {}), ("sinusoidal", {}), ("rope_dynamic", {}), ("rope", {"cache_positions": "absolute"})],
)
def test_positions_that_were_not_trained_are_refused_where_the_text_would_reach_them(variant: str, given: dict) -> None:
    slot = "--cache_positions slot, or " if variant == "rope" else ""
    words = f"cache=window: after 27 more tokens .* take --max_new_tokens 27 or less, or {slot}--beyond_context window"
    with pytest.raises(UserError, match=words):
        job_with(variant, 5, 28, **WINDOW, **given)
    assert job_with(variant, 5, 27, **WINDOW, **given).beyond_context == "window"
    assert job_with(variant, None, 28, **WINDOW, **given).beyond_context == "window"  # chat reads the text anew


@pytest.mark.parametrize("variant", ["gpt2", "rope"])
def test_the_text_is_read_anew_where_that_is_asked_for(variant: str, ids: torch.Tensor) -> None:
    job = job_with(variant, 16, 60, "window", **WINDOW)
    (samples,) = grow(job, [ids[0].tolist()])
    cache = job.generation["make_cache"]
    text = [*ids[0].tolist(), *samples[0].tokens]
    # The last token but one window: what was read when the context was last full, and the tokens since.
    again = continue_ids(
        job.model, torch.tensor([text[33 - 16 :][:16]]), 16, ends=[], make_cache=cache, do_sample=False
    )
    assert again[0].tolist() == text[33 - 16 :][:32]


def test_a_window_of_the_whole_context_goes_on_as_without_a_policy(ids: torch.Tensor, capsys) -> None:
    rows = ids[:2, :9].tolist()
    plain, full = job_with("modern", 9, 60), job_with("modern", 9, 60, cache="window", cache_budget=CONTEXT)
    assert grow(full, rows) == grow(plain, rows)
    assert "the full cache is used" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--cache_window", "8"], "cache_window=8: has no effect without --cache"),
        (["--cache", "h2o"], "cache=h2o: give --cache_budget"),
        (["--cache", "windoww"], "unknown cache 'windoww': did you mean 'window'?"),
        (["--cache", "window", "--cache_window", "2"], "cache_window=2: is smaller than cache_sinks=4"),
        (["--cache", "window", "--cache_window", "x"], "--cache_window: invalid int value"),
        (["--cache", "window", "--cache_window", "9", "--assistant_model", "y"], "not with --assistant_model"),
        (["--cache", "tova", "--cache_budget", "9", "--prompt_lookup_num_tokens", "3"], "not with --prompt_lookup"),
        (["--cache", "tova", "--cache_budget", "9", "--compile"], "not with --compile"),
        (["--cache", "tova", "--cache_budget", "9", "--json", "--logprobs"], "not with --logprobs"),
    ],
)
def test_flags_are_refused_before_a_model_is_loaded(flags: list[str], words: str) -> None:
    with pytest.raises(UserError) as refusal:
        generate.main(["no-such-model", "--temperature", "0", *flags])
    assert words in str(refusal.value)


def test_chat_takes_a_policy_too() -> None:
    with pytest.raises(UserError, match="cache=random: give --cache_budget"):
        chat.main(["no-such-model", "--cache", "random"])
