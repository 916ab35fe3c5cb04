"""What the tests share: no network, one thread, fixed seeds, and a model that is built in milliseconds."""

import atexit
import os
import shlex
import shutil
import tempfile
from pathlib import Path

# Read by transformers and tokenizers when they are imported, so set before anything else.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Code of saved models is copied here when it is loaded: one folder a process, so that parallel workers do not collide.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="acorn-tests-")
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)

import pytest  # noqa: E402
import torch  # noqa: E402

from training.system import errors  # noqa: E402

from . import variants  # noqa: E402

torch.set_num_threads(1)  # the models are too small to share out, and pytest-xdist fills the cores


# Marks of transformers' own tests, which test_conformance.py runs.
THEIR_MARKS = "accelerate_tests flash_attn_test flash_attn_3_test flash_attn_4_test torch_compile_test".split()


def pytest_configure(config) -> None:
    for mark in THEIR_MARKS:
        config.addinivalue_line("markers", mark)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Make every test draw the same numbers, and say the same, whatever ran before it."""
    torch.manual_seed(1337)
    errors.log_once.cache_clear()


@pytest.fixture
def tiny_config():
    """The factory `tiny_config(**overrides) -> GPTConfig`: 2 layers of 4 heads, 32 wide, 61 tokens, context 32."""
    return variants.tiny_config


@pytest.fixture
def tiny_model():
    """The factory `tiny_model(**overrides) -> GPTForCausalLM` in eval mode, all of its parameters random."""
    return lambda **overrides: variants.random_model(variants.tiny_config(**overrides))


@pytest.fixture
def ids() -> torch.Tensor:
    """Random token ids, (3, 16), the same in every test."""
    return torch.randint(variants.TINY["vocab_size"], (3, 16), generator=torch.Generator().manual_seed(42))


@pytest.fixture(scope="session")
def grown(tmp_path_factory) -> Path:
    """The directory of a run that has learned a little: rotary positions, a context of 64 bytes."""
    from .tiny_runs import grow

    flags = shlex.split("--tokenizer byte --position_encoding rope --block_size 64 --max_steps 60 --eval_steps 60")
    return grow(tmp_path_factory.mktemp("grown"), *flags)


@pytest.fixture
def hub(monkeypatch):
    """A Hub on loopback (tests/hub_server.py) that this process talks to; the tests' offline mode is lifted for it."""
    from huggingface_hub import constants

    from .hub_server import HubServer

    server = HubServer()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "mine")
    yield server
    server.stop()


@pytest.fixture
def no_token(monkeypatch, tmp_path) -> None:
    """Nobody is logged in to the Hub."""
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
