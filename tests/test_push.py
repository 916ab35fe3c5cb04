"""Pushing over real HTTP, to a Hub on loopback: what goes up, what arrives, and each way that it can fail."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from inference import push
from modeling import GPTForCausalLM
from training.share.hub import finish_files, send
from training.share.uploads import resume_state, sort_files

from .hub_server import card_errors
from .test_hub_copy import run_without_acorn, tiny_tokenizer
from .tiny_runs import checkpoints, contents, grow, refused, write_text
from .variants import random_model, tiny_config

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = grow(tmp_path_factory.mktemp("push"))
    (folder / "notes.docx").write_bytes(b"not of the model")
    (folder / ".model.safetensors.1.tmp").write_bytes(b"half")
    shutil.copy(folder / "checkpoint-8" / "training_args.bin", folder)
    return folder


@pytest.fixture
def model_dir(tmp_path) -> Path:
    """A model in two shards with a tokenizer, and no run around it."""
    path = tmp_path / "model"
    tokenizer = tiny_tokenizer()
    random_model(tiny_config(vocab_size=len(tokenizer))).save_pretrained(path, max_shard_size="20KB")
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def adapter(tmp_path) -> Path:
    """A LoRA adapter whose base is a directory of this machine."""
    torch.manual_seed(3)
    base = tmp_path / "base"
    tokenizer = tiny_tokenizer()
    random_model(tiny_config(vocab_size=len(tokenizer))).save_pretrained(base)
    tokenizer.save_pretrained(base)
    config = LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(GPTForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


# what goes up


def test_a_dry_run_lists_everything_and_needs_no_network_and_no_token(run, no_token, capsys) -> None:
    before = contents(run)
    push.main([str(run), "me/gpt", "--dry_run"])
    up, stays = capsys.readouterr().out.split("goes up:\n")[1].split("stays:\n")
    for name in ("model.safetensors", "config.json", "modeling_gpt.py", "tokenizer.json", "README.md", "loss.png"):
        assert f"  {name} " in up
    for name in ("checkpoint-8/", "training_args.bin", ".model.safetensors.1.tmp", "notes.docx"):
        assert f"  {name} " in stays and name not in up
    listed = {line.split()[0].rstrip("/") for line in up.splitlines() + stays.splitlines() if line.startswith("  ")}
    assert {path.name for path in run.iterdir()} <= listed
    assert "Nothing was uploaded" in stays and "license: unknown" in stays and "--license" in stays
    assert contents(run) == before


def test_what_arrives_is_what_the_dry_run_lists(run, hub, capsys) -> None:
    push.main([str(run), "me/gpt", "--license", "mit"])
    assert f"{hub.address}/me/gpt\n" in capsys.readouterr().out
    repo = hub.repos["me/gpt"]
    assert repo.messages == ["initial commit", "Upload run with Acorn"]
    arrived = repo.files()
    assert set(arrived) - {".gitattributes"} == {upload.name for upload in sort_files(run)[0]}
    assert not [name for name in arrived if name.endswith((".pt", ".pth", ".bin", ".tmp")) or "checkpoint" in name]
    for name in set(arrived) - {".gitattributes", "README.md", "recipe.yaml"}:
        assert arrived[name] == (run / name).read_bytes(), name
    assert any(line.startswith("PUT /lfs/") for line in hub.log) and "POST /api/validate-yaml" in hub.log


def test_the_card_and_the_recipe_are_made_for_everyone(run, hub) -> None:
    before = contents(run)
    push.main([str(run), "me/gpt", "--license", "mit"])
    arrived = hub.repos["me/gpt"].files()
    card = arrived["README.md"].decode()
    assert card_errors(card) == []
    assert ModelCard(card).data.license == "mit"
    assert 'name = "me/gpt"' in card and "PATH-OR-ID" not in card
    assert "data_dir" in (run / "recipe.yaml").read_text()
    assert "data_dir" not in yaml.safe_load(arrived["recipe.yaml"])["data"]
    assert contents(run) == before


def test_what_merely_lies_there_stays(model_dir, hub, capsys) -> None:
    """Secrets under names that look like a model's, and links that lead out of the directory."""
    secret = model_dir.parent / "secret"
    secret.write_text("S3CRET")
    (model_dir / "chat_templates").mkdir()
    names = "config.py settings.py tokenizer_secret.json LICENSE_KEY.txt chat_templates/.env sample_of_me.txt id.png"
    names += " private.model vocab.env extra.safetensors model.gguf"
    for name in names.split():
        (model_dir / name).write_text("S3CRET")
    for name in ("LICENSE", "sample.txt", "vocab.txt", "metrics.jsonl"):
        (model_dir / name).symlink_to(secret)
    (model_dir / "additional_chat_templates").symlink_to(model_dir.parent)
    os.mkfifo(model_dir / "loss.png")
    (model_dir / "inside").write_text("mine")
    (model_dir / "NOTICE").symlink_to("inside")
    push.main([str(model_dir), "me/gpt"])
    arrived = hub.repos["me/gpt"].files()
    assert not any(b"S3CRET" in content for content in arrived.values())
    assert arrived["NOTICE"] == b"mine"
    assert {"modeling_gpt.py", "configuration_gpt.py", "attention.py", "tokenizer.json"} <= set(arrived)
    assert not {"config.py", "loss.png", "inside"} & set(arrived)
    push.main([str(model_dir), "me/gpt", "--dry_run"])
    assert capsys.readouterr().out.count("a link that leads outside") == 5


