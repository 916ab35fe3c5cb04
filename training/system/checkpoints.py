"""The checkpoints of a run directory: written whole or not at all, verified before a run goes on from one, rotated."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .distributed import on_all_processes
from .errors import UserError, unknown
from .files import hash_files, publish, write_json
from .pickles import UNREADABLE, refuse_unreadable, why_unreadable
from .shell import shell

STATE, MANIFEST = "trainer_state.json", "manifest.json"
# What a killed process leaves: folders that grow, that gave way to a new one of their name, that are on their way out.
SAVING, REPLACED, REMOVING = ".saving-", ".replaced-", ".removing-"
# What is read of a checkpoint that a run goes on from, beside JSON; training_args.bin is written and never read.
STATE_FILES = ("*.safetensors", "*.pt", "*.pth", "optimizer*.bin", "pytorch_model*.bin", "adapter_model.bin")
# The files of a run that write_whole makes, under another name first.
WRITTEN_WHOLE = """
recipe.yaml inputs.json finetune.json metrics.jsonl loss.png sample.txt README.md manifest.json
""".split()


def step_of(checkpoint: Path) -> int:
    """N of checkpoint-N; -1 for a folder with another ending."""
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else -1


def run_of(directory: Path) -> Path | None:
    """The run directory that `directory` is, or lies in as one of its checkpoints; None where it is of no run."""
    places = (directory, directory.absolute().parent)
    return next((place for place in places if (place / "recipe.yaml").is_file()), None)


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The folders checkpoint-N, by step, whole or damaged."""
    return sorted((path for path in run_dir.glob("checkpoint-*") if step_of(path) >= 0), key=step_of)


def read_state(checkpoint: Path) -> dict:
    """Trainer's own record of a checkpoint."""
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))


def missing_state(checkpoint: Path) -> list[str]:
    """What a checkpoint lacks of all that a run goes on exactly by, in words."""
    kinds = {"optimizer state": "optimizer.pt", "schedule": "scheduler.pt", "random state": "rng_state*.pth"}
    if (checkpoint / "latest").is_file():  # DeepSpeed's own folder holds the first two
        kinds = {"random state": kinds["random state"]}
    return [what for what, pattern in kinds.items() if not any(checkpoint.glob(pattern))]


def processes_of(checkpoint: Path) -> int:
    """How many processes wrote it, by their random states; 0 where none were saved."""
    return len(list(checkpoint.glob("rng_state*.pth")))


# ---- writing


def write_beside(aside: Path, write: Callable[[], object], finish: Callable[[], object], args) -> None:
    """Let every process `write()` into the folder `aside`, then the first one `finish()`; an error removes the folder.

    Where it fails in one process it fails in all.
    """

    def write_in_all() -> None:
        aside.mkdir(parents=True, exist_ok=True)
        write()

    try:
        on_all_processes(args, write_in_all)
        on_all_processes(args, finish if args.should_save else lambda: None)
    except BaseException:
        if args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
        raise


def seal(aside: Path, checkpoint: Path) -> None:
    """Write the manifest of `aside`, then give the folder its name; an older one of that step stands until then."""
    write_json(aside / MANIFEST, {"files": facts_of_files(aside, files_of(aside))})
    replaced = checkpoint.with_name(REPLACED + checkpoint.name)
    publish(aside, checkpoint, replaced)
    shutil.rmtree(replaced, ignore_errors=True)


def files_of(folder: Path) -> list[Path]:
    """Every file below a folder, in order."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def facts_of_files(folder: Path, files: list[Path]) -> dict[str, dict]:
    """Name to size and hash, as a manifest lists them."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, hash_files(files), strict=True)
    }


