"""metrics.jsonl: a line an evaluation, appended while a run goes on, read whole, and mended by a resumed run."""

import json
import math
import os
from pathlib import Path

from ..system.errors import UserError, one_line
from ..system.files import write_whole

METRICS_FILE = "metrics.jsonl"
# What a line of metrics.jsonl has at least.
ROW = {"step", "tokens", "train_loss", "eval_loss", "bits_per_byte", "learning_rate", "seconds"}


def append_metrics(run_dir: str | os.PathLike, row: dict) -> None:
    """Add a line, on the disk before the checkpoint that counts on it."""
    with open(Path(run_dir, METRICS_FILE), "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_metrics(run_dir: str | os.PathLike) -> list[dict]:
    """The whole lines of metrics.jsonl; where a resumed run passed a step again, the later line counts."""
    path = Path(run_dir, METRICS_FILE)
    latest: dict[int, dict] = {}
    for number, line in enumerate(_whole_lines(path).splitlines(), start=1):
        row = _read_row(path, number, line)
        latest = {step: kept for step, kept in latest.items() if step < row["step"]} | {row["step"]: row}
    return list(latest.values())


def _read_row(path: Path, number: int, line: bytes) -> dict:
    try:
        row = json.loads(line)
        if row.keys() >= ROW and isinstance(row["step"], int) and isinstance(row["eval_loss"], float):
            return row
        why = "not a row of figures"
    except (ValueError, AttributeError) as error:
        why = one_line(error)
    raise UserError(f"{path} is damaged in line {number} ({why}): fix or remove that line")


def mend_metrics(run_dir: str | os.PathLike, last_step: float = math.inf) -> None:
    """Keep the whole lines up to a step: what comes after was half-written, or is of a course that the run left."""
    path = Path(run_dir, METRICS_FILE)
    if not path.is_file():
        return
    lines = _whole_lines(path).splitlines(keepends=True)
    kept = [line for number, line in enumerate(lines, 1) if _read_row(path, number, line)["step"] <= last_step]
    if (whole := b"".join(kept)) != path.read_bytes():
        write_whole(path, whole)


def _whole_lines(path: Path) -> bytes:
    raw = path.read_bytes() if path.is_file() else b""
    return raw[: raw.rfind(b"\n") + 1]
