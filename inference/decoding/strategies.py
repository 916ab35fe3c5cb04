"""How the next token is chosen: the table of generate()'s strategies, their flags, and what goes together."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from transformers import GenerationConfig

from training.model.sampling import sampling_arguments
from training.model.sizes import text_config
from training.system.errors import UserError, unknown
from training.system.files import read_json
from training.system.flags import FlagParser, check_number


def one_of(*words: str) -> Callable[[object], object]:
    """A value that is one of these words; true and false become bool."""

    def read(value: object) -> object:
        word = str(value).lower() if isinstance(value, bool) else str(value)
        if word not in words:
            raise ValueError(f"must be {', '.join(words[:-1])} or {words[-1]}")
        return {"true": True, "false": False}.get(word, word)

    return read


def whole(value: object) -> int:
    """A whole number."""
    if isinstance(value, bool) or (isinstance(value, float) and value != int(value)):
        raise ValueError("must be a whole number")
    try:
        return int(value)
    except (TypeError, ValueError):
        raise ValueError("must be a whole number") from None


def number(value: object) -> float:
    """A number."""
    try:
        return float("x" if isinstance(value, bool) else value)
    except (TypeError, ValueError):
        raise ValueError("must be a number") from None


def texts(value: object) -> list[str]:
    """One or more strings that are not empty."""
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not strings or not all(isinstance(text, str) and text for text in strings):
        raise ValueError("must be strings that are not empty")
    return strings


def ids(value: object) -> list[int]:
    """A list of token ids, in JSON where it is a flag."""
    tokens = parsed(value)
    if not isinstance(tokens, list) or not tokens or not all(type(token) is int and token >= 0 for token in tokens):
        raise ValueError("must be a list of token ids, such as [5, 17]")
    return tokens


def lists_of_ids(value: object) -> list[list[int]]:
    """Lists of token ids, in JSON where it is a flag."""
    lists = parsed(value)
    if not isinstance(lists, list) or not lists:
        raise ValueError("must be lists of token ids, such as [[5], [8, 17]]")
    return [ids(tokens) for tokens in lists]


def parsed(value: object) -> object:
    """What a flag's JSON says."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError("must be JSON, such as [5, 17]") from None


class Strategy(NamedTuple):
    """A field of GenerationConfig: how its value is read, what it needs, what it is without effect, and its help."""

    read: Callable[[object], Any]
    needs: str  # a key of NEEDS, or "" for one that goes with all
    idle: object
    help: str


DRAFT_FLAGS = {"lookup": "prompt_lookup_num_tokens", "assistant": "assistant_model"}
# what a strategy needs: how that is switched on
NEEDS = {
    "sampling": "without sampling; leave it out, or sample (--temperature above 0, --do_sample true)",
    "beams": "without beams; leave it out, or take --num_beams 2 or more",
    "lookup": "without prompt lookup; leave it out, or take --prompt_lookup_num_tokens",
    "assistant": "without a draft model; leave it out, or take --assistant_model",
}

