"""Recipes: YAML files and flags to checked sections of arguments, each decided once."""

import dataclasses
import functools
import typing
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml

from modeling import GPTConfig
from modeling.configuration_gpt import FIELDS

from ..data.corpus import Corpus
from ..data.preparation import DECIDED
from ..data.tokenizers import DEFAULT_BPE_VOCAB_SIZE
from ..model.devices import PRECISION_KEYS
from ..model.starting import architecture_to_start_from
from ..system.addresses import each_text, public_name, public_text
from ..system.checkpoints import run_of
from ..system.distributed import check_launch, check_partitions
from ..system.errors import UserError, one_line, unknown
from ..system.files import check_hash, write_with_hash
from ..system.flags import check_number
from .arguments import CardArguments, DataArguments, GPTTrainingArguments, SampleArguments
from .checks import NEEDS, REFUSED, RISING, check_name
from .depth import HORIZON, REPLACED, Dial
from .presets import PRESETS
from .values import coerce, dump, load

RECIPES_DIR = Path(__file__).parents[1] / "recipes"
SOURCE_KEYS = ("text_files", "data_files", "dataset", "mixture")
SECTIONS = {"data": DataArguments, "training": GPTTrainingArguments, "sample": SampleArguments, "card": CardArguments}
# What a recipe says for one choice alone, and the key of the choice: a flag that chooses otherwise drops it.
GOES_WITH = {name: need.argument for name, need in NEEDS.items()} | {
    "lr_scheduler_kwargs": "lr_scheduler_type",
    "greater_is_better": "metric_for_best_model",
}
TOKEN_IDS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), "the tokenizer knows its special tokens")
DROPOUTS = ("embedding_dropout", "attention_dropout", "residual_dropout")
# Keys of the model section that are not fields of GPTConfig.
MODEL_EXTRAS = {"preset": str, "model_name_or_path": str, "dropout": float, "attn_implementation": str}
DIAL = {"depth": int | None, "tokens_per_parameter": float}
NO_ARCHITECTURE = ("preset", "model_name_or_path", *DIAL)


