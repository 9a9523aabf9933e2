"""`offramp link` as a process of its own: what it prints, what steers it, how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# `offramp` with this one command, whatever else is installed.
_MAIN = """
import argparse, sys
from offramp_common import cli
from offramp_simulate.link_cli import add_link_command
def build_parser():
    parser = argparse.ArgumentParser(prog="offramp")
    add_link_command(parser.add_subparsers(dest="command"))
    return parser
cli.build_parser = build_parser
cli.console_main()
"""


def start(*options: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", _MAIN, "link", *options],
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
        # The packages as this process finds them, installed or not.
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


def answer(process: subprocess.Popen[str], command: str = "") -> dict[str, Any]:
    """The next line of standard output, after a command if one is given."""
    assert process.stdin is not None
    assert process.stdout is not None
    if command:
        print(command, file=process.stdin, flush=True)
    line: dict[str, Any] = json.loads(process.stdout.readline())
    return line


def connect(started: dict[str, Any]) -> socket.socket:
    host, port = started["listening"].split(":")
    return socket.create_connection((host, int(port)), timeout=5)


@pytest.fixture
def echo() -> Iterator[str]:
    """The address of a server that sends back what it gets."""

    def serve() -> None:
        while True:
            try:
                end, _ = listener.accept()
            except OSError:  # closed at the end of the test
                return
            with end:
                try:
                    while data := end.recv(65536):
                        end.sendall(data)
                except ConnectionError:
                    pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield "{}:{}".format(*listener.getsockname())
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_commands_on_standard_input_steer_the_link_and_each_is_answered(
    echo: str, tmp_path: Path
) -> None:
    stats = tmp_path / "stats.json"
    with start(
        "--to", echo, "--profile", "unshaped", "--control-stdin", "--stats", str(stats)
    ) as p:
        end = connect(answer(p))
        end.sendall(b"hello")
        assert end.recv(5) == b"hello"
        now = answer(p, "stats")
        assert (now["command"], now["state"]) == ("stats", "up")
        assert (now["bytes_up"], now["bytes_down"], now["connections"]) == (5, 5, 1)
        assert answer(p, "cut   silent")["state"] == "silent"
        end.sendall(b"hello")
        end.settimeout(0.1)
        with pytest.raises(TimeoutError):
            end.recv(5)
        assert answer(p, "restore")["state"] == "up"
        assert end.recv(5) == b"hello"
        assert answer(p, "cut")["state"] == "cut"
        with pytest.raises(ConnectionError):
            end.recv(5)
        end.close()
        assert "one of stats, cut" in answer(p, "explode")["error"]
        assert answer(p, "quit")["command"] == "quit"
        assert p.wait(5) == 0
    assert json.loads(stats.read_text())["bytes_up"] == 10


def test_the_end_of_the_steering_input_ends_the_link(echo: str) -> None:
    with start("--to", echo, "--control-stdin") as p:
        answer(p)
        assert p.stdin is not None
        p.stdin.close()
        assert p.wait(5) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_link_with_its_counters_on_standard_output(
    echo: str, number: signal.Signals
) -> None:
    with start("--to", echo, "--stats", "-") as p:
        with connect(answer(p)):
            p.send_signal(number)
            assert answer(p)["state"] == "up"
            assert p.wait(5) == 0
        assert p.stderr is not None
        assert p.stderr.read().splitlines() == [
            f"offramp link: lte 5 up / 20 down Mbit/s, round trip 40 ms, to {echo}"
        ]


def test_a_trace_is_described_on_standard_error(echo: str, tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text('{"trace": "bus", "dt": 1, "mbps": [1, 3]}\n', encoding="utf-8")
    with start("--to", echo, "--trace", str(file), "--rtt-ms", "70", "--control-stdin") as p:
        answer(p)
        _, people = p.communicate("quit\n", timeout=5)
    assert "trace bus, on average 2 up / 2 down Mbit/s, round trip 70 ms" in people


def test_an_address_beyond_this_machine_is_warned_of(echo: str) -> None:
    with start("--listen", "0.0.0.0:0", "--to", echo, "--control-stdin") as p:
        answer(p)
        _, people = p.communicate("quit\n", timeout=5)
    assert "warning: 0.0.0.0 is reachable from outside" in people


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "nowhere"], "'nowhere' is not HOST:PORT"),
        (["--to", "h:70000"], "'h:70000' is not HOST:PORT"),
        ([], "required: --to"),
        (["--to", "h:1", "--profile", "pigeon"], "invalid choice: 'pigeon'"),
        (["--to", "h:1", "--profile", "lte", "--trace", "t"], "not allowed with"),
        (["--to", "h:1", "--rtt-ms", "5"], "need --trace FILE"),
        (["--to", "h:1", "--trace", "{tmp}/none"], "cannot read the traces"),
        (["--to", "h:1", "--trace", "{tmp}/bad"], "bad:1: "),
        (["--to", "h:1", "--stats", "{tmp}/no/such"], "cannot write"),
        (["--to", "h:1", "--listen", "{echo}"], "cannot listen on 127.0.0.1:"),
    ],
)
def test_wrong_arguments_end_with_code_2_and_say_what_is_wrong(
    options: list[str], message: str, tmp_path: Path, echo: str
) -> None:
    (tmp_path / "bad").write_text("{}\n", encoding="utf-8")
    with start(*(o.format(tmp=tmp_path, echo=echo) for o in options)) as p:
        machine, people = p.communicate(timeout=10)
    assert p.returncode == 2
    assert machine == ""
    assert message in people
    assert "Traceback" not in people
