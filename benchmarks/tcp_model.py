"""Does the model of TCP say when messages arrive? Against the kernel, over the layer-3 link; needs root.

    python benchmarks/tcp_model.py [--runs N] [--link NAME] [--quick] [--json FILE|-]

Four links; on each, over one connection, messages of 1 to 400 KB go up: `first` on a fresh
connection, `idle` after so long a pause that the window is small again, `burst` five at once, each
waiting for the one before. Measured: from the call that sends to the last byte read at the other
end. The model (offramp_simulate.tcp_model) is given the times at which messages were sent, nothing
else. The kernel's congestion control is CUBIC; with --bbr the same again with BBR. With --json, links that
are not measured now are kept from the file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import platform
import socket
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import report
from link_process import LinkProcess, Row

from offramp_common.cli import write_json
from offramp_simulate.links import PROFILES, LinkProfile
from offramp_simulate.live_link import keep_time
from offramp_simulate.netns import MTU_NBYTES, why_not
from offramp_simulate.tcp_model import TcpSender, TcpSettings

_LINKS = {
    "3g": PROFILES["3g"],
    "lte": PROFILES["lte"],
    "wifi": PROFILES["wifi"],
    "satellite": PROFILES["satellite"],
}
_SIZES_KB = (1, 4, 16, 64, 150, 400)
_BURST = 5
_ACK_NBYTES = 52


def read_messages(end: socket.socket, arrived: list[float]) -> None:
    """Note when the last byte of each message came; a message begins with its length."""
    with end:
        while len(head := end.recv(8, socket.MSG_WAITALL)) == 8:
            left = int.from_bytes(head, "big") - 8
            while left > 0 and (data := end.recv(min(left, 1 << 18))):
                left -= len(data)
            arrived.append(time.perf_counter())


def pauses(profile: LinkProfile, kind: str, quick: bool) -> Iterator[tuple[float, int]]:
    """Seconds to wait since the last arrival, then KB to send."""
    sizes = _SIZES_KB[::2] if quick else _SIZES_KB
    idle_s = 1.0 + 4 * profile.rtt_ms / 1e3  # several time-outs: the window is the initial one
    for size in sizes if kind != "burst" else (1, 16, 64):
        yield idle_s, size
        if kind == "burst":
            yield from ((0.0, size) for _ in range(_BURST - 1))


def measure(profile: LinkProfile, control: str, kind: str, quick: bool) -> list[Row]:
    """Each message's size, time in the kernel's TCP and in the model's, ms."""
    options = ["--profile", profile.name]
    sent: list[tuple[float, int]] = []
    arrived: list[float] = []
    with LinkProcess("layer3", options, control.encode()) as link, link.listen() as listener:
        for index, (pause_s, size_kb) in enumerate(pauses(profile, kind, quick)):
            if index == 0 or kind == "first":
                end = link.open()
                reader = threading.Thread(
                    target=read_messages, args=(listener.accept()[0], arrived)
                )
                reader.start()
            if pause_s:
                while len(arrived) < len(sent):
                    time.sleep(0.001)
                time.sleep(0.05 if kind == "first" else pause_s)
            nbytes = size_kb * 1000
            message = nbytes.to_bytes(8, "big") + bytes(nbytes - 8)
            sent.append((time.perf_counter(), nbytes))
            end.sendall(message)
            if kind == "first":
                end.close()
                reader.join()
        end.close()
        reader.join()
    return compare(profile, control, kind, sent, arrived)


def compare(
    profile: LinkProfile,
    control: str,
    kind: str,
    sent: list[tuple[float, int]],
    arrived: list[float],
) -> list[Row]:
    predicted: list[float] = []
    for begin in range(len(sent)) if kind == "first" else (0,):
        shaper = profile.shaper("up")
        shaper.queue_nbytes = max(shaper.queue_nbytes, 3 * MTU_NBYTES)
        back_s = profile.rtt_ms / 2e3 + _ACK_NBYTES * 8 / (profile.downlink_mbps * 1e6)
        is_cubic = control == "cubic"
        settings = replace(TcpSettings(), slow_start_after_idle=is_cubic, hystart=is_cubic)
        model = TcpSender(shaper, back_s, settings)
        known: list[tuple[int, float]] = []
        for sent_s, nbytes in sent[begin : begin + 1] if kind == "first" else sent:
            known += model.send(nbytes, sent_s)
        known += model.advance(math.inf)
        predicted += [arrives_s for _, arrives_s in known]
    return [
        {"link": profile.name, "control": control, "kind": kind, "kb": nbytes // 1000,
         "kernel_ms": (arrived_s - sent_s) * 1e3, "model_ms": (predicted_s - sent_s) * 1e3}
        for (sent_s, nbytes), arrived_s, predicted_s in zip(sent, arrived, predicted, strict=True)
    ]  # fmt: skip


