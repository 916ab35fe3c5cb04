"""The checkpoints of a run directory and the best model at its root: written whole, rotated, chosen to go on from."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .distributed import on_all_processes
from .errors import UserError, unknown
from .files import publish, sync, write_json
from .pickles import UNREADABLE, why_unreadable
from .run_files import MANIFEST, STATE, Use, damage, files_below, kind_of, list_files, read_file_manifest
from .shell import shell

# What a killed process leaves: folders that grow, that gave way to a new one of their name, that are on their way out.
SAVING, REPLACED, REMOVING = ".saving-", ".replaced-", ".removing-"


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
    write_json(aside / MANIFEST, {"files": list_files(aside, files_below(aside))})
    publish(aside, checkpoint, replaced := checkpoint.with_name(REPLACED + checkpoint.name))
    shutil.rmtree(replaced, ignore_errors=True)


def move_into_root(aside: Path, root: Path, step: int) -> None:
    """Move the model's files of `aside` into `root`, each over its namesake, and remove `aside`.

    The manifest is written before, with the hashes from before too, and after: a kill in between leaves nothing that
    is taken for damage.
    """
    files = [path for path in files_below(aside) if Use.NO_MODEL not in kind_of(path.name)[1]]
    for path in files:
        sync(path)
    new = {"step": step, "files": list_files(aside, files)}
    try:
        before = read_file_manifest(root).get("files", {})
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


def rotate(run_dir: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints beyond `limit`, but never the last one nor the `best`."""
    kept = list_checkpoints(run_dir)
    protected = {kept[-1].name, Path(best).name if best else kept[-1].name}
    for path in kept[:]:
        if limit and len(kept) > max(limit, len(protected)) and path.name not in protected:
            kept.remove(path)
            nameless = path.rename(path.with_name(REMOVING + path.name))  # half-removed, it is never taken for one
            shutil.rmtree(nameless, ignore_errors=True)


def sweep(run_dir: Path) -> None:
    """Clear away what a killed process left half-done; only for who holds the directory's lock."""
    for path in run_dir.glob(f"{REPLACED}*"):
        checkpoint = path.with_name(path.name.removeprefix(REPLACED))
        if not checkpoint.exists():  # killed between the two renames
            path.rename(checkpoint)
    for pattern in (".saving", f"{SAVING}*", f"{REPLACED}*", f"{REMOVING}*"):
        for path in run_dir.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
    for path in run_dir.glob(".*.[0-9]*.tmp"):  # as files.replace_whole calls a file until it is whole
        if path.is_file():
            path.unlink()


# ---- reading


@contextmanager
def reading(checkpoint: str | None, what: str) -> Iterator[None]:
    """Make one line of whatever loading a part of a checkpoint raises: what opens may still not be what is wanted."""
    try:
        yield
    except UNREADABLE as error:
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


# ---- going back to an earlier checkpoint


def abandon_later_checkpoints(checkpoint: Path) -> None:
    """Rename the checkpoints after the one that a run goes back to: what follows now is another run than theirs."""
    for path in list_checkpoints(checkpoint.parent):
        if step_of(path) > step_of(checkpoint):
            aside = path.with_name(f"abandoned-{path.name}")
            while aside.exists():
                aside = aside.with_name(f"abandoned-{aside.name}")
            path.rename(aside)


def restore_best_model(checkpoint: Path) -> bool:
    """Put at the root the model that was the best when a checkpoint was written; whether there is one still.

    Where it is gone the checkpoint's own model is put there, and the next evaluation decides anew.
    """
    root, best = checkpoint.parent, read_state(checkpoint).get("best_global_step")
    try:
        there = read_file_manifest(root)
        is_whole = "before" not in there and damage(root) is None if there else None
    except UserError:
        there, is_whole = {}, False
    if is_whole is None or (is_whole and there.get("step") == best):
        return True  # a root without a manifest is an earlier Acorn's
    source = root / f"checkpoint-{best}"
    is_best = best is not None and source.is_dir() and damage(source) is None
    source, aside = source if is_best else checkpoint, root / ".saving"
    step = step_of(source)
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(source, aside, ignore=lambda _, names: [n for n in names if Use.NO_MODEL in kind_of(n)[1]])
    move_into_root(aside, root, step)
    print(f"the model of step {step:,} is at the root again: the run goes on from before a later best", file=sys.stderr)
    return is_best


# ---- runs with nothing left to do


def is_finished(run_dir: Path) -> bool:
    """Whether a run came to its end: its report is written last, and removed when the run goes on."""
    return (run_dir / "README.md").is_file()


def stopped_early(checkpoint: Path, patience: int | None) -> bool:
    """Whether the run ended at this checkpoint because its validation loss no longer fell."""
    saved = read_state(checkpoint).get("stateful_callbacks", {}).get("EarlyStoppingCallback", {})
    return bool(patience) and saved.get("attributes", {}).get("early_stopping_patience_counter", 0) >= patience


def refuse_finished(checkpoint: Path, args) -> None:
    """Say so when there is nothing left to do: all steps are done and the report is there."""
    step = read_state(checkpoint)["global_step"]
    if not is_finished(checkpoint.parent):
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
