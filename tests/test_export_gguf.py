"""`acorn export --format gguf`, read back by the gguf package, and by transformers where it knows the architecture."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from inference import export
from inference.formats.gguf import choose, write_gguf
from modeling import GPTConfig
from training.config.presets import PRESETS
from training.data.tokenizers import build_entries, build_tokenizer
from training.system.errors import UserError, explain

from .foreign import CHARACTERS, nanogpt_of, stock_gpt2, write_checkpoint, write_meta
from .gguf_cases import CASES, RULES, SWIGLU, model_of, split_otherwise, tokenizer_of
from .tiny_runs import refused
from .variants import VARIANTS, _rope, random_model, tiny_config

ROOT = Path(__file__).parent.parent
TEXT = "the quick brown fox: 12 jumps, naïve 漢字 😀 over\n\tthe lazy dogs\r\n  and  the quick brown foxes' dens\n" * 9


def written(path, model, tokenizer, outtype: str = "f32") -> gguf.GGUFReader:
    """What the gguf package reads of the model in a file."""
    write_gguf(model, tokenizer, path, outtype, "mine")
    return gguf.GGUFReader(path)


def value(reader: gguf.GGUFReader, key: str):
    """The value of a key; None where there is no such key."""
    found = reader.get_field(key)
    return None if found is None else found.contents()


def matrices(reader: gguf.GGUFReader) -> dict[str, torch.Tensor]:
    """Name and value of each tensor, in float32."""
    return {
        tensor.name: torch.tensor(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
        for tensor in reader.tensors
    }


@pytest.fixture
def run(tmp_path, capsys):
    """`run(*flags, tokenizer=…, **config) -> what was printed` for a tiny model saved at tmp_path / "model"."""

    def call(*flags: str, tokenizer="byte", **fields) -> str:
        entries = build_tokenizer(tokenizer, lambda: iter([TEXT]), 300 if tokenizer == "bpe" else None)
        model = random_model(tiny_config(vocab_size=len(entries), eos_token_id=entries.eos_token_id, **fields))
        model.save_pretrained(tmp_path / "model")
        entries.save_pretrained(tmp_path / "model")
        export.main([str(tmp_path / "model"), str(tmp_path / "made.gguf"), "--format", "gguf", *flags])
        return capsys.readouterr().out

    return call


# which architecture


@pytest.mark.parametrize("name", CASES)
def test_what_llama_cpp_holds(name: str) -> None:
    architecture, fields = CASES[name]
    assert choose("mine", tiny_config(**fields)).name == architecture


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in CASES])
def test_what_it_cannot_hold_is_named(name: str) -> None:
    config = tiny_config(**VARIANTS[name])
    with pytest.raises(UserError, match=r"llama\.cpp has no architecture for it: the nearest") as refusal:
        choose("mine", config)
    named = str(refusal.value).partition("cannot hold ")[2].split("; ")
    assert named
    assert all(f"={getattr(config, field.partition('=')[0])!r} (" in field for field in named)


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("logit_softcap=2.0", {"logit_softcap": 2.0}),
        ("embedding_norm=True", {"embedding_norm": True}),
        ("lm_head_bias=True", {"lm_head_bias": True}),
        ("norm_order='post'", {"norm_order": "post"}),
        ("hidden_act='relu'", {"hidden_act": "relu"}),
        ("kv_sharing_modes=['store', 'reuse']", {"kv_sharing_modes": ["store", "reuse"]}),
        ("sliding_window=5", {"sliding_window": 5}),
        ("qk_norm=True", {**SWIGLU, "qk_norm": True}),
        ("'dynamic'", {**SWIGLU, **VARIANTS["rope_dynamic"]}),
        ("'attention_factor'", {**SWIGLU, **_rope("yarn", factor=4.0, attention_factor=1.5)}),
        ("'sliding_attention'", {**SWIGLU, **VARIANTS["rope_by_layer"], "sliding_window": 64}),
    ],
)
def test_a_refusal_names_the_one_field(field: str, fields: dict) -> None:
    with pytest.raises(UserError) as refusal:
        choose("mine", tiny_config(**fields))
    assert field in str(refusal.value)
    assert ";" not in str(refusal.value)


# what is in the file


def test_numbers_and_tensors(tmp_path) -> None:
    model = model_of({**SWIGLU, "bias": False, "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 48})
    reader = written(tmp_path / "made.gguf", model, tokenizer_of(61))
    numbers = {key: value(reader, f"llama.{key}") for key in ("block_count", "context_length", "feed_forward_length")}
    assert numbers == {"block_count": 2, "context_length": 48, "feed_forward_length": 128}
    heads = [value(reader, f"llama.attention.{key}") for key in ("head_count", "head_count_kv", "key_length")]
    assert heads == [4, 2, 12]
    assert value(reader, "general.architecture") == "llama"
    assert value(reader, "llama.attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)
    found, ours = matrices(reader), dict(model.named_parameters())
    assert torch.equal(found["token_embd.weight"], ours["model.embed_tokens.weight"])
    assert torch.equal(found["blk.1.ffn_down.weight"], ours["model.layers.1.mlp.down_proj.weight"])
    assert torch.equal(found["blk.0.attn_v.weight"], ours["model.layers.0.self_attn.v_proj.weight"])
    assert "output.weight" not in found  # the head is the embedding
    query = ours["model.layers.0.self_attn.q_proj.weight"].unflatten(0, (4, 2, 6))
    pairs = found["blk.0.attn_q.weight"].unflatten(0, (4, 6, 2))
    assert torch.equal(pairs[:, :, 0], query[:, 0])
    assert torch.equal(pairs[:, :, 1], query[:, 1])


@pytest.mark.parametrize(("outtype", "error"), [("f16", 5e-4), ("q8_0", 5e-3)])
def test_types(outtype: str, error: float, tmp_path) -> None:
    model, tokenizer = model_of(VARIANTS["modern"]), tokenizer_of(61)
    reader = written(tmp_path / f"{outtype}.gguf", model, tokenizer, outtype)
    exact = matrices(written(tmp_path / "f32.gguf", model, tokenizer))
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["blk.0.ffn_down.weight"] == outtype.upper()
    assert types["blk.0.attn_norm.weight"] == "F32"
    for name, tensor in matrices(reader).items():
        assert (tensor - exact[name]).abs().max() <= error * exact[name].abs().max(), name


def test_rows_that_no_block_divides_are_f16(tmp_path) -> None:
    reader = written(tmp_path / "made.gguf", model_of({"intermediate_size": 37}), tokenizer_of(61), "q8_0")
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert (types["blk.0.ffn_down.weight"], types["blk.0.ffn_up.weight"]) == ("F16", "Q8_0")
    assert types["position_embd.weight"] == "F32"


READ_BY_TRANSFORMERS = {  # by what its own reader makes of them: biases and rotary parameters it drops
    "gpt2": {"max_position_embeddings": 1024},
    "gpt2_no_bias": {"max_position_embeddings": 1024, "bias": False, "norm_gain": False},
    "gpt2_sinusoidal": {"max_position_embeddings": 1024, "position_encoding": "sinusoidal"},
    "llama": {**SWIGLU, "bias": False},
    "llama_grouped": {**SWIGLU, "bias": False, "num_key_value_heads": 2, "tie_word_embeddings": False},
    "llama_embedding_norm": {**SWIGLU, "bias": False, "embedding_norm": True, "norm_gain": False},
    "qwen3": {**SWIGLU, "bias": False, "qk_norm": True, "head_dim": 128, "num_key_value_heads": 2},
    "starcoder2": {"position_encoding": "rope", "num_key_value_heads": 2},
}


@pytest.mark.parametrize("name", READ_BY_TRANSFORMERS)
@torch.no_grad()
def test_transformers_reads_the_same_model(name: str, ids, tmp_path) -> None:
    model = model_of(READ_BY_TRANSFORMERS[name])
    write_gguf(model, tokenizer_of(61), tmp_path / "made.gguf", "f32", "mine")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="made.gguf", dtype=torch.float32).eval()
    assert type(theirs).__module__.startswith("transformers.")
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


# tokenizers


@pytest.mark.parametrize("kind", ["bpe", "byte"])
def test_transformers_reads_the_same_tokenizer(kind: str, tmp_path) -> None:
    ours = build_tokenizer(kind, lambda: iter([TEXT]), 300 if kind == "bpe" else None)
    reader = written(tmp_path / "made.gguf", model_of({**SWIGLU, "vocab_size": len(ours) + 3}), ours)
    tokens, types = value(reader, "tokenizer.ggml.tokens"), value(reader, "tokenizer.ggml.token_type")
    assert tokens[: len(ours)] == ours.convert_ids_to_tokens(range(len(ours)))
    assert types == [1] * (len(ours) - 1) + [3] + [5] * 3  # normal, control, unused
    assert value(reader, "tokenizer.ggml.eos_token_id") == ours.eos_token_id
    assert (value(reader, "tokenizer.ggml.model"), value(reader, "tokenizer.ggml.add_bos_token")) == ("gpt2", False)
    if kind == "bpe":
        theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="made.gguf")
        assert theirs(TEXT, add_special_tokens=False)["input_ids"] == ours(TEXT)["input_ids"]


def test_characters_are_merged_from_their_bytes(tmp_path) -> None:
    ours = build_tokenizer("char", lambda: iter(["aé漢😀 \n"]))
    reader = written(tmp_path / "made.gguf", model_of({"vocab_size": len(ours)}), ours)
    assert value(reader, "tokenizer.ggml.tokens") == ["Ċ", "Ġ", "a", "Ã©", "æ¼¢", "ðŁĺĢ", "<|endoftext|>"]
    merges = value(reader, "tokenizer.ggml.merges")
    assert merges == ["Ã ©", "æ ¼", "æ¼ ¢", "ð Ł", "ðŁ ĺ", "ðŁĺ Ģ"]


def test_chat_template_and_several_ends(tmp_path) -> None:
    ours, model = tokenizer_of(61), model_of({})
    ours.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    model.generation_config.eos_token_id = [60, 5]
    reader = written(tmp_path / "made.gguf", model, ours)
    assert value(reader, "tokenizer.chat_template") == ours.chat_template
    assert [value(reader, f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "bos")] == [60, 5, 60]


# the verb


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_what_to_type_next(tokenizer: str, run, tmp_path) -> None:
    printed = run("--outtype", "q8_0", tokenizer=tokenizer, hidden_act="gelu")
    assert f"llama-completion -m {tmp_path / 'made.gguf'}" in printed
    assert "ollama create made" in printed
    assert "tanh approximation" in printed
    assert value(gguf.GGUFReader(tmp_path / "made.gguf"), "general.name") == "model"


def test_other_formats_go_through_ours(tmp_path, capsys) -> None:
    """nanoGPT's characters have no end of text, and llama.cpp none that would mean nothing."""
    stock = stock_gpt2(activation_function="gelu", vocab_size=len(CHARACTERS))
    stock.save_pretrained(tmp_path / "stock")
    write_meta(write_checkpoint(tmp_path / "nano", nanogpt_of(stock)))
    for source in ("nano", "nano/ckpt.pt"):
        path = tmp_path / f"{len(source)}.gguf"
        export.main([str(tmp_path / source), str(path), "--format", "gguf"])
        reader = gguf.GGUFReader(path)
        assert value(reader, "general.architecture") == "gpt2"
        assert len(value(reader, "tokenizer.ggml.tokens")) == len(CHARACTERS)
        assert value(reader, "tokenizer.ggml.eos_token_id") is None
        assert f"entry 11, {CHARACTERS[11]!r}, and will stop there" in capsys.readouterr().out
    export.main(
        [str(tmp_path / "stock"), str(tmp_path / "x.gguf"), "--format", "gguf", "--tokenizer", str(chars(tmp_path))]
    )
    assert value(gguf.GGUFReader(tmp_path / "x.gguf"), "tokenizer.ggml.eos_token_id") == stock.config.eos_token_id


