"""Does the link emulator give the rate, the round trip and the course of its links, and at what cost?

    python benchmarks/link_emulator.py [--runs N] [--form proxy|layer3] [--part rates|profiles|traces]
                                       [--quick] [--json FILE|-]

Both forms: the TCP proxy and, with root, the layer-3 link. The emulator is a process of its own,
`offramp link`; sender and receiver are threads here, their sockets in the namespaces of the link.

- rates: 1, 10 and 100 Mbit/s each way, 20 ms. profiles: every profile as it comes.
  Per run the time of a new connection's first answer (two round trips, one of them the handshake),
  the median of single bytes there and back, and one transfer each way. A rate is the bytes over the
  time from the first byte sent to the answer received, less the median round trip; CPU is the
  emulator's, as a share of one core during the transfers. On the layer-3 link TCP is the kernel's:
  headers and slow start are in its figure.
- traces: the link follows a recording while it is kept full; what came out second by second beside
  what the recording has for that second. The proxy is fed by TCP. The layer-3 link is fed by UDP
  (what the link can carry), and once more by TCP (what TCP makes of it; whole IP packets counted).

With --json, parts that are not measured now are kept from the file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import report
from link_process import LinkProcess, Row, accept, answer, ask, connect

from offramp_common.cli import write_json
from offramp_simulate.links import PROFILES, LinkProfile
from offramp_simulate.live_link import keep_time
from offramp_simulate.netns import why_not
from offramp_simulate.traces import RateTrace, load_trace

_UNLIMITED_NBYTES = 100_000_000
_N_ROUND_TRIPS = 15
_RTT_MS = 20.0
_RATES_MBPS = (1.0, 10.0, 100.0)
_TRACES = (  # file, name; their first seconds: 1 to 130 Mbit/s, outages among them
    ("norway_3g_hsdpa", "bus.ljansbakken-oslo-report.2010-09-28_1407CEST.log"),
    ("mahimahi_cellular", "ATT-LTE-driving-2016.up"),
    ("nyc_lte_2019", "2767958-taxi1"),
    ("lumos5g_4g", "4g_trace_driving_50032_dr"),
)


def measure(form: str, options: list[str], profile: LinkProfile, transfer_s: float) -> Row:
    """One run of one link, through a fresh emulator process."""
    with LinkProcess(form, options) as link, link.listen() as listener:
        threading.Thread(target=accept, args=(listener, answer), daemon=True).start()
        connect(link)[0].close()  # a fresh process is slow for its own reasons
        end, first_s = connect(link)
        with end:
            rtt_s = statistics.median(ask(end, 0, 1) for _ in range(_N_ROUND_TRIPS))
            nbytes = {
                way: _UNLIMITED_NBYTES if math.isinf(mbps) else int(mbps / 8e-6 * transfer_s)
                for way, mbps in (("up", profile.uplink_mbps), ("down", profile.downlink_mbps))
            }
            start_s, cpu_s = time.perf_counter(), link.cpu_s()
            up_s = ask(end, nbytes["up"], 1) - rtt_s
            middle_s, middle_cpu_s = time.perf_counter(), link.cpu_s()
            down_s = ask(end, 0, nbytes["down"]) - rtt_s
            stop_s, stop_cpu_s = time.perf_counter(), link.cpu_s()
    return {
        "first_answer_ms": first_s * 1e3,
        "rtt_ms": rtt_s * 1e3,
        "uplink_mbps": nbytes["up"] * 8 / 1e6 / up_s,
        "downlink_mbps": nbytes["down"] * 8 / 1e6 / down_s,
        "cpu_up": (middle_cpu_s - cpu_s) / (middle_s - start_s),
        "cpu_down": (stop_cpu_s - middle_cpu_s) / (stop_s - middle_s),
    }


def summary(form: str, profile: LinkProfile, runs: list[Row]) -> Row:
    """Medians over the runs beside the link's figures."""
    row: Row = {"form": form, "link": profile.name, "runs": len(runs)}
    for key in runs[0]:
        values = [run[key] for run in runs]
        row[key] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    row["nominal"] = {
        # JSON has no infinity.
        key: None if math.isinf(getattr(profile, key)) else getattr(profile, key)
        for key in ("rtt_ms", "uplink_mbps", "downlink_mbps")
    } | {"first_answer_ms": 2 * profile.rtt_ms}
    return row


def constant_links(forms: list[str], part: str, args: argparse.Namespace) -> list[Row]:
    """The rows of `rates` or of `profiles`: all links in turn, so that a busy minute hits them all."""
    if part == "rates":
        links = {
            LinkProfile(f"{mbps:g} Mbit/s", mbps, mbps, _RTT_MS): [
                f"--uplink-mbps={mbps}", f"--downlink-mbps={mbps}", f"--rtt-ms={_RTT_MS}"
            ]
            for mbps in _RATES_MBPS
        }  # fmt: skip
    else:
        links = {profile: ["--profile", name] for name, profile in PROFILES.items()}
    transfer_s = 0.3 if args.quick else 3.0 if part == "rates" else 1.0
    runs: dict[tuple[str, str], list[Row]] = {}
    for number in range(args.runs):
        for form in forms:
            for profile, options in links.items():
                print(f"{part}: run {number + 1}, {form}, {profile.name}", file=sys.stderr)
                run = measure(form, options, profile, transfer_s)
                runs.setdefault((form, profile.name), []).append(run)
    return [summary(form, profile, runs[form, profile.name]) for form in forms for profile in links]


