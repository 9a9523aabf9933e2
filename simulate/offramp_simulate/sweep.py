"""All cells of a scenario: every value of every swept key with every plan, by as many processes as asked for.

A cell depends on nothing but the scenario, its values, the record and the seed, so the result is the same
whoever ran it in whatever order.
"""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from offramp_common.errors import ConfigError
from offramp_simulate.record import Record
from offramp_simulate.scenario import Scenario
from offramp_simulate.scenario_parts import Plan
from offramp_simulate.simulate_run import Ran, simulate, without_sweep

_EXECUTORS = "offramp.executors"
OnCell = Callable[[int, int, "Cell"], None]
"""Told how many cells are done, of how many, and the last of them."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of the sweep. `values`: what it has instead of the scenario's own."""

    values: dict[str, Any]
    plan: str
    ran: Ran

    def to_json(self) -> dict[str, Any]:
        return {"values": self.values, "plan": self.plan, **self.ran.summary}


def cells_of(scenario: Scenario) -> Iterator[tuple[dict[str, Any], Plan]]:
    """The last key runs fastest, and plans within it."""
    keys = list(scenario.sweep)
    for values in itertools.product(*scenario.sweep.values()):
        for plan in scenario.plans:
            yield dict(zip(keys, values, strict=True)), plan


def sweep(
    scenario: Scenario, record: Record, on_cell: OnCell, workers: int = 1, on: str = ""
) -> list[Cell]:
    """The cells in order. `on` names an executor that another package brings ("ray"); its processes must see
    the record under the same path. ConfigError where it is not installed."""
    wanted = list(cells_of(scenario))
    if not on and min(workers, len(wanted)) <= 1:
        found = []
        for number, (values, plan) in enumerate(wanted, start=1):
            found.append(_cell(scenario, record, values, plan))
            on_cell(number, len(wanted), found[-1])
        return found
    if record.path is None:
        raise ConfigError("a record that is not in a file: save it before it is run by processes")
    results: dict[int, Cell] = {}
    with _executor(on, workers) as executor:
        futures = {
            executor.submit(_in_process, scenario, record.path, values, plan): place
            for place, (values, plan) in enumerate(wanted)
        }
        for future in as_completed(futures):
            results[futures[future]] = future.result()
            on_cell(len(results), len(wanted), results[futures[future]])
    return [results[place] for place in range(len(wanted))]


def _executor(on: str, workers: int) -> Executor:
    if not on:
        return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    found = {point.name: point for point in entry_points(group=_EXECUTORS)}
    if on not in found:
        have = ", ".join(sorted(found)) or "none"
        raise ConfigError(f"--on {on}: no such executor installed (there are: {have})")
    executor = found[on].load()()
    assert isinstance(executor, Executor)
    return executor


_loaded: dict[Path, Record] = {}  # of this process


def _in_process(scenario: Scenario, path: Path, values: dict[str, Any], plan: Plan) -> Cell:
    if path not in _loaded:
        _loaded[path] = Record.load(path)
    return _cell(scenario, _loaded[path], values, plan)


def _cell(scenario: Scenario, record: Record, values: dict[str, Any], plan: Plan) -> Cell:
    for key, value in values.items():
        scenario = scenario.changed(key, value)
    return Cell(values, plan.name, simulate(without_sweep(scenario), record, plan))
