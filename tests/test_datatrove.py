"""Tokens in datatrove's format: written by hand, and by datatrove itself where it is installed."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from shlex import split as words

import numpy as np
import pytest

from inference import evaluate
from training import pretrain, resume
from training.config.arguments import DataArguments
from training.data.corpus import holds_datatrove, load_datatrove, read_token_file
from training.data.encoding import encode_documents
from training.data.tokenizers import build_tokenizer
from training.system.errors import UserError

from .tiny_runs import TEXT, checkpoints, latest, metrics, refused, same_weights, tiny_argv

DOCUMENTS = [TEXT[place : place + 60 + place % 41] for place in range(0, 3000, 75)]


@pytest.fixture
def tokenizer(tmp_path, monkeypatch):
    """A small BPE tokenizer, saved in `made` of an empty folder."""
    monkeypatch.chdir(tmp_path)
    built = build_tokenizer("bpe", lambda: iter([TEXT]), 300)
    built.save_pretrained("made")
    return built


def write(tokenizer, texts=DOCUMENTS, name="made/tokenizer.json", file="tokens/00000_shuffled.ds", dtype="<u2") -> Path:
    """Write documents as datatrove does: tokens, then ends as 8-byte integers, then three lines of metadata."""
    path = Path(file)
    path.parent.mkdir(exist_ok=True)
    ids = [np.append(ids, tokenizer.eos_token_id) for ids in encode_documents(tokenizer, texts)]
    tokens = np.concatenate(ids).astype(dtype)
    tokens.tofile(path)
    np.cumsum([len(document) for document in ids]).astype("<u8").tofile(f"{path}.index")
    Path(f"{path}.metadata").write_text(f"{name}|{np.dtype(dtype).itemsize}\n{len(tokens)}\n{len(tokens) / 1000} KT")
    return path


def arguments(**changes) -> DataArguments:
    return replace(DataArguments(data_dir="tokens", tokenizer="made"), **changes)


def spelt(corpus, split: str) -> list[str]:
    """The documents of a split as text."""
    tokens = corpus.tokens(split)
    return corpus.tokenizer.decode(tokens.sequence(0, len(tokens)).tolist()).split("<|endoftext|>")[:-1]


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
@pytest.mark.parametrize("by", ["position", "documents"])
def test_every_document_is_in_one_split(tokenizer, by: str, dtype: str) -> None:
    write(tokenizer, DOCUMENTS[:25], dtype=dtype)
    write(tokenizer, DOCUMENTS[25:], file="tokens/00001_shuffled.ds", dtype=dtype)
    corpus = load_datatrove(arguments(validation_by=by, validation_fraction=0.2))
    train, validation = spelt(corpus, "train"), spelt(corpus, "validation")
    assert sorted(train + validation) == sorted(DOCUMENTS)
    splits = corpus.manifest["splits"]
    assert (splits["train"]["documents"], splits["validation"]["documents"]) == (len(train), len(validation))
    assert splits["validation"]["bytes"] == sum(len(text.encode()) for text in validation)
    assert splits["train"]["tokens"] == len(corpus.tokens("train"))
    if by == "position":
        assert train + validation == DOCUMENTS
        assert 0.1 < splits["validation"]["tokens"] / sum(split["tokens"] for split in splits.values()) <= 0.2
    else:
        assert train == [text for text in DOCUMENTS if text in train], "the order is kept"
        assert spelt(load_datatrove(arguments(validation_by=by, validation_fraction=0.2)), "train") == train
        others = arguments(validation_by=by, validation_fraction=0.2, validation_seed=1)
        assert spelt(load_datatrove(others), "train") != train


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
@pytest.mark.parametrize("by", ["position", "documents"])
def test_no_split_stays_empty(tokenizer, by: str, fraction: float) -> None:
    write(tokenizer)
    corpus = load_datatrove(arguments(validation_by=by, validation_fraction=fraction))
    assert min(corpus.manifest["splits"][split]["documents"] for split in ("train", "validation")) == 1


def test_windows_pass_over_what_validates(tokenizer) -> None:
    """A window of the training tokens is the same whether it is read at once or token by token."""
    write(tokenizer)
    tokens = load_datatrove(arguments(validation_by="documents", validation_fraction=0.3)).tokens("train")
    whole = tokens.sequence(0, len(tokens))
    for start in range(0, len(tokens) - 90, 7):
        np.testing.assert_array_equal(tokens.sequence(start, 90), whole[start : start + 90])
    with pytest.raises(IndexError):
        tokens.sequence(len(tokens) - 5, 6)


def test_a_run_and_its_resume(tokenizer, capsys) -> None:
    """The recipe's own source gives way to the directory, and a resumed run finds it again."""
    write(tokenizer)
    argv = [word for word in tiny_argv() if word not in ("--text_files", "text.txt")]
    pretrain.main(latest(*argv, *words("--data_dir tokens --tokenizer made --save_total_limit 9")))
    assert "tokens: " in capsys.readouterr().out
    assert checkpoints(Path("run")) == [4, 8] and metrics(Path("run"))[-1]["bits_per_byte"] > 0
    assert "have no split of their own" in refused(evaluate.main, "run", "--data_dir", "tokens")
    resume.main(words("run --checkpoint checkpoint-4 --max_steps 9"))
    assert not same_weights(Path("run/checkpoint-4"), Path("run/checkpoint-9"))


