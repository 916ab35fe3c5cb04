"""Does a bad input ever end in a traceback, in silence, or in a loss? Prints one JSON line.

    python benchmarks/bad_inputs.py [--only WORDS] [--workers 1] [--limit N] [--kinds fields damage places files]

A small world is made once: a text, its tokens, a run, an adapter, a tokenizer. Then each case of bad_input_cases.py is
one `acorn` command in it, in a process forked from this one, so that it costs what the command costs and no imports. A
case fails by: traceback, crash (a signal), hang, silence (no word, or success where the value can be none), noise (more
than one line), loss (a file that was there is not what it was), litter (a refusal that leaves files), or wrong (success
with another result than without the damage). Exit code 1 if any does. `--keep FILE` writes each case's output there.
"""

import argparse
import collections
import contextlib
import hashlib
import importlib
import io
import itertools
import json
import os
import pickle
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
TIMEOUT = 60
MEMORY = 12 << 30  # of address space: a case that asks for terabytes must not take the machine down
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
MODULES = ("acorn", "torch", "transformers", "peft", "datasets", "pyarrow.parquet", "matplotlib.figure", "safetensors")


# ---- one command in a process of its own


def run_case(world: Path, argv: list[str], setup=None, seconds: float = TIMEOUT) -> tuple[int | str, str, str]:
    """(exit code, or a signal's name, or "hang"; stdout; stderr) of `acorn ARGV` in `world`."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            _child(world, argv, setup, out.fileno(), err.fileno())
        status = _wait(pid, seconds)
        texts = [(file.seek(0), file.read().decode("utf-8", "replace"))[1] for file in (out, err)]
    return status, *texts


def _child(world: Path, argv: list[str], setup, out: int, err: int) -> None:
    """Be the command, and end as the interpreter would."""
    code = 70
    try:
        os.setsid()
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(n, "w", closefd=False), "utf-8") for n in (1, 2))
        sys.stdin = io.TextIOWrapper(io.FileIO(os.devnull))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        os.chdir(world)
        if setup is not None:
            setup(world)
        importlib.import_module("acorn").main(argv)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1 if error.code else 0
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        code = _flush(code)
        os._exit(code)


def _flush(code: int) -> int:
    """The flush at the interpreter's exit, which ends in 120 where it fails."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError):
                os.write(2, b"Traceback: Exception ignored while flushing a standard stream\n")
            code = code or 120
    return code


def _wait(pid: int, seconds: float) -> int | str:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return signal.Signals(-code).name if code < 0 else code
        time.sleep(0.005)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hang"


# ---- the world


class World:
    """A folder that each case finds as it was made; `restore` copies it back only where something changed."""

    def __init__(self, folder: Path, commands, write):
        self.path, self.pristine = folder / "world", folder / "pristine"
        self.path.mkdir(parents=True)
        write(self.path)
        for argv in commands:
            code, out, err = run_case(self.path, argv)
            if code != 0:
                raise SystemExit(f"the world cannot be made: acorn {' '.join(argv)}: {code}\n{out}\n{err}")
        os.system(f"chmod -R a+rX {folder}")
        shutil.copytree(self.path, self.pristine, symlinks=True)
        self.marks = marks(self.path)
        self.hashes = contents(self.path)

    def restore(self) -> None:
        if marks(self.path) != self.marks:
            shutil.rmtree(self.path)
            shutil.copytree(self.pristine, self.path, symlinks=True)
            self.marks = marks(self.path)


def marks(folder: Path) -> dict[str, tuple]:
    """What changes when a file does, without reading it."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in folders + files:
            facts = os.lstat(os.path.join(place, name))
            found[os.path.join(place, name)] = (facts.st_mode, facts.st_size, facts.st_mtime_ns * (name in files))
    return found


def contents(folder: Path) -> dict[str, str]:
    """Each file and its hash; what comes and goes with a process is left out."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# ---- judging


def judge(case, code: int | str, out: str, err: str, before: dict, after: dict, expected) -> str | None:
    """How a case failed, or None."""
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip()]
    if code == "hang" or isinstance(code, str):
        return "hang" if code == "hang" else f"crash ({code})"
    if "Traceback" in err or "Traceback" in out or code not in (0, 1, 2, 130):
        return "traceback"
    if code == 0:
        if case.must_refuse:
            return "silence (accepted)"
        is_same = case.result is None or expected is None or case.result(out, after) == expected
        return None if is_same or lines else "wrong"
    if not lines and not case.is_mute:
        return "silence (no word)"
    lost = [name for name, digest in before.items() if after.get(name) != digest]
    if lost:
        return f"loss ({', '.join(lost[:3])})"
    said = [line for line in lines if line.startswith("acorn: ")]
    if code == 2 and (len(said) != 1 or len(lines) > 1 + case.extra_lines):
        return f"noise ({len(lines)} lines)"
    left = [name for name in after if name not in before and not name.startswith("corpora/")]
    left = [] if "training stopped" in err else left  # a run that had begun
    return f"litter ({', '.join(left[:3])})" if code == 2 and left else None