STRATEGIES = {  # in the order of the help
    "do_sample": Strategy(one_of("true", "false"), "", None, "draw tokens (true), or take the likeliest (false)"),
    "temperature": Strategy(number, "sampling", 1.0, "below 1 draws likelier tokens; 0 takes the likeliest"),
    "top_k": Strategy(whole, "sampling", 0, "draw from the k likeliest tokens; 0: all"),
    "top_p": Strategy(number, "sampling", 1.0, "draw from the likeliest tokens whose probabilities add up to this"),
    "min_p": Strategy(number, "sampling", 0.0, "draw from tokens this likely or more, the likeliest counting as 1"),
    "top_h": Strategy(number, "sampling", 1.0, "draw from the likeliest tokens that keep this share of the entropy"),
    "typical_p": Strategy(number, "sampling", 1.0, "draw from the most typical tokens that add up to this"),
    "epsilon_cutoff": Strategy(number, "sampling", 0.0, "draw from tokens above this probability"),
    "eta_cutoff": Strategy(number, "sampling", 0.0, "the same, lower where the model is unsure"),
    "num_beams": Strategy(whole, "", 1, "beam search: the likeliest text of so many that are followed"),
    "length_penalty": Strategy(number, "beams", 1.0, "of beams: above 0 prefers long texts, below 0 short ones"),
    "early_stopping": Strategy(
        one_of("true", "false", "never"), "beams", False,
        "stop when there are enough finished beams (true), when better ones are unlikely (false) or impossible (never)",
    ),
    "repetition_penalty": Strategy(number, "", 1.0, "above 1 repeats less"),
    "no_repeat_ngram_size": Strategy(whole, "", 0, "no sequence of so many tokens comes twice"),
    "encoder_repetition_penalty": Strategy(number, "", 1.0, "above 1 keeps to the tokens of the prompt"),
    "encoder_no_repeat_ngram_size": Strategy(whole, "", 0, "no sequence of so many tokens of the prompt comes again"),
    "suppress_tokens": Strategy(ids, "", None, "token ids never to write: [5, 17]"),
    "begin_suppress_tokens": Strategy(ids, "", None, "token ids not to begin with: [5, 17]"),
    "bad_words_ids": Strategy(lists_of_ids, "", None, "sequences of token ids never to write: [[5], [8, 17]]"),
    "max_new_tokens": Strategy(whole, "", None, "longest sample in tokens"),
    "min_new_tokens": Strategy(whole, "", 0, "no end of text before so many tokens"),
    "max_time": Strategy(number, "", None, "stop after so many seconds"),
    "stop_strings": Strategy(texts, "", None, "end before any of these texts ($'\\n' is a line break in bash)"),
    "num_return_sequences": Strategy(whole, "", 1, "number of samples, or of the best beams"),
    "prompt_lookup_num_tokens": Strategy(
        whole, "", None, "draft up to so many tokens from what followed the same words before: same text, fewer passes"
    ),
    "max_matching_ngram_size": Strategy(whole, "lookup", None, "longest sequence to look up"),
    "num_assistant_tokens": Strategy(whole, "assistant", None, "tokens that the draft model writes ahead"),
    "num_assistant_tokens_schedule": Strategy(
        one_of("constant", "heuristic", "heuristic_transient"), "assistant", None,
        "whether that number follows how many are right",
    ),
    "assistant_confidence_threshold": Strategy(
        number, "assistant", None, "the draft model stops where it is less sure than this"
    ),
}  # fmt: skip

# the first strategy of a group: the heading that the help puts above it
HEADINGS = {
    "do_sample": "sampling",
    "num_beams": "beams",
    "repetition_penalty": "what not to write",
    "max_new_tokens": "how much",
    "prompt_lookup_num_tokens": "drafts",
}

# Without a file the verb samples as nanoGPT does; with one, what it does not say is as in transformers.
DEFAULTS = {"do_sample": True, "temperature": 0.8, "top_k": 200, "max_new_tokens": 300}
IN_TRANSFORMERS = {"do_sample": False, "temperature": 1.0, "top_k": 50, "max_new_tokens": 300}

GONE = "left transformers for code on the Hub ({}), which Acorn does not run; leave it out"
REFUSED = {  # fields of GenerationConfig that are no strategy of this verb, with the reason
    "num_beam_groups": "diverse beam search " + GONE.format("transformers-community/group-beam-search"),
    "diversity_penalty": "diverse beam search " + GONE.format("transformers-community/group-beam-search"),
    "penalty_alpha": "contrastive search " + GONE.format("transformers-community/contrastive-search"),
    "dola_layers": "DoLa " + GONE.format("transformers-community/dola"),
    "constraints": "constrained beams " + GONE.format("transformers-community/constrained-beam-search"),
    "force_words_ids": "constrained beams " + GONE.format("transformers-community/constrained-beam-search"),
    "max_length": "counts the prompt too; give max_new_tokens",
    "min_length": "counts the prompt too; give min_new_tokens",
}
HIDDEN_FLAGS = ("num_beam_groups", "diversity_penalty", "penalty_alpha", "dola_layers", "max_length", "min_length")
# What a generation_config.json holds besides: where it comes from, and tokens that do nothing to a text.
NOT_READ = ("transformers_version", "_from_model_config", "_commit_hash", "bos_token_id", "pad_token_id")


