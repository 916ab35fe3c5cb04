"""Packed documents do not see each other, every counted token is predicted once, rows follow from their index."""

import numpy as np
import pytest
import torch

from finetune.arguments import FinetuneTrainingArguments
from finetune.data import Example
from finetune.packing import ExampleRows, documents_of, keeps_documents_apart, pack
from training.data.dataset import IGNORED, EvaluationRows, TrainingRows, collate_rows
from training.loop.lanes import SeparatedRows
from training.system.errors import UserError

from .tiny_bases import BASES, VOCABULARY, our_model, stock_model

END, ROW = 256, 48


def some_examples(count: int = 12, seed: int = 0) -> list[Example]:
    """Documents of random tokens, the second half of each counted."""
    draw = np.random.default_rng(seed)
    ids = [draw.integers(0, 256, draw.integers(5, 30)) for _ in range(count)]
    return [Example(one, np.arange(len(one)) >= len(one) // 2, str(number)) for number, one in enumerate(ids)]


class Tokens:
    """Token ids in memory, read like TokenShards."""

    def __init__(self, ids):
        self.ids = np.asarray(ids)

    def __len__(self) -> int:
        return len(self.ids)

    def sequence(self, start: int, length: int) -> np.ndarray:
        return self.ids[start : start + length].astype(np.int64)

    def sequences(self, starts: np.ndarray, length: int) -> np.ndarray:
        return np.stack([self.sequence(int(start), length) for start in starts])


def losses(model, row: dict) -> torch.Tensor:
    """Nats of each label that counts, (labels,)."""
    batch = {key: value[None] for key, value in row.items()}
    labels = batch.pop("shift_labels")
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits
    nats = torch.nn.functional.cross_entropy(logits[0], labels[0], ignore_index=IGNORED, reduction="none")
    return nats[labels[0] != IGNORED]


@pytest.fixture(params=BASES)
def base(request):
    """Stock GPT-2 and two of our own models."""
    return BASES[request.param]()


# documents do not see each other


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_changing_one_document_changes_no_others_loss(base, attention: str) -> None:
    base.set_attn_implementation(attention)
    examples = some_examples(3)
    changed = [examples[0], Example((examples[1].ids + 7) % 256, examples[1].counts, "changed"), examples[2]]
    before, after = (ExampleRows(some, 3 * 30, END)[0] for some in (examples, changed))
    sizes = [int(examples[number].counts[1:].sum()) for number in ExampleRows(examples, 3 * 30, END).bins[0]]
    base.config.max_position_embeddings = 3 * 30
    parts = zip(losses(base, before).split(sizes), losses(base, after).split(sizes), strict=True)
    same = [torch.equal(first, second) or torch.allclose(first, second, atol=1e-6) for first, second in parts]
    order = ExampleRows(examples, 3 * 30, END).bins[0]
    assert [same[order.index(number)] for number in range(3)] == [True, False, True]


def test_packed_is_as_one_by_one(base) -> None:
    examples = some_examples(8)
    packed = ExampleRows(examples, ROW, END)
    alone = ExampleRows(examples, ROW, END, packing=False)
    assert len(packed) < len(alone) == 8
    expected = {number: losses(base, alone[number]) for number in range(8)}
    for index, numbers in enumerate(packed.bins):
        found = losses(base, packed[index])
        torch.testing.assert_close(found, torch.cat([expected[number] for number in numbers]), atol=2e-6, rtol=1e-5)


def test_documents_of_a_text_do_not_see_each_other(base) -> None:
    text = np.random.default_rng(1).integers(0, 256, 40)
    text[[12, 25]] = END
    changed = text.copy()
    changed[3:9] = (changed[3:9] + 1) % 256
    rows = [SeparatedRows(EvaluationRows(Tokens(ids), 39), END)[0] for ids in (text, changed)]
    first, second = (losses(base, row) for row in rows)
    assert not torch.allclose(first[:12], second[:12], atol=1e-4)
    torch.testing.assert_close(first[12:], second[12:], atol=1e-6, rtol=0)  # the end-of-text token starts the next


def test_without_positions_they_would(base) -> None:
    """The tests above can fail: without position_ids a change is felt by all that follows."""
    text = np.random.default_rng(1).integers(0, 256, 40)
    text[12] = END
    changed = text.copy()
    changed[3] = (changed[3] + 1) % 256
    first, second = (losses(base, EvaluationRows(Tokens(ids), 39)[0]) for ids in (text, changed))
    assert not torch.allclose(first[12:], second[12:], atol=1e-4)


# the probe


def test_the_probe_knows_models_that_keep_documents_apart(base) -> None:
    assert keeps_documents_apart(base, "base") is True


def test_the_probe_asks_as_training_will(monkeypatch, tmp_path) -> None:
    """On its device, in its precision, so many rows at once: flash attention tells documents apart in single rows."""
    seen = []
    model = our_model()
    forward = model.forward

    def watched(**inputs):
        seen.append((len(inputs["input_ids"]), torch.is_autocast_enabled("cpu"), inputs["input_ids"].device.type))
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", watched)
    for size, precision in ((1, "fp32"), (4, "bf16")):
        options = {"per_device_train_batch_size": size, "per_device_eval_batch_size": 1, "force_precision": True}
        args = FinetuneTrainingArguments(str(tmp_path), use_cpu=True, precision=precision, **options)
        assert keeps_documents_apart(model, "base", args)
        assert {rows for rows, _, _ in seen} == {min(size, 3)}
        assert {where[1:] for where in seen} == {(precision == "bf16", "cpu")}
        seen.clear()


def test_the_probe_knows_models_that_do_not(monkeypatch) -> None:
    model = stock_model()
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda **inputs: forward(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]))
    )
    assert keeps_documents_apart(model, "base") is False


