"""What a format is, what a name on the command line leads to, and the check of a file's tensors."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerFast
from transformers.initialization import no_init_weights

from modeling import GPTConfig, GPTForCausalLM
from training.data.tokenizers import BUILDERS, build_tokenizer, load_tokenizer
from training.model.loading import refuse_missing_directory
from training.system.errors import UserError, one_line
from training.system.pickles import UNREADABLE, read_pickle, why_unreadable
from training.system.run_files import verify

CHECKPOINT = "ckpt.pt"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass
class Source:
    """What SRC is before its weights are read: `config` of a model directory or Hub id, or else a `checkpoint` file."""

    name: str
    config: dict = field(default_factory=dict)
    checkpoint: dict = field(default_factory=dict)
    directory: Path = Path()


Obstacle = tuple[Callable[[GPTConfig], bool], str]  # when a field stands in the way, and why


class Format(ABC):
    """A way to keep a GPT. Our own GPTForCausalLM is what every format is turned into and made from.

    `title` names it in messages; `is_written` says that `--to` takes it. `theirs` is a model in the format's own terms,
    as `load` returns it; all weights are float32.
    """

    title: str
    is_written = True
    obstructing: dict[str, Obstacle] = {}  # by field

    @abstractmethod
    def recognises(self, source: Source) -> bool:
        """Whether the source is of this format."""

    @abstractmethod
    def load(self, source: Source):
        """Read the weights; UserError where they are not just those of the architecture."""

    def logits(self, theirs, ids: torch.Tensor) -> torch.Tensor:
        """Logits (batch, tokens, vocabulary) of ids (batch, tokens), as the format itself defines them."""
        with torch.no_grad():
            return theirs(ids, use_cache=False).logits

    @abstractmethod
    def config(self, theirs, tokenizer: PreTrainedTokenizerFast | None = None) -> GPTConfig:
        """The architecture in our terms; UserError where we have none for it."""

    @abstractmethod
    def weights(self, theirs) -> dict[str, torch.Tensor]:
        """The weights under our names."""

    @abstractmethod
    def write(self, model: GPTForCausalLM, tokenizer, directory: Path, destination: Path) -> list[str]:
        """Write our model into `directory`, which will be renamed to `destination`; lines to tell the person."""

    def obstacles(self, config: GPTConfig) -> list[str]:
        """What of an architecture of ours the format cannot hold: one `field=value (why)` each."""
        found = ((name, why) for name, (stands, why) in self.obstructing.items() if stands(config))
        return [f"{name}={getattr(config, name)!r} ({why})" for name, why in found]

    def tokenizer(self, source: Source, theirs, name: str | None, meta: str | None):
        """The tokenizer called `name`, else the one beside the weights, or None; only nanoGPT has a `meta`."""
        if meta:
            what = f"is for checkpoints of nanoGPT's, and {source.name} is {self.title}"
            raise UserError(f"--meta {meta}: {what}; leave it out")
        return named_tokenizer(name) if name else tokenizer_beside(source)

    def to_acorn(self, theirs, tokenizer: PreTrainedTokenizerFast | None = None) -> GPTForCausalLM:
        """Our model with its weights, in eval mode."""
        with no_init_weights():
            model = GPTForCausalLM(self.config(theirs, tokenizer))
        model.tie_weights()  # which comes with the initialisation otherwise
        model.load_state_dict(self.weights(theirs))  # strict: every weight has its place
        model.generation_config = getattr(theirs, "generation_config", model.generation_config)
        return model.eval()


def open_source(name: str) -> Source:
    """Find out what `name` leads to: a directory with config.json or ckpt.pt, a checkpoint file, or a Hub id."""
    path = Path(name)
    if path.is_file():
        return Source(name, checkpoint=read_checkpoint(path), directory=path.parent)
    if path.is_dir() and not (path / "config.json").is_file():
        if (path / CHECKPOINT).is_file():
            return Source(name, checkpoint=read_checkpoint(path / CHECKPOINT), directory=path)
        is_adapter = (path / "adapter_config.json").is_file()
        mend = "it is an adapter: `acorn merge` it first" if is_adapter else "name a model directory or a checkpoint"
        raise UserError(f"{name}: holds neither config.json nor {CHECKPOINT}; {mend}")
    if not path.is_dir() and (path.suffix in (".pt", ".pth", ".bin", ".safetensors") or name.startswith((".", "/"))):
        raise UserError(f"{name}: there is no such file or directory")
    refuse_missing_directory(name)
    try:
        config, _ = PreTrainedConfig.get_config_dict(name)
    except (OSError, ValueError) as error:
        why = f"is not a local directory, and config.json cannot be read: {one_line(error)}"
        raise UserError(f"{name}: {why}") from error
    if not config:
        raise UserError(f"{name}: is not a local directory, and no model of that name has a config.json")
    return Source(name, config=config, directory=path)


def read_checkpoint(path: Path) -> dict:
    """What a ckpt.pt holds, with Python's numbers for numpy's in its arguments; one that would run code is refused."""
    checkpoint = read_pickle(path)
    model = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if not isinstance(model, dict) or not all(torch.is_tensor(weight) for weight in model.values()):
        raise UserError(f"{path}: is not a nanoGPT checkpoint (a dict with 'model' and 'model_args')")
    args = checkpoint.get("model_args")
    if isinstance(args, dict):
        plain = {key: value.item() for key, value in args.items() if isinstance(value, np.generic)}
        checkpoint["model_args"] = {**args, **plain}
    return checkpoint


def load_strictly(model_class, name: str, no_weights: tuple[str, ...] = ()):
    """`model_class.from_pretrained(name)` in float32 and eval mode; missing, extra or misshapen tensors are refused.

    no_weights: how the names of buffers end that some versions saved beside the weights, and that say nothing.
    """
    verify(Path(name))
    options = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, info = model_class.from_pretrained(name, **options)
    except UNREADABLE as error:
        raise UserError(f"{name}: cannot be loaded: {why_unreadable(error)}") from error
    misshapen = ((key, tuple(found), tuple(wanted)) for key, found, wanted in info["mismatched_keys"])
    extra = (key for key in info["unexpected_keys"] if not key.endswith(no_weights))
    refuse_tensors(name, info["missing_keys"], extra, misshapen)
    # A file that holds two different matrices has the last word over a config that says they are one.
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.config.tie_word_embeddings = is_tied
    return model.eval()


def check_tensors(where: str, found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors whose names and shapes are not just the expected ones."""
    shared = found.keys() & expected.keys()
    shapes = ((name, tuple(found[name].shape), tuple(expected[name].shape)) for name in shared)
    misshapen = (entry for entry in shapes if entry[1] != entry[2])
    refuse_tensors(where, expected.keys() - found.keys(), found.keys() - expected.keys(), misshapen)