def try_all(cases: list, folder: Path, keep) -> list[dict]:
    """Each case's verdict, in order."""
    made = importlib.import_module("benchmarks.bad_input_cases")
    world, verdicts, expected = World(folder, made.COMMANDS, made.write_world), [], {}
    for case in cases:
        world.restore()
        if case.result is not None and tuple(case.argv) not in expected:
            code, out, err = run_case(world.path, case.argv)
            expected[tuple(case.argv)] = case.result(out, contents(world.path)) if code == 0 else f"failed: {err}"
            world.restore()
        if case.spoil is not None and case.spoil(world.path) is False:
            continue  # there is no such file
        before = contents(world.path) if case.spoil else world.hashes
        began = time.monotonic()
        code, out, err = run_case(world.path, case.argv, case.setup)
        failure = judge(case, code, out, err, before, contents(world.path), expected.get(tuple(case.argv)))
        seconds = round(time.monotonic() - began, 2)
        verdict = {"case": case.name, "kind": case.kind, "code": code, "failure": failure, "seconds": seconds}
        verdict["said"] = " ".join((err.strip().splitlines() or [""])[-1].split())[:300]
        verdicts.append(verdict)
        if keep is not None:
            print(json.dumps(verdict, ensure_ascii=False), file=keep, flush=True)
    return verdicts


def share_out(cases: list, workers: int, keep) -> list[dict]:
    """The cases over so many forked workers, each with a world of its own."""
    with tempfile.TemporaryDirectory(prefix="acorn-bad-inputs-", ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o755)
        pids, results = [], [Path(folder, f"result-{number}") for number in range(workers)]
        for number, result in enumerate(results):
            if pid := os.fork():
                pids.append(pid)
                continue
            try:
                result.write_bytes(pickle.dumps(try_all(cases[number::workers], Path(folder, str(number)), keep)))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        if any(codes):
            raise SystemExit("a worker failed")
        return [verdict for result in results for verdict in pickle.loads(result.read_bytes())]


def main(argv: list[str] | None = None) -> int:
    """Try all cases, list the failures on stderr, and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--kinds", nargs="+", default=["fields", "damage", "places", "files"])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--limit", type=int, help="so many cases, evenly drawn")
    parser.add_argument("--keep", type=argparse.FileType("w"), help="a JSON line a case goes there")
    flags = parser.parse_args(argv)
    os.environ.update(ENVIRONMENT)
    home = tempfile.mkdtemp(prefix="acorn-home-")
    os.environ.update(HF_HOME=home, HOME=home, MPLCONFIGDIR=home, HF_MODULES_CACHE=f"{home}/modules")
    for module in MODULES:
        importlib.import_module(module)
    fields, places = (importlib.import_module(f"benchmarks.bad_input_{name}") for name in ("cases", "places"))

    for module, _ in importlib.import_module("acorn").VERBS.values():
        importlib.import_module(module)
    everything = itertools.chain(fields.field_and_damage_cases(), places.place_cases(), places.file_cases())
    cases = [case for case in everything if case.kind in flags.kinds and flags.only in case.name]
    if flags.limit and flags.limit < len(cases):
        cases = cases[:: -(-len(cases) // flags.limit)]
    verdicts = share_out(cases, flags.workers, flags.keep)
    shutil.rmtree(home, ignore_errors=True)
    failures = [verdict for verdict in verdicts if verdict["failure"]]
    for verdict in failures:
        print(f"{verdict['failure']}: {verdict['case']}: {verdict['said']}", file=sys.stderr)
    codes = collections.Counter(str(verdict["code"]) for verdict in verdicts)
    kinds = collections.Counter(verdict["failure"].split(" (")[0] for verdict in failures)
    by_kind = collections.Counter(verdict["kind"] for verdict in verdicts)
    line = {"cases": len(verdicts), "kinds": dict(by_kind), "exit_codes": dict(codes), "failures": len(failures)}
    print(json.dumps(line | {"failed_by": dict(kinds), "seconds": round(sum(v["seconds"] for v in verdicts))}))
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