def test_a_model_that_sees_the_future_is_no_causal_lm(monkeypatch) -> None:
    model = our_model()
    forward = model.forward

    def both_ways(**inputs):
        outputs = forward(**inputs)
        outputs.logits = outputs.logits + forward(**{**inputs, "input_ids": inputs["input_ids"].flip(1)}).logits.flip(1)
        return outputs

    monkeypatch.setattr(model, "forward", both_ways)
    with pytest.raises(UserError, match="is not a causal language model"):
        keeps_documents_apart(model, "base")


# rows


def test_every_counted_token_is_predicted_once() -> None:
    examples = some_examples(40)
    expected = sorted(int(token) for example in examples for token in example.ids[1:][example.counts[1:]])
    for packing in (True, False):
        rows = ExampleRows(examples, ROW, END, packing)
        labels = collate_rows(rows.__getitems__(range(len(rows))))["shift_labels"]
        assert sorted(labels[labels != IGNORED].tolist()) == expected


def test_labels_are_the_next_tokens() -> None:
    (example,) = some_examples(1)
    row = ExampleRows([example], ROW, END)[0]
    length = len(example.ids) - 1
    counted = row["shift_labels"] != IGNORED
    assert row["input_ids"][:length].tolist() == example.ids[:-1].tolist()
    assert row["shift_labels"][counted].tolist() == example.ids[1:][example.counts[1:]].tolist()
    assert (row["input_ids"][length:] == END).all()


def test_training_goes_round_in_a_new_order_each_time() -> None:
    rows = ExampleRows(some_examples(30), ROW, END, num_rows=60, seed=5)
    once = len(rows.bins)
    both = [tuple(row["input_ids"].tolist()) for row in rows.__getitems__(range(2 * once))]
    passes = both[:once], both[once:]
    assert sorted(passes[0]) == sorted(passes[1])
    assert passes[0] != passes[1]
    assert tuple(rows[once + 2]["input_ids"].tolist()) == passes[1][2], "a row follows from its index alone"


@pytest.mark.parametrize("capacity", [30, 64, 200])
def test_bins_hold_everything_and_no_more_than_fits(capacity: int) -> None:
    lengths = np.random.default_rng(2).integers(1, 31, 500).tolist()
    bins = pack(lengths, capacity)
    assert sorted(number for numbers in bins for number in numbers) == list(range(500))
    assert all(sum(lengths[number] for number in numbers) <= capacity for numbers in bins)
    assert len(bins) <= 1 + 1.1 * sum(lengths) / capacity * (1.3 if capacity == 30 else 1)


def test_a_document_that_was_not_split_is_refused() -> None:
    with pytest.raises(UserError, match="block_size=10"):
        pack([5, 11], 10)


def test_positions_of_text_begin_anew_at_each_end() -> None:
    rows = SeparatedRows(EvaluationRows(Tokens([1, 2, END, END, 3, 4, END, 5, 6]), 8), END)
    assert rows[0]["position_ids"].tolist() == [0, 1, 0, 0, 1, 2, 0, 1]
    assert len(rows) == 1


def test_separated_rows_are_the_rows() -> None:
    plain = TrainingRows(Tokens(np.arange(200)), 16, 1, 10)
    row = SeparatedRows(plain, END)[3]
    assert {key: row[key].tolist() for key in ("input_ids", "shift_labels")} == {
        key: value.tolist() for key, value in plain[3].items()
    }


def test_documents_of_a_text_one_by_one() -> None:
    found = documents_of(np.array([1, 2, 3, END, 4, END, END, 5, 6, 7, 8, 9]), END, 4)
    assert [piece.ids.tolist() for piece in found] == [
        [END, 1, 2, 3, END], [END, 4, END], [END, END], [END, 5, 6, 7, 8], [8, 9]
    ]  # fmt: skip
    assert VOCABULARY > END
