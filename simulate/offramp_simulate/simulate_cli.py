"""`offramp simulate`: a scenario, what it costs each plan, as a table, as JSON and as one HTML page."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp_common.cli import OK, write_json
from offramp_common.errors import ConfigError

if TYPE_CHECKING:
    from offramp_simulate.scenario import Scenario
    from offramp_simulate.sweep import Cell

_READY = Path(__file__).parent / "scenarios"
_RECORDS = Path(__file__).parent / "records"
_EVERY_S = 0.5


def add_simulate_command(subparsers: Any) -> None:
    """Declare `simulate` and its options; the parsed arguments carry `run`."""
    ready = ", ".join(sorted(path.stem for path in _READY.glob("*.toml")))
    parser = subparsers.add_parser(
        "simulate",
        help="what links, devices and clouds do to latency, quality, bytes and cost, without any of them",
        description="Runs a scenario over a bundle's record on a virtual clock. The same seed gives the same "
        "result.",
        epilog=f"ready scenarios, by name: {ready}",
    )
    add = parser.add_argument
    add("scenario", metavar="SCENARIO", help="a TOML file, or the name of a ready scenario")
    add(
        "--record",
        type=Path,
        metavar="FILE",
        help="instead of the scenario's own (`offramp record`)",
    )
    add("--seed", type=int, metavar="N", help="instead of the scenario's own")
    add("--requests", type=int, metavar="N", help="instead of the scenario's own")
    add("--json", metavar="FILE", help="write every number to FILE (- for standard output)")
    add("--parquet", type=Path, metavar="FILE", help="the cells as a table; needs offramp[parquet]")
    add("--report", type=Path, metavar="FILE.html", help="write one page that needs nothing else")
    add(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes for a sweep (default: one a core)",
    )
    add("--on", default="", metavar="NAME", help="an installed executor instead of processes: ray")
    parser.set_defaults(run=run_simulate)


def run_simulate(args: argparse.Namespace) -> int:
    from offramp_simulate.outcome import outcome, table, write_parquet
    from offramp_simulate.record import Record
    from offramp_simulate.report import render
    from offramp_simulate.sweep import sweep

    if args.workers < 1:
        raise ConfigError(f"--workers {args.workers}: must be at least 1")
    scenario = _scenario(args)
    record = Record.load(_record(args, scenario))
    progress = _Progress()
    cells = sweep(scenario, record, progress.cell, args.workers, args.on)
    progress.done(scenario.requests)
    result = outcome(scenario, record, cells)
    print(table(result), file=sys.stderr)
    if args.json:
        write_json(result, args.json)
    if args.parquet:
        write_parquet(result, args.parquet)
    if args.report:
        args.report.write_text(render(result, scenario, record), encoding="utf-8")
        print(f"report: {args.report}", file=sys.stderr)
    return OK


def _scenario(args: argparse.Namespace) -> Scenario:
    from dataclasses import replace

    from offramp_simulate.scenario import load_scenario

    path = Path(args.scenario)
    ready = _READY / f"{args.scenario}.toml"
    if not path.is_file() and ready.is_file():
        path = ready
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in _READY.glob("*.toml")))
        raise ConfigError(f"{args.scenario}: no such file, nor a ready scenario ({names})")
    scenario = load_scenario(path)
    given = {k: getattr(args, k) for k in ("seed", "requests") if getattr(args, k) is not None}
    if "requests" in given:
        given["warm_up"] = min(scenario.warm_up, given["requests"] // 10)
    return replace(scenario, **given)


def _record(args: argparse.Namespace, scenario: Scenario) -> Path:
    if args.record is not None:
        path: Path = args.record
        return path
    if not scenario.record:
        raise ConfigError('no record: name one in the scenario (record = "FILE"), or give --record')
    beside, shipped = scenario.file(scenario.record), _RECORDS / scenario.record
    return shipped if shipped.is_file() and not beside.is_file() else beside


class _Progress:
    """One line on standard error, rewritten."""

    def __init__(self) -> None:
        self._began, self._said, self._cells = time.monotonic(), 0.0, 0

    def cell(self, done: int, of: int, cell: Cell) -> None:
        now, self._cells = time.monotonic(), of
        if of > 1 and (now - self._said >= _EVERY_S or done == of):
            self._said = now
            left_s = (now - self._began) / done * (of - done)
            text = f"{done} of {of} cells, {left_s:.0f} s left"
            print(f"\r{text:<60}", end="", file=sys.stderr, flush=True)

    def done(self, requests: int) -> None:
        took_s = time.monotonic() - self._began
        total = requests * self._cells
        print(
            f"\r{total:,} requests in {self._cells} runs, {took_s:.1f} s ({total / took_s:,.0f} a second)",
            file=sys.stderr,
        )
