"""What each file of a run, a checkpoint or a model directory is, and whether it is still what was written."""

import fnmatch
import json
import sys
from enum import Flag, auto
from pathlib import Path

from .errors import UserError
from .files import hash_files, read_json, write_json
from .pickles import refuse_unreadable

STATE, MANIFEST = "trainer_state.json", "manifest.json"


class Use(Flag):
    """What a file is used for, beside lying there."""

    NOTHING = 0
    SHARED = auto()  # goes to the Hub with the model
    RESUMED = auto()  # goes there too, where a run pushes its checkpoints
    OPENED = auto()  # read by a run that goes on, and so tried before it does
    WEIGHTS = auto()  # what loaders look for: old ones may not stay on the Hub beside new ones
    NO_MODEL = auto()  # in a checkpoint, and no part of its model


NO_PART, PICKLE = "no part of a model", "pickle: loading one can run code"
STATE_USES = Use.RESUMED | Use.NO_MODEL
# What a file is, its uses, and its names; the first line that fits counts. Modeling code goes up where an `auto_map`
# names it, weights where they are model.safetensors or an index lists them.
FILES = [
    ("hidden or temporary", Use.NOTHING, ".*"),
    ("model card", Use.SHARED, "README.md"),
    ("licence", Use.SHARED, "LICENSE LICENSE.md LICENSE.txt NOTICE"),
    ("architecture", Use.SHARED, "config.json"),
    ("what the adapter is, and its base", Use.SHARED, "adapter_config.json"),
    ("how generate() samples", Use.SHARED, "generation_config.json"),
    ("tokenizer", Use.SHARED, "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json"),
    ("chat template", Use.SHARED, "chat_template.jinja chat_template.json"),
    ("recipe, without paths of this machine", Use.SHARED, "recipe.yaml"),
    ("a line an evaluation", Use.SHARED, "metrics.jsonl"),
    ("picture", Use.SHARED, "loss.png"),
    ("sample", Use.SHARED, "sample.txt"),
    ("weights", Use.WEIGHTS | Use.OPENED, "*.safetensors"),
    ("weights", Use.WEIGHTS, "*.safetensors.index.json"),
    ("optimizer state", STATE_USES | Use.OPENED, "optimizer.pt"),
    ("schedule", STATE_USES | Use.OPENED, "scheduler.pt"),
    ("random state", STATE_USES | Use.OPENED, "rng_state*.pth"),
    ("weights behind the average, which training goes on with", STATE_USES | Use.OPENED, "raw_weights.pt"),
    ("memory of each lane", STATE_USES | Use.OPENED, "memory.pt"),
    ("scale of fp16", STATE_USES | Use.OPENED, "scaler.pt"),
    ("resume state", STATE_USES, STATE),
    ("resume state", Use.NO_MODEL, MANIFEST),
    ("resume state", Use.NOTHING, "inputs.json finetune.json"),
    ("the base's place on this machine", Use.RESUMED, "base_model.json"),
    (PICKLE, Use.OPENED | Use.NO_MODEL | Use.WEIGHTS, "pytorch_model*.bin adapter_model.bin"),
    (PICKLE, Use.OPENED | Use.NO_MODEL, "*.pt *.pth optimizer*.bin"),
    (PICKLE, Use.NO_MODEL, "*.bin"),
    (PICKLE, Use.NOTHING, "*.pkl *.ckpt"),
    ("temporary", Use.NOTHING, "*.tmp"),
    ("lock", Use.NOTHING, "*.lock"),
    ("resume state; `acorn push` takes one by its name", Use.NOTHING, "checkpoint-*"),
    ("resume state of a course the run left", Use.NOTHING, "abandoned-checkpoint-*"),
]
EXACT_STATE = ("optimizer state", "schedule", "random state")  # what a run goes on exactly by


def kind_of(name: str) -> tuple[str, Use]:
    """(what it is, its uses) of a file by its name; of any other it is not known to be part of a model."""
    fitting = (
        (what, uses)
        for what, uses, patterns in FILES
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns.split())
    )
    return next(fitting, (NO_PART, Use.NOTHING))


def files_used(directory: Path, use: Use) -> list[Path]:
    """The files right in a directory that are for this use."""
    return sorted(path for path in directory.iterdir() if path.is_file() and use in kind_of(path.name)[1])


def missing_state(checkpoint: Path) -> list[str]:
    """What a checkpoint lacks of all that a run goes on exactly by, in words."""
    needed = EXACT_STATE[2:] if (checkpoint / "latest").is_file() else EXACT_STATE  # DeepSpeed's own folder has two
    there = {kind_of(path.name)[0] for path in checkpoint.iterdir()}
    return [what for what in needed if what not in there]


