"""A run that lies in its directory, or comes to: for experiments, which are asked again after they were stopped."""

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

from .config.recipe import Recipe
from .run import Run, open_run
from .system.checkpoints import is_finished
from .system.errors import log


def grown(directory: Path, build: Callable[[], Recipe]) -> Path:
    """The directory, with a finished run in it: one that lies there, that goes on where it stopped, or is begun.

    build: makes the recipe of the run, and is called only where none lies there; its output_dir is set to the
    directory. What training prints goes to stderr.
    """
    if is_finished(directory):
        log(f"{directory}: grown before")
        return directory
    log(f"{directory}: growing")
    with redirect_stdout(sys.stderr):
        if (directory / "recipe.yaml").is_file():
            open_run(directory).go_on()
        else:
            recipe = build()
            recipe.training["output_dir"] = str(directory)
            Run(recipe).start()
    return directory
