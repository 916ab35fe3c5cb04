"""benchmarks/gpu.py: a line a part, whatever happens in it, and the parts that need no GPU."""

import json
import os
import time

import pytest

from benchmarks import gpu, gpu_parts, gpu_training


def explode(device: str) -> dict:
    raise ValueError("out of memory")


PARTS = {
    "explode": explode,
    "vanish": lambda device: os._exit(3),
    "sleep": lambda device: time.sleep(60),
    "fine": lambda device: {"figure": 1.5},
}


def test_a_part_that_fails_says_why_and_the_others_run_on(monkeypatch, capfd) -> None:
    for name, part in PARTS.items():
        monkeypatch.setattr(gpu_parts, name, part, raising=False)
    monkeypatch.setattr(gpu, "PARTS", {name: (1 if name == "sleep" else 30, True) for name in PARTS})
    monkeypatch.setattr(gpu_parts, "machine", lambda device: {})
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--device", "meta", "--only", *PARTS])
    lines = {line["part"]: line for line in map(json.loads, capfd.readouterr().out.splitlines())}
    assert ended.value.code == 1
    assert lines["explode"]["error"] == "ValueError: out of memory"
    assert any(place.startswith("test_gpu_benchmark.py:") for place in lines["explode"]["at"])
    assert lines["vanish"]["error"] == "ended with exit code 3"
    assert lines["sleep"]["error"] == "took longer than 1 s"
    assert lines["fine"]["figure"] == 1.5


def test_every_part_is_there() -> None:
    names = [name.replace("-", "_") for name in gpu.PARTS]
    assert all(callable(getattr(gpu_parts, name, None) or getattr(gpu_training, name, None)) for name in names)


def test_without_a_gpu_the_parts_that_need_one_are_skipped(capfd) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--device", "meta", "--only", "machine", "speed-trainer"])
    machine, speed = map(json.loads, capfd.readouterr().out.splitlines())
    assert ended.value.code == 0
    assert machine["torch"] and speed["skipped"] == "needs a GPU"