def add_strategy_flags(parser: FlagParser, names=tuple(STRATEGIES)) -> None:
    """A flag for each of these strategies; what is not given is None."""
    group = parser
    for name in names:
        strategy = STRATEGIES[name]
        group = parser.add_argument_group(HEADINGS[name]) if name in HEADINGS else group
        default = f" (default: {DEFAULTS[name]})" if name in ("temperature", "top_k", "max_new_tokens") else ""
        many = {"nargs": "+"} if strategy.read is texts else {}
        group.add_argument(f"--{name}", help=strategy.help + default, **many)
        if name == "num_return_sequences":
            group.add_argument("--num_samples", help="nanoGPT's name of the same")
    for name in HIDDEN_FLAGS:
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)


def given_strategies(flags: argparse.Namespace) -> dict[str, Any]:
    """The strategies that the flags give, read and in their ranges."""
    for name in HIDDEN_FLAGS:
        if getattr(flags, name, None) is not None:
            raise refused(name, getattr(flags, name))
    given = {name: value for name, value in vars(flags).items() if name in STRATEGIES and value is not None}
    if getattr(flags, "num_samples", None) is not None:
        if "num_return_sequences" in given:
            raise UserError("num_samples and num_return_sequences are two names of one number; give it once")
        return read_all(given) | {"num_return_sequences": read_value("num_samples", whole, flags.num_samples)}
    return read_all(given)


def read_all(values: dict[str, Any]) -> dict[str, Any]:
    """Values of strategies in their types; one that is none, or out of its range, is refused."""
    return {name: read_value(name, STRATEGIES[name].read, value) for name, value in values.items()}


def read_value(name: str, read: Callable[[object], Any], value: object) -> Any:
    """One value in its type and range, or a UserError that names it."""
    try:
        found = read(value)
    except (ValueError, OverflowError) as error:
        shown = f"{value}"[:60] + ("…" if len(f"{value}") > 60 else "")
        raise UserError(f"{name}={shown}: {error}") from error
    check_number(name, found)
    return found


def file_strategies(path: Path) -> tuple[dict[str, Any], list[int] | None]:
    """(strategies, end-of-text tokens or None) of a generation_config.json; an unknown key is refused."""
    if not path.is_file():
        raise UserError(f"--generation_config {path}: there is no such file")
    content = {name: value for name, value in read_json(path, "mend it").items() if value is not None}
    ends = content.pop("eos_token_id", None)
    values = {name: value for name, value in content.items() if name not in NOT_READ}
    for name, value in values.items():
        if name not in STRATEGIES and name not in REFUSED and hasattr(GenerationConfig(), name):
            raise UserError(f"{path}: {name}={value}: `acorn generate` does not do this; leave it out")
        if name not in STRATEGIES:
            raise refused(name, value, path) if name in REFUSED else unknown(f"key of {path}", name, STRATEGIES)
    try:
        if ends is not None:
            ends = read_value("eos_token_id", ids, [ends] if isinstance(ends, int) else ends)
        return read_all(values), ends
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def refused(name: str, value: object, path: Path | None = None) -> UserError:
    """Say why this verb does not take a field of GenerationConfig."""
    return UserError(f"{f'{path}: ' if path else ''}{name}={value}: {REFUSED[name]}")


# ---- what goes together


def samples(values: dict[str, Any]) -> bool | None:
    """Whether these values ask for sampling; None where they leave it open."""
    if values.get("do_sample") is not None:
        return values["do_sample"]
    if values.get("temperature") == 0:
        return False
    drawn = (name for name in values if STRATEGIES[name].needs == "sampling" and not is_idle(name, values[name]))
    return True if any(drawn) else None