def test_an_empty_task_and_an_old_metadata_file(tokenizer) -> None:
    """A task without documents leaves an empty file; before token sizes were written, tokens had two bytes."""
    path = write(tokenizer)
    metadata = Path(f"{path}.metadata")
    metadata.write_text(metadata.read_text().replace("|2", ""))
    write(tokenizer, file="tokens/00001_shuffled.ds").write_bytes(b"")
    Path("tokens/00001_shuffled.ds.index").write_bytes(b"")
    Path("tokens/00001_shuffled.ds.metadata").write_text("made/tokenizer.json\n0\n0 T")
    assert read_token_file(path).token_size == 2
    assert len(spelt(load_datatrove(arguments()), "train")) > 30


# the tokenizer


def test_the_tokenizer_is_known_by_its_file_wherever_it_lies(tokenizer) -> None:
    Path("elsewhere").mkdir()
    tokenizer.save_pretrained("elsewhere/copy")
    write(tokenizer, name=str(Path("elsewhere/copy/tokenizer.json").absolute()))
    assert len(load_datatrove(arguments()).tokenizer) == 300


def test_a_tokenizer_of_another_name_is_known_by_its_tokens(tokenizer) -> None:
    """As where the tokens were made with a Hub id and this machine has only a copy of it."""
    write(tokenizer, name="somebody/tokenizer")
    assert len(load_datatrove(arguments()).tokenizer) == 300
    build_tokenizer("bpe", lambda: iter(["zebra zebra quick"]), 266).save_pretrained("other")
    with pytest.raises(UserError, match="was made with 'somebody/tokenizer'; give --tokenizer somebody/tokenizer"):
        load_datatrove(arguments(tokenizer="other"))


@pytest.mark.parametrize("name", ["byte", "other"])
def test_another_tokenizer_is_refused(tokenizer, name: str) -> None:
    write(tokenizer)
    build_tokenizer("bpe", lambda: iter([TEXT[::-1]]), 300).save_pretrained("other")
    with pytest.raises(UserError, match=f"tokenizer='{name}': .* was made with 'made'; give --tokenizer made"):
        load_datatrove(arguments(tokenizer=name))


def test_documents_without_an_end_are_refused(tokenizer) -> None:
    path = write(tokenizer)
    ends = np.fromfile(f"{path}.index", dtype="<u8")
    (np.fromfile(path, dtype="<u2")[: ends[2] - 1]).tofile(path)
    np.append(ends[:2], ends[2] - 1).astype("<u8").tofile(f"{path}.index")
    Path(f"{path}.metadata").write_text(f"made/tokenizer.json|2\n{ends[2] - 1}\n")
    with pytest.raises(UserError, match=r"do not end with <\|endoftext\|> \(id 299\)"):
        load_datatrove(arguments())


# damaged files


