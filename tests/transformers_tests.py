"""transformers' own tests, taken from its source distribution on PyPI into a cache: no text of theirs lies here.

`python -m tests.transformers_tests` fetches them; ACORN_TRANSFORMERS_TESTS names another folder than the cache's.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path

import transformers

PACKAGE = "transformers_tests"
# What their common tests import, and their source distribution leaves out: tests that are not run.
LEFT_OUT = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}


def home() -> Path:
    """Where the tests of the installed version are kept."""
    cache = Path(os.environ.get("ACORN_TRANSFORMERS_TESTS") or Path.home() / ".cache" / "acorn" / PACKAGE)
    return cache / transformers.__version__


def is_fetched() -> bool:
    return (home() / "tests").is_dir()


def fetch() -> Path:
    """The folder of the tests, taken from PyPI by pip unless they are there; OSError where that does not work."""
    if is_fetched():
        return home()
    home().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home().parent) as aside:
        name = f"transformers=={transformers.__version__}"
        _pip("download", name, "--no-deps", "--no-binary", "transformers", "-d", aside)
        _pip("install", "parameterized", "--no-deps", "--target", f"{aside}/new/site")
        with tarfile.open(next(Path(aside).glob("transformers-*.tar.gz"))) as archive:
            members = [member for member in archive if member.name.split("/")[1:2] == ["tests"]]
            archive.extractall(aside, members, filter="data")
        next(Path(aside).glob("transformers-*/tests")).rename(Path(aside, "new", "tests"))
        Path(aside, "new").rename(home())
    return home()


def _pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", *words, "-q", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise OSError(f"pip {words[0]} {words[1]}: {done.stderr.strip().splitlines()[-1:]}")


def common_tests():
    """Their module of tests that every model passes, once they are fetched."""
    folder = home()
    if str(folder / "site") not in sys.path:
        sys.path.append(str(folder / "site"))
    for name, path in ((PACKAGE, [str(folder / "tests")]), *((f"{PACKAGE}.{n.split('.')[0]}", []) for n in LEFT_OUT)):
        sys.modules.setdefault(name, types.ModuleType(name)).__path__ = path
    for name, mixin in LEFT_OUT.items():
        module = sys.modules.setdefault(f"{PACKAGE}.{name}", types.ModuleType(f"{PACKAGE}.{name}"))
        setattr(module, mixin, type(mixin, (), {}))
    return __import__(f"{PACKAGE}.test_modeling_common", fromlist=["ModelTesterMixin"])


if __name__ == "__main__":
    try:
        print(f"transformers' own tests: {fetch()}")
    except (OSError, subprocess.TimeoutExpired) as error:
        sys.exit(f"transformers' own tests cannot be had, and are left out: {error}")
