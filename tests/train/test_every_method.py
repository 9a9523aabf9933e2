"""Every method, trained end to end by its own recipe and calibrated, on a tiny encoder that can learn."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_checkpoint import make_checkpoint, write_similarity, write_topics

from offramp_common.bundle import Bundle
from offramp_model.methods import METHODS
from offramp_train.build import Request, resolve_config, train_bundle
from offramp_train.progress import Report

CASES = [(method.name, kind) for method in METHODS.values() for kind in method.tasks]
# Three topics: chance is 0.33. Scores: a constant has no correlation.
LEAST = {"classification": 0.8, "regression": 0.5}
# 14 where not said. past_future: its low layers learn little in the first half. be3r: routers soon send all
# rows to the first expert, and the last learns slowly from what the loss keeps for each.
EPOCHS = {"past_future": 30, "be3r": 20}
# The recipe's own where not said. romebert: the paper's gamma of 0.9 holds early exits of an encoder that
# knows nothing yet where the final one stands, often with two topics taken for one.
LOSS = {"romebert": {"gamma": 0.5}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "kind"), CASES)
def test_a_method_is_trained_calibrated_and_measured(
    method: str, kind: str, checkpoint: Path, tmp_path: Path
) -> None:
    write = write_topics if kind == "classification" else write_similarity
    table = {
        "method": method,
        "backbone": str(checkpoint),
        "training": {
            "lr": 3e-3,
            "batch": 16,
            "epochs": EPOCHS.get(method, 14),
            "stage_lr": [],
            "stage_epochs": [],
        },
        "loss": LOSS.get(method, {}),
    }
    data = write(tmp_path / "data")
    request = Request(
        resolve_config(table, where="test"), data, tmp_path / "bundle", "offramp train ..."
    )
    train_bundle(request, Report())
    bundle = Bundle.read(tmp_path / "bundle")
    bundle.verify()
    m = bundle.manifest
    assert (m.method, m.training["settings"]["recipe"]) == (method, METHODS[method].recipe)
    assert set(m.operating_points) == {"fp32", "int8"}
    metric = "accuracy" if kind == "classification" else "pearson"
    for point in m.curve:
        if point["kind"] == "operating point":
            assert point["full_depth"] > LEAST[kind], point
            assert point["full_depth"] - point[metric] < 0.1, "dev allowed 0.01; rows are few"
            assert 1 <= point["mean_depth"] <= m.n_layers
