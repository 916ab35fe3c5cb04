"""The shape of the house: who may import whom, and how long a file and a function may be."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {  # a room: the other rooms it may import
    "modeling": set(),
    "training": {"modeling"},
    "finetune": {"modeling", "training"},
    "inference": {"modeling", "training"},
    "benchmarks": {"modeling", "training", "finetune", "inference"},
    "acorn": {"training"},
}
# The rooms of training/, from the lowest up: each may import those before it, and the modules on top import them all.
TRAINING = ("system", "data", "model", "config", "share", "loop")
# What a model from the Hub may count on: huggingface_hub comes with every transformers, and holds its `strict`.
TRAVELS_WITH = {"torch", "transformers", "huggingface_hub"} | sys.stdlib_module_names
MAX_FILE, MAX_FUNCTION, MAX_MODULES = 400, 50, 10

FILES = sorted(path.relative_to(ROOT) for room in MAY_IMPORT for path in (ROOT / room).rglob("*.py"))
FILES += [Path("acorn.py")]


def imports(tree: ast.Module, package: str) -> Iterator[tuple[int, str]]:
    """Yield (dots, absolute dotted name) of every import in the file, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*parents, *([node.module] if node.module else [])])
            yield node.level, source
            yield from ((node.level, f"{source}.{alias.name}") for alias in node.names)


def defines_main(tree: ast.Module) -> bool:
    return any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)


def forbidden_imports(path: Path, tree: ast.Module, mains: set[str]) -> list[str]:
    """List what the file at `path` (relative to the root) imports against the rule."""
    package, room = ".".join(path.parent.parts), path.with_suffix("").parts[0]
    wrong = []
    for dots, name in imports(tree, package):
        top = name.split(".")[0]
        if top in MAY_IMPORT and top != room and top not in MAY_IMPORT.get(room, set()):
            wrong.append(f"{room} may not import {top}: {name}")
        if name in mains:
            wrong.append(f"nobody imports a module with a main(): {name}")
        if package.startswith("training.") and name.startswith("training.") and is_upward(package, name):
            wrong.append(f"{package} may not import {name}")
        if room == "modeling" and dots == 0 and top not in TRAVELS_WITH | MAY_IMPORT.keys():
            wrong.append(f"modeling imports torch and transformers only: {name}")
    return wrong + (untravelled(tree) if room == "modeling" else [])


def is_upward(package: str, name: str) -> bool:
    """Whether a module of a room of training/ imports a later room, or a module on top of them."""
    here, there = package.split(".")[1], name.split(".")[1]
    if here not in TRAINING:  # launch/ is on top
        return False
    return there not in TRAINING or TRAINING.index(there) > TRAINING.index(here)


def untravelled(tree: ast.Module) -> list[str]:
    """List the imports of its own files that the Hub copy would miss: all but `from .x import y`."""
    wrong = []
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.ImportFrom)
            and node.level
            and (node.level > 1 or not node.module or "." in node.module)
        ):
            wrong.append(f"only `from .x import y` travels: {ast.unparse(node)}")
        absolute = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        absolute += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
        if any(name.split(".")[0] == "modeling" for name in absolute):
            wrong.append(f"only `from .x import y` travels: {ast.unparse(node)}")
    return wrong


def too_long(text: str, tree: ast.Module) -> list[str]:
    """List the file itself and its functions where they pass the limit."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    wrong = [f"{name}() has {lines} lines" for name, lines in lengths.items() if lines > MAX_FUNCTION]
    lines = len(text.splitlines())
    return wrong + ([f"the file has {lines} lines"] if lines > MAX_FILE else [])


@pytest.fixture(scope="module")
def mains() -> set[str]:
    """The dotted names of the modules that define main()."""
    trees = {path: ast.parse((ROOT / path).read_text(encoding="utf-8")) for path in FILES}
    return {".".join(path.with_suffix("").parts) for path, tree in trees.items() if defines_main(tree)}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_keep_the_rule(path: Path, mains: set[str]) -> None:
    assert forbidden_imports(path, ast.parse((ROOT / path).read_text(encoding="utf-8")), mains) == []


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_and_functions_stay_short(path: Path) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    assert too_long(text, ast.parse(text)) == []


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES} - {Path("benchmarks"), Path(".")}), ids=str)
def test_a_folder_holds_few_modules_and_says_what_they_are(folder: Path) -> None:
    assert len([path for path in FILES if path.parent == folder and path.name != "__init__.py"]) <= MAX_MODULES
    init = ROOT / folder / "__init__.py"
    assert folder.name == "launch" or ast.get_docstring(ast.parse(init.read_text(encoding="utf-8")))


def test_modeling_is_flat() -> None:
    assert [path for path in FILES if path.parts[0] == "modeling" and len(path.parts) > 2] == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("modeling/a.py", "import numpy"),
        ("modeling/a.py", "from training.system.errors import UserError"),
        ("modeling/a.py", "from . import positions"),
        ("modeling/a.py", "from ..training import errors"),
        ("modeling/a.py", "from modeling.positions import POSITIONS"),
        ("modeling/a.py", "def f():\n    import datasets"),
        ("training/a.py", "from inference.caches import sink"),
        ("training/a.py", "import finetune.adapters"),
        ("training/a.py", "from training.pretrain import main"),
        ("training/a.py", "from training import pretrain"),
        ("training/a.py", "from .pretrain import read"),
        ("training/a.py", "import acorn"),
        ("inference/a.py", "from finetune.adapters import ADAPTERS"),
        ("inference/caches/a.py", "from ...training.pretrain import main"),
        ("finetune/a.py", "import inference"),
        ("training/data/a.py", "from ..config.recipe import Recipe"),
        ("training/share/a.py", "from training.loop.trainer import GPTTrainer"),
        ("training/loop/a.py", "from ..run import run"),
    ],
)
def test_the_rule_catches(path: str, line: str) -> None:
    assert forbidden_imports(Path(path), ast.parse(line), {"training.pretrain", "acorn"}) != []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("modeling/a.py", "import math, torch.nn\nfrom transformers import Cache\nfrom .positions import POSITIONS"),
        (
            "training/a.py",
            "import datasets\nfrom modeling.loss import causal_lm_loss\nfrom training.system.errors import unknown",
        ),
        ("training/a.py", "import evaluate, tokenizers"),
        ("inference/a.py", "from training.loop.evaluation import evaluate_rows\nfrom modeling import GPTForCausalLM"),
        ("training/loop/a.py", "from ..data.corpus import Corpus\nfrom ..share.report import write_report"),
        ("training/run.py", "from .loop.trainer import GPTTrainer"),
        ("finetune/a.py", "import peft\nfrom training.loop.trainer import GPTTrainer"),
    ],
)
def test_the_rule_allows(path: str, line: str) -> None:
    assert forbidden_imports(Path(path), ast.parse(line), {"training.pretrain", "acorn"}) == []
