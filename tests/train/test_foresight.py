"""The table that planners read: recorded from a bundle's exits, kept in its manifest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from toy_models import toy_bundle

from offramp_common.bundle import Bundle
from offramp_train.foresight import record_forecasts
from offramp_train.measure import subject
from offramp_train.progress import Report
from offramp_train.tables import read_rows


@pytest.mark.parametrize("method", ["deebert", "pabee"])
def test_what_is_recorded_tells_how_deep_samples_really_run(tmp_path: Path, method: str) -> None:
    made = toy_bundle(tmp_path / "toy", method, n_layers=4, split=2)
    rng = np.random.default_rng(0)
    words = [" ".join(f"w{w}" for w in rng.integers(1, 30, rng.integers(2, 9))) for _ in range(200)]
    label = made.manifest.task.labels[0]
    file = tmp_path / "rows.tsv"
    file.write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text in words))
    rows, before = read_rows(file), Bundle.read(made.path).manifest
    record_forecasts(made, rows, "all", Report())
    after = Bundle.read(made.path)
    after.verify()
    assert after.manifest.operating_points == before.operating_points
    assert after.digest(0) == made.digest(0)
    for precision, table in after.manifest.forecasts.items():
        here = subject(after, "torch", rows)
        depth_N, _ = here.run(after.knobs(precision), Report(), "")
        # Bins lean towards the mean of all, by four samples of a few dozen.
        assert table.layers_left()[0][0] == pytest.approx(depth_N.mean(), abs=0.15)
    assert after.manifest.forecasts
