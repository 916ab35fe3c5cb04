"""A Space: what `acorn push --space` sends to a Hub on loopback, and that it runs where no Acorn is."""

import json
import os
import socket
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from inference import push
from inference.serving.listening import listen
from inference.serving.space import DOCUMENTS, GRADIO, PAGE
from modeling import GPTForCausalLM

from .chat_fixture import CHATML
from .hub_server import card_errors
from .test_hub_copy import WITHOUT_ACORN, tiny_tokenizer
from .tiny_runs import contents, grow, refused
from .variants import random_model, tiny_config

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return grow(tmp_path_factory.mktemp("space"))


@pytest.fixture
def base(tmp_path) -> Path:
    """A model of letters, which has a chat template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    random_model(tiny_config(vocab_size=len(tokenizer), eos_token_id=0)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapted(base: Path, config) -> str:
    get_peft_model(GPTForCausalLM.from_pretrained(base), config).save_pretrained(base.parent / "adapter")
    return str(base.parent / "adapter")


def test_a_dry_run_lists_a_space_and_sends_nothing(run, no_token, capsys) -> None:
    before = contents(run)
    push.main([str(run), "me/page", "--space", "--dry_run"])
    printed = capsys.readouterr().out
    up, stays = printed.split("goes up:\n")[1].split("stays:\n")
    for name in (
        "app.py",
        "requirements.txt",
        "README.md",
        "model/model.safetensors",
        *(f"playground/{n}" for n in PAGE),
    ):
        assert f"  {name} " in up
    for name in ("checkpoint-8/", "inputs.json", *(set(DOCUMENTS) - {"README.md"})):
        assert f"  {name} " in stays and name not in up
    assert "Space me/page" in printed and "sdk: gradio" in stays and "Nothing was uploaded" in stays
    assert contents(run) == before


def test_what_arrives(run, hub, capsys) -> None:
    push.main([str(run), "page", "--space", "--license", "mit"])
    assert f"{hub.address}/spaces/me/page\n" in capsys.readouterr().out
    assert list(hub.repos) == ["spaces/me/page"]
    arrived = hub.repos["spaces/me/page"].files()
    card = arrived["README.md"].decode()
    assert card_errors(card, is_space=True) == []
    settings = yaml.safe_load(card.split("---\n")[1])
    assert (settings["title"], settings["license"], settings["app_file"]) == ("page", "mit", "app.py")
    assert arrived["model/model.safetensors"] == (run / "model.safetensors").read_bytes()
    for name in PAGE:
        assert arrived[f"playground/{name}"] == (ROOT / "inference" / "serving" / name).read_bytes()
    assert not [name for name, content in arrived.items() if str(run.parent).encode() in content]


def test_a_model_and_a_space_of_one_name_are_two(run, hub) -> None:
    push.main([str(run), "me/gpt"])
    push.main([str(run), "me/gpt", "--space", "--private"])
    assert set(hub.repos) == {"me/gpt", "spaces/me/gpt"}
    assert (hub.repos["me/gpt"].private, hub.repos["spaces/me/gpt"].private) == (False, True)


def test_old_weights_leave_a_space(run, base, hub) -> None:
    push.main([str(run), "me/page", "--space"])
    random_model(tiny_config()).save_pretrained(base, max_shard_size="20KB")
    (base / "model.safetensors").unlink()
    push.main([str(base), "me/page", "--space"])
    arrived = set(hub.repos["spaces/me/page"].files())
    assert "model/model.safetensors" not in arrived and "model/model.safetensors.index.json" in arrived


def test_adapters(base, hub) -> None:
    adapter = adapted(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert "--base_model" in refused(push.main, adapter, "me/page", "--space")
    push.main([adapter, "me/page", "--space", "--base_model", "me/base"])
    arrived = {name: content.decode(errors="ignore") for name, content in hub.repos["spaces/me/page"].files().items()}
    assert json.loads(arrived["model/adapter_config.json"])["base_model_name_or_path"] == "me/base"
    app, needs, card = (arrived[name] for name in ("app.py", "requirements.txt", "README.md"))
    assert "AutoPeftModelForCausalLM" in app and "AutoTokenizer.from_pretrained('me/base')" in app
    assert "context=32" in app and "peft==" in needs and "- me/base" in card
    virtual = adapted(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert "PROMPT_TUNING" in refused(push.main, virtual, "me/page", "--space", "--base_model", "me/base")


def test_a_space_of_another(run, hub) -> None:
    assert "them/page belongs to someone else" in refused(push.main, str(run), "them/page", "--space")
    assert not hub.repos


@pytest.mark.clients
def test_the_space_is_of_the_gradio_that_was_tested() -> None:
    import gradio

    assert gradio.__version__ == GRADIO


def checked_out(hub, folder: Path) -> Path:
    """The Space's files in a folder, as the machine that runs it finds them."""
    for name, content in hub.repos["spaces/me/page"].files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@contextmanager
def running(folder: Path) -> Iterator[str]:
    """The address of the Space in `folder`, run as the Hub does, but in a process that can import no Acorn."""
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"GRADIO_SERVER_PORT": str(port), "HF_MODULES_CACHE": str(folder.parent / "modules")}
    app = "import runpy\nsys.path.insert(0, '.')\nrunpy.run_path('app.py', run_name='__main__')"
    command = [sys.executable, "-I", "-c", WITHOUT_ACORN + app]
    with (folder.parent / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        for _ in range(1200):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            assert process.poll() is None, (folder.parent / "log").read_text()[-3000:]
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.clients
@pytest.mark.slow
def test_the_space_runs_where_no_acorn_is(base, hub, tmp_path) -> None:
    """Pushed, run from what arrived, and asked, by a client of gradio's own; the text is the model's."""
    from gradio_client import Client

    push.main([str(base), "me/page", "--space"])
    folder = checked_out(hub, tmp_path / "space")
    settings = (5, 0, 0, 1, 1, 1)  # greedy
    with running(folder) as address:
        client = Client(address, verbose=False)
        html, said = client.predict("a b", *settings, api_name="/write")
        assert "5 tokens in" in said
        question, chat, said = client.predict("a b", "", *settings, api_name="/answer")
        assert question == "" and "turn user" in chat and " tokens in" in said
        assert "empty" in client.predict("", "", *settings, api_name="/answer")[-1]
        assert "33 tokens" in client.predict("a " * 33, *settings, api_name="/write")[-1]
    model, tokenizer = GPTForCausalLM.from_pretrained(base), tiny_tokenizer()
    ids = tokenizer("a b", return_tensors="pt")["input_ids"]
    grown = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, 2:].tolist()
    spans = ElementTree.fromstring(f"<p>{html}</p>")[2:]
    assert "".join(span.text or "" for span in spans).split() == tokenizer.decode(grown).split()


@pytest.mark.clients
@pytest.mark.slow
def test_the_space_of_an_adapter_takes_its_base_from_the_hub(base, hub, tmp_path, monkeypatch) -> None:
    from gradio_client import Client

    push.main([str(base), "me/base"])
    adapter = adapted(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False))
    push.main([adapter, "me/page", "--space", "--base_model", "me/base"])
    hub_of_the_space = {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    for name, value in (hub_of_the_space | {"HF_HUB_OFFLINE": "0"}).items():
        monkeypatch.setenv(name, value)
    with running(checked_out(hub, tmp_path / "space")) as address:
        html, said = Client(address, verbose=False).predict("a b", 5, 0, 0, 1, 1, 1, api_name="/write")
    assert " tokens in" in said and len(ElementTree.fromstring(f"<p>{html}</p>")) > 2
