"""Does the link emulator give the rate and the round trip of each profile?

    python benchmarks/link_emulator.py [--runs N] [--json FILE|-]

The emulator runs in a process of its own, as `offramp link` does; the sender here, the receiver in
a thread. Per run and profile: the time of a new connection's first answer (a link's own: two round
trips, one of them the handshake), the median of single bytes there and back, and one transfer each
way, long enough for about a second. A rate is the bytes over the time from the first byte sent to
the answer received, less the median round trip. Printed are medians and ranges over the runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import platform
import socket
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

import report

from offramp_common.cli import write_json
from offramp_simulate.links import PROFILES, LinkProfile

_TRANSFER_S = 1.0
_UNLIMITED_NBYTES = 100_000_000
_N_ROUND_TRIPS = 9
_EMULATE = """
import argparse, sys
from offramp_simulate.link_cli import add_link_command
parser = argparse.ArgumentParser()
add_link_command(parser.add_subparsers())
args = parser.parse_args(sys.argv[1:])
sys.exit(args.run(args))
"""


def serve(listener: socket.socket) -> None:
    """Take connections, a thread for each."""
    while True:
        threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()


def answer(end: socket.socket) -> None:
    """Answer requests of two 8-byte numbers: so many bytes follow, send so many back."""
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with end, contextlib.suppress(ConnectionError):  # the emulator of a run has ended
        while len(head := end.recv(16, socket.MSG_WAITALL)) == 16:
            receive(end, int.from_bytes(head[:8], "big"))
            end.sendall(bytes(int.from_bytes(head[8:], "big")))


def receive(end: socket.socket, nbytes: int) -> None:
    """Take exactly so many bytes; ConnectionError when the other end closes before."""
    while nbytes:
        data = end.recv(min(nbytes, 65536))
        if not data:
            raise ConnectionError("the link was closed")
        nbytes -= len(data)


def ask(end: socket.socket, up_nbytes: int, down_nbytes: int) -> float:
    """Seconds from the first byte sent to the last received."""
    start_s = time.perf_counter()
    end.sendall(up_nbytes.to_bytes(8, "big") + down_nbytes.to_bytes(8, "big"))
    end.sendall(bytes(up_nbytes))
    receive(end, down_nbytes)
    return time.perf_counter() - start_s


def connect(host: str, port: int) -> tuple[socket.socket, float]:
    """A new connection, and the seconds until its first answer."""
    start_s = time.perf_counter()
    end = socket.create_connection((host, port))
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    ask(end, 0, 1)
    return end, time.perf_counter() - start_s


def transfer_nbytes(mbps: float) -> int:
    return _UNLIMITED_NBYTES if math.isinf(mbps) else int(mbps * 1e6 / 8 * _TRANSFER_S)


def measure(profile: LinkProfile, target: str) -> dict[str, float]:
    """One run of one profile, through a fresh emulator process."""
    command = ["link", "--listen", "127.0.0.1:0", "--to", target, "--profile", profile.name]
    emulator = subprocess.Popen(
        [sys.executable, "-c", _EMULATE, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert emulator.stdout is not None
    host, port = json.loads(emulator.stdout.readline())["listening"].split(":")
    try:
        connect(host, int(port))[0].close()  # a fresh process is slow for its own reasons
        end, first_s = connect(host, int(port))
        with end:
            rtt_s = statistics.median(ask(end, 0, 1) for _ in range(_N_ROUND_TRIPS))
            up_nbytes = transfer_nbytes(profile.uplink_mbps)
            down_nbytes = transfer_nbytes(profile.downlink_mbps)
            up_s = ask(end, up_nbytes, 1) - rtt_s
            down_s = ask(end, 0, down_nbytes) - rtt_s
    finally:
        emulator.terminate()
        emulator.wait()
        emulator.stdout.close()
    return {
        "first_answer_ms": first_s * 1e3,
        "rtt_ms": rtt_s * 1e3,
        "uplink_mbps": up_nbytes * 8 / 1e6 / up_s,
        "downlink_mbps": down_nbytes * 8 / 1e6 / down_s,
    }


def summary(profile: LinkProfile, runs: list[dict[str, float]]) -> dict[str, Any]:
    """Medians over the runs beside the profile's figures."""
    row: dict[str, Any] = {"profile": profile.name, "runs": len(runs)}
    for key in runs[0]:
        values = [run[key] for run in runs]
        row[key] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    row["nominal"] = {
        # JSON has no infinity.
        key: None if math.isinf(getattr(profile, key)) else getattr(profile, key)
        for key in ("rtt_ms", "uplink_mbps", "downlink_mbps")
    } | {"first_answer_ms": 2 * profile.rtt_ms}
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table: the profile's figure, then the measured one."""
    lines = [
        "| profile | round trip ms | first answer ms | uplink Mbit/s | downlink Mbit/s |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [row["profile"]]
        for key in ("rtt_ms", "first_answer_ms", "uplink_mbps", "downlink_mbps"):
            got, nominal = row[key], row["nominal"][key]
            text = f"{got['median']:.4g} ({got['min']:.4g}-{got['max']:.4g})"
            cells.append(f"{'no limit' if nominal is None else f'{nominal:g}'}: {text}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--profile", action="append", choices=list(PROFILES), help="only this one")
    parser.add_argument(
        "--json", metavar="FILE", help="-: standard output, the table then to stderr"
    )
    args = parser.parse_args()
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=serve, args=(listener,), daemon=True).start()
    target = f"127.0.0.1:{listener.getsockname()[1]}"
    profiles = [PROFILES[name] for name in args.profile or PROFILES]
    machine = report.machine(f"{platform.system()} {platform.release()}")
    runs: dict[str, list[dict[str, float]]] = {profile.name: [] for profile in profiles}
    for _ in range(args.runs):  # the profiles in turn, so that a busy minute hits them all
        for profile in profiles:
            runs[profile.name].append(measure(profile, target))
    rows = [summary(profile, runs[profile.name]) for profile in profiles]
    print(
        f"{table(rows)}\n\nnominal: median (range) of {args.runs} runs; {machine}; {report.commit()}",
        file=sys.stderr if args.json == "-" else sys.stdout,
    )
    if args.json:
        write_json({"hardware": machine, "commit": report.commit(), "rows": rows}, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
