"""`acorn convert` from end to end: what it prints, writes and refuses."""

import json
import pickle
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from inference import convert, evaluate, generate
from inference.formats import FORMATS
from modeling import GPTForCausalLM
from training.data.encoding import encode_documents
from training.data.tokenizers import build_tokenizer

from .foreign import CHARACTERS, TEXT, RotaryReference, Trap, nanogpt_of, stock_gpt2, write_checkpoint, write_meta
from .tiny_runs import contents, refused
from .variants import random_model, tiny_config


@pytest.fixture
def stock(tmp_path):
    """A stock GPT-2 over bytes with its tokenizer."""
    stock_gpt2().save_pretrained(tmp_path / "stock")
    build_tokenizer("byte").save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"


@pytest.fixture
def character_model(tmp_path):
    """(nanoGPT's checkpoint over characters in a checkout of its own, transformers' model of the same function)."""
    write_meta(tmp_path / "checkout/data/letters")
    stock = stock_gpt2(vocab_size=len(CHARACTERS), activation_function="gelu")
    return write_checkpoint(tmp_path / "checkout/out", nanogpt_of(stock)), stock


@pytest.fixture
def run(tmp_path, capsys):
    """`run(src, format, *flags) -> (directory, what it printed)`."""

    def call(src, to: str, *flags: str, name: str = "made"):
        convert.main([str(src), str(tmp_path / name), "--to", to, *flags])
        return tmp_path / name, capsys.readouterr().out

    return call


def difference(printed: str) -> float:
    """The largest difference of logits that was printed."""
    return float(re.search(r"largest logit difference (\S+) over 24 random tokens", printed)[1])


def no_rests(folder) -> bool:
    """Whether nothing half made is left."""
    return not [path for path in folder.iterdir() if path.name.startswith(".")]


# what comes out


@torch.no_grad()
def test_stock_to_acorn_and_back(stock, run, tmp_path) -> None:
    ours, printed = run(stock, "acorn", name="ours")
    assert difference(printed) <= 1e-5
    assert f"acorn generate {ours}" in printed
    back, printed = run(ours, "gpt2", name="back")
    assert difference(printed) <= 1e-5
    ids = torch.randint(257, (2, 24))
    expected = AutoModelForCausalLM.from_pretrained(stock)(ids).logits
    for directory, options in ((ours, {"trust_remote_code": True}), (back, {})):
        found = AutoModelForCausalLM.from_pretrained(directory, **options)(ids).logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert AutoTokenizer.from_pretrained(directory)("né").input_ids == [110, 195, 169]
    for directory in (ours, back):
        assert "lm_head.weight" not in load_file(directory / "model.safetensors")  # tied: it is the embedding
    assert {"modeling_gpt.py", "configuration_gpt.py", "generation_config.json"} <= contents(ours).keys()
    assert json.loads((ours / "config.json").read_text())["auto_map"].keys() >= {"AutoModel", "AutoModelForCausalLM"}
    assert not list(back.glob("*.py"))
    assert no_rests(tmp_path)


def test_what_is_made_writes_text(stock, run, capsys) -> None:
    ours, _ = run(stock, "acorn")
    generate.main([str(ours), "--prompt", "né", "--max_new_tokens", "5"])
    assert capsys.readouterr().out.startswith("né")


def test_nanogpt_evaluates_to_the_same_loss(character_model, run, tmp_path, capsys) -> None:
    checkpoint, stock = character_model
    ours, printed = run(checkpoint, "acorn")
    assert difference(printed) <= 1e-5
    (tmp_path / "val.txt").write_text(TEXT)
    evaluate.main([str(ours), "--text_files", str(tmp_path / "val.txt")])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    ids = torch.tensor([CHARACTERS.index(character) for character in TEXT])
    nats = 0.0
    for start in range(0, len(ids) - 1, 24):
        window = ids[start : start + 25]
        logits = stock(window[None, :-1]).logits[0].double()
        nats += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    assert found["tokens"] == len(TEXT) - 1  # no end-of-text token, which the model does not know
    assert found["loss"] == pytest.approx(nats / found["tokens"], abs=1e-5)


def test_a_model_without_end_of_text_writes_text(character_model, run, capsys) -> None:
    ours, _ = run(character_model[0], "acorn")
    for prompt, start in (("", ""), ("A lazy", "A lazy")):
        generate.main([str(ours), "--prompt", prompt, "--max_new_tokens", "40"])
        text = capsys.readouterr().out.removesuffix("\n")
        assert text.startswith(start)
        assert len(text) == len(start) + 40
    assert "'é'" in refused(generate.main, str(ours), "--prompt", "é")


