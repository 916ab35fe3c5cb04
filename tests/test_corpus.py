"""Preparing: exact tokens and splits, nothing half-written, nothing lost, and the same again does nothing."""

import errno
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from training import prepare as prepare_main
from training.config.arguments import DataArguments
from training.config.command_line import load_recipe
from training.data import preparation
from training.data.corpus import load_corpus
from training.data.preparation import prepare
from training.data.sources import SOURCE_DEFAULTS
from training.data.tokenizers import build_tokenizer
from training.system.errors import UserError

SHAKESPEARE = Path(__file__).parents[2] / "shared/data/tinyshakespeare.txt"
DEFAULTS = {
    "mixture": None,
    "tokenizer": "byte",
    "tokenizer_vocab_size": None,
    "validation_fraction": 0.1,
    "validation_by": "position",
    "validation_seed": 2357,
    "data_dir": None,
    "shard_size": 100_000_000,
    "num_proc": 1,
}


def arguments(**changes) -> SimpleNamespace:
    return SimpleNamespace(**SOURCE_DEFAULTS | DEFAULTS | changes)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Work in an empty folder with one text of 200 characters and 40 short documents."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path.parent / f"{tmp_path.name}-cache")
    Path("text.txt").write_text("0123456789" * 20)
    rows = [{"text": f"document {number} é\r\n"} for number in range(40)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def everything(folder: str = ".") -> dict[str, str]:
    """Return each file below a folder with its hash."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def decoded(corpus, split: str) -> str:
    tokens = corpus.tokens(split)
    return corpus.tokenizer.decode(tokens.sequence(0, len(tokens)).tolist())


def test_position_cuts_one_document():
    corpus = prepare(arguments(text_files=["text.txt"]))
    train, validation = corpus.tokens("train"), corpus.tokens("validation")
    assert train.sequence(0, len(train)).tolist() == list(b"0123456789" * 18)
    assert validation.sequence(0, len(validation)).tolist() == [*b"0123456789" * 2, 256]
    assert {split: part["bytes"] for split, part in corpus.manifest["splits"].items()} == {
        "train": 180,
        "validation": 20,
    }


def test_position_over_documents_drops_nothing():
    corpus = prepare(arguments(data_files=["rows.jsonl"], validation_fraction=0.33))
    text = "".join(f"document {number} é\r\n<|endoftext|>" for number in range(40))
    assert decoded(corpus, "train") + decoded(corpus, "validation") == text
    characters = len(text.replace("<|endoftext|>", ""))
    assert len(decoded(corpus, "train").replace("<|endoftext|>", "")) == int(characters * (1 - 0.33))


def test_rows_without_text_are_no_documents_and_a_cut_between_documents():
    Path("empties.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ["", "ab", "", "cd", ""]))
    corpus = prepare(arguments(data_files=["empties.jsonl"], validation_fraction=0.5))
    end = "<|endoftext|>"
    assert (decoded(corpus, "train"), decoded(corpus, "validation")) == (f"ab{end}", f"cd{end}")


def test_documents_are_split_whole_by_seed():
    def split(seed, fraction=0.2):
        options = {"validation_by": "documents", "validation_fraction": fraction, "validation_seed": seed}
        corpus = prepare(arguments(data_files=["rows.jsonl"], **options))
        parts = [decoded(corpus, split).split("<|endoftext|>")[:-1] for split in ("train", "validation")]
        assert sorted(parts[0] + parts[1]) == sorted(f"document {number} é\r\n" for number in range(40))
        return parts[1]

    assert split(1) == split(1) != split(2)
    assert 2 <= len(split(1)) <= 16
    assert len(split(1, fraction=1e-9)) == 1
    assert len(split(1, fraction=1 - 1e-9)) == 1


def test_documents_of_a_mixture_stay_on_one_side():
    Path("few.jsonl").write_text("".join(json.dumps({"text": f"few {number}"}) + "\n" for number in range(6)))
    mixture = [{"data_files": "few.jsonl", "weight": 1}, {"data_files": "rows.jsonl", "weight": 1}]
    corpus = prepare(arguments(mixture=mixture, validation_by="documents", validation_fraction=0.3))
    train, validation = (set(decoded(corpus, split).split("<|endoftext|>")[:-1]) for split in ("train", "validation"))
    assert not train & validation and len(train | validation) == 46
    assert corpus.manifest["splits"]["train"]["documents"] > len(train)


def test_manifest_and_shards():
    corpus = prepare(arguments(text_files=["text.txt"], shard_size=50), name="digits")
    manifest = json.loads((corpus.directory / "manifest.json").read_text())
    assert re.fullmatch(r"corpora/digits-[0-9a-f]{8}", str(corpus.directory))
    assert manifest["fingerprint"].startswith(corpus.directory.name[-8:])
    shards = manifest["splits"]["train"]["shards"]
    assert [shard["tokens"] for shard in shards] == [50, 50, 50, 30]
    for shard in shards:
        raw = (corpus.directory / shard["file"]).read_bytes()
        assert (len(raw), hashlib.sha256(raw).hexdigest()) == (2 * shard["tokens"], shard["sha256"])
    expected = {"format_version": 1, "vocab_size": 257, "dtype": "uint16", "eos_token_id": 256, "licence": None}
    assert expected.items() <= manifest.items()
    assert manifest["sources"]["files"][0]["path"] == "text.txt"
    assert [path.name for path in Path("corpora").iterdir()] == [corpus.directory.name]


@pytest.mark.slow
def test_large_vocabularies_take_four_bytes():
    letters = "".join(map(chr, range(0x20000, 0x20000 + 66_000)))  # added tokens would each be looked for
    tokenizer = build_tokenizer("char", lambda: iter(["0123456789" + letters]))
    corpus = prepare(arguments(text_files=["text.txt"]), tokenizer)
    assert corpus.manifest["dtype"] == "uint32" and decoded(corpus, "train") == "0123456789" * 18
    assert (corpus.directory / "train-00000.bin").stat().st_size == 180 * 4


def test_the_same_again_does_nothing(capsys):
    first = prepare(arguments(text_files=["text.txt"], tokenizer="char"))
    before, _ = everything(), capsys.readouterr()
    stamps = [path.stat().st_mtime_ns for path in first.directory.iterdir()]
    again = prepare(arguments(text_files=["text.txt"], tokenizer="char"))
    assert capsys.readouterr().out == f"{first.directory} is prepared already: nothing to do.\n"
    assert again.manifest == first.manifest and everything() == before
    assert stamps == [path.stat().st_mtime_ns for path in first.directory.iterdir()]


def test_each_choice_has_its_own_directory():
    choices = [
        {},
        {"tokenizer": "char"},
        {"tokenizer": "bpe", "tokenizer_vocab_size": 258},
        {"validation_fraction": 0.2},
    ]
    directories = {prepare(arguments(text_files=["text.txt"], **choice)).directory for choice in choices}
    assert len(directories) == len(choices)


def test_data_dir_without_a_source_is_used_as_it_is():
    prepare(arguments(text_files=["text.txt"], data_dir="mine"))
    corpus = prepare(DataArguments(data_dir="mine"))
    assert (corpus.directory, corpus.manifest["vocab_size"]) == (Path("mine"), 257)


def test_data_dir_made_with_another_tokenizer_is_refused():
    made = prepare(arguments(text_files=["text.txt"], tokenizer="char", data_dir="mine"))
    made.tokenizer.save_pretrained("same")
    build_tokenizer("char", lambda: iter(["ab"])).save_pretrained("other")
    for tokenizer in ("char", "same", "byte"):  # byte stands there when nothing was named
        assert prepare(DataArguments(data_dir="mine", tokenizer=tokenizer)).manifest == made.manifest
    for tokenizer in ("bpe", "other"):
        with pytest.raises(UserError, match=rf"tokenizer='{tokenizer}': data_dir='mine' is not its: .* 'char'; name"):
            prepare(DataArguments(data_dir="mine", tokenizer=tokenizer))


def test_another_corpus_is_never_overwritten():
    prepare(arguments(text_files=["text.txt"], data_dir="mine"))
    before = everything()
    with pytest.raises(UserError, match=r"data_dir='mine': holds another corpus \(.{8}, and this one is .{8}\); name"):
        prepare(arguments(text_files=["text.txt"], data_dir="mine", tokenizer="char"))
    with pytest.raises(UserError, match=r"data_dir='\.': holds no manifest.json"):
        prepare(arguments(text_files=["text.txt"], data_dir="."))
    assert everything() == before


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left on device"), RuntimeError])
def test_a_failure_leaves_nothing(monkeypatch, failure):
    def fail(*_):
        raise failure

    monkeypatch.setattr(preparation, "publish", fail)  # the last step: all files are written
    before = sorted(Path().rglob("*"))
    with pytest.raises(UserError if isinstance(failure, OSError) else failure) as raised:
        prepare(arguments(text_files=["text.txt"], data_dir="deep/down/mine"))
    assert sorted(Path().rglob("*")) == before
    if isinstance(failure, OSError):
        message = r"data_dir: the disk of deep/down is full: at least 0\.\d MB are needed and [\d,.]+ MB are free; free"
        assert re.match(message, str(raised.value))


def test_a_disk_that_is_too_small_is_seen_before_writing(monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=300))
    with pytest.raises(UserError, match=r"is full: at least 0\.0 MB are needed and 0.0 MB are free"):
        prepare(arguments(text_files=["text.txt"]))
    assert not Path("corpora").exists()


def test_the_slower_of_two_processes_takes_what_the_faster_made(monkeypatch):
    options = {"text_files": ["text.txt"], "data_dir": "mine"}
    publish = preparation.publish

    def overtaken(folder, directory):  # by a process on a machine that does not see this one's lock
        shutil.copytree(folder, "mine")
        return publish(folder, directory)

    monkeypatch.setattr(preparation, "publish", overtaken)
    prepare(arguments(**options))
    assert sorted(path.name for path in Path().iterdir()) == ["mine", "rows.jsonl", "text.txt"]


def test_damage_is_seen_when_loading():
    directory = prepare(arguments(text_files=["text.txt"], data_dir="mine")).directory
    shard = directory / "train-00000.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-2])
    with pytest.raises(UserError, match=r"mine/train-00000.bin: is 358 bytes long, not 360; prepare the text again"):
        load_corpus(directory)
    shard.unlink()
    with pytest.raises(UserError, match=r"mine/train-00000\.bin: is missing"):
        load_corpus(directory)
    shard.write_bytes(whole)
    build_tokenizer("char", lambda: iter(["ab"])).save_pretrained(directory / "tokenizer")
    with pytest.raises(UserError, match=r"mine/tokenizer: its hash is .{8} and the tokens were made with .{8}"):
        load_corpus(directory)
    (directory / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"mine/manifest.json: cannot be read \("):
        load_corpus(directory)
    (directory / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"mine/manifest\.json: is not of format acorn-corpus 1"):
        load_corpus(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest["splits"]["train"].update(tokens=7), "its train shards hold 180 tokens together"),
        (lambda manifest: manifest.pop("dtype"), "lacks 'dtype'; prepare the text again"),
        (lambda manifest: manifest["splits"].pop("validation"), "lacks 'validation'; prepare"),
        (lambda manifest: manifest["splits"]["train"]["shards"].pop(), "its train shards hold 150 tokens together"),
    ],
)
def test_a_manifest_that_disagrees_with_its_shards_is_refused(change, message):
    directory = prepare(arguments(text_files=["text.txt"], data_dir="mine", shard_size=50)).directory
    manifest = json.loads((directory / "manifest.json").read_text())
    change(manifest)
    (directory / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="^" + re.escape(f"mine/manifest.json: {message}")):
        load_corpus(directory)


def test_main_compares_shards_with_their_hashes(capsys):
    Path("mine.yaml").write_text("data:\n  text_files: [text.txt]\n  shard_size: 50\n")
    argv = ["mine.yaml", "--data_dir", "made"]  # where the text of the recipe goes
    prepare_main.main(argv)
    prepare_main.main(argv)
    assert "made is prepared already, and its 5 shards are whole: nothing to do." in capsys.readouterr().out
    shard = Path("made/train-00001.bin")
    raw = bytearray(shard.read_bytes())
    raw[7] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(UserError, match=r"made/train-00001.bin: its bytes are not those that were written; prepare"):
        prepare_main.main(argv)


def test_prepared_tokens_replace_the_tokenizer_of_a_recipe():
    prepare(arguments(text_files=["text.txt"], data_dir="mine", tokenizer="char"))
    Path("other.yaml").write_text("data:\n  dataset: python-stdlib\n  tokenizer: bpe\n  tokenizer_vocab_size: 300\n")
    recipe = load_recipe("pretrain", ["other.yaml", "--data_dir", "mine"])
    assert prepare(recipe.data_arguments()).manifest["vocab_size"] == 11
    recipe = load_recipe("pretrain", ["other.yaml", "--data_dir", "mine", "--tokenizer", "bpe"])
    with pytest.raises(UserError, match="tokenizer='bpe': data_dir='mine' is not its"):
        prepare(recipe.data_arguments())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"validation_fraction": 0.999},
            "validation_fraction=0.999 (by position): no text is left for the train split",
        ),
        ({"text_files": None}, "no text: name a source"),
        ({"text_files": None, "data_files": ["blank.jsonl"]}, "data_files: the source holds no text at all"),
        (
            {"text_files": None, "mixture": [{"dataset": "x", "weight": 1}]},
            "validation_by='position': a mixture repeats",
        ),
        ({"text_files": None, "data_dir": "nowhere"}, "data_dir='nowhere': holds no manifest.json; make it with"),
        ({"data_dir": "text.txt/x"}, "data_dir='text.txt/x': Not a directory; choose another directory"),
        ({"tokenizer": "bpe", "tokenizer_vocab_size": 9999}, "tokenizer_vocab_size=9999: the text yields only"),
    ],
)
def test_refusals_leave_nothing(changes, message):
    Path("blank.jsonl").write_text('{"text": ""}\n')
    Path("short.txt").write_text("abc")
    before = sorted(Path().rglob("*"))
    changes = {"text_files": ["short.txt"]} | changes
    with pytest.raises(UserError, match="^" + re.escape(message)) as refusal:
        prepare(arguments(**changes))
    assert "\n" not in str(refusal.value)
    assert sorted(Path().rglob("*")) == before


def test_main_prepares_a_recipe_and_says_what_is_next(capsys):
    Path("mine.yaml").write_text("data:\n  text_files: [text.txt]\n  tokenizer: char\n")
    prepare_main.main(["mine.yaml", "--validation_fraction", "0.2"])
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"corpora/mine-.{8}: 160 train and 41 validation tokens, vocabulary 11\.", lines[0])
    assert lines[1:] == ["Type next: acorn pretrain mine.yaml --validation_fraction 0.2"]


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="../shared is absent")
def test_tiny_shakespeare_is_cut_as_nanogpt_cuts_it():
    corpus = prepare(arguments(text_files=[str(SHAKESPEARE)], tokenizer="char"))
    assert {split: len(corpus.tokens(split)) for split in ("train", "validation")} == {
        "train": 1_003_854,
        "validation": 111_541,
    }
    assert corpus.manifest["vocab_size"] == 66
    text = SHAKESPEARE.read_bytes().decode()
    assert decoded(corpus, "train") == text[:1_003_854]
    assert np.array_equal(corpus.tokens("validation").sequence(111_540, 1), [65])


def test_one_document_is_split_by_position(capsys):
    corpus = prepare(arguments(text_files=["text.txt"], validation_by="documents"))
    assert corpus.manifest["splits"]["validation"]["bytes"] == 20
    assert "validation_by=position" in capsys.readouterr().err


# --- files that change meanwhile --------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [{"text_files": ["text.txt"]}, {"data_files": ["rows.jsonl"]},
                                    {"mixture": [{"text_files": ["text.txt"], "weight": 1}],
                                     "validation_by": "documents"}], ids=["text", "table", "mixture"])  # fmt: skip
def test_a_file_that_grows_meanwhile_gives_no_tokens(monkeypatch, source):
    write_tokens, changed = preparation.write_tokens, "rows.jsonl" if "data_files" in source else "text.txt"

    def growing(*args):
        with open(changed, "a") as file:
            file.write('{"text": "more"}\n')
        return write_tokens(*args)

    monkeypatch.setattr(preparation, "write_tokens", growing)
    with pytest.raises(UserError, match=f"{changed} was written to while it was being prepared"):
        prepare(arguments(data_dir="x", **source))
    assert sorted(path.name for path in Path().iterdir()) == ["rows.jsonl", "text.txt"]
    monkeypatch.setattr(preparation, "write_tokens", write_tokens)
    assert prepare(arguments(data_dir="x", **source)).manifest["sources"]


def test_a_file_that_was_touched_meanwhile_is_the_same_file(monkeypatch):
    write_tokens = preparation.write_tokens

    def touching(*args):
        os.utime("text.txt", (1, 1))
        return write_tokens(*args)

    monkeypatch.setattr(preparation, "write_tokens", touching)
    assert prepare(arguments(text_files=["text.txt"])).manifest["splits"]["train"]["tokens"] == 180
