"""Does anything grow? A gateway under steady load from devices that come and go, for half an hour.

    python benchmarks/soak.py [--bundle DIR] [--minutes M] [--devices N] [--rate R] [--life S] [--ray]
                              [--sizes-first] [--json FILE|-]

The gateway is `offramp cloud serve` as a process of its own, over TLS with a certificate of each device (its
engine in its process, or one replica of Ray's with --ray). Devices are EdgeWorkers in this process; each
lives for a while, asks steadily, says goodbye, and another takes its place. A further one at a time is an
`offramp edge run` that is killed in the middle of its work.

Memory, threads, files and connections of both sides are noted every few seconds, with the gateway's own
count of its tasks. Published are their slopes over the second part of the run (least squares, with the
slope's standard error), and what is left of each once all devices have gone, against what there was before
the first came.

With --sizes-first one request of each size that a layer may have goes before the soak: oneDNN keeps code for
each of them (docs/decisions/0011-elevator.md), and under light load some come up only after hours. What that
took is told, and the soak then shows whether anything else grows. With a short --life and --rate 0 devices
greet and leave without a request: what comes and goes with them is then all there is.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import report
from ray_nodes import descendants
from soak_devices import Load, ask_for_all_sizes, device, rude_devices, sizes, text

from offramp_cloud.top import scrape
from offramp_common import certs
from offramp_common.cli import write_json
from offramp_common.errors import CloudUnavailable
from offramp_edge import EdgeWorker, load_bundle
from offramp_edge.runtime import OnnxLayers

_WARM_SHARE = 0.3  # of the run, before slopes count: caches and allocators fill
_GONE_S = 60.0  # how long the gateway may take to notice the last device's end
_FIRST_LINE_S = 180.0
_COUNTED = ("rss_mib", "threads", "files", "connections")
_ARENAS = "MALLOC_ARENA_MAX"
_TOTALS = {
    "requests": "offramp_cloud_requests_total",
    "layer_tokens": "offramp_engine_layer_tokens_total",
    "compute_s": "offramp_engine_compute_seconds_total",
}


def look_at(pids: list[int]) -> dict[str, float]:
    """Resident MiB, threads, open files and sockets among them, summed over the processes."""
    found = dict.fromkeys(_COUNTED, 0.0)
    for one in pids:
        with contextlib.suppress(OSError):
            status = dict(
                line.split(":", 1) for line in Path(f"/proc/{one}/status").read_text().splitlines()
            )
            found["rss_mib"] += int(status["VmRSS"].split()[0]) / 1024
            found["threads"] += int(status["Threads"])
            for entry in Path(f"/proc/{one}/fd").iterdir():
                with contextlib.suppress(OSError):
                    found["files"] += 1
                    found["connections"] += os.readlink(entry).startswith("socket:")
    return found


@contextlib.contextmanager
def gateway(bundle: Path, tls: Path, ray: bool) -> Iterator[tuple[int, str, str]]:
    """(process id, address, address of the metrics) of a gateway that serves until the block ends."""
    command = [sys.executable, "-m", "offramp_common", "cloud", "serve", "--bundle", str(bundle)]
    command += ["--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0", "--tls-dir", str(tls)]
    command += [] if ray else ["--local"]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=_as_shipped()
        ) as process,
    ):
        assert process.stdout is not None
        hangs = threading.Timer(_FIRST_LINE_S, process.kill)
        hangs.start()
        line = process.stdout.readline()
        hangs.cancel()
        if not line:
            log.seek(0)
            raise SystemExit(f"the gateway did not start:\n{log.read()[-2000:]}")
        ready = json.loads(line)
        try:
            yield process.pid, ready["listening"], ready["metrics"]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def sample(pid: int, metrics: str, began_s: float) -> dict[str, float]:
    """A row: the time in minutes, and both sides' counts."""
    row = {"minute": (time.monotonic() - began_s) / 60}
    row |= {f"gateway {name}": value for name, value in look_at([pid, *descendants(pid)]).items()}
    row |= {f"devices {name}": value for name, value in look_at([os.getpid()]).items()}
    with contextlib.suppress(CloudUnavailable):
        reading = scrape(metrics, time.monotonic)
        row["gateway tasks"] = sum(reading.by("offramp_cloud_tasks").values())
        row |= {name: sum(reading.by(metric).values()) for name, metric in _TOTALS.items()}
    return row


def slope(rows: list[dict[str, float]], name: str) -> dict[str, float]:
    """Change an hour by least squares, its standard error, and the mean."""
    pairs = [(row["minute"] / 60, row[name]) for row in rows if name in row]
    hours, values = (np.array(column) for column in zip(*pairs, strict=True))
    apart = hours - hours.mean()
    per_hour = float((apart * values).sum() / (apart**2).sum())
    rest = values - values.mean() - per_hour * apart
    error = float(np.sqrt((rest**2).sum() / max(1, len(values) - 2) / (apart**2).sum()))
    named = {"per_hour": per_hour, "standard_error": error, "mean": float(values.mean())}
    return {key: round(value, 3) for key, value in named.items()}