def is_idle(name: str, value: object) -> bool:
    """Whether a strategy has no effect at this value."""
    return value == STRATEGIES[name].idle and name != "do_sample"


def settle(given: dict[str, Any], file: dict[str, Any] | None = None, has_assistant: bool = False) -> dict[str, Any]:
    """All strategies by name, from flags that win over a file; what contradicts itself is refused."""
    base = DEFAULTS if file is None else IN_TRANSFORMERS | file
    has_beams = given.get("num_beams", base.get("num_beams", 1)) > 1
    asked = samples(given)
    do_sample = asked if asked is not None else base["do_sample"] and not (has_beams and file is None)
    values = base | given | {"do_sample": do_sample}
    is_on = {"": True, "sampling": do_sample, "beams": has_beams, "assistant": has_assistant}
    is_on["lookup"] = "prompt_lookup_num_tokens" in values
    overruled = {"sampling": asked is not None, "beams": "num_beams" in given}  # what a file says of these may go
    for name, value in values.items():
        needs, where = STRATEGIES[name].needs, "" if name in given else "generation_config: "
        may_be = is_on[needs] or is_idle(name, value) or (name == "temperature" and value == 0)
        if not may_be and (name in given or (name in (file or {}) and not overruled.get(needs))):
            raise UserError(f"{where}{name}={value}: has no effect {NEEDS[needs]}")
    refuse_contradictions(values, is_on)
    return {name: value for name, value in values.items() if is_on[STRATEGIES[name].needs]}


def refuse_contradictions(values: dict[str, Any], is_on: dict[str, bool]) -> None:
    """Refuse values that are right alone and not together."""
    beams, sequences, drafts = values.get("num_beams", 1), values.get("num_return_sequences", 1), DRAFT_FLAGS
    draft = next((flag for needs, flag in drafts.items() if is_on[needs]), None)
    if is_on["lookup"] and is_on["assistant"]:
        raise UserError("prompt_lookup_num_tokens and assistant_model are two kinds of drafts; leave one out")
    if is_on["beams"] and draft:
        raise UserError(f"num_beams={beams} and {draft} do not go together; leave one out")
    if is_on["beams"] and sequences > beams:
        raise UserError(f"num_return_sequences={sequences}: there are {beams} beams; take more --num_beams")
    if is_on["sampling"] and values.get("temperature") == 0:
        raise UserError("temperature=0 takes the likeliest token, and do_sample=true draws one; leave one out")
    if values["max_new_tokens"] < max(1, values.get("min_new_tokens", 0)):
        least = f"at least min_new_tokens={values['min_new_tokens']}" if values.get("min_new_tokens") else "above 0"
        raise UserError(f"max_new_tokens={values['max_new_tokens']}: must be {least}")


def generate_arguments(values: dict[str, Any]) -> dict[str, Any]:
    """What generate() is called with for these strategies, but for lengths, samples and stop strings."""
    own = ("do_sample", "temperature", "top_k", "top_p", "max_new_tokens", "stop_strings", "num_return_sequences")
    more = {name: value for name, value in values.items() if name not in own and not is_idle(name, value)}
    more = {name: value for name, value in more.items() if STRATEGIES[name].needs != "assistant"}
    temperature = values.get("temperature", 1.0) if values["do_sample"] else 0
    return sampling_arguments(temperature, values.get("top_k"), values.get("top_p"), **more)


def refuse_unknown_ids(values: dict[str, Any], model) -> None:
    """Refuse token ids that the model does not have."""
    size = text_config(model.config).vocab_size
    for name in ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids"):
        tokens = values.get(name) or []
        flat = [token for part in tokens for token in (part if isinstance(part, list) else [part])]
        if flat and max(flat) >= size:
            raise UserError(f"{name}: the model has no token {max(flat)}; its ids end with {size - 1}")
