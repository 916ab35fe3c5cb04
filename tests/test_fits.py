"""What this machine's memory cannot hold is refused in one line, before anything is read or written."""

from pathlib import Path

import pytest

from training import costs, pretrain
from training.config.command_line import load_recipe

from .tiny_runs import refused, tiny_argv, write_text


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--per_device_train_batch_size 100000000", "per_device_train_batch_size=100000000"),
        ("--n_embd 10000000", "n_embd=10000000"),
        ("--block_size 100000000", "block_size=100000000"),
        ("--vocab_size 100000000000", "vocab_size=100000000000"),
        ("--n_embd 1000000000000", "n_embd=1000000000000"),
    ],
)
def test_what_no_machine_holds(flags: str, named: str) -> None:
    message = refused(pretrain.main, *tiny_argv(*flags.split()))
    assert named in message
    assert "acorn estimate" in message or "too large for any memory" in message
    assert {path.name for path in Path.cwd().iterdir()} == {"text.txt"}


def test_what_fits_is_let_through(monkeypatch) -> None:
    recipe = load_recipe("pretrain", tiny_argv())
    args = recipe.training_arguments()
    costs.refuse_too_large(recipe, args)
    monkeypatch.setattr(costs, "memory_of", lambda device: 10_000)
    assert "0.0 GB" in refused(lambda argv: costs.refuse_too_large(recipe, args), "")


@pytest.mark.parametrize("name", ["nonsense", "flash_attention_2", "flex_attention", "paged|eager"])
def test_attention_that_is_not_here(name: str) -> None:
    if name.startswith("fl") and costs.torch.cuda.is_available():
        pytest.skip("it may be installed")
    message = refused(pretrain.main, *tiny_argv("--attn_implementation", name))
    assert "attn_implementation" in message and name in message
    assert not Path("corpora").exists()