@torch.no_grad()
def test_nanogpt_and_back_is_the_same_checkpoint(character_model, run) -> None:
    checkpoint, _ = character_model
    ours, _ = run(checkpoint, "acorn", name="ours")
    back, printed = run(ours, "nanogpt", name="back")
    assert f"python sample.py --out_dir={back}" in printed
    first, second = (torch.load(folder / "ckpt.pt", weights_only=True) for folder in (checkpoint, back))
    assert first["model_args"] == second["model_args"]
    assert first["model"].keys() == second["model"].keys()
    assert all(torch.equal(weight, second["model"][name]) for name, weight in first["model"].items())
    meta = pickle.loads((back / "meta.pkl").read_bytes())
    assert list(meta["stoi"]) == CHARACTERS
    again, _ = run(back, "acorn", name="again")
    first, second = contents(ours), contents(again)
    assert {name for name in first if first[name] != second[name]} <= {"tokenizer_config.json"}  # says whence it came


def test_rotary_bytes_become_ours(run, tmp_path) -> None:
    source = write_checkpoint(tmp_path / "rotary", RotaryReference().checkpoint())
    ours, printed = run(source / "ckpt.pt", "acorn")
    assert difference(printed) <= 1e-5
    assert GPTForCausalLM.from_pretrained(ours).config.position_encoding == "rope"


def test_padded_vocabulary_keeps_its_rows(run, tmp_path) -> None:
    source = write_checkpoint(tmp_path / "out", nanogpt_of(stock_gpt2(vocab_size=320, activation_function="gelu")))
    ours, _ = run(source, "acorn", "--tokenizer", "byte")
    model, tokenizer = GPTForCausalLM.from_pretrained(ours), AutoTokenizer.from_pretrained(ours)
    assert (model.config.vocab_size, len(tokenizer), model.config.eos_token_id) == (320, 257, 256)


def test_an_own_tokenizer_goes_to_nanogpt_and_comes_back(run, tmp_path) -> None:
    tokenizer = build_tokenizer("bpe", lambda: iter([TEXT]), 270)
    random_model(tiny_config(vocab_size=270, hidden_act="gelu")).save_pretrained(tmp_path / "own")
    tokenizer.save_pretrained(tmp_path / "own")
    out, printed = run(tmp_path / "own", "nanogpt", name="out")
    assert "nonsense" in printed
    ours, _ = run(out, "acorn", name="ours")
    text = encode_documents(AutoTokenizer.from_pretrained(ours), [TEXT])[0]
    assert text.tolist() == encode_documents(tokenizer, [TEXT])[0].tolist()


def test_without_a_tokenizer_the_weights_go_alone(run, tmp_path) -> None:
    random_model(tiny_config(hidden_act="gelu")).save_pretrained(tmp_path / "own")
    out, printed = run(tmp_path / "own", "nanogpt", name="out")
    assert "No tokenizer" in printed
    assert contents(out).keys() == {"ckpt.pt"}
    stock, printed = run(tmp_path / "own", "gpt2", name="stock")
    assert "--tokenizer" in printed
    assert not (stock / "tokenizer.json").exists()


# what is refused, and that nothing is left


def refusal(src, tmp_path, *flags: str, to: str = "acorn") -> str:
    """The one line, after which DST and everything half made are gone."""
    message = refused(convert.main, str(src), str(tmp_path / "dst"), "--to", to, *flags)
    assert not (tmp_path / "dst").exists()
    assert no_rests(tmp_path)
    return message


def test_a_proof_that_fails_leaves_nothing(stock, tmp_path, monkeypatch) -> None:
    acorn = type(FORMATS["acorn"])
    honest = acorn.logits
    monkeypatch.setattr(acorn, "logits", lambda self, theirs, ids: honest(self, theirs, ids) + 1e-2)
    assert "largest logit difference 1.0e-02" in refusal(stock, tmp_path)


def test_weights_that_are_not_numbers_are_refused(stock, tmp_path) -> None:
    weights = load_file(stock / "model.safetensors")
    weights["transformer.ln_f.bias"][0] = torch.nan
    save_file(weights, stock / "model.safetensors", {"format": "pt"})
    assert "nan" in refusal(stock, tmp_path)


def test_a_directory_that_holds_something_stays(stock, tmp_path) -> None:
    before = contents(stock)
    message = refused(convert.main, str(stock), str(stock), "--to", "acorn")
    assert f"{stock}: already exists" in message
    assert contents(stock) == before


def test_an_empty_directory_is_filled(stock, run, tmp_path) -> None:
    (tmp_path / "made").mkdir()
    made, _ = run(stock, "acorn")
    assert (made / "model.safetensors").is_file()