@dataclass
class Recipe:
    """A name and one dict of checked values a section; `training_arguments` and the like build the objects."""

    name: str
    model: dict = field(default_factory=dict)
    data: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)
    sample: dict = field(default_factory=dict)
    card: dict = field(default_factory=dict)
    command: str = ""

    # What a kind of recipe is made of; finetuning has its own.
    directory: typing.ClassVar[Path] = RECIPES_DIR
    sections: typing.ClassVar[dict[str, type]] = SECTIONS
    refused: typing.ClassVar[dict[str, dict[str, str]]] = {"training": REFUSED, "model": TOKEN_IDS}

    dial: typing.ClassVar[Dial | None] = None  # of a recipe that has a depth, once it is turned

    @property
    def output_dir(self) -> Path:
        return Path(self.training.get("output_dir") or f"runs/{self.name}")

    def data_arguments(self) -> DataArguments:
        return self.sections["data"](**self.data)

    def best(self, rows: list[dict]) -> dict | None:
        """The row of metrics.jsonl whose model is the best one, by the metric that the recipe names."""
        metric = (self.training.get("metric_for_best_model") or "loss").removeprefix("eval_")
        key, sign = (metric, -1) if RISING.get(metric) else ("eval_loss", 1)  # those that fall, fall with the loss
        return min(rows, key=lambda row: sign * row[key], default=None)

    def sample_arguments(self) -> SampleArguments:
        return self.sections["sample"](**self.sample)

    def card_arguments(self) -> CardArguments:
        return self.sections["card"](**self.card)

    def check(self) -> None:
        """Refuse values that cannot be, of every section but the one that training_arguments builds."""
        for section in self.sections.keys() - {"training"}:
            self.sections[section](**getattr(self, section))

    def training_arguments(self) -> GPTTrainingArguments:
        """transformers' own refusals become one line too, and a launch that is not what was asked for is refused."""
        check_launch(bool(self.training.get("use_cpu")), bool(self.training.get("fsdp")))
        if self.training.get("use_cpu") is False and not torch.accelerator.is_available():
            raise UserError("use_cpu=False: this machine has no accelerator; leave it out")
        use_cpu = {} if torch.accelerator.is_available() else {"use_cpu": True}
        try:
            args = self.sections["training"](**{**use_cpu, **self.training, "output_dir": str(self.output_dir)})
        except (ValueError, TypeError, KeyError, OSError, ImportError, RuntimeError) as error:
            words = one_line(error)
            named = [f"{key}={value!r}" for key, value in self.training.items() if str(value) in words.split()]
            raise UserError(f"training: {', '.join(named) + ': ' if named else ''}{words}") from error
        check_partitions(args)
        return args

    def model_config(self, **overrides) -> GPTConfig:
        """The architecture: preset, then the recipe's keys, then what the tokenizer decides."""
        keys = {key: value for key, value in self.model.items() if key not in NO_ARCHITECTURE}
        try:
            return GPTConfig(**{**PRESETS.get(self.model.get("preset"), {}), **keys, **overrides})
        except Exception as error:  # @strict wraps ValueError and TypeError in errors of its own
            raise UserError(f"model: {one_line(error)}") from error

    def update(self, overrides: dict[str, dict], data_dir_is_source: bool = True) -> None:
        """Lay checked flags over the recipe; naming a source replaces the recipe's.

        Prepared tokens are a source too, unless they are what is to be made.
        """
        self._lift_dial(overrides.get("model", {}), overrides.get("training", {}))
        named = overrides.get("data", {})
        names_source = any(key in named for key in SOURCE_KEYS)
        if names_source or ("data_dir" in named and data_dir_is_source):
            for key in (*SOURCE_KEYS, "data_dir", "dataset_config", "dataset_split", "text_column", "streaming"):
                self.data.pop(key, None)
            self.card.pop("language", None)  # it was that of the other text
            if not names_source and Path(named["data_dir"] or "", "manifest.json").is_file():
                for key in ("tokenizer", *DECIDED):  # the tokens have their own
                    self.data.pop(key, None)
        if "model_name_or_path" in overrides.get("model", {}) and "model_name_or_path" not in self.model:
            self.model = {key: self.model[key] for key in DIAL if key in self.model}  # the rest is another model's
        self._drop_size_of_another(overrides.get("data", {}), names_source)
        self._drop_what_goes_with_another(overrides.get("training", {}))
        for section, values in overrides.items():
            getattr(self, section).update(values)

    def _lift_dial(self, flags: dict, training: dict) -> None:
        """Take back what the recipe's depth chose; a depth among the flags replaces what the recipe says of a size."""
        if self.dial is not None:
            self.dial.withdraw()
            self.dial = None
        depth, ratio = flags.get("depth", self.model.get("depth")), flags.get("tokens_per_parameter")
        if depth is not None and flags.get("preset"):
            raise UserError(f"preset={flags['preset']!r}: depth={depth} sets the size; leave one of them out")
        if ratio is not None and training.get("max_steps", -1) > 0:
            raise UserError(
                f"tokens_per_parameter={ratio:g}: max_steps={training['max_steps']} sets the steps; give one"
            )
        for section, keys in REPLACED.items() if flags.get("depth") is not None or ratio is not None else ():
            for key in keys:
                getattr(self, section).pop(key, None)

    def turn_dial(self) -> None:
        """Where there is a depth, choose what follows from it and was not said, for a text that is long enough."""
        if self.model.get("depth") is not None:
            self.dial = Dial(self)
            self.dial.turn()
        elif "tokens_per_parameter" in self.model:
            raise UserError("tokens_per_parameter: has no effect without depth; give --depth, or leave it out")

    def settle_depth(self, args: GPTTrainingArguments, corpus: Corpus) -> None:
        """Choose again now that the text is known (a stream has no end), in the arguments too."""
        if self.dial is None:
            return
        tokens = None if corpus.directory is None else len(corpus.tokens("train"))
        for key, value in self.dial.turn(tokens).items():
            if key in HORIZON:
                setattr(args, key, value)

    def start_from_another(self, flags: dict) -> None:
        """Where a model to start from is named, take over its architecture and its tokenizer; `flags`: of the data."""
        name = self.model.get("model_name_or_path")
        if name is None:
            return
        if self.model.get("preset"):
            raise UserError(f"preset={self.model['preset']!r}: {name} has an architecture of its own; leave it out")
        for key in ("tokenizer", "tokenizer_vocab_size"):
            if flags.get(key, name) != name:
                raise UserError(f"{key}={flags[key]!r}: {name} keeps its own tokenizer; leave it out")
            self.data.pop(key, None)
        self.model = architecture_to_start_from(name, self.model)
        if any(self.data.get(key) for key in SOURCE_KEYS):  # else they are prepared tokens, which have theirs
            self.data["tokenizer"] = name

    def _drop_size_of_another(self, flags: dict, names_source: bool) -> None:
        """The recipe's size of vocabulary is its own tokenizer's; the usual one is no demand on another text either."""
        is_usual = names_source and self.data.get("tokenizer_vocab_size") == DEFAULT_BPE_VOCAB_SIZE
        if is_usual or flags.get("tokenizer", "bpe") != "bpe":
            self.data.pop("tokenizer_vocab_size", None)

    def _drop_what_goes_with_another(self, flags: dict) -> None:
        """Settings that go with the recipe's schedule, optimizer and so on are not those of another one."""
        for key in [key for key in self.training if key in GOES_WITH and key not in flags]:
            other, wanted = GOES_WITH[key], NEEDS[key].value.split(" or ") if key in NEEDS else ()
            before = self.training.get(other, getattr(self.sections["training"], other))
            if other in flags and str(flags[other]).lower() not in wanted and flags[other] != before:
                del self.training[key]
        for key in PRECISION_KEYS if flags.keys() & set(PRECISION_KEYS) else ():  # three keys for one thing
            self.training.pop(key, None)

    def save(self, path: Path) -> None:
        """Write the recipe where `load_run_recipe` finds it again; addresses in it without what may be a secret."""
        public = {"data": each_text(self.data, public_name), "command": public_text(self.command)}
        write_with_hash(path, dump(dataclasses.asdict(self) | public))


