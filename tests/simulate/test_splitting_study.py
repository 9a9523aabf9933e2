"""The study's page shows what its results say, and its scenarios are readable."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import splitting_study

from offramp_simulate.scenario import load_scenario

PAGE = splitting_study.PAGE.read_text()
RESULTS = json.loads(splitting_study.RESULTS.read_text())


@pytest.mark.parametrize("name", ["wins", "gains", "price", "crowd"])
def test_the_page_shows_the_tables_of_the_results(name: str) -> None:
    assert splitting_study.tables(RESULTS)[name] in PAGE


@pytest.mark.parametrize("name", ["links", "crowd"])
def test_each_scenario_asks_what_the_results_answer(name: str) -> None:
    scenario = load_scenario(splitting_study.FOLDER / f"{name}.toml")
    assert {k: list(v) for k, v in scenario.sweep.items()} == RESULTS[name]["axes"]
    assert {plan.name for plan in scenario.plans} == {c["plan"] for c in RESULTS[name]["cells"]}
    assert f"when-splitting-pays/{name}.svg" in PAGE
    assert (Path(splitting_study.FOLDER) / f"{name}.svg").is_file()
