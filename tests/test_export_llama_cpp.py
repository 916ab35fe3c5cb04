"""`acorn export --format gguf` in llama.cpp itself: the same logits, ids, text and perplexity."""

from pathlib import Path
from shlex import split as words

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from inference import export
from inference.formats.gguf import write_gguf
from modeling import GPTForCausalLM
from training.data.tokenizers import build_tokenizer

from .gguf_cases import CASES, RULES, model_of, split_otherwise, tokenizer_of
from .tiny_runs import grow

pytestmark = [pytest.mark.clients, pytest.mark.slow]

ROOT = Path(__file__).parent.parent
GPT2_TOKENIZER = ROOT.parent / "shared/data/gpt2-tokenizer"
TEXT = (ROOT / "README.md").read_text(encoding="utf-8") + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
ODD = "naïve façade, 漢字 and 😀👩‍👩‍👧: I'm we'll 1234567 x²\r\n\r\n\t\ttabs   and    spaces \u00a0\u200b …\n\n\n end  "
# Of float32; larger where there is a GELU, which llama.cpp reads from a table in half precision.
LOGIT_ERROR, GELU_ERROR = 1e-4, 1e-2
PLAIN = words(
    "--position_encoding learned --norm layer_norm --norm_gain true --qk_norm false --embedding_norm false --bias true "
    "--hidden_act gelu_new --tie_word_embeddings true --zero_init_head false --embedding_initializer_range 0.02"
)
SHAPE = words(
    "--n_layer 2 --n_embd 64 --n_head 4 --block_size 128 --max_steps 120 --eval_steps 120 --tokenizer bpe "
    "--tokenizer_vocab_size 512 --tokens_per_step 1024 --per_device_train_batch_size 8 --learning_rate 6e-3"
)
RUNS = {
    "gpt2": PLAIN,
    "llama": words(
        "--norm_gain true --qk_norm false --embedding_norm false --hidden_act silu --gated_mlp true "
        "--num_key_value_heads 2 --tie_word_embeddings true --zero_init_head false --embedding_initializer_range 0.02"
    ),
    "apertus": [],  # as quickstart is
}


def opened(path: Path, context: int):
    """A llama_cpp.Llama whose keys and values are kept in float32, as ours are."""
    from llama_cpp import GGML_TYPE_F32, Llama

    types = {"type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32}
    return Llama(str(path), n_ctx=context, logits_all=True, verbose=False, n_threads=1, **types)


def logits_of(llama, ids: list[int]) -> torch.Tensor:
    """llama.cpp's logits (tokens, vocabulary)."""
    llama.reset()
    llama.eval(ids)
    return torch.tensor(np.array(llama.scores[: len(ids)]))


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_same_logits(name: str, ids, tmp_path) -> None:
    architecture, fields = CASES[name]
    model = model_of(fields)
    write_gguf(model, tokenizer_of(61), tmp_path / "made.gguf", "f32", name)
    error = GELU_ERROR if architecture in ("gpt2", "starcoder2") else LOGIT_ERROR
    llama = opened(tmp_path / "made.gguf", 32)
    assert llama.metadata["general.architecture"] == architecture
    torch.testing.assert_close(logits_of(llama, ids[0].tolist()), model(ids[:1]).logits[0], rtol=error, atol=error)


@pytest.mark.parametrize("kind", ["bpe", "byte", "char", "gpt2", *RULES])
def test_the_same_ids(kind: str, tmp_path) -> None:
    if kind == "gpt2":
        if not GPT2_TOKENIZER.is_dir():
            pytest.skip("GPT-2's tokenizer is not on this machine")
        ours = AutoTokenizer.from_pretrained(GPT2_TOKENIZER)
    elif kind in RULES:
        ours = split_otherwise(kind, TEXT + ODD)
    else:
        ours = build_tokenizer(kind, lambda: iter([TEXT + ODD]), 700 if kind == "bpe" else None)
    write_gguf(model_of({"vocab_size": len(ours) + 2}), ours, tmp_path / "made.gguf", "f32", kind)
    llama = opened(tmp_path / "made.gguf", 32)
    for text in (TEXT, ODD, ODD[::-1], " a", "\n"):
        ids = ours(text)["input_ids"]
        assert llama.tokenize(text.encode(), add_bos=False, special=False) == ids
        assert llama.detokenize(ids).decode() == text
    assert llama.tokenize(b"a<|endoftext|>", add_bos=True, special=True)[-1] == llama.token_eos() == ours.eos_token_id


@pytest.mark.parametrize("architecture", RUNS)
def test_the_same_text_and_perplexity(architecture: str, tmp_path) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    run = grow(tmp_path, *SHAPE, *RUNS[architecture], recipe="quickstart")
    with torch.no_grad():
        compare_with_llama_cpp(run, architecture, tmp_path)


def compare_with_llama_cpp(run: Path, architecture: str, folder: Path) -> None:
    """Export a run as each type, and compare perplexity and greedy text."""
    model, tokenizer = GPTForCausalLM.from_pretrained(run).float().eval(), AutoTokenizer.from_pretrained(run)
    ids = tokenizer(TEXT)["input_ids"]
    ours = model(torch.tensor([ids[:128]])).logits[0]
    prompt = tokenizer("acorn generate ")["input_ids"]
    text = model.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None)[0].tolist()
    for outtype in ("f32", "f16", "q8_0"):
        path = folder / f"{outtype}.gguf"
        export.main([str(run), str(path), "--format", "gguf", "--outtype", outtype])
        llama = opened(path, 128)
        assert llama.metadata["general.architecture"] == architecture
        difference = nats(logits_of(llama, ids[:128]), ids) - nats(ours, ids)
        assert abs(difference) < np.log(1.005), outtype  # of the perplexity half a percent
        if outtype != "q8_0":
            llama.reset()
            tokens = llama.generate(prompt, temp=0.0)
            assert [*prompt, *(next(tokens) for _ in range(64))] == text, outtype


def nats(logits: torch.Tensor, ids: list[int]) -> float:
    """Mean loss of the tokens that follow."""
    return torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1 : len(logits)])).item()
