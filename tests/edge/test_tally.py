"""The summary of a run."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest

from offramp_edge.answers import Answer
from offramp_edge.tally import Percentiles, Tally


def answer(where: str = "device", **fields: object) -> Answer:
    values: dict[str, Any] = {
        "id": "1",
        "text": "x",
        "label": "a",
        "probability": 0.5,
        "exit_depth": 2,
        "where": where,
        "reason": "",
        "split": 2,
        "complete": True,
        "confidence": 0.5,
        "ms": 4.0,
    }
    return Answer(**(values | fields))


def test_percentiles_are_exact_to_a_hundredth() -> None:
    rng, percentiles = random.Random(0), Percentiles()
    values = sorted(rng.lognormvariate(2, 1.5) for _ in range(5000))
    for value in values:
        percentiles.add(value)
    for share in (0.01, 0.5, 0.95, 0.999):
        assert percentiles.at(share) == pytest.approx(
            values[math.ceil(share * len(values)) - 1], rel=0.0101
        )
    assert Percentiles().at(0.5) is None


def test_it_counts_places_reasons_labels_and_bytes() -> None:
    tally = Tally()
    tally.add(answer(), "a")
    tally.add(answer("cloud", exit_depth=6, bytes_up=700), "b")
    tally.add(answer("fallback", reason="deadline", exit_depth=4), None)
    value = tally.to_json(2.0)
    assert value["where"] == {"device": 1, "cloud": 1, "fallback": 1}
    assert value["reasons"] == {"deadline": 1}
    assert (value["accuracy"], value["labelled"]) == (0.5, 2)
    assert (value["mean_depth"], value["bytes_up"]) == (4.0, 700)
    assert value["exit_depths"] == {"2": 1, "4": 1, "6": 1}
    assert "deadline 1" in tally.words(2.0)
    json.dumps(value, allow_nan=False)


def test_regression_has_an_error_rather_than_an_accuracy() -> None:
    tally = Tally()
    tally.add(answer(label=2.0), 3.0)
    tally.add(answer(label=2.0), 2)
    value = tally.to_json(1.0)
    assert (value["mean_squared_error"], value["accuracy"]) == (0.5, None)
    assert "mean squared error" in tally.words(1.0)


def test_a_run_without_input_says_so() -> None:
    assert Tally().words(1.0) == "no input"
    assert Tally().to_json(1.0)["p50_ms"] is None
    assert "2 bad lines" in Tally(failed=2).words(1.0)


def test_an_answer_is_json_without_nan() -> None:
    given = answer(logits=(1.0, math.nan, math.inf), probability=0.0)
    text = json.dumps(given.to_json(), allow_nan=False)
    assert json.loads(text)["logits"] == [1.0, None, None]
    assert "logits" not in answer().to_json()
