"""Faults in real time: they begin and end by a timetable or on command."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from offramp_common.errors import ConfigError
from offramp_simulate.faults import Conditions, Fault, conditions
from offramp_simulate.links import Direction


class LiveFaults:
    """The faults of one link. `changed` is called after each begin and end, `reset` at each reset.

    Times are the running event loop's: a link whose own clock stands still heals all the same.
    """

    def __init__(self, changed: Callable[[], None], reset: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._changed = changed
        self._reset = reset
        self._active: dict[int, Fault] = {}
        self._timers: dict[int, asyncio.TimerHandle] = {}  # the next thing that each will do
        self._n_injected = 0

    def inject(self, fault: Fault) -> int:
        """Let it begin in `fault.at_s` seconds, at once if that is 0; returns its number, for `heal`."""
        self._n_injected += 1
        number = self._n_injected
        if fault.at_s:
            self._timers[number] = self._loop.call_later(fault.at_s, self._begin, number, fault)
        else:
            self._begin(number, fault)
        return number

    def heal(self, number: int | None = None) -> None:
        """End one fault, also one that has not begun; without a number, all that are active.

        ConfigError for a number that was never given; a fault that has ended stays so.
        """
        if number is not None and not 1 <= number <= self._n_injected:
            raise ConfigError(f"heal {number}: there were {self._n_injected} faults: name one")
        for one in list(self._active) if number is None else [number]:
            self._forget(one)
        self._changed()

    def close(self) -> None:
        """End all, those to come too, without a word."""
        for number in [*self._active, *self._timers]:
            self._forget(number)

    def named(self) -> tuple[str, ...]:
        """Number and kind of each active fault, such as "2 delay"."""
        return tuple(f"{number} {fault.kind}" for number, fault in self._active.items())

    @property
    def state(self) -> str:
        """up, cut, or silent where a direction at least is a black hole."""
        kinds = {fault.kind for fault in self._active.values()}
        return "cut" if "cut" in kinds else "silent" if "blackhole" in kinds else "up"

    def conditions(self, direction: Direction) -> Conditions:
        return conditions(self._active.values(), direction)

    def _begin(self, number: int, fault: Fault) -> None:
        self._timers.pop(number, None)
        if fault.kind == "reset":
            self._reset_again(number, fault, self._loop.time() + fault.for_s)
            return
        self._active[number] = fault
        if fault.for_s < math.inf:
            self._timers[number] = self._loop.call_later(fault.for_s, self._end, number)
        self._changed()

    def _reset_again(self, number: int, fault: Fault, until_s: float) -> None:
        self._reset()
        self._forget(number)
        if fault.every_s is not None and self._loop.time() + fault.every_s < until_s:
            self._active[number] = fault
            self._timers[number] = self._loop.call_later(
                fault.every_s, self._reset_again, number, fault, until_s
            )

    def _end(self, number: int) -> None:
        self._forget(number)
        self._changed()

    def _forget(self, number: int) -> None:
        self._active.pop(number, None)
        if timer := self._timers.pop(number, None):
            timer.cancel()
