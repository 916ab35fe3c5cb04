"""nanoGPT's checkpoints and their rotary sibling, in and out, against transformers and a model written out here."""

import os
import pickle

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from inference.formats import FORMATS
from inference.formats.base import open_source
from inference.formats.gpt2 import turned
from inference.formats.vocabulary import read_meta
from training.data.encoding import encode_documents
from training.data.tokenizers import build_tokenizer, tokenizer_kind
from training.system.errors import UserError

from .foreign import CHARACTERS, SHAPE, TEXT, RotaryReference, nanogpt_of, stock_gpt2, write_checkpoint, write_meta
from .variants import VARIANTS, random_model, tiny_config

NANOGPT, BYTE_ROPE = FORMATS["nanogpt"], FORMATS["byte-rope"]
HELD = {  # our variants that nanoGPT can hold, once they have its GELU
    "gpt2",
    "sinusoidal",
    "no_positions",
    "layer_norm_no_gain",
    "layer_norm_no_gain_no_bias",
    "embedding_range",
    "gelu",
    "one_head",
    "grouped_query",
    "multi_query",
    "no_bias",
    "normal_residual_init",
    "zero_residual_init",
    "one_layer",
}


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 0.05
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


def stock_of(checkpoint: dict) -> GPT2LMHeadModel:
    """transformers' GPT-2 with the weights of nanoGPT's checkpoint: the same function, written by others."""
    args = checkpoint["model_args"]
    sizes = {name: args[name] for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
    stock = GPT2LMHeadModel(GPT2Config(**sizes, n_positions=args["block_size"], activation_function="gelu")).eval()
    missing, extra = stock.load_state_dict(turned(checkpoint["model"]), strict=False)
    assert not extra
    assert all(name.endswith("bias") for name in missing)  # and those are zero when they are new
    assert args["bias"] != bool(missing)
    return stock


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.model."])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@torch.no_grad()
def test_in(bias: bool, prefix: str, tmp_path) -> None:
    stock = stock_gpt2(vocab_size=len(CHARACTERS), activation_function="gelu")
    checkpoint = nanogpt_of(stock, bias, prefix)
    source = open_source(str(write_checkpoint(tmp_path, checkpoint)))
    assert NANOGPT.recognises(source)
    loaded = NANOGPT.load(source)
    ours, ids = NANOGPT.to_acorn(loaded), torch.randint(len(CHARACTERS), (2, 24))
    close(ours(ids).logits, stock(ids).logits)
    close(NANOGPT.logits(loaded, ids), stock(ids).logits)
    config = ours.config
    assert (config.bias, config.tie_word_embeddings, config.hidden_act) == (bias, True, "gelu")
    assert (config.residual_dropout, config.max_position_embeddings) == (0.1, 24)


@torch.no_grad()
def test_masks_are_no_weights(tmp_path) -> None:
    stock = stock_gpt2(vocab_size=61, activation_function="gelu")
    checkpoint = nanogpt_of(stock)
    for layer in range(SHAPE["n_layer"]):  # what nanoGPT saves where torch has no fused attention
        checkpoint["model"][f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 24, 24).tril()
        checkpoint["model"][f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    ours = NANOGPT.to_acorn(NANOGPT.load(open_source(str(write_checkpoint(tmp_path, checkpoint)))))
    ids = torch.randint(61, (2, 24))
    close(ours(ids).logits, stock(ids).logits)


def test_numpys_numbers_are_numbers(tmp_path) -> None:
    """train.py's kin keep losses and sizes as numpy gave them; older numpy names itself otherwise in a pickle."""
    stock = stock_gpt2(vocab_size=61, activation_function="gelu")
    checkpoint = nanogpt_of(stock)
    checkpoint["best_val_loss"], checkpoint["config"] = np.float64(1.5), {"lr": np.float32(1e-3), "name": np.str_("x")}
    checkpoint["model_args"] |= {"n_layer": np.int64(SHAPE["n_layer"]), "dropout": np.float64(0.1)}
    source = open_source(str(write_checkpoint(tmp_path, checkpoint)))
    assert type(source.checkpoint["model_args"]["n_layer"]) is int
    assert NANOGPT.to_acorn(NANOGPT.load(source)).config.num_hidden_layers == SHAPE["n_layer"]
    torch.save(checkpoint, tmp_path / "ckpt.pt", _use_new_zipfile_serialization=False)
    raw = (tmp_path / "ckpt.pt").read_bytes()
    (tmp_path / "ckpt.pt").write_bytes(raw.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert open_source(str(tmp_path)).checkpoint["best_val_loss"] == 1.5


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_our_variants_out(name: str, ids, tmp_path) -> None:
    config = tiny_config(**{"hidden_act": "gelu", **VARIANTS[name]})
    obstacles = NANOGPT.obstacles(config)
    assert (not obstacles) == (name in HELD)
    if obstacles:
        return
    model = random_model(config)
    NANOGPT.write(model, None, tmp_path, tmp_path)
    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    close(stock_of(checkpoint)(ids).logits, model(ids).logits)
    loaded = NANOGPT.load(open_source(str(tmp_path)))
    close(NANOGPT.logits(loaded, ids), model(ids).logits)


def test_what_nanogpt_alone_can_not_hold() -> None:
    config = tiny_config(norm_eps=1e-6, intermediate_size=40, tie_word_embeddings=False)
    found = {line.split("=")[0] for line in NANOGPT.obstacles(config)}
    assert found == {"hidden_act", "norm_eps", "intermediate_size", "tie_word_embeddings"}


@torch.no_grad()
def test_out_has_all_that_sample_and_resume_read(tmp_path) -> None:
    tokenizer = build_tokenizer("char", lambda: iter([TEXT]))
    model = random_model(tiny_config(vocab_size=len(tokenizer), bias=False, hidden_act="gelu"))
    NANOGPT.write(model, tokenizer, tmp_path, tmp_path)
    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    names = {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"}
    assert checkpoint["model_args"].keys() == names
    assert (checkpoint["iter_num"], checkpoint["best_val_loss"]) == (0, 1e9)
    wte, head = (checkpoint["model"][name] for name in ("transformer.wte.weight", "lm_head.weight"))
    assert wte.data_ptr() == head.data_ptr()
    # sample.py: os.path.join('data', checkpoint['config']['dataset'], 'meta.pkl')
    meta_path = os.path.join("data", checkpoint["config"]["dataset"], "meta.pkl")
    with open(meta_path, "rb") as file:
        meta = pickle.load(file)
    text = "A lazy dog\n"
    assert [meta["stoi"][character] for character in text] == encode_documents(tokenizer, [text])[0].tolist()
    assert "".join(meta["itos"][index] for index in range(len(meta["itos"]))) == "".join(
        tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    )
    # train.py: AdamW over matrices with decay and vectors without, then load_state_dict
    own = [weight.clone() for name, weight in checkpoint["model"].items() if name != "lm_head.weight"]
    groups = [[weight for weight in own if weight.dim() >= 2], [weight for weight in own if weight.dim() < 2]]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=1.0)
    optimizer.load_state_dict(checkpoint["optimizer"])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)


# the vocabulary


def find(folder, vocab_size: int, name: str | None = None, meta: str | None = None):
    """The tokenizer that is found for a checkpoint of that vocabulary in `folder`."""
    checkpoint = nanogpt_of(stock_gpt2(vocab_size=vocab_size, activation_function="gelu"))
    source = open_source(str(write_checkpoint(folder, checkpoint)))
    return NANOGPT.tokenizer(source, NANOGPT.load(source), name, meta)


@pytest.mark.parametrize("place", ["out/run", "data/letters"])
def test_meta_beside_or_in_the_checkout(place: str, tmp_path) -> None:
    write_meta(tmp_path / place)
    tokenizer = find(tmp_path / "out/run", len(CHARACTERS))
    assert len(tokenizer) == len(CHARACTERS)
    assert tokenizer_kind(tokenizer) == "char"
    assert (tokenizer.eos_token_id, tokenizer.model_max_length) == (None, 24)
    ids = encode_documents(tokenizer, [TEXT])[0]
    np.testing.assert_array_equal(ids, [CHARACTERS.index(character) for character in TEXT])
    assert tokenizer.decode(ids.tolist()) == TEXT


def test_meta_named_and_its_order_kept(tmp_path) -> None:
    path = write_meta(tmp_path / "elsewhere", CHARACTERS[::-1])
    tokenizer = find(tmp_path / "out", len(CHARACTERS), meta=str(path))
    assert tokenizer.convert_ids_to_tokens(range(len(CHARACTERS))) == CHARACTERS[::-1]


def test_an_end_of_text_in_meta_is_one(tmp_path) -> None:
    tokenizer = read_meta(write_meta(tmp_path, [*CHARACTERS, "<|endoftext|>"]))
    assert tokenizer.eos_token_id == len(CHARACTERS)
    assert tokenizer_kind(tokenizer) == "char"


@pytest.mark.parametrize("vocab_size", [256, 257])
def test_bytes_by_size(vocab_size: int, tmp_path) -> None:
    tokenizer = find(tmp_path, vocab_size)
    assert (tokenizer_kind(tokenizer), len(tokenizer)) == ("byte", vocab_size)
    assert tokenizer.decode(encode_documents(tokenizer, ["é\n"])[0].tolist()) == "é\n"


def test_a_tokenizer_beside_comes_first(tmp_path) -> None:
    write_meta(tmp_path)
    build_tokenizer("byte").save_pretrained(tmp_path)
    assert tokenizer_kind(find(tmp_path, 300)) == "byte"
    assert tokenizer_kind(find(tmp_path, 300, meta=str(tmp_path / "meta.pkl"))) == "char"


@pytest.mark.parametrize(("vocab_size", "words"), [(61, "--meta"), (50304, "--tokenizer")])
def test_no_vocabulary_found(vocab_size: int, words: str, tmp_path) -> None:
    with pytest.raises(UserError, match=words):
        find(tmp_path, vocab_size)


@pytest.mark.parametrize(
    ("entries", "words"), [(["a", "bc"], "entry 1 is 'bc'"), (["a", "a"], "different"), ([], "at least one")]
)
def test_metas_that_are_no_characters(entries: list[str], words: str, tmp_path) -> None:
    with pytest.raises(UserError, match=words):
        read_meta(write_meta(tmp_path, entries))


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps([1]), pickle.dumps({"itos": {1: "a"}})])
def test_metas_that_are_none(content: bytes, tmp_path) -> None:
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(UserError, match=r"meta\.pkl"):
        read_meta(tmp_path / "meta.pkl")