def rotate(run_dir: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints beyond `limit`, but never the last one nor the `best`."""
    kept = list_checkpoints(run_dir)
    protected = {kept[-1].name, Path(best).name if best else kept[-1].name}
    for path in kept[:]:
        if limit and len(kept) > max(limit, len(protected)) and path.name not in protected:
            kept.remove(path)
            remove(path)


def remove(checkpoint: Path) -> None:
    """Take a checkpoint away: first its name, so that a half-removed one is never taken for one."""
    leaving = checkpoint.with_name(REMOVING + checkpoint.name)
    checkpoint.rename(leaving)
    shutil.rmtree(leaving, ignore_errors=True)


def sweep(run_dir: Path) -> None:
    """Clear away what a killed process left half-done; only for who holds the directory's lock."""
    for path in run_dir.glob(f"{REPLACED}*"):
        checkpoint = path.with_name(path.name.removeprefix(REPLACED))
        if not checkpoint.exists():  # killed between the two renames
            path.rename(checkpoint)
    for pattern in (".saving", f"{SAVING}*", f"{REPLACED}*", f"{REMOVING}*"):
        for path in run_dir.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
    for name in WRITTEN_WHOLE:
        for path in run_dir.glob(f".{name}.*.tmp"):
            path.unlink()


# ---- reading


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file; None when each file is what was written."""
    what = (
        _damage_by_manifest(checkpoint) if (checkpoint / MANIFEST).is_file() else _damage_without_manifest(checkpoint)
    )
    return what or _unreadable(checkpoint)


def _damage_by_manifest(checkpoint: Path) -> str | None:
    try:
        listed = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        sizes = {checkpoint / name: (facts["bytes"], facts["sha256"]) for name, facts in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    for path, (size, _) in sizes.items():
        if not path.is_file():
            return f"{path.relative_to(checkpoint)} is missing"
        if path.stat().st_size != size:
            return f"{path.relative_to(checkpoint)} has {path.stat().st_size:,} of {size:,} bytes"
    for path, digest in zip(sizes, hash_files(list(sizes)), strict=True):
        if digest != sizes[path][1]:
            return f"{path.relative_to(checkpoint)} is not what was written (its sha256 differs)"
    return None


def _damage_without_manifest(checkpoint: Path) -> str | None:
    """Checkpoints of an Acorn that wrote none, or of plain Trainer: the state was written last."""
    try:
        is_whole = {"global_step", "best_model_checkpoint"} <= read_state(checkpoint).keys()
    except FileNotFoundError:
        return f"it has neither {MANIFEST} nor {STATE}"
    except (ValueError, AttributeError):
        is_whole = False
    if not is_whole:
        return f"{STATE} cannot be read"
    print(f"{checkpoint} has no {MANIFEST}, as an earlier Acorn left it: taken unverified", file=sys.stderr)
    return None


def _unreadable(checkpoint: Path) -> str | None:
    """A manifest vouches for what it lists alone: what training will read must open, and run no code."""
    try:
        for path in sorted(path for pattern in STATE_FILES for path in checkpoint.glob(pattern)):
            refuse_unreadable(path)
    except UserError as error:
        return str(error).removeprefix(f"{checkpoint}/")
    return None


@contextmanager
def reading(checkpoint: str | None, what: str) -> Iterator[None]:
    """Make one line of whatever loading a part of a checkpoint raises: what opens may still not be what is wanted."""
    try:
        yield
    except (*UNREADABLE, TypeError, AttributeError, IndexError) as error:
        raise UserError(
            f"{checkpoint}: its {what} cannot be loaded ({why_unreadable(error)}): it is damaged, or belongs to "
            "another run; choose another with --checkpoint"
        ) from error


def find_checkpoint(run_dir: Path, wanted: str) -> Path | None:
    """The directory of `last`, `best` or `checkpoint-N`; None for the `last` of a run that has none yet.

    `last` is the newest that is whole, and stderr says which were passed over and why. A named one that is damaged is
    refused.
    """
    found = list_checkpoints(run_dir)
    if wanted == "last":
        return newest_whole(found) if found else None
    if not found:
        raise UserError(f"{run_dir} has no checkpoint yet: `{shell('acorn', 'resume', run_dir)}` starts it again")
    if wanted == "best":
        best = read_state(newest_whole(found))["best_model_checkpoint"]
        wanted = Path(best).name if best else found[-1].name
    if run_dir / wanted not in found:
        raise unknown("checkpoint", wanted, ["last", "best", *(path.name for path in found)])
    if what := damage(run_dir / wanted):
        raise UserError(f"{run_dir / wanted} is damaged: {what}; `--checkpoint last` takes the newest that is whole")
    return run_dir / wanted


def newest_whole(found: list[Path]) -> Path:
    """The last of the checkpoints that is whole; what is wrong with the later ones goes to stderr."""
    damages = []
    for path in reversed(found):
        what = damage(path)
        if what is None:
            return path
        damages.append(f"{path.name}: {what}")
        print(f"{path} is skipped: {what}", file=sys.stderr)
    raise UserError(
        f"{found[0].parent}: no checkpoint is whole ({'; '.join(damages)}); start the run again "
        "with another --output_dir"
    )


def set_aside_later(checkpoint: Path) -> None:
    """Rename the checkpoints after the one that a run goes back to: they are of another course."""
    for path in list_checkpoints(checkpoint.parent):
        if step_of(path) > step_of(checkpoint):
            aside = path.with_name(f"abandoned-{path.name}")
            while aside.exists():
                aside = aside.with_name(f"abandoned-{aside.name}")
            path.rename(aside)


# ---- runs with nothing left to do


def stopped_early(checkpoint: Path, patience: int | None) -> bool:
    """Whether the run ended at this checkpoint because its validation loss no longer fell."""
    saved = read_state(checkpoint).get("stateful_callbacks", {}).get("EarlyStoppingCallback", {})
    return bool(patience) and saved.get("attributes", {}).get("early_stopping_patience_counter", 0) >= patience


def refuse_finished(checkpoint: Path, args) -> None:
    """Say so when there is nothing left to do: all steps are done and the report, written last, is there."""
    step = read_state(checkpoint)["global_step"]
    if not (checkpoint.parent / "README.md").is_file():
        return
    if stopped_early(checkpoint, args.early_stopping_patience):
        raise UserError(
            f"early_stopping_patience={args.early_stopping_patience}: {checkpoint} at step {step} is where the run "
            "stopped early; give a larger --early_stopping_patience"
        )
    if args.max_steps <= step:
        raise UserError(
            f"max_steps={args.max_steps}: {checkpoint} is at step {step} already; give a larger --max_steps "
            "(or --num_train_epochs, if the run counts epochs)"
        )
