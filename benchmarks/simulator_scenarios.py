"""Run the ready scenarios and put their tables into their pages (docs/scenarios).

OFFRAMP_DATA=FOLDER python benchmarks/simulator_scenarios.py [NAME ...]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import report

ROOT = Path(__file__).parents[1]
READY = ROOT / "simulate" / "offramp_simulate" / "scenarios"
PAGES = ROOT / "docs" / "scenarios"
RESULTS = Path(__file__).parent / "results" / "simulator_scenarios.json"
BEGIN, END = "<!-- table: benchmarks/simulator_scenarios.py -->", "<!-- end of table -->"
COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "p50 ms": lambda cell: f"{cell['ms']['p50']:.0f}",
    "p95 ms": lambda cell: f"{cell['ms']['p95']:.0f}",
    "p99 ms": lambda cell: f"{cell['ms']['p99']:.0f}",
    "right %": lambda cell: f"{100 * cell['right']:.1f}",
    "bytes up": lambda cell: f"{cell['bytes_up']:,.0f}",
    "sent %": lambda cell: f"{100 * cell['sent']:.0f}",
    "fallback %": lambda cell: f"{100 * cell['where']['fallback']:.1f}",
    "missed %": lambda cell: f"{100 * cell['missed']:.2f}",
    "cloud ms": lambda cell: f"{cell['cloud_ms']:.1f}",
    "device mJ": lambda cell: f"{cell['device_mj']:.0f}",
}


def table(result: dict[str, Any]) -> str:
    axes = list(result["axes"])
    head = [*axes, "plan", *COLUMNS]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    for cell in result["cells"]:
        values = [str(cell["values"][key]) for key in axes]
        row = [*values, cell["plan"], *(say(cell) for say in COLUMNS.values())]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def run(name: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-m", "offramp_common", "simulate", name, "--json", str(out)]
        subprocess.run([*command, "--workers", "1"], check=True)
        result: dict[str, Any] = json.loads(out.read_text())
    del result["timelines"]
    for cell in result["cells"]:
        del cell["cdf_ms"]
    return result


def main() -> None:
    names = sys.argv[1:] or sorted(path.stem for path in READY.glob("*.toml"))
    kept = json.loads(RESULTS.read_text())["scenarios"] if RESULTS.exists() else {}
    for name in names:
        kept[name] = run(name)
        page = PAGES / f"{name}.md"
        block = f"{BEGIN}\n\n{table(kept[name])}\n\n{END}"
        before, _, rest = page.read_text().partition(BEGIN)
        page.write_text(before + block + rest.partition(END)[2])
    record = {"command": report.command(), "commit": report.commit(), "scenarios": kept}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