def test_weights_that_are_a_link_elsewhere_are_refused(model_dir, hub) -> None:
    shard = next(model_dir.glob("*-00001-of-*"))
    shard.rename(model_dir.parent / "away")
    shard.symlink_to(model_dir.parent / "away")
    assert "a link that leads outside" in refused(push.main, str(model_dir), "me/gpt")


def test_paths_of_this_machine_stay(tmp_path, hub) -> None:
    """In recipe, command, card, settings and the state of a checkpoint; a prompt that looks like a path is none."""
    shutil.copy(write_text(tmp_path), tmp_path / "my text.txt")
    flags = ["--text_files", str(tmp_path / "my text.txt"), "--prompt", "/* fox", "--tokenizer", "byte"]
    run = grow(tmp_path, *flags, "--output_dir", str(tmp_path / "run"))
    card = (run / "README.md").read_text()
    push.main([str(run), "me/gpt"])
    files = sort_files(run)[0]
    going = finish_files(run, files, card) + resume_state(run / "checkpoint-8", "last-checkpoint")
    sent = {file.name: file.content if isinstance(file.content, bytes) else file.content.read_bytes() for file in going}
    assert str(tmp_path) in card and str(tmp_path) in (run / "checkpoint-8" / "trainer_state.json").read_text()
    assert [name for name, content in sent.items() if str(tmp_path).encode() in content] == []
    recipe = yaml.safe_load(sent["recipe.yaml"])
    assert recipe["data"]["text_files"] == ["my text.txt"] and recipe["training"]["output_dir"] == "run"
    assert recipe["sample"]["prompt"] == "/* fox" and "--prompt '/* fox'" in recipe["command"]
    assert "--text_files 'my text.txt'" in sent["README.md"].decode()


def test_a_name_alone_goes_to_the_tokens_owner(model_dir, hub, capsys) -> None:
    push.main([str(model_dir), "gpt"])
    assert 'name = "me/gpt"' in hub.repos["me/gpt"].files()["README.md"].decode()
    assert "acorn generate me/gpt --trust_remote_code" in capsys.readouterr().out


def test_a_second_push_of_the_same_is_no_commit(model_dir, hub) -> None:
    for _ in range(2):
        push.main([str(model_dir), "me/gpt", "--commit_message", "once"])
    assert hub.repos["me/gpt"].messages == ["initial commit", "once"]


def test_private(model_dir, hub) -> None:
    push.main([str(model_dir), "me/secret", "--private"])
    assert hub.repos["me/secret"].private
    push.main([str(model_dir), "me/secret", "--private", "--license", "mit"])
    assert len(hub.repos["me/secret"].messages) == 3
    hub.add("me/public")
    assert "exists and is public" in refused(push.main, str(model_dir), "me/public", "--private")
    assert list(hub.repos["me/public"].files()) == [".gitattributes"]


