"""transformers' own chat and server: the one talks to `acorn serve`, the other cannot load a class that it has not."""

import pytest

from .client_runs import run_client
from .test_serve import Served, directory  # noqa: F401 (a fixture)

pytestmark = pytest.mark.clients


def test_transformers_chat_talks_to_acorn_serve(directory, tmp_path) -> None:  # noqa: F811
    served = Served(directory)
    try:
        facts = run_client("chat_with", "tiny", f"http://127.0.0.1:{served.port}/v1", cwd=tmp_path)
    finally:
        served.stop()
    assert facts["status"] == 0, facts["errors"]
    assert facts["said"].count("<tiny>:") == 2


@pytest.mark.slow
def test_transformers_serve_cannot_load_our_class(grown, tmp_path) -> None:
    facts = run_client("their_server", grown, cwd=tmp_path)
    assert facts["status"] == 500
    assert "module transformers has no attribute GPTForCausalLM" in facts["errors"]
