"""Sources: documents come out whole and in order, and each bad input is refused in one line that says the mend."""

import http.server
import json
import threading
from collections import Counter
from types import SimpleNamespace

import pytest

from training.data.sources import (
    SOURCE_DEFAULTS,
    fingerprint_sources,
    licence_of,
    read_documents,
    unit_hash,
)
from training.system.errors import UserError


def arguments(**changes) -> SimpleNamespace:
    """Return data arguments with the given fields set."""
    return SimpleNamespace(**SOURCE_DEFAULTS | {"mixture": None, "validation_seed": 2357} | changes)


def texts(**changes) -> list[str]:
    return [document.text for document in read_documents(arguments(**changes))]


def write_rows(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Keep what `datasets` caches out of the home directory."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    monkeypatch.setattr("datasets.config.DOWNLOADED_DATASETS_PATH", cache / "downloads")


@pytest.fixture
def folder(tmp_path):
    """A folder with text at two depths, and with files that are not text."""
    (tmp_path / "deep/.git").mkdir(parents=True)
    (tmp_path / "b.txt").write_bytes(b"one\r\ntwo\rthree\n")
    (tmp_path / "a.md").write_bytes("\ufeffé\x0b\u2028x".encode())
    (tmp_path / "deep/c.txt").write_bytes(b"deep")
    (tmp_path / "deep/.git/config").write_bytes(b"hidden")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    return tmp_path


def test_stdlib_is_text_with_a_licence():
    named = list(read_documents(arguments(dataset="python-stdlib")))
    names = [document.name for document in named]
    assert names == sorted(names) and {"abc.py", "os.py"} <= set(names) and all(document.text for document in named)
    assert licence_of(arguments(dataset="python-stdlib")) == "PSF-2.0"
    assert licence_of(arguments(text_files=["x"])) is None
    fingerprint = fingerprint_sources(arguments(dataset="python-stdlib"))
    assert fingerprint["kind"] == "python-stdlib" and fingerprint["python"].startswith("3.")


def test_text_files_keep_every_character_but_a_byte_order_mark(folder):
    expected = ["é\x0b\u2028x", "one\r\ntwo\rthree\n", "deep"]
    assert texts(text_files=[str(folder)]) == expected
    assert texts(text_files=[f"{folder}/b.txt", f"{folder}/**/c.txt"]) == expected[1:]
    assert (
        texts(text_files=f"{folder}/b.txt") == texts(text_files=[f"{folder}/b.txt", f"{folder}/b.*"]) == expected[1:2]
    )


def test_a_folder_is_listed_first_without_what_tools_fill(folder, monkeypatch, capsys):
    for name in (".venv/lib/x.py", "env/lib/x.py", "node_modules/x.js", "__pycache__/x.txt", ".hidden.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("not mine")
    (folder / "env/pyvenv.cfg").write_text("home = /usr")
    monkeypatch.chdir(folder)
    assert texts(text_files=["."]) == texts(text_files=["."]) == ["é\x0b\u2028x", "one\r\ntwo\rthree\n", "deep"]
    said = capsys.readouterr().err
    assert said.count("text_files='.': 3 text files, 29 bytes (other files skipped: 1)") == said.count("\n") <= 1
    (folder / "hidden").mkdir()
    (folder / "hidden/.a.txt").write_text("a")
    with pytest.raises(UserError, match="text_files='hidden': the folder holds no text file"):
        texts(text_files=["hidden"])


def test_the_embedded_text_yields_to_a_named_one(folder):
    assert texts(dataset="python-stdlib", text_files=[f"{folder}/b.txt"]) == ["one\r\ntwo\rthree\n"]


def test_fingerprint_follows_the_content(folder):
    before = fingerprint_sources(arguments(text_files=[str(folder)]))
    assert before == fingerprint_sources(arguments(text_files=[str(folder)]))
    (folder / "b.txt").write_bytes(b"one\r\ntwo\rThree\n")
    assert before != fingerprint_sources(arguments(text_files=[str(folder)]))


@pytest.fixture
def address(folder, monkeypatch):
    """The address of a server that gives the folder's files to those who know the password or the token."""

    class Guarded(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=folder)

        def send_head(self):
            name, _, query = self.path.partition("?")
            known = query == "token=SECRET" or self.headers["Authorization"] == "Basic bWU6U0VDUkVU"  # me:SECRET
            if name.startswith("/closed") and not known:
                return self.send_error(403)
            self.path = name.removeprefix("/closed")
            return super().send_head()

        def log_message(self, *args):
            pass

    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)  # conftest forbids the Hub; this server is here
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Guarded)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_url(address):
    (document,) = read_documents(arguments(text_files=[f"{address}/b.txt"]))
    assert (document.name, document.text) == (f"{address}/b.txt", "one\r\ntwo\rthree\n")
    with pytest.raises(UserError, match=r"text_files='http.*nothing': cannot be downloaded \(.*\); .* a local file"):
        texts(text_files=[f"{address}/nothing"])


