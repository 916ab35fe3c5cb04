"""Evaluation holds the logits of a few tokens at a time, and measures what it would from all of them at once."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from finetune.packing import Example, ExampleRows
from training.data.dataset import IGNORED
from training.loop import evaluation
from training.loop.evaluation import evaluate_rows

from .tiny_bases import CONTEXT, VOCABULARY, our_model, stock_model
from .variants import randomize

BATCH, TOKENS = 4, 24
CHUNK = 7 * VOCABULARY  # seven tokens: no divisor of a row or of a batch
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "pad_token_id": 0,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": CONTEXT,
}  # fmt: skip
VIRTUAL = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}


def drawn(model):
    randomize(model)
    return model.eval()


def adapted(config, base=stock_model):
    torch.manual_seed(0)
    return drawn(get_peft_model(base(), config))


class Headless(nn.Module):
    """Another's causal LM: its forward is all there is."""

    def __init__(self):
        super().__init__()
        self.inner, self.config = our_model(), SimpleNamespace(vocab_size=VOCABULARY)

    def forward(self, input_ids, **kwargs):
        return self.inner(input_ids, **kwargs)


MODELS = {
    "ours": our_model,
    "softcap": lambda: our_model(logit_softcap=2.0),
    "head_bias": lambda: our_model(lm_head_bias=True, tie_word_embeddings=False),
    "gpt2": stock_model,
    "cohere": lambda: drawn(CohereForCausalLM(CohereConfig(**SIZES))),  # scales its logits
    "gemma2": lambda: drawn(Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=2.0))),
    "granite": lambda: drawn(GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=3.0))),  # divides them
    "lora": lambda: adapted(LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"]), our_model),
    "prompt": lambda: adapted(PromptTuningConfig(**VIRTUAL)),
    "prefix": lambda: adapted(PrefixTuningConfig(**VIRTUAL)),
}


def make_rows(packing: bool = False, count: int = 11) -> ExampleRows:
    """Rows with gaps in their labels, as finetuning has them; the last batch is not full."""
    generator = torch.Generator().manual_seed(0)
    examples = []
    for number in range(count):
        ids = torch.randint(0, VOCABULARY, (TOKENS - number % 3,), generator=generator).numpy()
        examples.append(Example(ids, torch.rand(len(ids), generator=generator).numpy() < 0.7, "drawn"))
    return ExampleRows(examples, TOKENS - 1, 0, packing)


def evaluate(model, monkeypatch, elements: int, rows: ExampleRows) -> tuple[dict, list[int]]:
    """(metrics, elements of each output of the model) with chunks of so many logits."""
    monkeypatch.setattr(evaluation, "CHUNK_ELEMENTS", 8 * elements)
    sizes = []

    def note(module, args, output):
        sizes.append(output[0].numel() if isinstance(output, tuple) else output.logits.numel())

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    handle = inner.register_forward_hook(note)
    results = evaluate_rows(model, rows, 500, BATCH)
    handle.remove()
    return results, sizes


@pytest.mark.parametrize("name", MODELS)
def test_chunks_give_the_numbers_of_the_whole(name, monkeypatch) -> None:
    model = MODELS[name]()
    whole, sizes = evaluate(model, monkeypatch, 2**30, make_rows())
    assert max(sizes) >= BATCH * (TOKENS - 1) * VOCABULARY
    blocks = []
    layer = next(m for m in evaluation.decoder_of(model).modules() if isinstance(m, nn.ModuleList))[0]
    layer.register_forward_hook(lambda *_: blocks.append(1))
    chunked, sizes = evaluate(model, monkeypatch, CHUNK, make_rows())
    assert chunked == pytest.approx(whole, rel=1e-6)
    assert max(sizes) <= CHUNK
    assert len(blocks) == 3  # once a batch


def test_a_model_that_is_only_a_forward_gets_a_few_rows_at_a_time(monkeypatch) -> None:
    whole, _ = evaluate(Headless(), monkeypatch, 2**30, make_rows())
    chunked, sizes = evaluate(Headless(), monkeypatch, CHUNK, make_rows())
    assert chunked == pytest.approx(whole, rel=1e-6)
    assert max(sizes) == (TOKENS - 1) * VOCABULARY  # a row is the least


def test_packed_documents_stay_apart(monkeypatch) -> None:
    model, rows = our_model(), make_rows(packing=True)
    assert "position_ids" in rows.__getitems__([0])[0]
    whole, _ = evaluate(model, monkeypatch, 2**30, rows)
    assert evaluate(model, monkeypatch, CHUNK, rows)[0] == pytest.approx(whole, rel=1e-6)


def test_batches_of_any_size_take_equally_many_forwards(monkeypatch) -> None:
    """Each forward of a sharded model gathers its weights from every process: fewer on one of them would hang all."""
    for model in (our_model(), Headless()):
        counts = [len(evaluate(model, monkeypatch, CHUNK, make_rows(count=rows))[1]) for rows in (1, 2, BATCH)]
        assert counts[0] == counts[1] == counts[2] > 2


def test_a_forward_that_accelerate_has_replaced_is_there_again(monkeypatch) -> None:
    model = our_model()
    whole, _ = evaluate(model, monkeypatch, 2**30, make_rows())
    decoder = evaluation.decoder_of(model)
    given = decoder.forward
    decoder.forward = lambda *args, **kwargs: given(*args, **kwargs)
    before = decoder.forward
    assert evaluate(model, monkeypatch, CHUNK, make_rows())[0] == pytest.approx(whole, rel=1e-6)
    assert decoder.forward is before


def test_labels_that_never_count_add_nothing(monkeypatch) -> None:
    rows = make_rows()
    results, _ = evaluate(our_model(), monkeypatch, CHUNK, rows)
    counted = sum(int((row["shift_labels"] != IGNORED).sum()) for row in rows.__getitems__(range(len(rows))))
    assert results["bits_per_byte"] == pytest.approx(results["loss"] * counted / 500 / 0.6931471805599453)
