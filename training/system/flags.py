"""Command-line flags: the parser of every verb, and the valid range of every number (of recipes and calls, too)."""

import argparse
import math
import re
import shutil
import sys
import textwrap
from collections.abc import Callable
from typing import NamedTuple

from .errors import UserError, unknown


class Range(NamedTuple):
    """The numbers that a field takes: in words, and as a test that NaN does not pass."""

    words: str
    holds: Callable[[float], bool]


MOST = 10**12  # the largest count; beyond it products of counts leave 64 bits


def _whole(low: int, high: int = MOST) -> Range:
    return Range(f"a whole number from {low} to {high:,}", lambda n: low <= n <= high and n == int(n))


def _or(words: str, holds: Callable[[float], bool], other: Range) -> Range:
    return Range(f"{words}, or {other.words}", lambda n: holds(n) or other.holds(n))


def _or_share(steps: Range) -> Range:
    return _or("a share of the run between 0 and 1", lambda n: 0 < n < 1, steps)


_RANGES = {
    "max_steps": _or("-1", lambda n: n == -1, _whole(1)),
    "eval_steps save_steps logging_steps": _or_share(_whole(1)),
    "warmup_steps muon_momentum_warmup_steps average_start kv_quantization_start": _or_share(_whole(0)),
    "seed data_seed validation_seed cache_seed": _whole(0, 2**32 - 1),
    "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps tokens_per_step": _whole(1),
    "save_total_limit early_stopping_patience dataloader_prefetch_factor torch_empty_cache_steps": _whole(1),
    "shard_size validation_characters tokenizer_vocab_size block_size stride num_virtual_tokens length": _whole(1),
    "memory_length train_memory_length": _whole(0, 10**9),
    "ddp_timeout ddp_bucket_cap_mb": _whole(1, 10**9),
    "depth": _whole(1, 64),
    "num_train_epochs peak_flops lora_alpha loraplus_lr_ratio tokens_per_parameter": Range(
        "a finite number above 0", lambda x: 0 < x < math.inf
    ),
    "learning_rate muon_learning_rate weight_decay max_grad_norm adam_epsilon eval_delay": Range(
        "a finite number of at least 0", lambda x: 0 <= x < math.inf
    ),
    "adam_beta1 adam_beta2 muon_momentum muon_beta2 lora_dropout label_smoothing_factor "
    "memory_reset_probability": Range("at least 0 and below 1", lambda x: 0 <= x < 1),
    "validation_fraction": Range("above 0 and below 1", lambda x: 0 < x < 1),
    "average_decay mfu top_p top_h typical_p": Range("above 0 and at most 1", lambda x: 0 < x <= 1),
    "dataloader_num_workers": _whole(0, 1024),
    "num_proc": _whole(1, 1024),
    "num_gpus": _whole(1, 10**6),
    "num_samples num_return_sequences": _whole(1, 10_000),
    "max_new_tokens min_new_tokens top_k no_repeat_ngram_size encoder_no_repeat_ngram_size num_fewshot": _whole(0),
    "prompt_lookup_num_tokens max_matching_ngram_size num_assistant_tokens num_beams batch_size": _whole(1, 10_000),
    "cache_window cache_budget cache_group streams": _whole(1),
    "cache_sinks": _whole(0),
    "min_p assistant_confidence_threshold": Range("from 0 to 1", lambda x: 0 <= x <= 1),
    "epsilon_cutoff eta_cutoff": Range("at least 0 and below 1", lambda x: 0 <= x < 1),
    "length_penalty": Range("from -50 to 50", lambda x: -50 <= x <= 50),  # beyond, powers of lengths leave float64
    "max_time": Range("a finite number above 0", lambda x: 0 < x < math.inf),
    "limit": _or("a share between 0 and 1", lambda n: 0 < n < 1, _whole(1)),
    # logits divided by less, or multiplied by more, leave float32
    "temperature": Range("0, or a finite number of at least 1e-30", lambda x: x == 0 or 1e-30 <= x < math.inf),
    "repetition_penalty encoder_repetition_penalty": Range("from 0.01 to 100", lambda x: 0.01 <= x <= 100),
    "r": _whole(1, 2**20),
    # of the model GPTConfig knows the low end; more layers than these would not even be counted in a minute
    "num_hidden_layers num_nextn_predict_layers": Range("at most 10,000", lambda n: n <= 10_000),
    "hidden_size num_attention_heads num_key_value_heads head_dim intermediate_size vocab_size kv_lora_rank "
    "bigram_vocab_size q_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim max_position_embeddings "
    "sliding_window": Range(f"at most {MOST:,}", lambda n: n <= MOST),
}
RANGES = {name: range_ for names, range_ in _RANGES.items() for name in names.split()}