def test_fields_in_the_way_are_all_named(tmp_path) -> None:
    config = tiny_config(position_encoding="rope", norm="rms_norm", lm_head_bias=True, hidden_act="relu2")
    random_model(config).save_pretrained(tmp_path / "own")
    message = refusal(tmp_path / "own", tmp_path, to="gpt2")
    assert all(field in message for field in ("position_encoding='rope'", "norm='rms_norm'", "lm_head_bias=True"))
    assert "hidden_act" not in message
    assert "hidden_act='relu2'" in refusal(tmp_path / "own", tmp_path, to="nanogpt")


@pytest.mark.parametrize("name", ["stock", "own"])
def test_tensors_that_do_not_fit_are_named(name: str, stock, tmp_path) -> None:
    random_model(tiny_config()).save_pretrained(tmp_path / "own")
    path = tmp_path / name / "model.safetensors"
    weights = load_file(path)
    first, second, third, fourth = sorted(weights)[5:9]
    del weights[first], weights[second]
    weights[third] = weights[third][:-1].clone()
    save_file({**weights, "more.weight": torch.ones(2)}, path, {"format": "pt"})
    message = refusal(tmp_path / name, tmp_path, to="acorn" if name == "stock" else "gpt2")
    assert f"{first} is missing; {second} is missing; {third} is (" in message
    assert "and 1 more" in message
    assert fourth not in message


def test_same_format(stock, tmp_path) -> None:
    assert "stock GPT-2 already" in refusal(stock, tmp_path, to="gpt2")


def test_gpt2_has_another_gelu_than_nanogpt(stock, tmp_path) -> None:
    assert "hidden_act='gelu_new'" in refusal(stock, tmp_path, to="nanogpt")


def test_what_is_no_model(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    assert "neither config.json nor ckpt.pt" in refusal(tmp_path / "empty", tmp_path)
    (tmp_path / "empty/adapter_config.json").write_text("{}")
    assert "acorn merge" in refusal(tmp_path / "empty", tmp_path)
    assert "no such file" in refusal(tmp_path / "nothing", tmp_path)
    assert "nobody/nothing" in refusal("nobody/nothing", tmp_path)
    (tmp_path / "empty/config.json").write_text('{"model_type": "llama"}')
    assert "model_type='llama'" in refusal(tmp_path / "empty", tmp_path)
    (tmp_path / "empty/config.json").write_text("{")
    assert "config.json" in refusal(tmp_path / "empty", tmp_path)


def test_a_pickle_with_code_is_not_run(character_model, tmp_path) -> None:
    trap = tmp_path / "trap"
    torch.save({"model": {}, "model_args": Trap(trap)}, tmp_path / "ckpt.pt")
    assert "code" in refusal(tmp_path / "ckpt.pt", tmp_path)
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Trap(trap)))
    assert "refused" in refusal(tmp_path / "raw.pt", tmp_path)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"itos": Trap(trap)}))
    assert "code" in refusal(character_model[0], tmp_path, "--meta", str(tmp_path / "meta.pkl"))
    assert not trap.exists()
    torch.load(tmp_path / "ckpt.pt", weights_only=False)
    assert trap.exists()  # it was a trap indeed


def test_checkpoints_that_are_none(tmp_path) -> None:
    for content in (b"", b"garbage", b"PK\x03\x04 cut off"):
        (tmp_path / "ckpt.pt").write_bytes(content)
        assert "ckpt.pt" in refusal(tmp_path / "ckpt.pt", tmp_path)
    for content in ([1], {"weights": {}}, {"model": {"transformer.wpe.weight": 3}}):
        torch.save(content, tmp_path / "ckpt.pt")
        assert "nanoGPT" in refusal(tmp_path / "ckpt.pt", tmp_path)


def test_a_checkpoint_cut_off(character_model, tmp_path) -> None:
    path = character_model[0] / "ckpt.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    assert "ckpt.pt" in refusal(path, tmp_path)


def test_a_tokenizer_that_is_too_large(character_model, tmp_path) -> None:
    message = refusal(character_model[0], tmp_path, "--tokenizer", "byte")
    assert "257 entries" in message
    assert str(len(CHARACTERS)) in message


@pytest.mark.parametrize("flags", [["--tokenizer", "char"], ["--tokenizer", "nowhere"], ["--meta", "nowhere.pkl"]])
def test_flags_that_name_nothing(flags: list[str], character_model, tmp_path) -> None:
    assert flags[1] in refusal(character_model[0], tmp_path, *flags)


def test_meta_is_nanogpts(stock, tmp_path) -> None:
    assert "--meta" in refusal(stock, tmp_path, "--meta", "meta.pkl")


def test_rotary_is_read_only(stock, tmp_path) -> None:
    assert "byte-rope" in refusal(stock, tmp_path, to="byte-rope")
