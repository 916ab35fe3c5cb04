"""Print what pyproject.toml requires, for running and for the tests, without version bounds, for `make newest`."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
names = [re.split(r"[<>=\[]", line)[0] for line in project["dependencies"] + extras["dev"] + extras["tensorboard"]]
print(*(name for name in names if name not in ("torch", "acorn-gpt", "ruff")))
