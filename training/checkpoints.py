"""The checkpoints of a run directory: which there are, which are whole, which one is meant."""

import json
import sys
from pathlib import Path

from .errors import UserError, unknown

STATE = "trainer_state.json"


def step_of(checkpoint: Path) -> int:
    """N of checkpoint-N; -1 for a folder with another ending."""
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else -1


def find_checkpoint(run_dir: Path, wanted: str) -> Path:
    """The directory of `last`, `best` or `checkpoint-N`."""
    # trainer_state.json is written last: a directory without it was cut off while it was written.
    found = sorted((path for path in run_dir.glob("checkpoint-*") if step_of(path) >= 0), key=step_of)
    checkpoints = [path for path in found if (path / STATE).is_file()]
    for path in set(found) - set(checkpoints):
        print(f"{path} was not written whole and is passed over", file=sys.stderr)
    if not checkpoints:
        raise UserError(f"{run_dir} has no checkpoint yet: start it again with `acorn pretrain`")
    if wanted == "last":
        return checkpoints[-1]
    if wanted == "best":
        best = read_state(checkpoints[-1])["best_model_checkpoint"]
        wanted = Path(best).name if best else checkpoints[-1].name
    if run_dir / wanted not in checkpoints:
        raise unknown("checkpoint", wanted, ["last", "best", *(path.name for path in checkpoints)])
    return run_dir / wanted


def set_aside_later(checkpoint: Path) -> None:
    """Rename the checkpoints after the one that a run goes back to: they are of another course."""
    step = step_of(checkpoint)
    for path in checkpoint.parent.glob("checkpoint-*"):
        if step_of(path) > step:
            aside = path.with_name(f"abandoned-{path.name}")
            while aside.exists():
                aside = aside.with_name(f"abandoned-{aside.name}")
            path.rename(aside)


def read_state(checkpoint: Path) -> dict:
    """Trainer's own record of a checkpoint."""
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))


def refuse_finished(checkpoint: Path, max_steps: int) -> None:
    """Say so when there is nothing left to do: all steps are done and the report, written last, is there."""
    step = read_state(checkpoint)["global_step"]
    if max_steps <= step and (checkpoint.parent / "README.md").is_file():
        raise UserError(
            f"max_steps={max_steps}: {checkpoint} is at step {step} already; give a larger --max_steps "
            "(or --num_train_epochs, if the run counts epochs)"
        )
