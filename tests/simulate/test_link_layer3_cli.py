"""`offramp link --layer3` as a process: its ends, its commands, what it leaves behind and when."""

from __future__ import annotations

import ctypes
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from link_world import answer, start

from offramp_simulate.netns import why_not

PR_CAPBSET_DROP = 24
needs_root = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")


def named(ends: dict[str, Any]) -> list[bool]:
    """Whether the two namespaces of a link are there."""
    return [Path("/run/netns", ends[side]["namespace"]).exists() for side in ("device", "cloud")]


@pytest.mark.root
@needs_root
def test_a_command_can_be_run_at_an_end_and_reaches_the_other() -> None:
    listen = "import socket; s = socket.create_server(('', 7)); print(flush=True); s.accept()"
    call = "import socket, sys; socket.create_connection((sys.argv[1], 7), timeout=10)"
    with start("--layer3", "--profile", "wifi", "--control-stdin", "--stats", "-") as p:
        ends = answer(p)
        device, cloud = ends["device"], ends["cloud"]
        assert device["enter"] == ["ip", "netns", "exec", device["namespace"]]
        with subprocess.Popen(
            [*cloud["enter"], "python3", "-c", listen], stdout=subprocess.PIPE
        ) as server:
            assert server.stdout is not None
            server.stdout.readline()
            subprocess.run(
                [*device["enter"], "python3", "-c", call, cloud["address"]], check=True, timeout=20
            )
            assert server.wait(10) == 0
        assert answer(p, "stats")["packets_up"] >= 2
        assert answer(p, "fault kind=delay ms=5")["faults"] == ["1 delay"]
        assert "only the TCP proxy" in answer(p, "fault kind=reset")["error"]
        assert answer(p, "cut")["state"] == "cut"
        assert answer(p, "restore")["faults"] == []
        assert answer(p, "quit")["state"] == "up"
        assert answer(p)["bytes_up"] > 0
        assert p.wait(10) == 0
    assert not any(named(ends))


@pytest.mark.root
@needs_root
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_takes_the_namespaces_away(number: signal.Signals) -> None:
    with start("--layer3") as p:
        ends = answer(p)
        assert all(named(ends))
        p.send_signal(number)
        assert p.wait(10) == 0
    assert not any(named(ends))


@pytest.mark.root
@needs_root
def test_what_a_killed_link_leaves_is_cleaned_and_a_running_one_is_left_alone() -> None:
    with start("--layer3") as killed, start("--layer3", "--control-stdin") as running:
        left, kept = answer(killed), answer(running)
        killed.kill()
        killed.wait()
        assert all(named(left))
        with start("--clean") as cleaner:
            removed = answer(cleaner)["removed"]
            assert cleaner.wait(10) == 0
        assert {left[side]["namespace"] for side in ("device", "cloud")} <= set(removed)
        assert not any(named(left))
        assert all(named(kept))
        answer(running, "quit")


def give_up_root() -> None:
    """Root, if this process has it, without CAP_NET_ADMIN and CAP_SYS_ADMIN after the next exec."""
    for capability in (12, 21):
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)


def test_without_root_the_message_says_what_it_takes_and_what_does_without() -> None:
    with start("--layer3", before=give_up_root) as p:
        machine, people = p.communicate(timeout=20)
    assert p.returncode == 2
    assert machine == ""
    assert "layer-3 link: " in people
    assert "the TCP proxy, --to, needs none of it" in people