def shipped_recipes(kind: type[Recipe] = Recipe) -> list[str]:
    return sorted(path.stem for path in kind.directory.glob("*.yaml"))


def load_recipe_file(name: str, kind: type[Recipe] = Recipe) -> Recipe:
    """Read and check one recipe of a kind, and turn its dial; errors name the file."""
    recipe = read_recipe_file(name, kind)
    try:
        recipe.turn_dial()
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    return recipe


def read_recipe_file(name: str, kind: type[Recipe] = Recipe) -> Recipe:
    """Read and check what one file says."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else kind.directory / f"{name}.yaml"
    if not path.is_file():
        if path.parent != kind.directory:
            raise UserError(f"recipe {name}: no such file")
        raise unknown("recipe", name, shipped_recipes(kind), "`acorn recipes` lists them; a path ends in .yaml.")
    try:
        content = load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not a YAML file: {one_line(error)}") from error
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections: model, data, training, sample, card")
    if "adapter" in content and "adapter" not in kind.sections:
        raise UserError(f"{path}: is of `acorn finetune`; use `acorn resume RUN_DIR`")
    recipe = kind(name=str(content.pop("name", path.stem)), command=str(content.pop("command", "")))
    for section, values in content.items():
        if section not in known_keys(kind):
            raise unknown("section", section, known_keys(kind), f"In {path}.")
        values = {} if values is None else values
        if not isinstance(values, dict):
            raise UserError(f"{path}: section {section} must hold `key: value` lines")
        try:
            if section == "model" and "label_smoothing" in values:  # of older recipes
                smoothing = {"label_smoothing_factor": values.pop("label_smoothing")}
                recipe.training.update(read_section("training", smoothing, kind))
            getattr(recipe, section).update(read_section(section, values, kind))
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
    return recipe


def load_run_recipe(run_dir: Path, kind: type[Recipe] = Recipe) -> Recipe:
    """The recipe that a run directory was grown from."""
    if not (run_dir / "recipe.yaml").is_file():
        if run_of(run_dir) is not None:
            raise UserError(f"{run_dir} is no run; name the run: {run_dir.parent} --checkpoint {run_dir.name}")
        what = "has no recipe.yaml, so it is not a run directory" if run_dir.is_dir() else "does not exist"
        made = "that `acorn pretrain` or `acorn finetune` made"
        raise UserError(f"{run_dir} {what}: name a directory {made}, such as runs/quickstart")
    check_hash(run_dir / "recipe.yaml")
    recipe = read_recipe_file(str(run_dir / "recipe.yaml"), kind)  # what its depth chose is written there
    if not recipe.training.keys() & set(PRECISION_KEYS):
        recipe.training["precision"] = "fp32"  # of a run that an Acorn began which took it without a word
    return recipe


@functools.cache
def known_keys(kind: type[Recipe] = Recipe) -> dict[str, dict[str, typing.Any]]:
    """Section to its keys and their types."""
    keys = {}
    for section, arguments in kind.sections.items():
        hints = typing.get_type_hints(arguments)
        keys[section] = {f.name: hints[f.name] for f in dataclasses.fields(arguments) if f.init}
    return keys if "model" in keys else {"model": architecture_keys(), **keys}


def architecture_keys() -> dict[str, typing.Any]:
    """The keys of GPTConfig, under our names and nanoGPT's, and their types."""
    own = {name: hint for name, hint in FIELDS.items() if name != "auto_map"}
    aliases = {alias: own[name] for alias, name in GPTConfig.attribute_map.items()}
    return {**own, **aliases, **MODEL_EXTRAS, **DIAL}