@pytest.mark.parametrize("field", ["text_files", "data_files"])
@pytest.mark.parametrize("secret", ["token", "password"])
def test_secrets_of_an_address_are_used_and_shown_nowhere(folder, address, field, secret, capsys, tmp_path_factory):
    (folder / "rows.jsonl").write_text('{"text": "one"}\n')
    name = f"{address}/closed/{'b.txt' if field == 'text_files' else 'rows.jsonl'}"
    given = f"{name}?token=SECRET" if secret == "token" else name.replace("//", "//me:SECRET@")
    data = arguments(**{field: [given]})
    assert [document.text[:3] for document in read_documents(data)] == ["one"]
    assert fingerprint_sources(data)["files"][0]["path"] == name
    with pytest.raises(UserError) as refusal:
        texts(**{field: [given.replace("closed/", "closed/no")]})
    cached = [path.read_bytes() for path in tmp_path_factory.getbasetemp().glob("cache*/**/*.json")]
    shown = capsys.readouterr()
    assert "SECRET" not in f"{refusal.value} {list(read_documents(data))} {shown.out} {shown.err} {cached}"
    assert f"{field}: the user and query of {name} are not stored" in shown.err


def test_tables(tmp_path):
    rows = [{"text": "a\r\nb", "n": 1}, {"text": "", "n": 2}, {"text": "é", "n": 3}]
    write_rows(tmp_path / "x.jsonl", rows)
    (tmp_path / "y.json").write_text(json.dumps([{"text": "list"}]))
    from datasets import Dataset

    Dataset.from_list([{"text": "parquet"}]).to_parquet(tmp_path / "z.parquet")
    files = [f"{tmp_path}/*.json*", f"{tmp_path}/z.parquet"]
    assert texts(data_files=files) == ["a\r\nb", "é", "list", "parquet"]  # a row without text is no document
    assert [document.name for document in read_documents(arguments(data_files=files))][1] == f"{tmp_path}/x.jsonl:2"
    assert len(fingerprint_sources(arguments(data_files=files))["files"]) == 3


def test_dataset_directories(tmp_path):
    for name, streaming in (("tables", False), ("streams", True)):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "train.jsonl", [{"body": "a"}, {"body": "b\r\n"}])
        directory = str(tmp_path / name)
        assert texts(dataset=directory, text_column="body", streaming=streaming) == ["a", "b\r\n"]
        assert fingerprint_sources(arguments(dataset=directory))["files"][0]["path"] == "train.jsonl"


