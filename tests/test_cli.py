"""The door: it opens at once, names the nearest verb, and turns mistakes into one line."""

import errno
import gc
import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import acorn
from training import list_recipes
from training.system import errors
from training.system.errors import UserError, is_disk_full, run_main, unknown

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted(list_recipes.RECIPES.glob("*.yaml"))


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    """Run `code` in a bare process in the clone."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=120)


def exit_of(error: BaseException) -> int:
    """The exit code that run_main makes of an error."""

    def main(argv):
        raise error

    with pytest.raises(SystemExit) as left:
        run_main(main, [])
    return left.value.code


# the door


@pytest.mark.parametrize("argv", ["[]", "['--help']", "['--version']", "['recipes']"])
def test_the_door_opens_without_torch(argv: str) -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'numpy'}"
    done = python(f"import sys, acorn; acorn.main({argv}); assert not {heavy} & set(sys.modules)")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


def test_help_lists_every_verb_in_order(capsys) -> None:
    acorn.main(["--help"])
    text = capsys.readouterr().out
    places = [text.index(f"\n  {verb} ") for verb in acorn.VERBS]
    assert places == sorted(places)
    assert all(f"\n{heading}:\n  {verb} " in text for verb, heading in acorn.HEADINGS.items())
    assert text.splitlines()[-1].startswith("Type next:")


def test_version(capsys) -> None:
    acorn.main(["--version"])
    assert capsys.readouterr().out == f"acorn {acorn.__version__}\n"


def test_unknown_verb_names_its_neighbour(capsys) -> None:
    with pytest.raises(SystemExit) as left:
        acorn.main(["pretrian", "quickstart"])
    assert left.value.code == 2
    assert "did you mean 'pretrain'?" in capsys.readouterr().err


@pytest.mark.parametrize("verb", acorn.VERBS)
def test_every_verb_has_its_module(verb: str) -> None:
    assert find_spec(acorn.VERBS[verb][0]) is not None


def test_a_verb_gets_the_rest_of_the_line(monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(list_recipes, "main", seen.append)
    acorn.main(["recipes", "--flag", "value"])
    assert seen == [["--flag", "value"]]


def test_a_verb_is_imported_without_collecting(monkeypatch, tmp_path) -> None:
    (tmp_path / "a_verb_of_this_test.py").write_text("import gc\nwas_on = gc.isenabled()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(acorn.VERBS, "try", ("a_verb_of_this_test", ""))
    module = acorn.module_of("try")
    frozen = gc.get_freeze_count()
    gc.unfreeze()
    assert (module.was_on, gc.isenabled(), frozen > 0) == (False, True, True)
    assert acorn.module_of("try") is module
    assert gc.get_freeze_count() == 0  # what a second call finds imported is left to the collector


# acorn recipes


def test_recipes_are_listed_with_their_first_comment(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "quickstart.yaml").write_text("# a small one\n# more\nmodel: {}\n")
    (tmp_path / "b.yaml").write_text("model: {}\n")
    monkeypatch.setattr(list_recipes, "RECIPES", tmp_path)
    list_recipes.main([])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:4] == ["  b", "  quickstart  a small one"]
    assert "acorn pretrain quickstart" in lines[-2]


def test_shipped_recipes_say_what_they_grow() -> None:
    assert RECIPES
    assert [path.name for path in RECIPES if not list_recipes.first_comment(path)] == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_printed_as_it_is(path: Path, capsys) -> None:
    list_recipes.main([path.stem])
    assert capsys.readouterr().out == path.read_text(encoding="utf-8")


def test_unknown_recipe_names_its_neighbour() -> None:
    with pytest.raises(UserError, match=r"did you mean 'baby'\?"):
        list_recipes.find("babby.yaml", {"baby": Path("baby.yaml")})


# run_main


def test_a_main_that_returns_does_not_exit() -> None:
    assert run_main(lambda argv: argv.append("seen"), []) is None


def test_a_user_error_is_one_line(capsys) -> None:
    assert exit_of(UserError("n_layer is -1: give 1 or more")) == 2
    assert capsys.readouterr().err == "acorn: error: n_layer is -1: give 1 or more\n"


def test_a_value_with_line_breaks_is_one_line(capsys) -> None:
    assert exit_of(UserError("dtype='a\nb': choose float32")) == 2
    assert capsys.readouterr().err == "acorn: error: dtype='a b': choose float32\n"


def test_ctrl_c_is_one_line(capsys) -> None:
    assert exit_of(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "acorn: stopped by Ctrl-C.\n"


@pytest.mark.parametrize(
    "words",
    [
        "I/O error: No space left on device (os error 28)",
        "PytorchStreamWriter failed writing file data/0: file write failed",
        "basic_ios::clear: iostream error",
        "[enforce fail at inline_container.cc:672] . unexpected pos 71360 vs 71252",
    ],
)
def test_a_full_disk_is_known_by_its_words(words: str) -> None:
    assert is_disk_full(RuntimeError(words))
    assert not is_disk_full(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_full_disk_names_the_file(capsys) -> None:
    assert exit_of(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/a/model.safetensors")) == 1
    assert exit_of(RuntimeError(f"I/O error: {errors.DISK_FULL[0]} (os error 28)")) == 1
    named, unnamed = capsys.readouterr().err.splitlines()
    assert "the disk is full while writing runs/a/model.safetensors: free some space" in named
    assert "the disk is full: free some space" in unnamed


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 39 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        MemoryError(),
    ],
)
def test_memory_that_is_used_up_is_one_line(error: Exception, capsys) -> None:
    assert exit_of(error) == 1
    assert re.match("acorn: error: out of memory .*: lower batch size or context; .*\n$", capsys.readouterr().err)


@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("shapes do not fit"), SystemExit(7)])
def test_the_rest_passes_through(error: BaseException) -> None:
    with pytest.raises(type(error)) as passed:
        run_main(lambda argv: (_ for _ in ()).throw(error), [])
    assert passed.value is error


def test_what_the_system_refuses_is_one_line(capsys) -> None:
    assert exit_of(PermissionError(errno.EACCES, os.strerror(errno.EACCES), "runs/a/recipe.yaml")) == 2
    assert exit_of(OSError("no file named model.safetensors")) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == "acorn: error: runs/a/recipe.yaml: Permission denied"
    assert second == "acorn: error: no file named model.safetensors"


@pytest.mark.parametrize(
    ("streams", "code", "said"),
    [
        (">&-", 0, ""),
        ("2>&-", 0, ""),
        (">/dev/full", 1, "the disk is full"),
        ("PYTHONIOENCODING=ascii", 0, ""),
    ],
)
def test_streams_that_cannot_be_written(tmp_path, streams: str, code: int, said: str) -> None:
    """Closed, full, and with an alphabet that lacks a dash; no file of the run is opened in their place."""
    program = (
        "from training.system.errors import run_main\n"
        "def main(argv):\n    open('file', 'w').close()\n"
        "    print('–', flush=True)\n    open('file', 'a').write('mine')\n"
        "run_main(main)"
    )
    variable, redirection = (streams, "") if "=" in streams else ("", streams)
    line = f"{variable} {shlex.quote(sys.executable)} -c {shlex.quote(program)} {redirection}"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == code and said in ended.stderr and len(ended.stderr.splitlines()) == bool(said)
    assert (tmp_path / "file").read_text() == ("mine" if code == 0 else "")


def test_only_the_first_process_speaks(monkeypatch, capsys) -> None:
    monkeypatch.setenv("RANK", "1")
    assert exit_of(UserError("once")) == 2
    assert capsys.readouterr().err == ""


def test_a_reader_that_went_away_is_quiet() -> None:
    code = "import sys; from training.system.errors import run_main; run_main(lambda _: print('x' * 1_000_000), [])"
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.close()
    assert (child.stderr.read(), child.wait(timeout=60)) == (b"", 1)
    child.stderr.close()


@pytest.mark.parametrize(("value", "advice"), [("adamv", "did you mean 'adamw'? "), ("zz", "")])
def test_unknown_names_the_nearest_and_all_where_they_are_few(value: str, advice: str) -> None:
    message = f"unknown optimizer {value!r}: {advice}choose from adamw, muon."
    assert str(unknown("optimizer", value, ["adamw", "muon"])) == message
    assert str(unknown("number", "1O", map(str, range(20)))) == "unknown number '1O': did you mean '1'?"