def refuse_tensors(where: str, missing: Iterable[str], extra: Iterable[str], misshapen: Iterable[tuple]) -> None:
    """Raise UserError where there is any; three are named, the rest is counted."""
    problems = [f"{name} is missing" for name in sorted(missing)]
    problems += [f"{name} is {found}, not {wanted}" for name, found, wanted in sorted(misshapen)]
    problems += [f"{name} has no place in the model" for name in sorted(extra)]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{where}: its tensors do not fit its config: {'; '.join(problems[:3])}{more}")


def named_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer that --tokenizer names: byte, or a directory or Hub id."""
    if name in BUILDERS and name != "byte":
        raise UserError(f"--tokenizer {name}: is made from a text; name a directory or a Hub id here")
    return build_tokenizer(name) if name == "byte" else load_tokenizer(name, needs_end_of_text=False)


def tokenizer_beside(source: Source) -> PreTrainedTokenizerFast | None:
    """The tokenizer in the source's directory or Hub repository, or None where a directory has none."""
    directory = source.directory
    if directory.is_dir() and not any((directory / name).is_file() for name in TOKENIZER_FILES):
        return None
    return load_tokenizer(str(directory) if directory.is_dir() else source.name, needs_end_of_text=False)


def save_tokenizer(tokenizer, directory: Path) -> list[str]:
    """Save the tokenizer beside the weights; a line to tell where there is none."""
    if tokenizer is None:
        return ["No tokenizer came along: text needs one, and --tokenizer names it."]
    tokenizer.save_pretrained(directory)
    return []


def config_of(where: str, **fields) -> GPTConfig:
    """A GPTConfig, or UserError where the fields do not fit together."""
    try:
        return GPTConfig(**fields)
    except Exception as error:  # @strict wraps ValueError and TypeError in errors of its own
        raise UserError(f"{where}: {one_line(error)}") from error