def summary(rows: list[Row]) -> list[Row]:
    """A row for each link, kind and size: medians of the kernel, of the model, and of the error."""
    groups: dict[tuple[str, str, str, int], list[Row]] = {}
    for row in rows:
        key = (row["control"], row["link"], row["kind"], row["kb"])
        groups.setdefault(key, []).append(row)
    table = []
    for (control, link, kind, kb), group in groups.items():
        errors = [row["model_ms"] / row["kernel_ms"] - 1 for row in group]
        table.append(
            {
                "control": control, "link": link, "kind": kind, "kb": kb, "messages": len(group),
                "kernel_ms": statistics.median(row["kernel_ms"] for row in group),
                "model_ms": statistics.median(row["model_ms"] for row in group),
                "error": {"median": statistics.median(errors), "min": min(errors), "max": max(errors)},
            }
        )  # fmt: skip
    return table


def markdown(table: list[Row]) -> str:
    lines = [
        "| control | link | messages | KB | kernel ms | model ms | error, median (range) |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in table:
        error = row["error"]
        lines.append(
            f"| {row['control']} | {row['link']} | {row['kind']} | {row['kb']} "
            f"| {row['kernel_ms']:.1f} | {row['model_ms']:.1f} "
            f"| {error['median']:+.1%} ({error['min']:+.1%} to {error['max']:+.1%}) |"
        )
    return "\n".join(lines)


def overall(table: list[Row]) -> Row:
    """Of the absolute medians of all cells: the middle, the 90th percentile, the worst."""
    errors = sorted(abs(row["error"]["median"]) for row in table)
    return {
        "cells": len(errors),
        "median": statistics.median(errors),
        "p90": errors[int(0.9 * (len(errors) - 1))],
        "worst": errors[-1],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--link", action="append", choices=list(_LINKS), help="only this one")
    parser.add_argument("--bbr", action="store_true", help="with BBR too")
    parser.add_argument("--quick", action="store_true", help="half of the sizes: does it run?")
    parser.add_argument("--json", metavar="FILE", help="-: standard output, the table to stderr")
    args = parser.parse_args()
    keep_time()  # the ends' threads too: what is late is to be the link
    if reason := why_not():
        print(f"tcp_model: {reason}", file=sys.stderr)
        return 1
    rows: list[Row] = []
    for number in range(args.runs):
        for name in args.link or _LINKS:
            for control in ("cubic", "bbr") if args.bbr else ("cubic",):
                for kind in ("first", "idle", "burst"):
                    print(f"run {number + 1}: {name}, {control}, {kind}", file=sys.stderr)
                    rows += measure(_LINKS[name], control, kind, args.quick)
    publish(rows, args.json)
    return 0


def publish(rows: list[Row], where: str | None) -> None:
    """The table for people, and the file, which keeps the links that were not measured now."""
    kept: list[Row] = []
    if where and where != "-":
        with contextlib.suppress(OSError, ValueError):
            kept = json.loads(Path(where).read_text(encoding="utf-8"))["rows"]
    measured = {row["link"] for row in rows}
    table = [row for row in kept if row["link"] not in measured] + summary(rows)
    of_all = {
        control: overall([row for row in table if row["control"] == control])
        for control in sorted({row["control"] for row in table})
    }
    print(
        f"{markdown(table)}\n\n{json.dumps(of_all)}",
        file=sys.stderr if where == "-" else sys.stdout,
    )
    if where:
        about = report.about(f"Linux {platform.release()}")
        write_json(about | {"overall": of_all, "rows": table}, where)


if __name__ == "__main__":
    sys.exit(main())
