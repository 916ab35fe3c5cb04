"""`--cache NAME`: which policy holds what is kept of earlier tokens, and what does not go with one."""

import argparse

from training.model.loading import without_adapter
from training.model.sampling import context_left
from training.system.errors import UserError
from training.system.flags import FlagParser

from ..caches.policies import FLAGS, POLICIES, Caches, settle
from .batches import Job, has_virtual_tokens

# what --cache does not go with, by flag, and why
APART = {
    "assistant_model": "drafts that turn out wrong would have to be taken back",
    "prompt_lookup_num_tokens": "drafts that turn out wrong would have to be taken back",
    "compile": "a compiled step needs a cache of a fixed size",
    "logprobs": "they are read without a cache",
}


def add_cache_flags(parser: FlagParser) -> None:
    """`--cache` and a flag for each setting of a policy; what is not given is None."""
    add = parser.add_argument_group("what is kept of earlier tokens").add_argument
    policies = "; ".join(f"{name}, {policy.help}" for name, policy in POLICIES.items())
    add("--cache", help=f"in place of all of them: {policies}")
    for name, flag in FLAGS.items():
        add(f"--{name}", type=flag.type, help=flag.help)


def refuse_cache(flags: argparse.Namespace, values: dict) -> None:
    """Refuse settings of no policy, and what does not go with one; values: strategies by name."""
    for name in FLAGS:
        if flags.cache is None and getattr(flags, name) is not None:
            raise UserError(f"{name}={getattr(flags, name)}: has no effect without --cache")
    if flags.cache is None:
        return
    settle(flags.cache, settings_of(flags))
    for name, why in APART.items():
        if values.get(name) or getattr(flags, name, None):
            raise UserError(f"cache={flags.cache}: not with --{name}, as {why}; leave one of them out")


def settings_of(flags: argparse.Namespace) -> dict:
    """The settings of a policy that the flags give; None where they do not."""
    return {name: getattr(flags, name) for name in FLAGS}


def add_cache(job: Job, flags: argparse.Namespace, longest: int | None = None) -> None:
    """Let the policy that the flags name hold what is kept of the text; past the context too, if it drops tokens.

    longest: tokens of the longest prompt, where a text that would end at untrained positions is to be refused.
    """
    if flags.cache is None:
        return
    if has_virtual_tokens(job.model):
        raise UserError(f"cache={flags.cache}: not with virtual tokens, which come with a cache of their own")
    caches = Caches(without_adapter(job.model).config, flags.cache, **settings_of(flags))
    job.generation["make_cache"] = caches
    asked = getattr(flags, "beyond_context", None)
    if not caches.is_bounded or asked == "window":
        return
    if caches.goes_on:
        job.beyond_context = "extrapolate"
    elif longest is not None and not asked and longest + job.max_new_tokens > context_left(job.model):
        raise UserError(past_context(caches, context_left(job.model) - longest))


def past_context(caches: Caches, left: int) -> str:
    """Why a policy does not go on where the context is full; left: tokens until then."""
    mends = [f"--max_new_tokens {left} or less"] if left > 0 else []
    mends += ["--cache_positions slot"] if caches.may_go_on else []
    mends += ["--beyond_context window, which reads the text anew"]
    why = f"after {left} more tokens come positions that the model was not trained on"
    return f"cache={caches.name}: {why}; take {', or '.join(mends)}"
