"""Documents that share a row are trained on as if each were alone, under every attention, streamed and resumed."""

import itertools
import json
import shutil
from pathlib import Path
from shlex import split as words

import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from finetune import finetune
from inference import evaluate
from training import pretrain
from training.data.dataset import IGNORED, EvaluationRows, TokenArray, collate_rows
from training.loop.lanes import SeparatedRows, tell_flash_attention
from training.loop.trainer import GPTTrainer

from .tiny_runs import TEXT, checkpoints, go_on, latest, metrics, refused, same_weights, short_of_memory, tiny_argv
from .variants import FULL, SLIDING, VARIANTS, random_model, tiny_config

END, CONTEXT = 60, 24
MODERN = VARIANTS["modern"] | {"layer_types": [SLIDING, FULL], "sliding_window": 5}  # a document may be longer


# Flex compiles its masks; it trains on no CPU, but reads there.
ATTENTIONS = ["eager", "sdpa", "flash_reference", pytest.param("flex_attention", marks=pytest.mark.slow)]


def flash_reference(module, query, key, value, attention_mask, scaling, cu_seq_lens_q, **kwargs):
    """Causal attention within stretches of all rows in a row, as flash attention's varlen kernels compute it."""
    assert attention_mask is None, "flash attention takes no mask"
    whole = [states.transpose(0, 1).flatten(1, 2) for states in (query, key, value)]  # (heads, rows * tokens, head_dim)
    within = torch.zeros(whole[0].shape[1], dtype=torch.long)
    within[cu_seq_lens_q[1:-1].long()] = 1
    within = within.cumsum(0)
    places = torch.arange(len(within))
    seen = (within[:, None] == within) & (places[:, None] >= places)
    if module.sliding_window:
        seen &= places[:, None] - places < module.sliding_window
    attended = torch.nn.functional.scaled_dot_product_attention(*whole, attn_mask=seen, scale=scaling)
    return attended.unflatten(1, (query.shape[0], -1)).permute(1, 2, 0, 3), None


def text_of_documents() -> torch.Tensor:
    """Tokens of some documents, of one token and of more than a row too, each closed by the end-of-text token."""
    ids = torch.randint(0, END, (4 * CONTEXT + 1,), generator=torch.Generator().manual_seed(3))
    ids[[5, 6, 19, 30, 31, 75]] = END
    return ids


def alone(model, batch: dict) -> torch.Tensor:
    """The logits of a batch whose documents are each read in a forward of their own."""
    logits = []
    for ids in batch["input_ids"]:
        starts = [0, *(place for place in range(1, len(ids)) if ids[place] == END), len(ids)]
        logits += [model(ids[None, a:b]).logits[0] for a, b in itertools.pairwise(starts)]
    return torch.cat(logits).view(*batch["input_ids"].shape, -1)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("overrides", [MODERN, VARIANTS["gpt2"]], ids=["modern", "learned"])
def test_a_row_of_documents_is_as_each_alone(attention: str, overrides: dict, monkeypatch) -> None:
    model = random_model(tiny_config(**overrides))
    rows = SeparatedRows(EvaluationRows(TokenArray(text_of_documents().numpy()), CONTEXT), END)
    batch = collate_rows(rows.__getitems__(range(4)))
    labels = batch.pop("shift_labels")
    with torch.no_grad():
        expected = alone(model, batch)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_reference", flash_reference)
    model.config._attn_implementation = attention
    tell_flash_attention(model)
    with torch.set_grad_enabled(attention != "flex_attention"), torch.compiler.set_stance("force_eager"):
        output = model(**batch, shift_labels=labels)
    assert (labels != IGNORED).all()  # each token of the text is predicted, the first of a document too
    torch.testing.assert_close(output.logits.detach(), expected, atol=2e-5, rtol=1e-4)


# runs


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where there are three parquet shards of short documents."""
    monkeypatch.chdir(tmp_path)
    for shard in range(3):
        documents = [f"shard {shard} row {row} " + TEXT[40 * row : 40 * row + 7 + row % 31] for row in range(40)]
        pyarrow.parquet.write_table(pyarrow.table({"text": documents}), f"{shard}.parquet", row_group_size=8)
    return tmp_path


ARGV = latest(
    *(word for word in tiny_argv(recipe="gpt2-one-gpu") if word not in ("--text_files", "text.txt")),
    *words("--data_files *.parquet --streaming --validation_characters 300 --tokenizer byte --vocab_size 257"),
    *words("--block_size 32 --save_total_limit 9 --dropout 0.1 --torch_compile false"),
)


def test_the_recipe_for_one_gpu_streams_parquet_shards_resumes_and_evaluates(folder, monkeypatch, capsys) -> None:
    monkeypatch.setattr("training.data.streaming.BATCH_CHARACTERS", 400)
    pretrain.main(ARGV)
    run, again = folder / "run", folder / "again"
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoint-8")
    (again / "README.md").unlink()
    go_on(again)
    assert checkpoints(again) == [4, 8]
    assert same_weights(run / "checkpoint-8", again / "checkpoint-8")
    capsys.readouterr()
    evaluate.main(["run"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["loss"]
    assert found == pytest.approx(min(row["eval_loss"] for row in metrics(run)), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("attention", "backend"), [("eager", "inductor"), ("sdpa", "aot_eager")])
def test_compiled_blocks_train_alike_and_are_compiled_for_rows_with_and_without_a_beginning(
    folder, monkeypatch, attention: str, backend: str
) -> None:
    """In a micro-batch that did not fit too, which is compiled anew for the size that does."""
    argv = latest(*ARGV, *words(f"--attn_implementation {attention} --dropout 0"))
    pretrain.main(latest(*argv, *words("--output_dir plain")))
    monkeypatch.setattr(GPTTrainer, "training_step", short_of_memory(2))
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        compiling = f"--output_dir compiled --torch_compile true --torch_compile_backend {backend}"
        pretrain.main(latest(*argv, *words(compiling)))
    for plain, compiled in zip(metrics(folder / "plain"), metrics(folder / "compiled"), strict=True):
        assert compiled["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-4)
        assert compiled["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-4)


def test_lanes_are_refused(folder) -> None:
    flags = "--sampling lanes --memory_length 8 --position_encoding rope --streaming false --validation_characters none"
    assert "document_masking=True: rows in lanes go on" in refused(pretrain.main, *latest(*ARGV, *words(flags)))
    assert not Path("run").exists()


def test_finetuning_has_its_own_way(folder) -> None:
    argv = ["gpt2-lora-text", "--data_files", "0.parquet", "--document_masking"]
    assert "document_masking=True: in finetuning packing" in refused(finetune.main, *argv)
