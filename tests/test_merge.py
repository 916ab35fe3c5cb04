"""`acorn merge` writes a plain model with the adapter's logits, and refuses what it cannot merge."""

import contextlib
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import save as save_tensors
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune import finetune, merge
from inference import generate
from training.model.loading import load_model_and_tokenizer

from .chat_fixture import chat_text
from .foreign import Trap
from .tiny_bases import BASES, TINY, save
from .tiny_runs import latest, refused, write_text

CHAT = ["--text_files", "chat.txt"]
MERGED = ["lora", "rslora", "dora", "pissa", "loraplus", "ia3"]
IDS = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A place with tiny bases and a chat."""
    place = tmp_path_factory.mktemp("merge")
    for name, build in BASES.items():
        save(build(), place / name)
    write_text(place, chat_text(), "chat.txt")
    return place


def tuned(folder: Path, adapter: str, base: str = "gpt2", *flags: str) -> Path:
    """A short run with this adapter, made once."""
    name = "-".join([base, adapter, *flags]).replace("--", "")
    if not (folder / name).exists():
        with contextlib.chdir(folder):
            argv = [base, *CHAT, *TINY, "--adapter", adapter, "--max_steps", "3", *flags, "--output_dir", name]
            finetune.main(latest(*argv))
    return folder / name


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits.float()


@pytest.mark.parametrize("adapter", MERGED)
def test_merged_is_unmerged(folder, adapter: str, tmp_path, capsys) -> None:
    run = tuned(folder, adapter)
    capsys.readouterr()
    merge.main([str(run), str(tmp_path / "out")])
    printed = float(re.search(r"random ids: (\S+)", capsys.readouterr().out)[1])
    expected = logits(load_model_and_tokenizer(str(run))[0])
    assert printed <= 1e-6 * max(1.0, expected.abs().max().item()) + 1e-5
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(plain).__name__ == "GPT2LMHeadModel"
    torch.testing.assert_close(logits(plain), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(AutoModelForCausalLM.from_pretrained(folder / "gpt2")), expected, atol=1e-3)


@pytest.mark.parametrize("base", [name for name in BASES if name != "gpt2"])
def test_our_models_merge_too(folder, base: str, tmp_path) -> None:
    run = tuned(folder, "lora", base)
    merge.main([str(run), str(tmp_path / "out")])
    expected = logits(load_model_and_tokenizer(str(run))[0])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    torch.testing.assert_close(logits(plain), expected, atol=1e-5, rtol=1e-5)
    assert (tmp_path / "out" / "modeling_gpt.py").is_file(), "the code travels along"


@pytest.mark.parametrize("module", ["lm_head", "wte"])
@pytest.mark.parametrize("how", ["--modules_to_save"])
def test_tied_embeddings(folder, how: str, module: str, tmp_path) -> None:
    """Whichever of the two is trained whole, the merged model is the adapted one."""
    run = tuned(folder, "lora", "gpt2", how, module)
    merge.main([str(run), str(tmp_path / "out")])
    expected = logits(load_model_and_tokenizer(str(run))[0])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)
    assert merged.config.tie_word_embeddings


def others_adapter(folder: Path, base: str = "gpt2", **settings) -> Path:
    """An adapter that PEFT made without us, its weights made up."""
    model = BASES[base]()
    config = LoraConfig(task_type="CAUSAL_LM", r=4, fan_in_fan_out=base == "gpt2", **settings)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))
    adapted.peft_config["default"].base_model_name_or_path = str(folder / base)
    adapted.save_pretrained(folder / "others")
    return folder / "others"


@pytest.mark.parametrize("module", ["lm_head", "wte"])
@pytest.mark.filterwarnings("ignore")
def test_others_low_rank_changes_of_half_a_tied_pair_are_merged(folder, module: str, tmp_path) -> None:
    """PEFT merges them into the one tensor of both; the model that was trained has two."""
    save(BASES["gpt2"](), tmp_path / "gpt2")
    adapter = others_adapter(tmp_path, target_modules=["c_attn", module])
    expected = logits(AutoPeftModelForCausalLM.from_pretrained(adapter))
    merge.main([str(adapter), str(tmp_path / "out")])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-4)
    assert not merged.config.tie_word_embeddings


@pytest.mark.parametrize("rows", [260, 320], ids=["added", "padded"])
@pytest.mark.parametrize("base", ["gpt2", "gpt"])
@pytest.mark.filterwarnings("ignore")
def test_others_adapters_with_added_tokens(base: str, rows: int, tmp_path) -> None:
    """What AutoPeft loads, and what it does not where the rows were padded, we load and merge."""
    save(BASES[base](), tmp_path / base)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / base)
    tokenizer.add_tokens(["<one>", "<two>", "<three>"])
    model = BASES[base]()
    model.resize_token_embeddings(rows)
    names = ["c_attn"] if base == "gpt2" else ["q_proj"]
    config = LoraConfig(task_type="CAUSAL_LM", r=4, fan_in_fan_out=base == "gpt2", target_modules=names)
    adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / base)
    adapted.save_pretrained(tmp_path / "others", save_embedding_layers=True)
    tokenizer.save_pretrained(tmp_path / "others")
    expected = logits(adapted)
    loaded, known = load_model_and_tokenizer(str(tmp_path / "others"))
    assert len(known) == 260
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-5)
    merge.main([str(tmp_path / "others"), str(tmp_path / "out")])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)
    assert merged.config.vocab_size == rows


@pytest.mark.filterwarnings("ignore")
def test_what_peft_itself_cannot_run_is_one_line(tmp_path) -> None:
    save(BASES["gpt2"](), tmp_path / "gpt2")
    adapter = others_adapter(tmp_path, target_modules=["c_attn"], init_lora_weights="olora")  # wrong for a Conv1D
    assert "PEFT cannot merge this adapter" in refused(merge.main, str(adapter), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["hostile", "cut off", "empty", "of no tensors"])
def test_damaged_or_hostile_weights_are_one_line_and_nothing_runs(folder, kind: str, tmp_path) -> None:
    shutil.copytree(tuned(folder, "lora"), tmp_path / "run")
    path = tmp_path / "run" / "adapter_model.safetensors"
    raw = path.read_bytes()
    others = {"cut off": raw[: len(raw) // 2], "empty": b"", "of no tensors": save_tensors({})}
    path.write_bytes(others.get(kind, raw))
    if kind == "hostile":
        path.unlink()
        torch.save({"weight": Trap(tmp_path / "trap")}, path.with_suffix(".bin"))
    message = refused(merge.main, str(tmp_path / "run"), str(tmp_path / "out"))
    assert str(tmp_path / "run") in message
    assert ("holds code" in message) == (kind == "hostile")
    assert not (tmp_path / "trap").exists()
    assert not (tmp_path / "out").exists()


def test_half_precision_and_the_chat_template_are_kept(folder, tmp_path) -> None:
    merge.main([str(tuned(folder, "lora")), str(tmp_path / "out"), "--dtype", "bfloat16"])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    assert "generation" in AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert "acorn" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_generate_takes_an_adapter_as_it_is_and_merged(folder, tmp_path, capsys) -> None:
    run = tuned(folder, "lora")
    merge.main([str(run), str(tmp_path / "out")])
    texts = []
    for directory in (run, tmp_path / "out"):
        capsys.readouterr()
        generate.main([str(directory), "--prompt", "User: What", "--max_new_tokens", "30", "--temperature", "0"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("User: What")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["gpt2", "out"], "holds a plain model already"),
        (["nowhere", "out"], "there is no such directory"),
        (["LORA", "gpt2"], "is not empty"),
        (["LORA", "chat.txt"], "is not empty"),
        (["PROMPT", "out"], "nothing to merge"),
        (["LORA", "out", "--dtype", "int8"], "choose float32"),
        (["LORA"], "required: out"),
        (["HOMELESS", "out"], "is gone"),
    ],
)
def test_what_cannot_be_merged_is_refused(folder, monkeypatch, argv: list[str], words: str) -> None:
    runs = {"LORA": str(tuned(folder, "lora")), "PROMPT": str(tuned(folder, "prompt")), "HOMELESS": "homeless"}
    monkeypatch.chdir(folder)
    if "HOMELESS" in argv and not Path("homeless").exists():
        shutil.copytree(runs["LORA"], "homeless")
        config = Path("homeless/adapter_config.json")
        config.write_text(config.read_text().replace(str(folder / "gpt2"), "/no/such/base"))
    assert words in refused(merge.main, *(runs.get(word, word) for word in argv))
    assert not Path("out").exists()
    assert not list(Path().glob(".out-*"))
