"""`make validate`: what it published is what its files say, and the comparison itself is right."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from validation import predicted
from validation.cells import CELLS, LEAD_S, Cell
from validation.compare import BARS, compared, differences, facts, table
from validation.live import link_arguments

from offramp_simulate.record import Record

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "validate"
SUMMARY: dict[str, Any] = json.loads((RESULTS / "summary.json").read_text())
N_LAYERS = 6


def row(ms: float, where: str, exit: int, split: int, up: int) -> list[Any]:
    return [0.0, ms, where, "", exit, split, up, 0]


def run(rows: list[list[Any]], up: int, down: int) -> dict[str, Any]:
    warm = [row(1e6, "device", 1, N_LAYERS, 0)] * 10
    return {"rows": [*warm, *rows], "bytes_up": up, "bytes_down": down}


def test_the_documentation_shows_the_table_of_the_results() -> None:
    assert table(SUMMARY["cells"]) in (ROOT / "docs" / "simulator.md").read_text()


def test_reports_show_the_summary_of_the_results() -> None:
    shipped = ROOT / "simulate" / "offramp_simulate" / "validation.json"
    assert json.loads(shipped.read_text()) == SUMMARY["short"]


def test_there_are_sixteen_cells_and_a_fault_and_a_third_or_so_is_held_out() -> None:
    assert len(CELLS) == 17
    assert len({cell.name for cell in CELLS}) == 17
    assert len({cell.file for cell in CELLS}) == 17
    assert sum(cell.held_out for cell in CELLS) == 5
    assert [bool(cell.faults) for cell in CELLS].count(True) == 1
    marked = {cell.name for cell in CELLS if cell.held_out}
    assert {cell["cell"] for cell in SUMMARY["cells"] if cell["held_out"]} == marked


@pytest.mark.parametrize("load", ["one at a time", "Poisson 8/s"])
def test_predictions_are_what_the_model_says_of_the_stored_record(load: str) -> None:
    cell = next(c for c in CELLS if (c.link.name, c.policy, c.load) == ("lte", "split 2", load))
    measured = json.loads((RESULTS / cell.file).read_text())
    found = compared(cell, measured, Record.load(RESULTS / "record.npz"))
    published = next(c for c in SUMMARY["cells"] if c["cell"] == cell.name)
    for name in ("p50", "p95", "bytes", "sent", "fallback"):
        # Floats are summed in another order by another numpy.
        assert found["predicted"][name] == pytest.approx(published["predicted"][name], rel=1e-9)
    assert found["misses"] == published["misses"]


def test_facts_leave_the_warm_up_out_of_latencies_and_shares_but_not_out_of_bytes() -> None:
    rows = [
        row(10.0, "device", 1, 6, 0),
        row(90.0, "cloud", 6, 2, 500),
        row(20.0, "fallback", 2, 2, 0),
    ]
    said = facts([run(rows, 1300, 130)], N_LAYERS, deadline_ms=50.0)
    assert (said["n"], said["p50"]) == (3, 20.0)
    assert said["p95"] == pytest.approx(83.0)
    assert said["bytes"] == 1430 / 13
    assert said["sent"] == pytest.approx(2 / 3)
    assert said["exits"] == pytest.approx([1 / 3, 1 / 3, 0, 0, 0, 1 / 3])
    assert said["missed"] == pytest.approx(1 / 3)


def test_differences_are_relative_for_times_and_points_for_shares() -> None:
    one = facts([run([row(11.0, "device", 1, 6, 0)] * 2, 0, 0)], N_LAYERS, 50.0)
    two = [row(10.0, "device", 1, 6, 0), row(10.0, "cloud", 2, 1, 70)]
    other = facts([run(two, 120, 0)], N_LAYERS, 50.0)
    found = differences(one, other)
    assert found["p50"] == pytest.approx(0.10)
    assert found["bytes"] == -1.0
    assert found["sent"] == found["exits"] * -1 == -0.5
    assert set(BARS) <= set(found)
    assert not math.isnan(found["sent_p50"])


def test_the_live_link_is_the_scenario_s_link() -> None:
    cell = CELLS[-1]
    words = link_arguments(cell, cell.scenario())
    assert words[:2] == ["--profile", "lte"]
    fault = cell.faults[0]
    assert words[3] == f"at={fault['at_s'] + LEAD_S},for={fault['for_s']},kind=blackhole"
    refused = Cell(cell.link, cell.policy, cell.load, ({**fault, "how": "refused"},))
    with pytest.raises(ValueError, match="knows black holes only"):
        link_arguments(refused, refused.scenario())


def test_a_cell_with_an_outage_is_predicted_from_draws_of_the_pauses_behind_it() -> None:
    record = Record.load(RESULTS / "record.npz")
    (once,) = predicted.runs(CELLS[0].scenario(40), record)
    assert once["asides"] == 0
    drawn = predicted.runs(CELLS[-1].scenario(120), record)
    assert len(drawn) == predicted.DRAWS
    assert all(found["asides"] for found in drawn)
    assert len({found["bytes_up"] for found in drawn}) > 1
    asked = [[line[0] for line in found["rows"]] for found in drawn]
    assert asked == asked[:1] * predicted.DRAWS


def test_predictions_have_a_row_for_each_request_in_order() -> None:
    cell = next(c for c in CELLS if c.link.name == "wifi")
    found = predicted.run(cell.scenario(40), Record.load(RESULTS / "record.npz"))
    asked = [line[0] for line in found["rows"]]
    assert len(asked) == 40
    assert asked == sorted(asked)
    assert found["bytes_up"] == sum(line[6] for line in found["rows"])