def test_a_dataset_of_text_files_keeps_line_breaks(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\n")
    assert texts(dataset=str(tmp_path)) == ["one\ntwo\n"]


def test_a_dataset_that_was_a_script_is_read_from_the_hubs_conversion(tmp_path, monkeypatch):
    import datasets

    file = str(tmp_path / "0000.parquet")
    datasets.Dataset.from_list([{"text": "converted"}]).to_parquet(file)
    calls = []

    def load_dataset_builder(path, name=None, revision=None):
        calls.append(revision)
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found x.py")
        config, info = SimpleNamespace(data_files={"train": [file]}), SimpleNamespace(builder_name="parquet")
        return SimpleNamespace(config=config, info=info)

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    assert texts(dataset="someone/x") == ["converted"]
    assert calls == [None, "refs/convert/parquet"]


def test_a_file_that_the_hub_does_not_give_is_named(monkeypatch):
    import datasets

    def load_dataset_builder(path, name=None):
        address = "hf://datasets/someone/x@main/0000.parquet"
        config, info = SimpleNamespace(data_files={"train": [address]}), SimpleNamespace(builder_name="parquet")
        return SimpleNamespace(config=config, info=info)

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    with pytest.raises(UserError, match=r"dataset='someone/x': hf://datasets/.*0000.parquet cannot be downloaded \("):
        texts(dataset="someone/x")


def test_mixture_shares_and_repeats(tmp_path):
    small = write_rows(tmp_path / "small.jsonl", [{"text": f"s{n}"} for n in range(5)])
    large = write_rows(tmp_path / "large.jsonl", [{"text": f"l{n}"} for n in range(300)])
    mixture = [{"data_files": [small], "weight": 1}, {"data_files": [large], "weight": 3.0}]
    drawn = list(read_documents(arguments(mixture=mixture)))
    assert drawn == list(read_documents(arguments(mixture=mixture)))
    assert drawn != list(read_documents(arguments(mixture=mixture, validation_seed=1)))
    counts = Counter(document.text for document in drawn)
    assert {text for text in counts if text[0] == "l"} == {f"l{n}" for n in range(300)}  # nothing is left out
    assert drawn[-1].text == "l299"  # and it stops at once
    assert abs(sum(counts[f"s{n}"] for n in range(5)) / len(drawn) - 0.25) < 0.08
    numbers = {(document.number, document.text) for document in drawn}
    assert len(numbers) == len({number for number, _ in numbers}) == 305
    assert fingerprint_sources(arguments(mixture=mixture))["parts"][0]["weight"] == 1


def test_unit_hash_is_even():
    points = [unit_hash("x", 1, number) for number in range(4000)]
    assert abs(sum(points) / 4000 - 0.5) < 0.03 and min(points) >= 0 and max(points) < 1


BAD_FILES = {"empty.txt": b"", "binary.txt": b"ab\0c", "latin.txt": b"caf\xe9!", "bad.jsonl": b'{"text": "a"}\n{oh\n'}
BAD_ROWS = {
    "rows.jsonl": [{"body": "a", "n": 1}],
    "number.jsonl": [{"text": "a"}, {"text": None}, {"text": 5}],
    "half.jsonl": [{"text": "\ud800"}],
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "no text: name a source, such as --text_files FILE, or --dataset python-stdlib"),
        ({"text_files": ["a"], "text_column": "body"}, "text_column='body': has no effect on text_files; leave it out"),
        ({"data_files": ["a"], "dataset_split": "dev"}, "dataset_split='dev': has no effect on data_files"),
        ({"dataset": "python-stdlib", "dataset_config": "x"}, "dataset_config='x': has no effect on python-stdlib"),
        ({"text_files": ["a"], "data_files": ["b"]}, "text_files and data_files: two sources at once; name one"),
        ({"text_files": ["none.txt"]}, "text_files='none.txt': there is no such file; check the path"),
        ({"text_files": ["*.nothing"]}, "text_files='*.nothing': the pattern matches no file; check it"),
        ({"text_files": ["void"]}, "text_files='void': the folder holds no text file; name one that does"),
        ({"text_files": ["empty.txt"]}, "text_files='empty.txt': the file is empty; name one with text in it"),
        ({"text_files": ["binary.txt"]}, "text_files='binary.txt': is binary (a NUL byte at offset 2); name text"),
        ({"text_files": ["latin.txt"]}, "text_files='latin.txt': is not UTF-8 (byte 0xE9 at offset 3); convert it"),
        ({"data_files": ["none.jsonl"]}, "data_files='none.jsonl': there is no such file"),
        ({"data_files": ["empty.txt"]}, "data_files='empty.txt': the file is empty"),
        ({"data_files": ["bad.jsonl"]}, "data_files='bad.jsonl': line 2: is not JSON ("),
        ({"data_files": ["rows.jsonl"]}, "text_column='text': rows.jsonl has no such column; it has body, n"),
        ({"data_files": ["number.jsonl"]}, "data_files='number.jsonl': line 3: holds int in 'text', not text; fix"),
        ({"data_files": ["half.jsonl"]}, "data_files='half.jsonl': line 1: is not UTF-8 (lone surrogate U+D800"),
        ({"data_files": ["latin.txt"]}, "data_files='latin.txt': is not a known kind of table (.json"),
        ({"data_files": [""]}, "data_files='': does not name a file"),
        ({"text_files": [" "]}, "text_files=' ': does not name a file"),
        ({"text_files": ["a" * 5000]}, f"text_files='{'a' * 100}': File name too long; check the path"),
        ({"data_files": ["a\0b"]}, "data_files='a\\x00b': embedded null byte; check the path"),
        (
            {"dataset": "http://me:S@h/x"},
            "dataset='http://h/x': is a web address; give it to --text_files or --data_files",
        ),
        ({"dataset": "./none"}, "dataset='./none': cannot be loaded ("),
        ({"dataset": "sets", "text_column": "x"}, "text_column='x': train.jsonl has no such column; it has body"),
        (
            {"dataset": "sets", "dataset_split": "dev"},
            "unknown dataset_split 'dev': choose from train. It is of dataset='sets'.",
        ),
        ({"mixture": [{"text_files": "a"}]}, "mixture[0].weight=None: must be a number above 0"),
        ({"mixture": [{"dataset": "a", "weight": 0}]}, "mixture[0].weight=0: must be a number above 0"),
        ({"mixture": [{"weight": 1}]}, "no text: name a source"),
        ({"mixture": [{"text_file": "a", "weight": 1}]}, "unknown key in mixture[0] 'text_file': did you mean"),
    ],
)
def test_bad_input_is_refused_in_one_line(tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "void").mkdir()
    (tmp_path / "sets").mkdir()
    for name, content in BAD_FILES.items():
        (tmp_path / name).write_bytes(content)
    for name, rows in BAD_ROWS.items():
        write_rows(tmp_path / name, rows)
    write_rows(tmp_path / "sets/train.jsonl", [{"body": "a"}])
    with pytest.raises(UserError) as refusal:
        texts(**changes)
    assert str(refusal.value).replace(f"{tmp_path}/sets/", "").startswith(message)
    assert "\n" not in str(refusal.value)