def capacity(first: dict[str, float], last: dict[str, float]) -> dict[str, float]:
    """What was asked for a second, and what the engine got done in a second of its own work."""
    grown = {name: last[name] - first[name] for name in _TOTALS}
    seconds = 60 * (last["minute"] - first["minute"])
    return {
        "requests_per_s": round(grown["requests"] / seconds, 1),
        "layer_tokens_per_s_of_compute": round(
            grown["layer_tokens"] / max(grown["compute_s"], 1e-9)
        ),
    }


def soak(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        tls = Path(folder) / "certs"
        certs.init(tls)
        certs.issue(tls, "kiosk")
        with gateway(args.bundle, tls, args.ray) as (pid, address, metrics):
            began_s = time.monotonic()
            bundle = load_bundle(args.bundle)
            layers = OnnxLayers(bundle, bundle.manifest.precision)
            with EdgeWorker(args.bundle, layers=layers) as first:  # what is loaded once and stays
                first.answer(text(random.Random(0)))
            started = before = sample(pid, metrics, began_s)
            if args.sizes_first:
                asyncio.run(ask_for_all_sizes(bundle, address, tls))
                began_s = time.monotonic()
                before = sample(pid, metrics, began_s)
            each = args.rate / (args.devices + 1)
            load = Load(args.bundle, layers, address, tls, each, args.life, args.seed)
            rows = list(_run(load, args, pid, metrics, began_s))
            after = _settled(pid, metrics, began_s, before)
    late = [row for row in rows if row["minute"] >= args.minutes * _WARM_SHARE]
    names = [name for name in rows[-1] if name not in ("minute", *_TOTALS)]
    return {
        **report.about(),
        "minutes": args.minutes,
        "sizes_first": len(sizes()) if args.sizes_first else 0,
        "sizes_mib": round(before["gateway rss_mib"] - started["gateway rss_mib"], 1),
        "devices_that_came": load.devices,
        "answers": dict(load.where),
        "capacity": capacity(late[0], late[-1]),
        "slopes": {name: slope(late, name) for name in names},
        "left_over": {
            name: round(after[name] - before[name], 2) for name in names if name in after
        },
        "samples": [{name: round(value, 2) for name, value in row.items()} for row in rows],
    }


def _run(
    load: Load, args: argparse.Namespace, pid: int, metrics: str, began_s: float
) -> Iterator[dict[str, float]]:
    threads = [threading.Thread(target=device, args=(load, slot)) for slot in range(args.devices)]
    threads.append(threading.Thread(target=rude_devices, args=(load,)))
    for thread in threads:
        thread.start()
    until_s = began_s + 60 * args.minutes
    try:
        while time.monotonic() < until_s:
            time.sleep(args.every)
            row = sample(pid, metrics, began_s)
            shown = (
                f"{row['gateway rss_mib']:.0f} MiB, {row['gateway connections']:.0f} connections"
            )
            print(f"minute {row['minute']:.1f}: gateway {shown}", file=sys.stderr)
            yield row
    finally:
        load.stop.set()
        for thread in threads:
            thread.join()


def _settled(pid: int, metrics: str, began_s: float, before: dict[str, float]) -> dict[str, float]:
    """Once the gateway has noticed that all devices are gone, or has had the time to."""
    until_s = time.monotonic() + _GONE_S
    while (row := sample(pid, metrics, began_s))["gateway connections"] > before[
        "gateway connections"
    ] and time.monotonic() < until_s:
        time.sleep(1)
    return row


def _one_arena() -> None:
    """Begin again with one arena for malloc. Each device here has threads of its own, and with an arena
    for each of them memory would grow with devices, though nothing is kept: 384 MiB after 24 devices in
    place of 209. The gateway runs as it is shipped."""
    if _ARENAS not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, _ARENAS: "1"})


def _as_shipped() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != _ARENAS}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--bundle", type=Path, default=Path("bundles/assistant-intents"), metavar="DIR"
    )
    parser.add_argument("--minutes", type=float, default=30.0, metavar="M")
    parser.add_argument("--devices", type=int, default=6, metavar="N", help="at once")
    parser.add_argument("--rate", type=float, default=14.0, metavar="R", help="requests a second")
    parser.add_argument("--every", type=float, default=5.0, metavar="S", help="between samples")
    parser.add_argument("--life", type=float, default=40.0, metavar="S", help="a device's longest")
    parser.add_argument("--ray", action="store_true", help="a replica of Ray's behind the gateway")
    parser.add_argument(
        "--sizes-first",
        action="store_true",
        help="a request of each size of a layer before the soak",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    _one_arena()
    found = soak(args)
    out = sys.stderr if args.json == "-" else sys.stdout
    print(f"{'':24}{'mean':>10}{'an hour':>10}{'+-':>8}{'left':>8}", file=out)
    for name, line in found["slopes"].items():
        numbers = f"{line['mean']:10.1f}{line['per_hour']:10.2f}{line['standard_error']:8.2f}"
        print(f"{name:24}{numbers}{found['left_over'].get(name, 0):8.1f}", file=out)
    print(f"{found['devices_that_came']} devices; {found['answers']}; {found['machine']}", file=out)
    if args.json:
        write_json(found, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
