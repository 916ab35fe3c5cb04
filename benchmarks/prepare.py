"""How fast is `acorn prepare`, in how much memory, and is its result always the same? Prints one JSON line.

    python benchmarks/prepare.py --gigabytes 1 --tokenizer gpt2 [--num_proc 1 2] [--tiktoken] [--kills 3]

The corpus is the standard library of the running Python, repeated and shuffled until it has so many bytes, written once
into the workspace as a few parquet shards (or text files). Each entry of --num_proc is one whole `acorn prepare`, with
the tokenizer's own threads off; --threads adds one process with them on. Peak memory is that of the process and its
workers together: proportional set size (Linux), so that shared pages count once, looked at ten times a second. --kills
ends one more preparation with signal 9 at random moments, goes on with it, and compares every byte. --tiktoken encodes
the same documents with GPT-2's ranks, read from the tokenizer itself. Without --tokenizer a BPE is trained on the text.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARDS = 8
ROWS_AT_ONCE = 200  # of a parquet shard that is being written


# --- the corpus -------------------------------------------------------------------------------------------------------


def standard_library() -> list[str]:
    """Every module below the standard library, tests and all, that is UTF-8 and not empty."""
    texts = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        try:
            texts.append(path.read_bytes().decode())
        except UnicodeDecodeError:  # some modules are there to test other encodings
            continue
    return [text for text in texts if text and "\0" not in text]


def documents(total_bytes: int, seed: int):
    """Yield the modules in a new order each time round, until they have so many bytes together."""
    texts, draw = standard_library(), random.Random(seed)
    while True:
        draw.shuffle(texts)
        for text in texts:
            yield text
            total_bytes -= len(text.encode())
            if total_bytes <= 0:
                return


def write_corpus(folder: Path, total_bytes: int, seed: int, form: str) -> None:
    """Write the documents in SHARDS files, in turn; a folder that is there already has them."""
    if folder.exists():
        return
    building = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    {"parquet": write_parquet, "text": write_text}[form](building, documents(total_bytes, seed))
    building.rename(folder)


def write_parquet(folder: Path, texts) -> None:
    """Write shards with a `text` column and a `url`, as data sets on the Hub have them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("text", pa.string()), ("url", pa.string())])
    names = [folder / f"train-{index:05d}-of-{SHARDS:05d}.parquet" for index in range(SHARDS)]
    writers, batch = [pq.ParquetWriter(name, schema) for name in names], []
    for number, text in enumerate(texts):
        batch.append({"text": text, "url": f"https://example.org/{number}"})
        if len(batch) == ROWS_AT_ONCE:
            writers[number // ROWS_AT_ONCE % SHARDS].write_table(pa.Table.from_pylist(batch, schema=schema))
            batch = []
    writers[0].write_table(pa.Table.from_pylist(batch, schema=schema))
    for writer in writers:
        writer.close()


def write_text(folder: Path, texts) -> None:
    """Write a few large text files: each is one long document."""
    files = [(folder / f"{index:05d}.txt").open("w", encoding="utf-8", newline="") for index in range(SHARDS)]
    for number, text in enumerate(texts):
        files[number % SHARDS].write(text)
    for file in files:
        file.close()


# --- preparing, as a person does --------------------------------------------------------------------------------------


class Preparation:
    """One `acorn prepare` in a process of its own, watched."""

    def __init__(self, workspace: Path, data_dir: str, flags: list[str], num_proc: int, threads: bool = False):
        recipe = workspace / "prepare.yaml"
        recipe.write_text("data: {dataset: python-stdlib}\n")  # the flags replace it
        command = [sys.executable, "-m", "training.prepare", str(recipe), *flags, "--data_dir", data_dir]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": str(threads).lower()}
        environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(workspace / "hf")}
        self.log = (workspace / f"{Path(data_dir).name}.log").open("a+")
        self.peak, self.begun = 0, time.perf_counter()
        self.process = subprocess.Popen(
            [*command, "--num_proc", str(num_proc)], cwd=workspace, env=environment, stdout=self.log, stderr=self.log
        )

    def wait(self, seconds: float = float("inf")) -> bool:
        """Watch until it ends, or so long; say whether it has ended. An error of its own ends this process."""
        until = time.perf_counter() + seconds
        while self.process.poll() is None and time.perf_counter() < until:
            self.peak = max(self.peak, memory_of_tree(self.process.pid))
            time.sleep(0.1)
        self.seconds = time.perf_counter() - self.begun
        if self.process.returncode:
            self.log.seek(0)
            sys.exit(f"acorn prepare failed:\n{self.log.read()[-2000:]}")
        return self.process.returncode == 0

    def kill(self) -> None:
        """End it as a power cut would."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def memory_of_tree(pid: int) -> int:
    """Bytes of a process and all below it; pages that several share are divided among them (Linux's Pss)."""
    total, waiting = 0, [pid]
    while waiting:
        process = Path(f"/proc/{waiting.pop()}")
        try:
            lines = (process / "smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
            for task in (process / "task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except (OSError, StopIteration):  # it has ended meanwhile
            continue
    return total


def contents(folder: Path) -> dict[str, str]:
    """Each file below a folder and the hash of what it holds."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            found[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def measured(workspace: Path, name: str, flags: list[str], num_proc: int, threads: bool = False) -> tuple[dict, dict]:
    """Figures of one whole preparation, and the files that it made, which are removed."""
    directory = workspace / name
    shutil.rmtree(directory, ignore_errors=True)
    run = Preparation(workspace, str(directory), flags, num_proc, threads)
    run.wait()
    files = contents(directory)
    splits = json.loads((directory / "manifest.json").read_text())["splits"]
    size, tokens = (sum(split[what] for split in splits.values()) for what in ("bytes", "tokens"))
    shutil.rmtree(directory)
    figures = {"seconds": run.seconds, "MB_per_second": size / run.seconds / 1e6, "peak_MB": run.peak / 1e6}
    return figures | {"tokens": tokens, "bytes": size}, files


def killed(workspace: Path, flags: list[str], num_proc: int, kills: int, seconds: float, seed: int) -> dict[str, str]:
    """The files of a preparation that is killed so often, at moments spread over the time that a whole one takes."""
    directory, draw = workspace / "killed", random.Random(seed)
    shutil.rmtree(directory, ignore_errors=True)
    moments = sorted(draw.uniform(0.1, 0.9) for _ in range(kills))
    done = 0.0
    for moment in moments:
        run = Preparation(workspace, str(directory), flags, num_proc)
        start_up = 5 if done else 0  # of a process that goes on, and reads the files to know them again
        if run.wait((moment - done) * seconds + start_up):
            sys.exit("a preparation ended before it was killed: the corpus is too small for so many kills")
        run.kill()
        done = moment
    Preparation(workspace, str(directory), flags, num_proc).wait()
    files = contents(directory)
    shutil.rmtree(directory)
    return files


# --- tiktoken on the same text ----------------------------------------------------------------------------------------


def tiktoken_speed(folder: Path, tokenizer: str, threads: int, limit: int) -> dict:
    """MB/s of tiktoken over at most `limit` bytes of the documents, in batches as `acorn prepare` takes them."""
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str
    from transformers import AutoTokenizer

    hf = AutoTokenizer.from_pretrained(tokenizer)
    encoding = tiktoken.Encoding(
        "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks(hf), special_tokens={hf.eos_token: hf.eos_token_id}
    )
    size = tokens = 0
    seconds = 0.0
    for texts in batches(folder, limit):
        begun = time.perf_counter()
        encoded = encoding.encode_ordinary_batch(texts, num_threads=threads)
        seconds += time.perf_counter() - begun
        size, tokens = size + sum(len(text.encode()) for text in texts), tokens + sum(map(len, encoded))
    return {"MB_per_second": size / seconds / 1e6, "bytes": size, "tokens": tokens, "threads": threads}


def batches(folder: Path, limit: int):
    """Yield lists of documents of about a million characters each, until `limit` characters are reached."""
    batch, size = [], 0
    for text in read_back(folder):
        batch.append(text)
        size += len(text)
        if size >= 1_000_000:
            yield batch
            limit -= size
            batch, size = [], 0
        if limit <= 0:
            return
    yield batch


def ranks(hf) -> dict[bytes, int]:
    """Each token of a byte-level BPE as bytes, and its id, which is the rank of its merge."""
    from training.data.tokenizers import BYTE_VOCABULARY

    vocabulary = hf.backend_tokenizer.get_vocab(with_added_tokens=False)
    return {
        bytes(BYTE_VOCABULARY[character] for character in token): rank
        for token, rank in vocabulary.items()
        if token != hf.eos_token
    }


def read_back(folder: Path):
    """The documents of the corpus, in the order of its shards."""
    if list(folder.glob("*.txt")):
        yield from (path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt")))
        return
    import pyarrow.parquet as pq

    for path in sorted(folder.glob("*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(100, columns=["text"]):
            yield from batch.column(0).to_pylist()


def arguments() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of text (10^9 bytes)")
    parser.add_argument("--num_proc", type=int, nargs="+", default=[1, 2], help="one whole preparation each")
    parser.add_argument("--threads", action="store_true", help="also one process with the tokenizer's own threads")
    parser.add_argument("--tokenizer", help="directory or id (default: a BPE trained on the text)")
    parser.add_argument("--tiktoken", action="store_true", help="also tiktoken over the first 100 MB of the text")
    parser.add_argument("--kills", type=int, default=0, help="of one more preparation, which must come out the same")
    parser.add_argument("--format", choices=("parquet", "text"), default="parquet", help="rows, or long texts")
    parser.add_argument("--shard_size", type=int, default=50_000_000, help="tokens a shard file")
    parser.add_argument("--seed", type=int, default=1, help="of the shuffling and of the moments of the kills")
    parser.add_argument("--workspace", type=Path, help="a folder that keeps the corpus (default: a temporary one)")
    return parser.parse_args()


def main() -> None:
    """Write the corpus, prepare it in every way that is asked for, compare, and print the figures."""
    args = arguments()
    with tempfile.TemporaryDirectory(prefix="acorn-prepare-") as temporary:
        workspace = (args.workspace or Path(temporary)).absolute()
        corpus = workspace / f"{args.format}-{args.gigabytes:g}-{args.seed}"
        write_corpus(corpus, int(args.gigabytes * 1e9), args.seed, args.format)
        source = ["--data_files", f"{corpus}/*.parquet"] if args.format == "parquet" else ["--text_files", str(corpus)]
        flags = [*source, "--validation_by", "documents", "--validation_fraction", "0.0005"]
        flags += ["--shard_size", str(args.shard_size), "--tokenizer", args.tokenizer or "bpe"]
        print(json.dumps(figures(args, workspace, corpus, flags)))


def figures(args, workspace: Path, corpus: Path, flags: list[str]) -> dict:
    """Every figure of the one JSON line."""
    results, files, found = {}, {}, {"gigabytes": args.gigabytes, "format": args.format}
    for num_proc in args.num_proc:
        results[f"{num_proc} process(es)"], files[num_proc] = measured(workspace, f"p{num_proc}", flags, num_proc)
    if args.threads:
        results["1 process, threads"], files["threads"] = measured(workspace, "threads", flags, 1, threads=True)
    first = files[args.num_proc[0]]
    found |= {"prepare": results, "same_bytes": all(made == first for made in files.values())}
    if args.kills:
        num_proc = args.num_proc[-1]
        seconds = results[f"{num_proc} process(es)"]["seconds"]
        made = killed(workspace, flags, num_proc, args.kills, seconds, args.seed)
        found |= {"kills": args.kills, "same_bytes_after_kills": made == first}
    if args.tiktoken:
        limit = min(100_000_000, int(args.gigabytes * 1e9))
        counts = sorted({1, *args.num_proc})
        found["tiktoken"] = [tiktoken_speed(corpus, args.tokenizer, threads, limit) for threads in counts]
    return found


if __name__ == "__main__":
    main()
