"""A client's script of tests/clients/, run where nothing of Acorn can be imported: the directory has to be enough."""

from pathlib import Path

from .test_hub_copy import run_without_acorn

SCRIPTS = Path(__file__).parent / "clients"


def run_client(name: str, *arguments: Path, cwd: Path) -> dict:
    """The facts that the script prints about the directories it is given."""
    return run_without_acorn((SCRIPTS / f"{name}.py").read_text(encoding="utf-8"), *arguments, cwd=cwd)