def read_section(section: str, values: dict[str, typing.Any], kind: type[Recipe] = Recipe) -> dict[str, typing.Any]:
    """Checked values in their fields' types; the model's keys under GPTConfig's names, `dropout` as all three."""
    read, given = {}, {}
    for key, value in values.items():
        name = GPTConfig.attribute_map.get(key, key) if section == "model" else key
        if name in read:
            raise UserError(f"{given[name]} and {key} are two names for one key; give only one")
        read[name], given[name] = check(section, key, value, kind), key
        check_number(name, read[name])
    if section == "model" and "dropout" in read:
        read = dict.fromkeys(DROPOUTS, read.pop("dropout")) | read
    return read


def check(section: str, key: str, value: typing.Any, kind: type[Recipe]) -> typing.Any:
    """The value in its field's type; raises UserError for unknown keys, wrong types and values that cannot be."""
    hints = known_keys(kind)[section]
    if key not in hints:
        raise unknown(f"key in {section}", key, hints)
    value = coerce(key, value, hints[key])
    place = kind.refused.get(section, {}).get(key)
    default = getattr(kind.sections[section], key, []) if section in kind.sections else None
    if place and value != default:
        raise UserError(f"{key}{'' if key == 'hub_token' else f'={value!r}'} has no effect here; {place}")
    check_name(key, value)
    check_settings(key, value)
    if (value == "" and key in ("output_dir", "data_dir")) or (isinstance(value, str) and "\0" in value):
        raise UserError(f"{key}={value!r}: is not a path; give one, or leave it out")
    return value


def check_settings(key: str, settings: typing.Any) -> None:
    """Refuse `no` among settings, which have no types to go by and where it would count as true, and infinity."""
    for name, value in settings.items() if isinstance(settings, dict) else ():
        if isinstance(value, str) and value.lower() in ("yes", "no", "on", "off"):
            raise UserError(f"{key}.{name}={value!r}: write true or false")
        check_number(f"{key}.{name}", value)
