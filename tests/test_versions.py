"""The promise of the Hub: what one version of transformers saves writes the same text under every other version.

`make test-versions` unpacks versions of transformers beside the environment and names their folders in ACORN_VERSIONS;
without it the crossed tests skip. The environment's own version is always one of those compared.
"""

import json
import logging
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import transformers
from packaging.requirements import Requirement
from packaging.version import Version

from modeling import compat

from .test_hub_copy import WITHOUT_ACORN
from .variants import INEXACT_WITH_CACHE, VARIANTS

ROOT = Path(__file__).parent.parent
FOLDERS = [folder for folder in os.environ.get("ACORN_VERSIONS", "").split(os.pathsep) if folder]
crossed = pytest.mark.skipif(not FOLDERS, reason="ACORN_VERSIONS names no other transformers: make test-versions does")

SAVE = """
import sys, pathlib
from tests.variants import VARIANTS, random_model, tiny_config

for name, overrides in VARIANTS.items():
    random_model(tiny_config(**overrides)).save_pretrained(pathlib.Path(sys.argv[1], name))
"""

GENERATE = """
import json, pathlib, torch, transformers
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
ids = torch.randint(1, 61, (2, 12), generator=torch.Generator().manual_seed(42))
mask = torch.ones_like(ids)
mask[1, :4] = 0  # the second row is shorter, and padded on the left
options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
ways = {
    "cached": {},
    "uncached": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "padded": {"attention_mask": mask},
    "padded uncached": {"attention_mask": mask, "use_cache": False},
    "padded static": {"attention_mask": mask, "cache_implementation": "static"},
}
written = {}
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    written[folder.name] = {}
    for way, more in ways.items():
        rows = ids.where(mask == 1, 0) if "attention_mask" in more else ids
        more = more if "attention_mask" in more else {"attention_mask": torch.ones_like(ids), **more}
        written[folder.name][way] = model.generate(rows, **options, **more)[:, 12:].tolist()
print(json.dumps({"version": transformers.__version__, "written": written}))
"""


def run(script: str, *arguments: Path, overlay: str, cwd: Path, bare: bool) -> str:
    """Run a script under the transformers in folder `overlay` ("" is the environment's); returns what it printed."""
    paths = [overlay] if bare else [overlay, str(ROOT)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {
        "PYTHONPATH": os.pathsep.join(str(Path(path).absolute()) for path in paths if path),
        "HF_MODULES_CACHE": str(cwd / f"modules-{Path(overlay).name}"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", (WITHOUT_ACORN if bare else "") + script, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "deprecat" not in done.stderr.lower(), done.stderr[-3000:]
    return done.stdout


@crossed
def test_every_version_writes_what_every_other_version_saved(tmp_path: Path) -> None:
    overlays = ["", *FOLDERS]
    table, versions = {}, set()
    for number, saver in enumerate(overlays):
        saved = tmp_path / f"saved-{number}"
        run(SAVE, saved, overlay=saver, cwd=tmp_path, bare=False)
        for loader in overlays:
            printed = run(GENERATE, saved, overlay=loader, cwd=tmp_path, bare=True)
            table[number, loader] = json.loads(printed.splitlines()[-1])
            versions.add(table[number, loader]["version"])
    assert len(versions) == len(overlays), "two folders of ACORN_VERSIONS hold the same version"
    expected = table[0, ""]["written"]
    assert set(expected) == set(VARIANTS)
    different = [
        f"saved by {overlays[saver] or 'the environment'}, loaded by {found['version']}: {name}, {way}"
        for (saver, _), found in table.items()
        for name, ways in found["written"].items()
        for way, tokens in ways.items()
        if tokens != expected[name][way]
    ]
    assert different == []
    for name, ways in expected.items():
        if name not in INEXACT_WITH_CACHE:
            assert ways["cached"] == ways["uncached"] == ways["static"], name
            assert ways["padded"] == ways["padded uncached"] == ways["padded static"], name


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_both_names_of_the_cache_are_taken(name: str, tiny_model, ids: torch.Tensor) -> None:
    model = tiny_model()
    for part, output in ((model, "logits"), (model.model, "last_hidden_state")):
        cache = transformers.DynamicCache(config=model.config)
        part(ids[:, :8], **{name: cache}, use_cache=True)
        continued = part(ids[:, 8:], **{name: cache}, use_cache=True)
        assert torch.allclose(continued[output], part(ids, use_cache=False)[output][:, 8:], atol=1e-5)
        assert continued[compat.CACHE_NAME] is cache
        with pytest.raises(ValueError, match="past_key_values"):
            part(ids, cache=cache, past_key_values=cache)


BEYOND = {"5.16.2": True, "5.17.0": False, "5.24.3": False, "5.25.0.dev0": True, "6.0.0": True}


@pytest.mark.parametrize(("version", "warns"), BEYOND.items())
def test_a_version_beyond_the_tested_range_is_said_once(version: str, warns: bool, caplog, monkeypatch) -> None:
    monkeypatch.setattr(compat.logger, "propagate", True)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    compat.logger.warning_once.cache_clear()
    for _ in range(2):
        compat.warn_beyond_range(version)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == warns
    assert all(version in line and "transformers==" in line for line in said)


def test_pyproject_states_the_range_that_the_model_states() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = next(line for line in project["dependencies"] if line.startswith("transformers"))
    oldest, (major, minor) = compat.OLDEST_TRANSFORMERS, compat.NEWEST_TRANSFORMERS
    assert bounds == f"transformers>={oldest[0]}.{oldest[1]},<{major}.{minor + 1}"


def test_the_oldest_versions_are_those_that_pyproject_states() -> None:
    lines = [line for line in (ROOT / "tests/oldest.txt").read_text().splitlines() if "==" in line]
    oldest = dict(line.split("==") for line in lines)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    stated = dict(line.split(",")[0].split(">=") for line in project["dependencies"])
    for name, version in stated.items():
        if name != "torch":
            assert f"{oldest[name]}.".startswith(f"{version}."), name


def test_the_lock_is_exact_and_inside_the_ranges() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all("==" in line for line in lines)
    locked = {name.lower().replace("_", "-"): Version(version) for name, version in (ln.split("==") for ln in lines)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in map(Requirement, project["dependencies"]):
        assert locked[requirement.name.replace("_", "-")] in requirement.specifier, requirement
    assert locked["transformers"].release[:2] == compat.NEWEST_TRANSFORMERS
