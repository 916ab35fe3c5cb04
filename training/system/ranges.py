"""The range of every number that a recipe, a flag or a call can give, in one table that one function applies."""

import math
from dataclasses import dataclass

from .errors import UserError


@dataclass(frozen=True)
class Range:
    """Finite numbers from `low` to `high`; `above` and `below` leave the ends out.

    whole: no fractions. or_share: numbers between 0 and 1 as well, which are shares of a run. also: one more number.
    """

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False
    whole: bool = False
    or_share: bool = False
    also: float | None = None

    def holds(self, value: float) -> bool:
        if value == self.also or (self.or_share and 0 < value < 1):
            return True
        is_low_enough = value < self.high if self.below or self.high == math.inf else value <= self.high
        is_in = is_low_enough and (value > self.low if self.above else value >= self.low)
        return is_in and (not self.whole or float(value).is_integer())

    def __str__(self) -> str:
        bounds = [
            "above 0" if self.whole and self.low == 1 else f"{'above' if self.above else 'at least'} {self.low:g}"
        ]
        bounds += [f"{'below' if self.below else 'at most'} {self.high:,.15g}"] if self.high < math.inf else []
        words = " and ".join(bounds[self.low == -math.inf :]) + (", and whole" if self.whole else "")
        words += " (or a share of the run, between 0 and 1)" if self.or_share else ""
        return words if self.also is None else f"{self.also:g}, or {words}"


MOST = 10**12  # what is counted; beyond it products of counts leave 64 bits
COUNT = Range(1, MOST, whole=True)
SMALL_COUNT = Range(1, 1024, whole=True)
NOT_NEGATIVE = Range(0)
POSITIVE = Range(0, above=True)
SHARE = Range(0, 1, below=True)
INTERVAL = Range(1, MOST, whole=True, or_share=True)
SEED = Range(0, 2**32 - 1, whole=True)
UP_TO = Range(-math.inf, MOST)  # GPTConfig knows the low end, and says it under its own name


def _same(range_: Range, names: str) -> dict[str, Range]:
    return dict.fromkeys(names.split(), range_)


RANGES = {
    # training
    "max_steps": Range(1, MOST, whole=True, also=-1),
    "warmup_steps": Range(0, MOST, whole=True, or_share=True),
    **_same(INTERVAL, "eval_steps save_steps logging_steps"),
    **_same(SEED, "seed data_seed validation_seed"),
    **_same(
        COUNT, "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps tokens_per_step"
    ),
    **_same(COUNT, "save_total_limit early_stopping_patience dataloader_prefetch_factor torch_empty_cache_steps"),
    **_same(Range(1, 10**9, whole=True), "ddp_timeout ddp_bucket_cap_mb"),
    **_same(POSITIVE, "num_train_epochs peak_flops lora_alpha loraplus_lr_ratio"),
    **_same(NOT_NEGATIVE, "learning_rate muon_learning_rate weight_decay max_grad_norm adam_epsilon eval_delay"),
    **_same(SHARE, "adam_beta1 adam_beta2 muon_momentum lora_dropout label_smoothing_factor"),
    "dataloader_num_workers": Range(0, 1024, whole=True),
    # acorn estimate
    "num_gpus": Range(1, 10**6, whole=True),
    "mfu": Range(0, 1, above=True),
    # data
    **_same(COUNT, "shard_size validation_characters tokenizer_vocab_size"),
    "validation_fraction": Range(0, 1, above=True, below=True),
    "num_proc": SMALL_COUNT,
    # what is sampled: logits divided by less than these leave float32
    "num_samples": Range(1, 10_000, whole=True),
    "max_new_tokens": Range(0, MOST, whole=True),
    "temperature": Range(1e-30, also=0),
    "top_k": Range(0, MOST, whole=True),
    "top_p": Range(0, 1, above=True),
    "repetition_penalty": Range(0.01, 100),
    # adapters
    "r": Range(1, 2**20, whole=True),
    "num_virtual_tokens": COUNT,
    # the model: more layers than these would not even be counted in a minute
    "num_hidden_layers": Range(-math.inf, 10_000),
    **_same(UP_TO, "hidden_size num_attention_heads num_key_value_heads head_dim intermediate_size"),
    **_same(UP_TO, "vocab_size max_position_embeddings sliding_window"),
}


def check_number(name: str, value: object, shown: str | None = None) -> None:
    """Refuse a number outside the range of the field `name`, which messages call `shown`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and name not in RANGES and isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{shown or name}={value}: must be a finite number")
    if is_number and name in RANGES and not RANGES[name].holds(value):
        finite = "" if math.isfinite(value) else "a finite number, "
        raise UserError(f"{shown or name}={value}: must be {finite}{RANGES[name]}")


def check_numbers(arguments: object) -> None:
    """Refuse whatever attribute of a section, or of parsed flags, is out of its range."""
    for name, value in vars(arguments).items():
        check_number(name, value)
