"""Rows: every legal window, each a pure function of (seed, index); evaluation predicts every token but one, once."""

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from training.data.dataset import (
    SAMPLERS,
    EvaluationRows,
    ShardWriter,
    TokenShards,
    TrainingRows,
    collate_rows,
    permuted,
)
from training.system.errors import UserError


def shards(folder, length: int, shard_size: int = 7) -> TokenShards:
    """Write the tokens 0, 1, 2, … in small shards."""
    writer = ShardWriter(folder, "train", "<u2", shard_size)
    for part in np.array_split(np.arange(length), 5):
        writer.write(part)
    writer.close()
    return TokenShards([folder / shard["file"] for shard in writer.finished])


def starts(rows) -> list[int]:
    return [int(rows[index]["input_ids"][0]) for index in range(len(rows))]


@pytest.mark.parametrize("is_mapped", [True, False])
def test_a_shard_that_was_cut_is_one_line_and_no_signal(tmp_path, is_mapped):
    tokens = shards(tmp_path, 50_000, 20_000)
    if is_mapped:
        tokens.sequence(0, 50_000)
    with open(tokens.paths[1], "r+b") as file:
        file.truncate(100)
    assert not is_mapped or tokens.sequence(0, 20_000)[-1] == 19_999
    with pytest.raises(UserError, match=r"train-00001.bin: was 40,000 bytes long and is 100 now; restore"):
        tokens.sequence(30_000, 9)


def test_windows_cross_shard_borders(tmp_path):
    tokens = shards(tmp_path, 50)
    assert len(tokens) == 50 and len(tokens.paths) == 8
    for start in range(50):
        for length in (0, 1, 20, 50 - start):
            if start + length <= 50:
                np.testing.assert_array_equal(tokens.sequence(start, length), np.arange(start, start + length))
    assert tokens.sequence(0, 3).dtype == np.int64
    for start, length in ((-1, 3), (49, 2), (50, 1)):
        with pytest.raises(IndexError, match="are not all among the 50 there are"):
            tokens.sequence(start, length)


def test_pickles_by_path(tmp_path):
    tokens = shards(tmp_path, 5000, shard_size=1000)
    tokens.sequence(0, 10)
    pickled = pickle.dumps(tokens)
    assert len(pickled) < 2000
    np.testing.assert_array_equal(pickle.loads(pickled).sequence(990, 20), tokens.sequence(990, 20))


@pytest.mark.parametrize("sampling", SAMPLERS)
def test_rows_are_pure_functions_of_seed_and_index(tmp_path, sampling):
    tokens = shards(tmp_path, 200)
    rows = TrainingRows(tokens, 8, seed=5, num_rows=1000, sampling=sampling)
    again = TrainingRows(tokens, 8, seed=5, num_rows=10**12, sampling=sampling)
    other = TrainingRows(tokens, 8, seed=6, num_rows=1000, sampling=sampling)
    assert [int(row["input_ids"][0]) for row in again.__getitems__([999, 3, 500])] == [
        starts(rows)[i] for i in (999, 3, 500)
    ]
    assert starts(rows) != starts(other)
    row = rows[17]
    assert row["input_ids"].dtype == row["shift_labels"].dtype == torch.int64
    assert row["input_ids"].shape == row["shift_labels"].shape == (8,)
    torch.testing.assert_close(row["shift_labels"], row["input_ids"] + 1)
    with pytest.raises(IndexError):
        rows[1000]


@pytest.mark.parametrize("sampling", SAMPLERS)
def test_all_starts_of_a_short_text_are_drawn(tmp_path, sampling):
    rows = TrainingRows(shards(tmp_path, 20), 4, seed=0, num_rows=2000, sampling=sampling)
    assert set(starts(rows)) == set(range(16))
    shortest = TrainingRows(TokenShards([tmp_path / "train-00000.bin"]), 6, seed=0, num_rows=9, sampling=sampling)
    assert set(starts(shortest)) == {0}


def test_random_starts_are_even(tmp_path):
    drawn = np.bincount(starts(TrainingRows(shards(tmp_path, 20), 4, seed=1, num_rows=16_000)), minlength=16)
    assert abs(drawn - 1000).max() < 5 * np.sqrt(1000)


def test_shuffled_epochs_cover_adjacent_blocks_once(tmp_path):
    context, length = 8, 205
    blocks = (length - context) // context
    rows = TrainingRows(shards(tmp_path, length), context, seed=3, num_rows=blocks * 6, sampling="shuffled")
    epochs = np.array(starts(rows)).reshape(6, blocks)
    for epoch in epochs:
        np.testing.assert_array_equal(np.diff(np.sort(epoch)), context)
    assert len({int(epoch.min()) for epoch in epochs}) > 1
    assert len({tuple(epoch - epoch.min()) for epoch in epochs}) == 6


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000])
def test_permutation(size):
    places = np.arange(size, dtype=np.uint64)
    for key in range(5):
        assert sorted(permuted(places, np.full(size, key, dtype=np.uint64), size).tolist()) == list(range(size))


@pytest.mark.parametrize(("length", "context"), [(2, 1), (2, 8), (9, 8), (10, 8), (17, 8), (50, 7)])
def test_evaluation_predicts_each_token_but_the_first_once(tmp_path, length, context):
    rows = EvaluationRows(shards(tmp_path, length), context)
    batch = collate_rows(rows.__getitems__(range(len(rows))))
    labels, inputs = batch["shift_labels"].flatten(), batch["input_ids"].flatten()
    assert labels[labels != -100].tolist() == list(range(1, length))
    assert inputs[labels != -100].tolist() == list(range(length - 1))
    assert (inputs[labels == -100] == length - 1).all()
    assert len(rows) == -(-(length - 1) // context)


def test_loader_with_workers_equals_direct_reading(tmp_path):
    rows = TrainingRows(shards(tmp_path, 100), 8, seed=0, num_rows=12)
    for options in ({}, {"collate_fn": collate_rows, "num_workers": 1}):
        batches = list(DataLoader(rows, batch_size=5, **options))
        assert torch.cat([batch["input_ids"][:, 0] for batch in batches]).tolist() == starts(rows)


def test_refusals(tmp_path):
    tokens = shards(tmp_path, 8)
    TrainingRows(tokens, 7, seed=0, num_rows=1)
    mend = r"context_length=8: a row needs 9 tokens and the training split has 8; lower it \(--block_size\) or add text"
    with pytest.raises(UserError, match=mend):
        TrainingRows(tokens, 8, seed=0, num_rows=1)
    with pytest.raises(UserError, match="sampling='sorted': must be one of random, shuffled"):
        TrainingRows(tokens, 4, seed=0, num_rows=1, sampling="sorted")
    with pytest.raises(UserError, match="context_length=0: must be at least 1"):
        EvaluationRows(tokens, 0)
    single = ShardWriter(tmp_path, "validation", "<u2", 5)
    single.write(np.array([1]))
    single.close()
    with pytest.raises(UserError, match="validation: the split has 1 tokens and at least 2 are needed"):
        EvaluationRows(TokenShards([tmp_path / "validation-00000.bin"]), 4)
