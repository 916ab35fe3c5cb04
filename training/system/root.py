"""The best model at the root of a run: moved in whole, known by its hashes, and the one of the run's own course."""

import fnmatch
import shutil
import sys
from pathlib import Path

from .checkpoints import MANIFEST, STATE, damage, facts_of_files, files_of, read_state, step_of
from .errors import UserError
from .files import hash_files, read_json, sync, write_json

NO_MODEL = ("*.pt", "*.pth", "*.bin", STATE, MANIFEST)  # of a checkpoint: its state, and pickles


def read_manifest(directory: Path) -> dict:
    """What a checkpoint or a root says of its files, whose hashes are sure to be there; empty where it says nothing."""
    mend = "copy the directory again, or remove that file to take the others unverified"
    manifest = read_json(directory / MANIFEST, mend)
    listed = manifest.get("files")
    if "format" in manifest or not (directory / MANIFEST).is_file():  # a format: prepared tokens
        return {}
    if not isinstance(listed, dict) or not all(isinstance(f, dict) and "sha256" in f for f in listed.values()):
        raise UserError(f"{directory / MANIFEST} is damaged (it does not list files with their hashes); {mend}")
    return manifest


def move_in(aside: Path, root: Path, step: int, leave_out: tuple[str, ...] = ()) -> None:
    """Move the files of `aside` into `root`, each over its namesake, and remove `aside`.

    The manifest is written before, with the hashes from before too, and after: a kill in between leaves nothing that
    is taken for damage.
    """
    files = [path for path in files_of(aside) if path.name not in leave_out]
    for path in files:
        sync(path)
    new = {"step": step, "files": facts_of_files(aside, files)}
    try:
        before = read_manifest(root).get("files", {})
    except UserError:  # damaged; it gives way now
        before = {}
    write_json(root / MANIFEST, new | {"before": before})
    for path in files:
        place = root / path.relative_to(aside)
        place.parent.mkdir(exist_ok=True)
        path.replace(place)
    sync(root)
    write_json(root / MANIFEST, new)
    shutil.rmtree(aside)


def verify(directory: Path) -> None:
    """Refuse weights that are not what Acorn wrote there; changes of other files are reported.

    Directories without a manifest are taken as they are. The state of a checkpoint is `damage`'s business.
    """
    manifest = read_manifest(directory)
    listed = {name: facts for name, facts in manifest.get("files", {}).items() if not _is_state(name)}
    there = [directory / name for name in listed if (directory / name).is_file()]
    for path, digest in zip(there, hash_files(there), strict=True):
        name = path.relative_to(directory).as_posix()
        known = (listed[name]["sha256"], manifest.get("before", {}).get(name, {}).get("sha256"))
        if digest in known:
            continue
        if path.suffix == ".safetensors":
            raise UserError(f"{path} is damaged: it is not what was written (its sha256 differs); copy it again")
        print(f"{path} has changed since it was written; using it as it is", file=sys.stderr)
    if missing := [name for name in listed if not (directory / name).is_file()]:
        print(f"{directory / missing[0]} has been removed since it was written", file=sys.stderr)


def _is_state(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in NO_MODEL)


def follow_course(checkpoint: Path) -> bool:
    """Put the best model of a checkpoint's course at the root, where another one's is; whether it is known as the best.

    Where the best of that time is gone, the checkpoint's own model is put there, and the next evaluation decides anew.
    """
    root, best = checkpoint.parent, read_state(checkpoint).get("best_global_step")
    try:
        there = read_manifest(root)
        is_whole = "before" not in there and damage(root) is None if there else None
    except UserError:
        there, is_whole = {}, False
    if is_whole is None or (is_whole and there.get("step") == best):
        return True  # a root without a manifest is an earlier Acorn's
    source = root / f"checkpoint-{best}"
    is_best = best is not None and source.is_dir() and damage(source) is None
    _take_over(source if is_best else checkpoint, root)
    return is_best


def _take_over(checkpoint: Path, root: Path) -> None:
    """Copy a checkpoint's model to the root."""
    aside = root / ".saving"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    for path in files_of(checkpoint):
        if not _is_state(path.name):
            (aside / path.relative_to(checkpoint)).parent.mkdir(exist_ok=True)
            shutil.copy2(path, aside / path.relative_to(checkpoint))
    move_in(aside, root, step_of(checkpoint))
    print(f"the model of step {step_of(checkpoint):,} is at the root again: it belongs to the course that continues",
          file=sys.stderr)  # fmt: skip