# the rotary sibling


@pytest.mark.parametrize("base", [10000.0, 100.0])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@torch.no_grad()
def test_rotary_pairs(bias: bool, base: float, tmp_path) -> None:
    reference = RotaryReference(bias=bias, base=base)
    args = {} if base == 10000.0 else {"rope_theta": base}
    source = open_source(str(write_checkpoint(tmp_path, reference.checkpoint(**args))))
    assert BYTE_ROPE.recognises(source)
    assert not NANOGPT.recognises(source)
    loaded = BYTE_ROPE.load(source)
    ours, ids = BYTE_ROPE.to_acorn(loaded), torch.randint(256, (2, 24))
    close(BYTE_ROPE.logits(loaded, ids), reference(ids))
    close(ours(ids).logits, reference(ids))
    assert tokenizer_kind(BYTE_ROPE.tokenizer(source, loaded, None, None)) == "byte"
    with pytest.raises(AssertionError):  # and the order of the rows is what does it
        close(ours(ids).logits, RotaryReference(bias=bias, base=50.0)(ids))


def test_rotary_is_not_written() -> None:
    assert not BYTE_ROPE.is_written
    assert BYTE_ROPE.title not in NANOGPT.title


# checkpoints that are not right


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_layer": None}, "n_layer=None"),
        ({"n_head": "four"}, "n_head='four'"),
        ({"n_head": 5}, "not divisible"),
        ({"bias": "yes"}, "bias"),
        ({"n_kv_head": 2}, "n_kv_head=2: nanoGPT has no such thing"),
        ({"block_size": 48}, r"wpe.weight is \(24, 32\), not \(48, 32\)"),
        ({"n_layer": 3}, "attn.c_attn.bias is missing.* and 9 more"),
        ({"n_layer": 1}, "has no place in the model.* and 9 more"),
    ],
)
def test_arguments_that_do_not_fit(changes: dict, words: str, tmp_path) -> None:
    checkpoint = nanogpt_of(stock_gpt2(vocab_size=61, activation_function="gelu"))
    checkpoint["model_args"] |= changes
    with pytest.raises(UserError, match=words):
        NANOGPT.load(open_source(str(write_checkpoint(tmp_path, checkpoint))))


def test_no_arguments(tmp_path) -> None:
    checkpoint = nanogpt_of(stock_gpt2(vocab_size=61))
    del checkpoint["model_args"]
    with pytest.raises(UserError, match="model_args"):
        NANOGPT.load(open_source(str(write_checkpoint(tmp_path, checkpoint))))