def chars(folder: Path) -> Path:
    """A directory with the tokenizer of CHARACTERS."""
    build_entries(CHARACTERS, has_end=False).save_pretrained(folder / "characters")
    return folder / "characters"


def test_an_unused_entry_ends_where_nothing_does(tmp_path) -> None:
    ours = build_entries(CHARACTERS, has_end=False)
    model = model_of({"vocab_size": len(CHARACTERS) + 3})
    lines = write_gguf(model, ours, tmp_path / "made.gguf", "f32", "mine")
    assert not any("end-of-text" in line for line in lines)
    assert value(gguf.GGUFReader(tmp_path / "made.gguf"), "tokenizer.ggml.eos_token_id") == len(CHARACTERS) + 2


def test_an_adapter_is_to_be_merged_first(tmp_path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    line = refused(export.main, str(tmp_path / "adapter"), str(tmp_path / "x.gguf"), "--format", "gguf")
    assert "acorn merge" in line


def test_refusals(run, tmp_path) -> None:
    run()
    model, made = str(tmp_path / "model"), tmp_path / "made.gguf"
    before = made.read_bytes()
    gguf_of = ("--format", "gguf")
    assert "already exists" in refused(export.main, model, str(made), *gguf_of)
    assert "ends in .gguf" in refused(export.main, model, str(tmp_path / "made"), *gguf_of)
    assert "needs DST" in refused(export.main, model, *gguf_of)
    assert "--outtype q8_0" in refused(export.main, model, "x", "--format", "gpt2", "--outtype", "q8_0")
    assert "no such file or directory" in refused(export.main, str(tmp_path / "none"), "x.gguf", *gguf_of)
    assert "File exists; choose another directory" in refused(export.main, model, str(made / "x.gguf"), *gguf_of)
    (tmp_path / "model/tokenizer.json").unlink()
    (tmp_path / "model/tokenizer_config.json").unlink()
    assert "has no tokenizer" in refused(export.main, model, str(tmp_path / "y.gguf"), *gguf_of)
    assert "has no tokenizer" in refused(export.main, model, str(tmp_path / "no/where/y.gguf"), *gguf_of)
    assert made.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"model", "made.gguf"}


