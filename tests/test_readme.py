"""What the README says is what happens: its commands run, its file tree is the tree, its Python runs."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

import acorn

from .tiny_runs import latest
from .two_processes import launch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"<!-- test: (\w+) -->\n```bash\n(.*?)```", README, flags=re.DOTALL))
TINY = ["--n_layer", "1", "--n_embd", "32", "--n_head", "2", "--max_steps", "4", "--eval_steps", "2", "--bf16", "false"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A directory with the README's texts, as parquet too, and a tiny runs/quickstart."""
    directory = tmp_path_factory.mktemp("readme")
    for name in ("README.md", "CONTRIBUTING.md"):
        shutil.copyfile(ROOT / name, directory / name)
    (directory / "shards").mkdir()
    table = pyarrow.table({"text": README.split("\n## ")})
    pyarrow.parquet.write_table(table, directory / "shards" / "0.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        acorn.main(["pretrain", "quickstart", "--text_files", "README.md", *TINY])
    return directory


def commands(block: str) -> list[list[str]]:
    return [shlex.split(line, comments=True) for line in BLOCKS[block].strip().splitlines()]


def shrunk(command: list[str]) -> list[str]:
    """The README's pretraining commands with a smaller model: the words are what is tested, not the training."""
    shapes = {"pretrain": [*TINY[:6], "--bf16", "false"], "finetune": ["--bf16", "false"]}
    return latest(*command, *shapes.get(command[1], []))


def launched(command: list[str], folder: Path) -> str:
    """What `accelerate launch --config_file training/launch/cpu-2.yaml …` prints."""
    assert command[:4] == ["accelerate", "launch", "--config_file", "training/launch/cpu-2.yaml"]
    return launch(*command[4:], *TINY[:6], cwd=folder).stdout


@pytest.mark.parametrize("block", BLOCKS)
def test_commands_run(block, workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    for command in commands(block):
        if command[0] == "accelerate":
            printed = launched(command, workplace)
        else:
            assert command[0] == "acorn"
            acorn.main(shrunk(command)[1:])
            printed = capsys.readouterr().out
        assert printed.strip(), command
        if command[1] == "evaluate":
            assert json.loads(printed.strip().splitlines()[-1])["tokens"] > 0


def test_every_job_has_tested_commands():
    jobs = (
        "generate evaluate inspect pretrain prepare estimate launch finetune convert export push strategies caches lab "
        "memory pool depth onegpu"
    )
    assert set(BLOCKS) == set(jobs.split())


def test_pipeline_snippet(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    snippet = next(code for code in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL) if "pipeline" in code)
    exec(compile(snippet, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("def main(")


def test_config_snippet():
    snippet = next(code for code in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL) if "GPTConfig" in code)
    names: dict = {}
    exec(compile(snippet, "README.md", "exec"), names)
    assert names["model"].config.hidden_size == 128


def test_the_file_tree_names_every_file():
    tree = README.split("## The files")[1]
    for folder in ("modeling", "training", "finetune", "inference"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name != "__init__.py":
                assert path.name in tree, f"{folder}/{path.name} is not in the README's tree"
    folders = [ROOT / name for name in ("modeling", "training", "finetune", "inference", "benchmarks", "tests")]
    there = {path.name for folder in folders for path in folder.rglob("*.py")} | {
        path.name for path in ROOT.glob("*.py")
    }
    for name in re.findall(r"\b([\w]+\.py)\b", tree):
        assert name in there, f"the README's tree names {name}, which is not there"
