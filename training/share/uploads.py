"""Which files of a directory go to the Hub: those that a model is made of, and none that merely lies beside them."""

import dataclasses
import json
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml
from transformers.dynamic_module_utils import get_relative_import_files

from ..config.values import dump, load
from ..system.addresses import each_text
from ..system.checkpoints import run_of
from ..system.errors import UserError, one_line
from ..system.files import digest, read_json
from ..system.run_files import MANIFEST, NO_PART, Use, kind_of, read_file_manifest

# Beside a tokenizer_config.json only: the files of slow tokenizers.
VOCABULARIES = ("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
TEMPLATES = "additional_chat_templates"  # a folder of .jinja files
LINK_OUT = "a link that leads outside"


@dataclasses.dataclass
class Upload:
    """A file (or a folder that stays) and its place in the repository; bytes are sent instead of a file's own."""

    name: str
    content: Path | bytes
    why: str

    @property
    def size(self) -> int:
        """In bytes."""
        if isinstance(self.content, bytes):
            return len(self.content)
        files = self.content.rglob("*") if self.content.is_dir() else [self.content]
        return sum(file.stat().st_size for file in files if file.is_file())


def sort_files(directory: Path) -> tuple[list[Upload], list[Upload]]:
    """(what goes up, what stays) of a model directory, each with the reason; a folder that stays is one entry."""
    chosen = {name: why for name, why in _chosen(directory) if is_own_file(directory / name, directory)}
    going = [Upload(name, directory / name, why) for name, why in sorted(chosen.items())]
    inside = {name.split("/")[0] for name in chosen}
    staying = [
        Upload(path.name + "/" * path.is_dir(), path, _why_it_stays(path, directory))
        for path in sorted(directory.iterdir())
        if path.name not in inside
    ]
    return going, staying


def _chosen(directory: Path) -> Iterator[tuple[str, str]]:
    """The names that may go up, of which some may not be there, and why."""
    kinds = {path.name: kind_of(path.name) for path in directory.iterdir()}
    yield from ((name, what) for name, (what, uses) in kinds.items() if Use.SHARED in uses)
    for stem in ("model", "adapter_model"):
        yield from ((name, "weights") for name in weight_files(directory, stem))
    yield from ((name, "modeling code, for trust_remote_code") for name in code_files(directory))
    if "tokenizer_config.json" in kinds:
        yield from ((name, "tokenizer") for name in VOCABULARIES)
    for path in (directory / TEMPLATES).glob("[!.]*.jinja"):
        yield f"{TEMPLATES}/{path.name}", "chat template"


def is_own_file(path: Path, directory: Path) -> bool:
    """Whether a path is a regular file that lies in the directory, and no link to another place."""
    return path.is_file() and path.resolve().is_relative_to(directory.resolve())


def _why_it_stays(path: Path, directory: Path) -> str:
    if path.is_symlink() and not path.resolve().is_relative_to(directory.resolve()):
        return LINK_OUT
    what, uses = kind_of(path.name)
    return NO_PART if Use.SHARED in uses or what == "weights" else what  # in name alone, or it would have been chosen


def weight_files(directory: Path, stem: str) -> list[str]:
    """One file of weights, or an index and the shards that it lists; the files may be missing."""
    index = directory / f"{stem}.safetensors.index.json"
    if (directory / f"{stem}.safetensors").exists() or not index.is_file():
        return [f"{stem}.safetensors"]
    shards = sorted(set(dict(read_json(index).get("weight_map") or {}).values()))
    for name in shards:
        if not re.fullmatch(rf"{stem}-\d+-of-\d+\.safetensors", str(name)):
            raise UserError(f"{index} is damaged: {name!r} is not the name of a shard; copy the directory again")
    return [index.name, *shards]


def code_files(directory: Path) -> list[str]:
    """The Python files that an auto_map names, and those that they import; refuses a map whose code is not there."""
    found = set()
    for config in ("config.json", "tokenizer_config.json"):
        for reference in _references(read_json(directory / config).get("auto_map")):
            module = directory / f"{reference.split('.')[0]}.py"
            try:
                found |= {module, *map(Path, get_relative_import_files(module))}
            except (OSError, UnicodeDecodeError) as error:
                missing = Path(getattr(error, "filename", None) or module).name
                raise UserError(
                    f"{directory / config} names the code {missing}, which is not there: it would load nowhere"
                ) from error
    return sorted(path.name for path in found if path.parent == directory and not path.name.startswith("."))


def _references(auto_map: Any) -> Iterator[str]:
    """The entries of an auto_map whose code lies in the directory, not in a repository of its own."""
    for entry in auto_map.values() if isinstance(auto_map, dict) else ():
        for reference in entry if isinstance(entry, list) else [entry]:
            if isinstance(reference, str) and "--" not in reference and "/" not in reference:
                yield reference


def refuse_no_model(directory: Path) -> None:
    """Refuse, in one line, a directory that nothing could load."""
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory; name a run, a checkpoint, a model or an adapter directory")
    names = {path.name for path in directory.iterdir()}
    is_adapter = "adapter_config.json" in names
    config, stem = ("adapter_config.json", "adapter_model") if is_adapter else ("config.json", "model")
    if config not in names:
        holds = sorted(name for name in names if name.startswith("checkpoint-"))
        mend = f"push one of its checkpoints, such as {directory / holds[-1]}" if holds else "name a model directory"
        raise UserError(f"{directory} holds no config.json, so it is not a model; {mend}")
    for name in (config, *weight_files(directory, stem), *code_files(directory)):
        if name not in names:
            pickled = [other for other in names if other.endswith(".bin") and stem.split("_")[-1] in other]
            why = f"; its weights are a pickle ({pickled[0]}), `acorn convert` writes safetensors" if pickled else ""
            raise UserError(f"{directory} is incomplete: {name} is missing{why}")
        if not is_own_file(directory / name, directory):
            raise UserError(f"{directory / name} is {LINK_OUT}, or not a file: put a copy of the file in its place")


def resume_state(checkpoint: Path, folder: str) -> list[Upload]:
    """A checkpoint as it can be gone on from, below `folder`: the model, the state, and a manifest of just these."""
    going, staying = sort_files(checkpoint)
    state = [file for file in staying if Use.RESUMED in kind_of(file.name)[1] and is_own_file(file.content, checkpoint)]
    files = [without_machine(file) for file in (*going, *state)]
    listed = read_file_manifest(checkpoint).get("files")
    if listed:
        facts = {file.name: _facts(file, listed) for file in files}
        files.append(Upload(MANIFEST, json.dumps({"files": facts}, indent=1).encode(), "resume state"))
    return [dataclasses.replace(file, name=f"{folder}/{file.name}") for file in files]


def _facts(file: Upload, listed: dict) -> dict:
    """Size and hash of a file as it is sent: the manifest knows them of those that are sent as they are."""
    if isinstance(file.content, Path) and file.name in listed:
        return listed[file.name]
    raw = file.content if isinstance(file.content, bytes) else file.content.read_bytes()
    return {"bytes": len(raw), "sha256": digest(raw)}


# ---- without paths of this machine


def without_machine(file: Upload) -> Upload:
    """A JSON file of settings without absolute paths; others, and those that hold none, as they are."""
    settings = ("config.json", "generation_config.json", "tokenizer_config.json", "trainer_state.json")
    if file.name not in (*settings, "adapter_config.json", "base_model.json") or isinstance(file.content, bytes):
        return file
    content = read_json(file.content)
    portable = without_paths(content)
    return file if portable == content else dataclasses.replace(file, content=json.dumps(portable, indent=2).encode())


def portable_recipe(directory: Path) -> tuple[bytes, set[str]]:
    """(the run's recipe as it is sent, the absolute paths that it and its command name); empty where there is none.

    It goes without the place of the prepared tokens, and with the last part only of other paths. What a sample is asked
    to continue is no path.
    """
    if (run_dir := run_of(directory)) is None:
        return b"", set()
    path = run_dir / "recipe.yaml"
    try:
        recipe = dict(load(path.read_text(encoding="utf-8")) or {})
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {one_line(error)}; copy the directory again") from error
    paths = paths_in([value for key, value in recipe.items() if key != "sample"])
    paths.discard(str((recipe.get("sample") or {}).get("prompt")))
    if isinstance(recipe.get("data"), dict):
        recipe["data"].pop("data_dir", None)
    changes = {"command": lambda command: replace_paths(command, paths), "sample": lambda sample: sample}
    return dump({key: changes.get(key, without_paths)(value) for key, value in recipe.items()}).encode(), paths


def without_paths(value: Any) -> Any:
    """The same structure with the last part only of each text that is an absolute path."""
    return each_text(value, lambda text: last_part(text) if is_absolute(text) else text)


def paths_in(value: Any) -> set[str]:
    """The absolute paths in a structure, those of a command among them."""
    if isinstance(value, dict | list):
        entries = value.values() if isinstance(value, dict) else value
        return {path for entry in entries for path in paths_in(entry)}
    if not isinstance(value, str):
        return set()
    words = [value]
    try:
        words += [part for word in shlex.split(value) for part in (word, word.partition("=")[2])]
    except ValueError:  # no command: an open quote
        words += value.split()
    return {word for word in words if is_absolute(word)}


def replace_paths(text: str, paths: Iterable[str]) -> str:
    """The text with the last part only of the paths named."""
    for path in sorted(paths, key=len, reverse=True):
        text = re.sub(rf"(?<![\w.~/-]){re.escape(path)}(?![\w-])", lambda _, path=path: last_part(path), text)
    return text


def is_absolute(text: str) -> bool:
    """Whether a text is a path of one machine: from the root, or from a home, and more than a slash."""
    if "\n" in text or len(text) < 3 or text.startswith("//"):
        return False
    return text.startswith(("/", "~/", "file:/")) or PureWindowsPath(text).is_absolute()


def last_part(path: str) -> str:
    kind = PureWindowsPath if "\\" in path else PurePosixPath
    return kind(path).name or "path"