def test_a_revision_is_a_branch_and_leaves_main_alone(run, hub) -> None:
    for step in checkpoints(run):
        push.main([str(run / f"checkpoint-{step}"), "me/gpt", "--revision", f"step-{step}"])
    repo = hub.repos["me/gpt"]
    assert list(repo.files()) == [".gitattributes"]
    for step in checkpoints(run):
        arrived = repo.files(f"step-{step}")
        assert arrived["model.safetensors"] == (run / f"checkpoint-{step}" / "model.safetensors").read_bytes()
        assert f"checkpoint-{step}" in arrived["README.md"].decode().split("\n# ")[1].splitlines()[0]
        assert not {"optimizer.pt", "trainer_state.json", "training_args.bin"} & set(arrived)


def test_old_weights_do_not_stay_beside_the_new(model_dir, run, hub) -> None:
    """A loader would find a single old file before new shards."""
    push.main([str(run), "me/gpt"])
    push.main([str(model_dir), "me/gpt"])
    arrived = hub.repos["me/gpt"].files()
    assert "model.safetensors" not in arrived and "loss.png" in arrived
    assert {path.name for path in model_dir.glob("*.safetensors")} <= set(arrived)


def test_an_adapter_goes_up_as_an_adapter(adapter, hub, capsys) -> None:
    line = refused(push.main, str(adapter), "me/adapter")
    assert "is a directory of this machine" in line and "--base_model" in line
    push.main([str(adapter), "me/adapter", "--base_model", "me/base"])
    arrived = hub.repos["me/adapter"].files()
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(arrived)
    assert json.loads(arrived["adapter_config.json"])["base_model_name_or_path"] == "me/base"
    card = ModelCard(arrived["README.md"].decode())
    assert (card.data.library_name, card.data.base_model) == ("peft", "me/base")
    assert "More Information Needed" not in card.text and str(adapter.parent) not in str(card)


# what arrives can be loaded by a stranger


LOAD = """
import io, json, torch
from contextlib import redirect_stdout
from pathlib import Path

torch.set_num_threads(1)
ids = torch.tensor(json.loads(sys.argv[1]))
logits, wrote = [], []
for code in sys.argv[2:]:
    found, said = {}, io.StringIO()
    with redirect_stdout(said):
        exec(code, found)
    with torch.no_grad():
        logits.append(found["model"].eval()(ids).logits.tolist())
    wrote.append(said.getvalue())
print(json.dumps({"logits": logits, "wrote": wrote}))
"""


def code_of_card(repo) -> str:
    """The Python with which the card that arrived says to load the model."""
    return repo.files()["README.md"].decode().split("```python\n")[1].split("```")[0]


@torch.no_grad()
def test_a_stranger_loads_what_arrived(run, adapter, hub, tmp_path, monkeypatch) -> None:
    """Pushed by the command in a process of its own; loaded, as the cards say, where no Acorn is and no cache."""
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "pusher")}
    command = [sys.executable, "-m", "acorn", "push", str(run), "me/gpt"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    push.main([str(adapter.parent / "base"), "me/base"])
    push.main([str(adapter), "me/adapter", "--base_model", "me/base"])

    ids = torch.randint(27, (2, 12))  # both vocabularies have as many
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "stranger"))
    codes = [code_of_card(hub.repos[name]) for name in ("me/gpt", "me/adapter")]
    found = run_without_acorn(LOAD, json.dumps(ids.tolist()), *codes, cwd=tmp_path)
    grown = AutoModelForCausalLM.from_pretrained(run, trust_remote_code=True)
    torch.testing.assert_close(torch.tensor(found["logits"][0]), grown(ids).logits, rtol=0, atol=0)
    base = GPTForCausalLM.from_pretrained(adapter.parent / "base")
    plain = base(ids).logits
    adapted = PeftModel.from_pretrained(base, adapter).eval()(ids).logits
    assert (adapted - plain).abs().max() > 1e-3
    torch.testing.assert_close(torch.tensor(found["logits"][1]), adapted, rtol=0, atol=0)
    assert all(len(text.strip()) > 4 for text in found["wrote"]), "each card's own code writes with its model"


