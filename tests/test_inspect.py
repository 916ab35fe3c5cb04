"""`acorn inspect`: what it says of a prompt is what the model does, for every variant, stock GPT-2 and adapters."""

import base64
import json
import re
import subprocess

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from PIL import Image

import acorn
from inference.measuring.attention import look_into, name_head, name_heads, patterns, shown
from inference.measuring.position_tables import no_positions, position_tables
from training.data.tokenizers import build_tokenizer

from .browser import CHROMIUM
from .tiny_bases import our_model, save, stock_model
from .tiny_runs import refused
from .variants import VARIANTS, WITHOUT_KEYS, random_model, tiny_config

PROMPT = "the fox, the dog; the fox, the"
VIRTUAL = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer("byte")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Bases of both formats, and a LoRA adapter and a prompt on one of them."""
    place = tmp_path_factory.mktemp("inspect")
    save(stock_model(), place / "gpt2")
    save(our_model(position_encoding="none"), place / "gpt")
    for name, config in (("lora", LoraConfig(task_type="CAUSAL_LM")), ("prompt", PromptTuningConfig(**VIRTUAL))):
        adapted = get_peft_model(stock_model(), config)
        adapted.peft_config["default"].base_model_name_or_path = str(place / "gpt2")
        adapted.save_pretrained(place / name)
    return place


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_looked_into(name: str, tokenizer, ids) -> None:
    model = random_model(tiny_config(**VARIANTS[name]))
    expected = model(ids[:1]).logits[0].softmax(-1)
    look = look_into(model, tokenizer, ids[:1], 4)
    assert len(look.attention) == (0 if name in WITHOUT_KEYS else model.config.num_hidden_layers)
    for layer, weights in enumerate(look.attention):
        assert weights.shape == (model.config.num_attention_heads, 16, 16)
        assert weights.sum(-1) == pytest.approx(torch.ones(weights.shape[:2]), abs=1e-5)
        assert weights.triu(1).abs().max() == 0
        if model.config.layer_types[layer] == "sliding_attention":
            assert weights.tril(-model.config.sliding_window).abs().max() == 0
    for place, row in enumerate(look.expected):
        found = [probability for _, probability in row]
        assert found == pytest.approx(expected[place].topk(4).values.tolist(), rel=1e-4, abs=1e-6)
    following = expected[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()
    assert look.probabilities == pytest.approx(following, rel=1e-4, abs=1e-6)
    if look.attention:
        assert len(name_heads(look, [0])) == model.config.num_attention_heads
    tables = position_tables(model)
    kind = model.config.position_encoding
    assert len(tables) == {"none": 0, "rope": len(model.config.rope_layer_types()) or 1}.get(kind, 1)
    for table in tables:
        assert table.values.shape[1] == len(table.similarity) == model.config.max_position_embeddings
        assert table.similarity[0] == pytest.approx(1.0, abs=1e-5) and table.values.abs().max() <= 1 + 1e-5
    assert "has no positions" in no_positions(random_model(tiny_config(position_encoding="none")))


@pytest.mark.parametrize(
    ("config", "virtual"),
    [(LoraConfig(task_type="CAUSAL_LM"), 0), (PromptTuningConfig(**VIRTUAL), 3), (PrefixTuningConfig(**VIRTUAL), 3)],
    ids=["lora", "prompt", "prefix"],
)
def test_an_adapter_is_looked_into_with_its_virtual_tokens(config, virtual: int, tokenizer) -> None:
    torch.manual_seed(0)
    model = get_peft_model(stock_model(), config).eval()
    ids = torch.tensor([list(PROMPT.encode())])
    look = look_into(model, tokenizer, ids, 3)
    with torch.no_grad():
        expected = model(ids).logits[0, -ids.shape[1] :].softmax(-1)
    assert look.virtual == virtual
    assert [tuple(weights.shape) for weights in look.attention] == [(2, len(PROMPT), len(PROMPT) + virtual)] * 2
    assert [row[0].probability for row in look.expected] == pytest.approx(expected.max(-1).values.tolist(), rel=1e-4)
    assert len(position_tables(model)) == 1


def test_heads_are_named_by_what_they_look_at() -> None:
    ids = torch.tensor([1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4])
    places, count = patterns(ids), len(ids)
    after = torch.zeros(count, count)
    for query in range(count):
        after[query, query - 3 if query >= 4 else query] = 1.0
    same = torch.zeros(count, count)
    for query in range(count):
        same[query, query - 4 if query >= 4 else query] = 1.0
    first = torch.zeros(count, count)
    first[:, 0] = 1.0
    previous = torch.eye(count).roll(1, 0)
    previous[0] = torch.eye(count)[0]
    drawn = {
        "previous token": previous, "itself": torch.eye(count), "first token": first, "after a repeat": after,
        "same token": same,
    }  # fmt: skip
    for pattern, weights in drawn.items():
        assert name_head(weights, places)[0] == pattern
        assert name_head(weights, places)[1] == pytest.approx(1.0, abs=0.01)
    even = torch.ones(count, count).tril()
    assert name_head(even / even.sum(1, keepdim=True), places) == ("", 0.0)
    window = even - even.tril(-4)
    assert name_head(window / window.sum(1, keepdim=True), places)[0] == "last 4 tokens"
    assert name_head(window / window.sum(1, keepdim=True), places, 4) == ("", 0.0)  # it sees no more
    assert patterns(torch.tensor([1])) == {}


def test_tokens_are_shown_whole(tokenizer) -> None:
    assert [shown(tokenizer, token) for token in b" \n\ta\x07"] == ["␣", "↵", "→", "a", "‹7›"]
    assert shown(tokenizer, 0xC3) == "‹c3›"
    assert shown(tokenizer, 256) == "<|endoftext|>"


@pytest.mark.parametrize("name", ["gpt2", "gpt", "lora", "prompt"])
def test_the_picture_and_the_page(folder, monkeypatch, capsys, name: str) -> None:
    monkeypatch.chdir(folder)
    acorn.call_verb(["inspect", name, "--prompt", PROMPT + "</script>$x^2$", "--output", f"{name}.html"])
    printed = capsys.readouterr().out
    assert printed.startswith("after '$': ") and f"{name}.html" in printed
    page = (folder / f"{name}.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|src=|href=", page.partition("<body>")[0] + page.partition('id="data"')[2][:100])
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)[1])
    assert data["tokens"] == [shown(build_tokenizer("byte"), token) for token in (PROMPT + "</script>$x^2$").encode()]
    queries, virtual = len(data["tokens"]), data["virtual"]
    assert virtual == (3 if name == "prompt" else 0)
    assert len(data["maps"]) == len(data["heads"]) == (8 if name == "gpt" else 4)
    for text in data["maps"]:
        rows = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8).view(queries, queries + virtual)
        assert rows.sum(1).tolist() == pytest.approx([255] * queries, abs=queries)
    assert ("words" in data["positions"]) == (name == "gpt")


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here: apt-get install chromium")
def test_a_browser_runs_the_page(folder, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    acorn.call_verb(["inspect", "prompt", "--prompt", PROMPT + "</script>\n", "--output", str(tmp_path / "page.html")])
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "page.html").as_uri()]
    page = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert page.count("<canvas") == 4 + 1 and 'alt="the positions' in page
    assert "After ↵" in page and page.count('<td class="bar">') == 5
    assert "<title>prompt: 40 tokens</title>" in page


def test_one_picture(folder, monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    acorn.call_verb(["inspect", "gpt2", "--prompt", PROMPT + " é 猫 $x^2$", "--layers", "1", "1"])
    with Image.open(folder / "inspect.png") as picture:
        assert picture.size[0] > 1000 and picture.size[1] > 800
        assert len(picture.convert("RGB").getcolors(2**24)) > 100
    assert "layer 0" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ([], "--prompt"),
        (["--prompt", "a", "--output", "there/look.png"], "--output=there/look.png: there is no directory"),
        (["--prompt", "a", "--output", "look.jpg"], "--output=look.jpg: must end in .png or .html"),
        (["--prompt", "a", "--output", "folder.png"], "is a directory"),
        (["--prompt", "a" * 65], "prompt: 65 tokens do not fit the model's context of 64"),
        (["--prompt", "FILE:nowhere.txt"], "--prompt FILE:nowhere.txt: No such file"),
        (["--prompt", "a", "--layers", "2"], "layers=2: the model has 2 layers"),
        (["--prompt", "a", "--layers", "-1"], "layers=-1"),
        (["--prompt", "a", "--top_k", "0"], "top_k=0: must be a whole number from 1 to 20"),
        (["--prompt", "a", "--top_k", "900"], "top_k=900"),
        (["--prompt", "a", "--ouput", "x.png"], "did you mean '--output'"),
    ],
)
def test_what_is_refused(folder, monkeypatch, argv: list[str], named: str) -> None:
    monkeypatch.chdir(folder)
    (folder / "folder.png").mkdir(exist_ok=True)
    assert named in refused(acorn.call_verb, "inspect", "gpt2", *argv)
