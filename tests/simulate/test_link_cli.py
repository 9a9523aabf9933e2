"""`offramp link` as a process of its own: what it prints, what steers it, how it ends."""

from __future__ import annotations

import json
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from link_world import answer, start


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
        assert "one of stats, fault" in answer(p, "explode")["error"]
        assert answer(p, "quit")["command"] == "quit"
        assert p.wait(5) == 0
    assert json.loads(stats.read_text())["bytes_up"] == 10


def test_faults_begin_and_end_on_command_and_wrong_ones_are_answered_with_the_reason(
    echo: str,
) -> None:
    with start("--to", echo, "--profile", "unshaped", "--control-stdin") as p:
        with connect(answer(p)) as end:
            assert answer(p, "heal")["faults"] == []
            begun = answer(p, "fault kind=stall, direction=down")
            assert (begun["fault"], begun["faults"], begun["state"]) == (1, ["1 stall"], "up")
            end.sendall(b"hello")
            end.settimeout(0.1)
            with pytest.raises(TimeoutError):
                end.recv(5)
            assert answer(p, "heal 1")["faults"] == []
            assert end.recv(5) == b"hello"
            assert answer(p, "fault kind=rate factor=2")["error"].endswith("give mbps")
            assert "no kind given" in answer(p, "fault")["error"]
            assert "there were 1 faults" in answer(p, "heal 2")["error"]
            assert "not the number of a fault" in answer(p, "heal all")["error"]
            assert answer(p, "cut")["faults"] == ["2 cut"]
        answer(p, "quit")
        assert p.wait(5) == 0


def test_a_timetable_is_taken_from_options_and_from_a_file(echo: str, tmp_path: Path) -> None:
    file = tmp_path / "faults.toml"
    file.write_text('[[fault]]\nkind = "stall"\nfor = 60\n', encoding="utf-8")
    with start(
        "--to", echo, "--fault", "kind=delay,ms=5", "--fault", "kind=cut,at=60",
        "--faults", str(file), "--control-stdin",
    ) as p:  # fmt: skip
        answer(p)
        assert answer(p, "stats")["faults"] == ["1 delay", "3 stall"]
        answer(p, "quit")


def test_any_link_can_be_made_to_jitter_lose_and_queue_otherwise(echo: str) -> None:
    with start(
        "--to", echo, "--profile", "wifi", "--jitter-ms", "1", "--queue-ms", "30",
        "--loss", "0.5", "--loss-burst", "2", "--seed", "3", "--control-stdin",
    ) as p:  # fmt: skip
        with connect(answer(p)) as end:
            end.sendall(bytes(30_000))
            end.settimeout(20)
            assert end.recv(1) == b"\0"
            assert answer(p, "stats")["lost_segments_up"] > 0
        _, people = p.communicate("quit\n", timeout=5)
    assert "round trip 5 ms, jitter 1 ms, 0.5 of packets lost, to" in people


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
    with start(
        "--to", echo, "--trace", str(file), "--rtt-ms", "70", "--uplink-factor", "0.2",
        "--downlink-mbps", "8", "--control-stdin",
    ) as p:  # fmt: skip
        answer(p)
        _, people = p.communicate("quit\n", timeout=5)
    # Scaling is said, since a trace that is scaled was not recorded so.
    assert (
        "trace bus, on average 0.4 up (the recording x 0.2) / 8 down (the recording x 4) Mbit/s, "
        "round trip 70 ms" in people
    )


def test_markov_states_vary_the_rate_of_a_link(echo: str) -> None:
    with start("--to", echo, "--markov", "8:2,0.5:1", "--control-stdin") as p:
        answer(p)
        _, people = p.communicate("quit\n", timeout=5)
    assert "trace markov, on average" in people


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
        ([], "one of the arguments --to --layer3 --clean is required"),
        (["--to", "h:1", "--profile", "pigeon"], "invalid choice: 'pigeon'"),
        (["--to", "h:1", "--profile", "lte", "--trace", "t"], "not allowed with"),
        (["--to", "h:1", "--uplink-factor", "2"], "need --trace or --markov"),
        (["--to", "h:1", "--trace-name", "bus"], "needs --trace FILE"),
        (["--to", "h:1", "--markov", "5:1,2"], "write MBPS:SECONDS"),
        (["--to", "h:1", "--markov", "5:1"], "two at least"),
        (["--to", "h:1", "--uplink-mbps", "-1"], "uplink_mbps is -1.0"),
        (["--layer3", "--listen", "127.0.0.1:0"], "--listen needs --to"),
        (["--to", "h:1", "--trace", "{tmp}/none"], "cannot read the traces"),
        (["--to", "h:1", "--trace", "{tmp}/bad"], "bad:1: "),
        (["--to", "h:1", "--loss", "1"], "rate is 1.0"),
        (["--to", "h:1", "--loss-burst", "2"], "needs --loss"),
        (["--to", "h:1", "--fault", "kind=flood"], "kind is 'flood'"),
        (["--to", "h:1", "--faults", "{tmp}/none.toml"], "cannot read the faults"),
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