# what keeps a push back: one line each


def test_no_token(model_dir, hub, no_token) -> None:
    line = refused(push.main, str(model_dir), "me/gpt")
    assert "hf auth login" in line and "HF_TOKEN" in line and "settings/tokens" in line
    assert not hub.log


def test_a_token_that_the_hub_does_not_know(model_dir, hub, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "stolen")
    assert "rejected the token (401)" in refused(push.main, str(model_dir), "me/gpt")


@pytest.mark.parametrize("is_there", [True, False])
def test_a_repository_of_another(model_dir, hub, is_there: bool) -> None:
    if is_there:
        hub.add("them/gpt")
    line = refused(push.main, str(model_dir), "them/gpt")
    assert "them/gpt belongs to someone else" in line and "403" in line
    assert not is_there or list(hub.repos["them/gpt"].files()) == [".gitattributes"]


def test_a_private_repository_of_another(model_dir, hub) -> None:
    hub.add("them/gpt", private=True)
    assert "them/gpt" in refused(push.main, str(model_dir), "them/gpt")
    assert list(hub.repos["them/gpt"].files()) == [".gitattributes"]


def test_a_hub_that_is_down(model_dir, hub) -> None:
    hub.stop()
    line = refused(push.main, str(model_dir), "me/gpt")
    assert f"{hub.address} cannot be reached" in line and "nothing is lost" in line


def test_offline(model_dir, hub, monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(push.main, str(model_dir), "me/gpt")


def test_a_card_that_the_hub_refuses(model_dir, hub) -> None:
    (model_dir / "README.md").write_text("---\nlanguage: [english]\n---\n# x\n")
    assert '"language" english' in refused(push.main, str(model_dir), "me/gpt")
    assert list(hub.repos["me/gpt"].files()) == [".gitattributes"]


def break_index(path: Path) -> None:
    next(path.glob("*-00001-of-*.safetensors")).unlink()


def pickle_weights(path: Path) -> None:
    for file in path.glob("model*.safetensors*"):
        file.unlink()
    torch.save({}, path / "pytorch_model.bin")


def leave_checkpoints(path: Path) -> None:
    (path / "config.json").unlink()
    (path / "checkpoint-4").mkdir()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (break_index, "model-00001-of-"),
        (pickle_weights, "pytorch_model.bin"),
        (leave_checkpoints, "checkpoint-4"),
        (lambda path: (path / "config.json").unlink(), "no config.json"),
        (lambda path: (path / "config.json").write_text("{"), "config.json is damaged"),
        (lambda path: (path / "modeling_gpt.py").unlink(), "modeling_gpt.py, which is not there"),
        (lambda path: next(path.glob("*-00001-of-*")).write_bytes(b"\1" * 99), "is damaged"),
        (lambda path: (path / "README.md").write_text("---\na: [\n---\n"), "README.md"),
        (shutil.rmtree, "is not a directory"),
    ],
    ids=["shard", "pickle", "checkpoints", "no-config", "config", "code", "weights", "card", "gone"],
)
def test_a_directory_that_nobody_could_load(model_dir, hub, spoil, words: str) -> None:
    spoil(model_dir)
    assert words in refused(push.main, str(model_dir), "me/gpt")
    assert not hub.log


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["me/you/gpt"], "REPO_ID 'me/you/gpt'"),
        (["me/gpt", "--license", "apache"], "did you mean 'apache-2.0'"),
        (["me/gpt", "--base_model", "./base"], "base_model='./base'"),
        (["me/gpt", "--privat"], "--privat"),
    ],
)
def test_flags_that_cannot_be(model_dir, hub, flags: list[str], words: str) -> None:
    assert words in refused(push.main, str(model_dir), *flags)
    assert not hub.log


def test_a_push_is_one_commit(hub, model_dir) -> None:
    """A reader never finds half of it."""
    files = sort_files(model_dir)[0]
    send(files, "me/gpt", "first")
    commits = list(hub.repos["me/gpt"].commits.values())
    assert [len(files) for files in commits] == [1, 1 + len(files)]
