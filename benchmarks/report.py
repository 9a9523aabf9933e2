"""What stands beside every measurement: the machine, the commit and the command."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles

_LOAD = os.getloadavg()[0]  # as this is imported: what is measured is a load itself


def machine(*more: str) -> str:
    """The hardware, its load at the start, and what runs on it, in one line."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), model)
    parts = [model, f"{os.cpu_count()} cores", f"load {_LOAD:.1f} at the start"]
    return ", ".join([*parts, f"Python {platform.python_version()}", *more])


def commit() -> str:
    """The commit that was measured; "-dirty" where files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "not in a commit"


def spread(values: Sequence[float]) -> dict[str, float]:
    """median, p10 and p90 to four digits."""
    tenths = quantiles(values, n=10)
    named = {"median": median(values), "p10": tenths[0], "p90": tenths[-1]}
    return {name: round(value, 4) for name, value in named.items()}


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """The spread of the ratios within each turn."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def about(*more: str) -> dict[str, str]:
    """What every measurement's file says first."""
    return {"command": command(), "machine": machine(*more), "commit": commit()}


def command() -> str:
    """The command line, as one would type it; of paths that say nothing elsewhere the last part."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    script, root = Path(sys.argv[0]).resolve(), Path(__file__).resolve().parents[1]
    inside = script.is_relative_to(root)
    return " ".join(["python", str(script.relative_to(root)) if inside else script.name, *words])
