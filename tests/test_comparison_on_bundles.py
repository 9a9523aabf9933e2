"""What the comparison does with bundles that its runs left: timings, and the bandit's pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from online import SCALES, World, measured
from timings import chosen_points, time_exits, time_points
from toy_models import LABELS, toy_bundle

from offramp_common.bundle import Bundle
from offramp_model.export import add_graphs
from offramp_train.measure import subject
from offramp_train.progress import Report
from offramp_train.tables import Rows

N = 3  # layers


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Bundle]:
    """A method's bundle with an exit after every layer, and the same model with the last alone."""
    folder = tmp_path_factory.mktemp("bundles")
    mine = toy_bundle(folder / "mine", "pabee", n_layers=N)
    plain = toy_bundle(folder / "plain", "pabee", n_layers=N, exits=(N,))
    return add_graphs(mine, ("fp32",)), add_graphs(plain, ("fp32",))


def _rows(path: Path, count: int) -> Rows:
    rng = np.random.default_rng(0)
    texts = tuple(
        " ".join(f"w{i}" for i in rng.integers(0, 96, rng.integers(1, 9))) for _ in range(count)
    )
    return Rows(
        path, texts, tuple(LABELS[i] for i in rng.integers(0, 5, count)), tuple(range(count))
    )


def test_the_timed_points_are_those_nearest_to_the_wanted_flops() -> None:
    points: list[dict[str, Any]] = [{"flops": f, "knobs": {}} for f in (310, 480, 560, 650, 900)]
    full = {"full_depth": {"flops": 1000}}
    found = chosen_points({"points": points, "full_depth": {"flops": 1010, "knobs": {}}}, full)
    assert {name: point["flops_share"] for name, point in found.items()} == {
        "2x": 0.48,
        "1.5x": 0.65,
        "full depth": 1.01,
    }


@pytest.mark.slow
def test_points_are_timed_with_rows_that_really_leave(
    bundles: tuple[Bundle, Bundle], tmp_path: Path
) -> None:
    texts = _rows(tmp_path / "rows.tsv", 12).texts
    chosen = {
        "2x": {"knobs": {"patience": 1}, "flops_share": 0.5},
        "full depth": {"knobs": {"patience": N}, "flops_share": 1.0},
    }
    timed = time_points(*bundles, texts, chosen, rounds=2)
    assert timed["full depth"]["mean_layers"] == N
    assert timed["2x"]["mean_layers"] < N
    assert set(timed["full model"]) == {"cpu_ms", "wall_ms"}
    assert timed["2x"]["ratio"]["median"] > 0
    assert timed["2x"]["cpu_ms"]["median"] > 0


@pytest.mark.slow
def test_the_cost_of_exits_is_a_ratio_to_the_model_without_them(
    bundles: tuple[Bundle, Bundle],
) -> None:
    timed = time_exits(*bundles, n_tokens=16, turns=3)
    assert timed["tokens"] == 16
    assert set(timed["cpu_ms"]) == {"with exits", "without"}
    assert timed["ratio"]["p10"] <= timed["ratio"]["median"] <= timed["ratio"]["p90"]


def test_the_bandit_plays_every_row_once_for_each_price(tmp_path: Path) -> None:
    bundle = toy_bundle(tmp_path / "bundle", "uee_ucb", n_layers=N)
    rows = _rows(tmp_path / "rows.tsv", 40)
    here = subject(bundle, "torch", rows)
    found = measured(here, seed=0, report=Report(), long=300)
    assert [point["price"] for point in found["points"]] == list(SCALES)
    assert found["rows"] == 40
    assert found["disagreement"][0] == 0.0
    for point in found["points"]:
        depths = np.arange(1, N + 1)
        assert point["mean_layers"] == pytest.approx(np.dot(point["leaving"], depths), abs=1e-3)
        assert sum(point["leaving"]) == pytest.approx(1.0, abs=1e-4)
        assert point["regret_a_round"] >= 0
    first, last = found["points"][0]["long_run"], found["points"][-1]["long_run"]
    assert last["mean_layers"] <= first["mean_layers"], "depth that costs more is played less"
    assert measured(here, seed=0, report=Report(), long=300) == found, (
        "the orders are fixed by the seed"
    )


def test_where_all_exits_say_the_same_the_cheapest_is_learnt() -> None:
    rows = 50
    classes_NE = np.repeat(np.arange(rows)[:, None] % 5, N, axis=1)
    right_NE = np.repeat((np.arange(rows) % 2 == 0)[:, None], N, axis=1)
    flops_NE = np.tile([1000.0, 2000.0, 3000.0], (rows, 1))
    point = World((1, 2, 3), N, classes_NE, right_NE, flops_NE).point(0.8, seed=0, long=1000)
    assert point["quality"] == 0.5
    assert point["quality_spread"] == 0.0
    assert point["best_fixed_exit"] == 1
    assert point["long_run"]["leaving"][0] > 0.9
    assert 1000 <= point["long_run"]["flops"] < 1200