def replay(form: str, feed: str, file: Path, trace: RateTrace, seconds: int) -> Row:
    """Follow a recording downward for so many seconds; what came out beside what it has."""
    options = ["--trace", str(file), "--trace-name", trace.name, f"--rtt-ms={_RTT_MS}"]
    got, wanted = [], []
    with LinkProcess(form, options) as link:
        stop = threading.Event()
        with link.flood(feed, trace.peak_mbps * 1.1, stop):
            time.sleep(1.0)  # until the link is full
            before, cpu_s, start_s = link.ask("stats"), link.cpu_s(), time.perf_counter()
            for _ in range(seconds):
                time.sleep(1.0)
                now = link.ask("stats")
                # What comes out left the queue half a round trip ago.
                span_s = [stats["time_s"] - _RTT_MS / 2e3 for stats in (before, now)]
                wanted.append((trace.bits_by(span_s[1]) - trace.bits_by(span_s[0])) / 8)
                got.append(now["bytes_down"] - before["bytes_down"])
                before = now
            cpu = (link.cpu_s() - cpu_s) / (time.perf_counter() - start_s)
            stop.set()
    mean = statistics.mean(wanted)
    errors = [abs(g - w) / w for g, w in zip(got, wanted, strict=True) if w > 0.05 * mean]
    return {
        "form": form, "feed": feed, "trace": trace.name, "seconds": seconds,
        "recorded_mbps": sum(wanted) * 8e-6 / seconds,
        "total_error": sum(got) / sum(wanted) - 1,
        "second_error": {"median": statistics.median(errors), "max": max(errors)},
        "bytes": [round(g) for g in got], "recorded_bytes": [round(w) for w in wanted], "cpu": cpu,
    }  # fmt: skip


def traces(forms: list[str], args: argparse.Namespace) -> list[Row]:
    folder = Path(os.environ.get("OFFRAMP_DATA", "../shared/data")) / "network_traces"
    rows = []
    for name, trace_name in _TRACES:
        file = folder / f"{name}.jsonl"
        trace = load_trace(file, trace_name)
        for form in forms:
            for feed in ("tcp",) if form == "proxy" else ("udp", "tcp"):
                print(f"traces: {form}, {feed}, {trace_name}", file=sys.stderr)
                rows.append(replay(form, feed, file, trace, 3 if args.quick else 20))
    return rows


def link_table(rows: list[Row]) -> str:
    """Markdown: the link's figure, then the measured one."""
    keys = ("rtt_ms", "first_answer_ms", "uplink_mbps", "downlink_mbps")
    lines = [
        "| form | link | round trip ms | first answer ms | uplink Mbit/s | downlink Mbit/s | CPU up / down |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [row["form"], row["link"]]
        for key in keys:
            got, nominal = row[key], row["nominal"][key]
            text = f"{got['median']:.4g} ({got['min']:.4g}-{got['max']:.4g})"
            cells.append(f"{'no limit' if nominal is None else f'{nominal:g}'}: {text}")
        cells.append(f"{row['cpu_up']['median']:.0%} / {row['cpu_down']['median']:.0%}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def trace_table(rows: list[Row]) -> str:
    lines = [
        "| form | fed by | trace | recorded Mbit/s | whole | a second, median (worst) | CPU |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        second = row["second_error"]
        lines.append(
            f"| {row['form']} | {row['feed']} | {row['trace']} | {row['recorded_mbps']:.1f} "
            f"| {row['total_error']:+.1%} | {second['median']:.1%} ({second['max']:.1%}) "
            f"| {row['cpu']:.0%} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--form", action="append", choices=["proxy", "layer3"], help="only this")
    parser.add_argument("--part", action="append", choices=["rates", "profiles", "traces"])
    parser.add_argument("--quick", action="store_true", help="short transfers: does it run?")
    parser.add_argument(
        "--json", metavar="FILE", help="-: standard output, the tables then to stderr"
    )
    args = parser.parse_args()
    keep_time()  # the ends' threads too: what is late is to be the link
    forms = args.form or ["proxy", "layer3"]
    if "layer3" in forms and (reason := why_not()):
        print(f"layer3 is left out: {reason}", file=sys.stderr)
        forms.remove("layer3")
    result: dict[str, Any] = {}
    if args.json and args.json != "-":
        with contextlib.suppress(OSError, ValueError):
            result = json.loads(Path(args.json).read_text(encoding="utf-8"))
    for part in args.part or ["rates", "profiles", "traces"]:
        rows = traces(forms, args) if part == "traces" else constant_links(forms, part, args)
        kept = [row for row in result.get(part, {}).get("rows", []) if row["form"] not in forms]
        result[part] = report.about() | {"rows": kept + rows}
        table = trace_table(rows) if part == "traces" else link_table(rows)
        print(f"{table}\n", file=sys.stderr if args.json == "-" else sys.stdout)
    if args.json:
        write_json(result, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