def check_number(name: str, value: object) -> None:
    """Refuse a number outside the range of the field `name`, and infinity and NaN in any field."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        range_ = RANGES.get(name, Range("a finite number", math.isfinite))
        if not range_.holds(value):
            raise UserError(f"{name}={value}: must be {range_.words}")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """A flag's name, then its help and default; no placeholder for its value."""

    def __init__(self, prog: str):
        width = max(shutil.get_terminal_size().columns - 2, 110)  # one line a flag, where that is possible
        super().__init__(prog, max_help_position=34, width=width)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Long sentences are wrapped, the line breaks of examples and tables kept."""
        return "\n".join(textwrap.fill(line, width) for line in text.splitlines())

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return ", ".join(action.option_strings) or super()._format_action_invocation(action)

    def _get_help_string(self, action: argparse.Action) -> str:
        is_shown = action.option_strings and action.default not in (None, False, "", argparse.SUPPRESS, [])
        return f"{action.help} (default: %(default)s)" if is_shown else action.help


class FlagParser(argparse.ArgumentParser):
    """argparse whose refusals are one line: flags by their whole name, each given once, and numbers in their range."""

    def __init__(self, **kwargs):
        super().__init__(**{"allow_abbrev": False, "formatter_class": HelpFormatter} | kwargs)
        self._negative_number_matcher = re.compile("-(?!-)")  # a value may begin with one dash: `--prompt -x`

    def parse_args(self, args=None, namespace=None):
        """As in argparse, but a flag that is given twice is refused: the last one would win in silence."""
        args = sys.argv[1:] if args is None else list(args)
        refuse_broken_text(args)
        words = [word.partition("=")[0] for word in args]
        for word in words:
            if words.count(word) > 1 and self._takes_one(word):
                raise UserError(f"{word} is given twice; give it once")
        flags, rest = super().parse_known_args(args, namespace)
        if rest and rest[0].startswith("--"):
            raise unknown("flag", rest[0].partition("=")[0], self._option_string_actions, self._see_help())
        if rest:
            raise UserError(f"{rest[0]!r} is not a flag; flags are written --name value")
        for name, value in vars(flags).items():
            check_number(name, value)
        return flags

    def _takes_one(self, word: str) -> bool:
        action = self._option_string_actions.get(word)
        return action is not None and action.nargs != 0 and not isinstance(action, argparse._AppendAction)

    def print_help(self, file=None):
        """argparse passes over errors of writing; here a full disk and a reader that went away reach `run_main`."""
        print(self.format_help(), end="", file=file, flush=True)

    def error(self, message: str):
        raise UserError(f"{message}; {self._see_help()}")

    def _see_help(self) -> str:
        return f"`{self.prog} --help` lists the flags."


def refuse_broken_text(words: list[str]) -> None:
    """Refuse words of a command line that are not UTF-8: no tokenizer and no recipe could hold them."""
    for word in words:
        if not word.isascii() and word.encode("utf-8", "replace") != word.encode("utf-8", "surrogatepass"):
            raise UserError(f"{word!a}: is not UTF-8; encode it as UTF-8, or put a prompt into a file: FILE:path")
