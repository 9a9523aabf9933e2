"""`offramp simulate`: the same seed to the byte, processes or not, and mistakes as messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from made_record import made_record

from offramp_common.cli import OK, USAGE, main

SCENARIO = """
title = "Made up, & <short>"
about = "A sweep over two values with three plans."
record = "made.npz"
requests = 300
seed = 7
[devices]
count = 4
[arrivals]
rate_per_s = 4.0
[link]
profile = "lte"
[sweep]
"link.rtt_ms" = [20, 200]
[[plans]]
name = "all on the device"
split = 4
[[plans]]
name = "split 2"
split = 2
[[plans]]
name = "planner"
planner = "auto"
"""


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    made_record(tokens=None, deviations=(0.9, 1.0, 1.3)).save(tmp_path / "made.npz")
    path = tmp_path / "scenario.toml"
    path.write_text(SCENARIO)
    return path


def test_the_same_seed_gives_the_same_bytes_whatever_the_number_of_processes(
    scenario: Path, tmp_path: Path
) -> None:
    texts = []
    for workers in ("1", "1", "2"):
        out = tmp_path / "out.json"
        assert main(["simulate", str(scenario), "--json", str(out), "--workers", workers]) == OK
        texts.append(out.read_bytes())
    assert texts[0] == texts[1] == texts[2]
    main(["simulate", str(scenario), "--json", str(out), "--workers", "1", "--seed", "8"])
    assert out.read_bytes() != texts[0]


def test_the_result_says_what_ran_and_people_get_a_table(
    scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", str(scenario), "--json", "-", "--workers", "1"]) == OK
    printed = capsys.readouterr()
    result: dict[str, Any] = json.loads(printed.out)
    assert result["axes"] == {"link.rtt_ms": [20, 200]}
    assert len(result["cells"]) == 6
    assert {cell["plan"] for cell in result["cells"]} == {"all on the device", "split 2", "planner"}
    assert all(cell["requests"] == 300 for cell in result["cells"])
    assert result["record"]["bundle"] == "made"
    assert "p95 ms" in printed.err
    assert "a second)" in printed.err


def test_the_report_is_one_file_that_asks_for_nothing(scenario: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    assert main(["simulate", str(scenario), "--report", str(report), "--workers", "1"]) == OK
    page = report.read_text()
    assert "Made up, &amp; &lt;short&gt;" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    assert "src=" not in page
    assert "<link" not in page


def test_every_report_says_how_far_off_the_live_system_the_simulator_was(
    scenario: Path, tmp_path: Path
) -> None:
    report = tmp_path / "report.html"
    assert main(["simulate", str(scenario), "--report", str(report), "--workers", "1"]) == OK
    page = report.read_text()
    assert "against the live system" in page
    assert "of 17</td>" in page
    assert "held out while the model was tuned" in page


def test_the_cells_are_a_parquet_table_too(scenario: Path, tmp_path: Path) -> None:
    path, plain = tmp_path / "cells.parquet", tmp_path / "cells.json"
    arguments = ["simulate", str(scenario), "--parquet", str(path), "--json", str(plain)]
    assert main([*arguments, "--workers", "1"]) == OK
    rows = pyarrow.parquet.read_table(path).to_pylist()
    cells = json.loads(plain.read_text())["cells"]
    assert [row["plan"] for row in rows] == [cell["plan"] for cell in cells]
    assert [row["ms.p95"] for row in rows] == [cell["ms"]["p95"] for cell in cells]
    assert {row["values.link.rtt_ms"] for row in rows} == {20, 200}


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["nowhere"], "no such file, nor a ready scenario (factory-5g, fleet-outage"),
        (["{scenario}", "--record", "missing.npz"], "offramp record BUNDLE --data FILE"),
        (["{scenario}", "--workers", "0"], "--workers 0: must be at least 1"),
        (["{scenario}", "--on", "moon"], "--on moon: no such executor installed"),
        (["{scenario}", "--requests", "0"], "requests = 0: must be at least 1"),
    ],
)
def test_mistakes_are_messages(
    scenario: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], what: str
) -> None:
    filled = [argument.format(scenario=scenario) for argument in arguments]
    assert main(["simulate", *filled]) == USAGE
    assert what in capsys.readouterr().err


def test_a_ready_scenario_runs_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "satellite", "--requests", "200", "--workers", "1"]) == OK
    assert "send the input" in capsys.readouterr().err