@pytest.mark.parametrize(("number", "words"), [(float("nan"), "not finite"), (1e5, "take f32")])
def test_numbers_that_the_type_cannot_hold(number: float, words: str, tmp_path) -> None:
    model = model_of({})
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = number
    with pytest.raises(UserError, match=words):
        write_gguf(model, tokenizer_of(61), tmp_path / "made.gguf", "f16", "mine")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a disk that is always full")
def test_a_full_disk_is_told_as_one(tmp_path) -> None:
    with pytest.raises(OSError) as error, open("/dev/full", "wb") as disk:
        np.zeros(10**5).tofile(disk)  # as the gguf package writes
    assert explain(error.value)[0] == 1
    assert "the disk is full" in explain(error.value)[1]


def test_what_the_recipes_grow() -> None:
    held = {}
    for path in sorted((ROOT / "training/recipes").glob("*.yaml")):
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
        config = GPTConfig(**PRESETS.get(fields.pop("preset", None), {}) | fields)
        try:
            held[path.stem] = choose(path.stem, config).name
        except UserError as refusal:
            held[path.stem] = str(refusal).partition("cannot hold ")[2].partition("=")[0]
    assert held["quickstart"] == held["shakespeare-char-fast"] == "apertus"
    assert held["shakespeare-char"] == held["gpt2-openwebtext"] == "gpt2"
    assert {name: why for name, why in held.items() if why not in ("apertus", "gpt2")} == {
        "gpt2-one-gpu": "logit_softcap",
        "gpt2-openwebtext-latent": "kv_lora_rank",
        "gpt2-openwebtext-modern": "logit_softcap",
        "gpt2-openwebtext-small-state": "kv_sharing_modes",
        "linear-stdlib": "layer_types",
        "shakespeare-char-best": "bigram_vocab_size",
        "shakespeare-char-small-state": "kv_sharing_modes",
        "stdlib-int2-cache": "kv_quantization",
        "stdlib-latent": "kv_sharing_modes",
        "stdlib-small-state": "kv_sharing_modes",
        "stdlib-xl": "memory_length",
        "toygpt-small": "lm_head_bias",
    }


@pytest.mark.parametrize("rule", RULES)
def test_rules_that_llama_cpp_has_a_name_for(rule: str, tmp_path) -> None:
    ours = split_otherwise(rule, TEXT)
    reader = written(tmp_path / "made.gguf", model_of({"vocab_size": len(ours)}), ours)
    assert value(reader, "tokenizer.ggml.pre") == rule


def test_a_tokenizer_with_another_splitting_rule(tmp_path) -> None:
    ours = build_tokenizer("bpe", lambda: iter([TEXT]), 300)
    state = json.loads(ours.backend_tokenizer.to_str())
    state["normalizer"] = {"type": "NFC"}
    other = type(ours)(tokenizer_object=type(ours.backend_tokenizer).from_str(json.dumps(state)))
    with pytest.raises(UserError, match="gpt-2, llama-bpe, qwen2 of llama"):
        write_gguf(model_of({"vocab_size": 300}), other, tmp_path / "made.gguf", "f32", "mine")
