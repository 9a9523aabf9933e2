"""The live system against the simulator, cell by cell: what was measured, what is predicted.

    OFFRAMP_DATA=FOLDER python benchmarks/validate.py [--quick] [--json FILE]

Device (real ONNX layers, slowed by sleeping), `offramp link` and `offramp cloud serve --local` are processes
of their own and speak real gRPC over TLS; the simulator runs the same requests in the same order at the same
times over the same stretch of a trace, with the record that this script makes first, on this machine on this
day.
Every cell runs twice live, so that the live system's own spread stands beside the simulator's error.

A cell is a file of results/validate; one that is there is not run again, so a run may be cut off and started
again (--again runs all). --only TEXT runs cells whose name has it. --tuning leaves out the held-out ones.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import report
from validation import live
from validation.cells import CELLS, LAYER_MS, REQUESTS, Cell
from validation.compare import compared, summary, table
from validation.place import Place, cloud_of, of_slowed, slowed

from offramp_common.bundle import Bundle
from offramp_common.cli import write_json
from offramp_simulate.record import Record
from offramp_simulate.record_build import read_labelled

ROOT = Path(__file__).parents[1]
BUNDLE = ROOT / "bundles" / "assistant-intents"
OUT = Path(__file__).parent / "results" / "validate"
MACHINE, RECORD, SUMMARY = "machine.npz", "record.npz", "summary.json"
SHIPPED = ROOT / "simulate" / "offramp_simulate" / "validation.json"
PAGE = ROOT / "docs" / "simulator.md"
BEGIN, END = "<!-- table: benchmarks/validate.py -->", "<!-- end of table -->"
SAMPLES, RUNS = 400, 2
_FOR_OVERHEAD = 30


def main() -> int:
    args = _arguments()
    if not os.environ.get("OFFRAMP_DATA"):
        print(
            "OFFRAMP_DATA is not set: two links are recorded traces of that folder", file=sys.stderr
        )
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    cells = [c for c in CELLS if args.only in c.name and not (args.tuning and c.held_out)]
    if args.quick:
        cells = [cells[0], cells[-1]]
    bundle = Bundle.read(BUNDLE)
    data = Path(os.environ["OFFRAMP_DATA"]) / "clinc150" / "test.tsv"
    if not args.no_live:
        asyncio.run(_live(bundle, data, cells, args))
    record = Record.load(args.out / RECORD)
    found = [
        _read(args.out / cell.file, cell, record)
        for cell in cells
        if (args.out / cell.file).is_file()
    ]
    print(table(found), file=sys.stderr)
    if len(found) == len(CELLS):
        whole = summary(found, record.header.machine)
        write_json(whole, str(args.out / SUMMARY))
        if args.out == OUT:
            write_json(whole["short"], str(SHIPPED))
            into_docs(found)
    if args.json:
        write_json({"cells": found}, args.json)
    return 0


def into_docs(found: list[dict[str, Any]]) -> None:
    """The table's place in docs/simulator.md."""
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(found)}\n\n{END}{after}", encoding="utf-8")


async def _live(bundle: Bundle, data: Path, cells: list[Cell], args: argparse.Namespace) -> None:
    """What is not there yet, until the time is over."""
    ends_s = time.monotonic() + args.seconds
    samples = 60 if args.quick else SAMPLES
    record_path = args.out / RECORD
    if args.again or not record_path.is_file():
        await _record(bundle, data, samples, args)
    texts = read_labelled(data, bundle, samples).texts
    place = Place(bundle, Record.load(record_path), slowed(bundle), texts)
    missing = [c for c in cells if args.again or not (args.out / c.file).is_file()]
    if not missing:
        return
    with tempfile.TemporaryDirectory(prefix="offramp-validate-") as folder:
        async with cloud_of(place, Path(folder)) as ready:
            await _warm(ready)
            for number, cell in enumerate(missing, start=1):
                if time.monotonic() > ends_s:
                    print(
                        f"{len(missing) - number + 1} cells are left: start again", file=sys.stderr
                    )
                    return
                print(f"{number} of {len(missing)}: {cell.name}", file=sys.stderr, flush=True)
                await _measure(ready, cell, args)


async def _record(bundle: Bundle, data: Path, samples: int, args: argparse.Namespace) -> None:
    """`offramp record`, then the slowed device's times in place of this machine's."""
    plain = args.out / MACHINE
    command = [
        sys.executable,
        "-m",
        "offramp_common",
        "record",
        str(bundle.path),
        "--data",
        str(data),
    ]
    command += ["--limit", str(samples), "--wall", "--out", str(plain)]
    command += ["--repeats", "3" if args.quick else "10"]
    process = await asyncio.create_subprocess_exec(*command)
    if await process.wait():
        raise SystemExit("offramp record has failed, see above")
    layers, texts = slowed(bundle), read_labelled(data, bundle, samples).texts
    made = await asyncio.to_thread(
        of_slowed, Record.load(plain), bundle, layers, texts[:_FOR_OVERHEAD]
    )
    made.save(args.out / RECORD)


async def _warm(place: Place) -> None:
    """The engine's first passes are start-up, not latency."""
    await live.run(place, CELLS[0], CELLS[0].scenario(30))


async def _measure(place: Place, cell: Cell, args: argparse.Namespace) -> None:
    scenario = cell.scenario(40 if args.quick else REQUESTS)
    runs = [await live.run(place, cell, scenario) for _ in range(1 if args.quick else RUNS)]
    about = report.about() | {"day": time.strftime("%Y-%m-%d"), "layer_ms": LAYER_MS}
    text = json.dumps({"cell": cell.name, "requests": scenario.requests, **about, "runs": runs})
    # A line a request, so that the file can be read.
    (args.out / cell.file).write_text(text.replace("], [", "],\n["), encoding="utf-8")


def _read(path: Path, cell: Cell, record: Record) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    return compared(cell, value, record)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two short cells, to see that it runs")
    parser.add_argument("--only", default="", metavar="TEXT")
    parser.add_argument("--tuning", action="store_true", help="without the held-out cells")
    parser.add_argument("--again", action="store_true", help="also what is there already")
    parser.add_argument("--no-live", action="store_true", help="compare what is there")
    parser.add_argument("--seconds", type=float, default=3600.0, help="begin no cell after so long")
    parser.add_argument("--out", type=Path, help="folder of the cells' files")
    parser.add_argument("--json", metavar="FILE", help="the comparison (-: standard output)")
    args = parser.parse_args()
    if args.out is None:
        args.out = OUT.with_name("validate-quick") if args.quick else OUT
    return args


if __name__ == "__main__":
    sys.exit(main())