def cut_tokens(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def cut_index(path: Path) -> None:
    index = Path(f"{path}.index")
    index.write_bytes(index.read_bytes()[:-3])


def wrong_count(path: Path) -> None:
    metadata = Path(f"{path}.metadata")
    metadata.write_text(metadata.read_text().replace("|2\n", "|2\n9"))


def strange_size(path: Path) -> None:
    Path(f"{path}.metadata").write_text("made|3\n10\n10T")


def no_metadata(path: Path) -> None:
    Path(f"{path}.metadata").unlink()


def no_index(path: Path) -> None:
    Path(f"{path}.index").unlink()


def masks(path: Path) -> None:
    Path(f"{path}.loss").write_bytes(b"\1")


def unreadable(path: Path) -> None:
    Path(f"{path}.metadata").write_text("one line")


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (cut_tokens, "it is damaged"),
        (cut_index, "is cut off"),
        (wrong_count, "it is damaged"),
        (strange_size, "tokens of 3 bytes are not known, only of 2 and 4"),
        (no_metadata, "there is no 00000_shuffled.ds.metadata beside it"),
        (no_index, "there is no 00000_shuffled.ds.index beside it"),
        (masks, "masks of the loss play no part"),
        (unreadable, "is not datatrove's metadata"),
    ],
)
def test_damage_is_named(tokenizer, spoil, named: str) -> None:
    path = write(tokenizer)
    spoil(path)
    argv = [word for word in tiny_argv() if word not in ("--text_files", "text.txt")]
    message = refused(pretrain.main, *argv, *words("--data_dir tokens --tokenizer made"))
    assert named in message and "00000_shuffled.ds" in message
    assert not Path("run").exists()


def test_files_of_two_tokenizers_are_refused(tokenizer) -> None:
    write(tokenizer)
    write(tokenizer, file="tokens/00001_shuffled.ds", name="gpt2")
    with pytest.raises(UserError, match=r"00001_shuffled.ds: was made with 'gpt2' and 00000_shuffled.ds with 'made"):
        load_datatrove(arguments())


def test_one_document_is_not_split(tokenizer) -> None:
    write(tokenizer, DOCUMENTS[:1])
    with pytest.raises(UserError, match="one document cannot be split"):
        load_datatrove(arguments())


def test_what_is_no_directory_of_datatrove(tokenizer) -> None:
    assert not holds_datatrove(None) and not holds_datatrove("nowhere") and not holds_datatrove("made")
    write(tokenizer)
    assert holds_datatrove("tokens")
    Path("tokens/manifest.json").write_text(json.dumps({}))
    assert not holds_datatrove("tokens")


# datatrove itself


def test_the_script_needs_datatrove_or_says_so(tokenizer, monkeypatch) -> None:
    from training.launch import prepare_datatrove

    monkeypatch.setitem(sys.modules, "datatrove", None)
    monkeypatch.setitem(sys.modules, "datatrove.pipeline.tokens", None)
    message = refused(prepare_datatrove.main, *words("--dataset python-stdlib --tokenizer made --output_dir tokens"))
    assert "datatrove is not installed: pip install" in message
    assert "did you mean 'slurm'" in refused(
        prepare_datatrove.main, *words("--data_folder x --tokenizer made --output_dir tokens --executor slrm")
    )
    assert "give either" in refused(prepare_datatrove.main, *words("--tokenizer made --output_dir tokens"))


def test_what_datatrove_writes_is_read(tokenizer) -> None:
    """A folder of JSONL files and one of parquet, by datatrove's own local executor, in two tasks."""
    pytest.importorskip("datatrove")
    import pyarrow
    import pyarrow.parquet

    from training.launch import prepare_datatrove

    for kind in ("json", "parquet"):
        Path(kind).mkdir()
    for shard in range(3):
        texts = DOCUMENTS[shard::3]
        Path(f"json/{shard}.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
        pyarrow.parquet.write_table(pyarrow.table({"body": texts}), f"parquet/{shard}.parquet")
    common = words("--text_column body --tokenizer made --tasks 2 --workers 1")
    for kind, pattern in (("json", "*.jsonl"), ("parquet", "*.parquet")):
        prepare_datatrove.main(
            ["--data_folder", kind, "--glob_pattern", pattern, "--output_dir", f"of-{kind}", *common]
        )
        corpus = load_datatrove(arguments(data_dir=f"of-{kind}", validation_by="documents", validation_fraction=0.2))
        assert len(corpus.files) == 2
        assert sorted(spelt(corpus, "train") + spelt(corpus, "validation")) == sorted(DOCUMENTS)
