"""Steering a running link: commands as lines on standard input, an answer in JSON to each."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
from dataclasses import asdict
from typing import TYPE_CHECKING, Protocol

from offramp_common.errors import ConfigError
from offramp_simulate.faults import Fault, parse_fault

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

COMMAND_HELP = """\
  stats                    the counters, the state and the active faults
  fault KEY=VALUE ...      let a fault begin (after at= seconds); the answer has its number as "fault"
  heal [NUMBER]            end this fault, also one to come; without a number, all that are active
  cut, cut silent          the same as fault kind=cut, fault kind=blackhole
  restore                  the same as heal
  quit                     end, as the end of standard input does
"""
_COMMANDS = "stats, fault, heal, cut, cut silent, restore, quit"


class SteeredLink(Protocol):
    """What the commands act on."""

    def inject(self, fault: Fault) -> int: ...
    def heal(self, number: int | None = None) -> None: ...
    def stats(self) -> DataclassInstance: ...


def obey(link: SteeredLink, line: str) -> dict[str, object]:
    """Do what a line says; returns the answer. "quit" is left to the caller."""
    command = " ".join(line.split())
    verb, _, rest = command.partition(" ")
    answer: dict[str, object] = {"command": command}
    try:
        if verb == "fault":
            answer["fault"] = link.inject(parse_fault(rest))
        elif command in ("cut", "cut silent"):
            answer["fault"] = link.inject(Fault("blackhole" if rest else "cut"))
        elif verb == "heal" and rest:
            link.heal(_whole(rest))
        elif command in ("heal", "restore"):
            link.heal()
        elif command not in ("stats", "quit"):
            raise ConfigError(f"unknown command: one of {_COMMANDS}")
    except ConfigError as error:
        return answer | {"error": str(error)}
    return answer | asdict(link.stats())


def take_commands(link: SteeredLink, stop: asyncio.Event) -> None:
    """Answer each line of standard input in the event loop; its end stops the link."""
    loop = asyncio.get_running_loop()

    def answer(line: str) -> None:
        print_line(obey(link, line))
        if line.split() == ["quit"]:
            stop.set()

    def read() -> None:
        # Any kind of standard input, a file too, hence a thread. Not sys.stdin: its lock, held by a
        # thread that waits, would keep the process from ending.
        rest = b""
        with contextlib.suppress(RuntimeError, OSError):  # the loop has ended, or there is no input
            while data := os.read(0, 4096):
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    loop.call_soon_threadsafe(answer, line.decode(errors="replace"))
            if rest:
                loop.call_soon_threadsafe(answer, rest.decode(errors="replace"))
            loop.call_soon_threadsafe(stop.set)

    threading.Thread(target=read, name="link commands", daemon=True).start()


def print_line(answer: dict[str, object]) -> None:
    """One object on standard output, at once."""
    print(json.dumps(answer), flush=True)


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ConfigError(f"heal {text}: not the number of a fault") from error