def files_below(folder: Path) -> list[Path]:
    """Every file below a folder, in order."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


# ---- the manifest, which lists files with their sizes and hashes


def list_files(folder: Path, files: list[Path]) -> dict[str, dict]:
    """Name to size and hash, as a manifest lists them."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, hash_files(files), strict=True)
    }


def read_file_manifest(directory: Path) -> dict:
    """What a checkpoint or a root says of its files, whose hashes are sure to be there; empty where it says nothing."""
    mend = "copy the directory again, or remove that file to take the others unverified"
    manifest = read_json(directory / MANIFEST, mend)
    listed = manifest.get("files")
    if "format" in manifest or not (directory / MANIFEST).is_file():  # a format: prepared tokens
        return {}
    if not isinstance(listed, dict) or not all(isinstance(f, dict) and "sha256" in f for f in listed.values()):
        raise UserError(f"{directory / MANIFEST} is damaged (it does not list files with their hashes); {mend}")
    return manifest


def relist(directory: Path, name: str) -> None:
    """Note in the manifest of a directory, if it lists the file, that Acorn itself has written it anew."""
    manifest = read_file_manifest(directory)
    if name in manifest.get("files", {}):
        manifest["files"] |= list_files(directory, [directory / name])
        write_json(directory / MANIFEST, manifest)


def verify(directory: Path) -> None:
    """Refuse weights that are not what Acorn wrote there; changes of other files are reported.

    Directories without a manifest are taken as they are. The state of a checkpoint is `damage`'s business.
    """
    manifest = read_file_manifest(directory)
    before = manifest.get("before", {})  # of a move into the root that was cut off
    listed = {name: f for name, f in manifest.get("files", {}).items() if Use.NO_MODEL not in kind_of(name)[1]}
    there = [directory / name for name in listed if (directory / name).is_file()]
    for path, digest in zip(there, hash_files(there), strict=True):
        name = path.relative_to(directory).as_posix()
        if digest in (listed[name]["sha256"], before.get(name, {}).get("sha256")):
            continue
        if path.suffix == ".safetensors":
            raise UserError(f"{path} is damaged: it is not what was written (its sha256 differs); copy it again")
        print(f"{path} has changed since it was written; using it as it is", file=sys.stderr)
    if missing := [name for name in listed if not (directory / name).is_file()]:
        print(f"{directory / missing[0]} has been removed since it was written", file=sys.stderr)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file; None when each file is what was written.

    A manifest vouches for what it lists alone: what training will read must open, too, and run no code.
    """
    has_manifest = (checkpoint / MANIFEST).is_file()
    if what := _changed(checkpoint) if has_manifest else _state_damage(checkpoint):
        return what
    try:
        for path in files_used(checkpoint, Use.OPENED):
            refuse_unreadable(path)
    except UserError as error:
        return str(error).removeprefix(f"{checkpoint}/")
    return None


def _changed(checkpoint: Path) -> str | None:
    """The first file that is not what the manifest says."""
    try:
        listed = read_file_manifest(checkpoint)["files"]
        listed = {checkpoint / name: (facts["bytes"], facts["sha256"]) for name, facts in listed.items()}
    except (UserError, KeyError):
        return f"{MANIFEST} cannot be read"
    for path, (size, _) in listed.items():
        if not path.is_file():
            return f"{path.relative_to(checkpoint)} is missing"
        if path.stat().st_size != size:
            return f"{path.relative_to(checkpoint)} has {path.stat().st_size:,} of {size:,} bytes"
    for path, digest in zip(listed, hash_files(list(listed)), strict=True):
        if digest != listed[path][1]:
            return f"{path.relative_to(checkpoint)} is not what was written (its sha256 differs)"
    return None


def _state_damage(checkpoint: Path) -> str | None:
    """Of checkpoints of an Acorn that wrote no manifest, or of plain Trainer: the state was written last."""
    try:
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        is_whole = {"global_step", "best_model_checkpoint"} <= state.keys()
    except FileNotFoundError:
        return f"it has neither {MANIFEST} nor {STATE}"
    except (ValueError, AttributeError):
        is_whole = False
    if not is_whole:
        return f"{STATE} cannot be read"
    print(
        f"{checkpoint} has no {MANIFEST} (an earlier Acorn wrote none): its files cannot be verified", file=sys.stderr
    )
    return None
