"""The metrics make no folders: they are computed where HOME cannot be written, too."""

import pytest
from evaluate import config

from training.loop.metrics import METRICS, language_metrics


def test_no_folder_is_made(monkeypatch, tmp_path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(config, "HF_METRICS_CACHE", str(tmp_path / "file" / "cache"))  # no folder can be made there
    results = language_metrics([2.0, 4.0], [1.0, 2.0], [2.0, 2.0], 4.0)
    assert results.keys() == METRICS.keys()
    assert results["loss"] == pytest.approx(1.5)
