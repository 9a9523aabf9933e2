"""An event loop whose clock is turned, never waited for: a minute of time-outs runs in a millisecond.

asyncio.sleep, timeouts and all that is built on them follow loop.time(); when nothing is ready to
run, the loop jumps to the next timer.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

T = TypeVar("T")


class VirtualLoop(asyncio.SelectorEventLoop):
    """Also the `Clock` of what runs in it, and in its VirtualThread."""

    def __init__(self) -> None:
        self._now_s = 1000.0  # no test may rely on a clock that starts at 0
        self._ahead_s = 0.0
        super().__init__(_Jump(self))

    def time(self) -> float:
        return self._now_s

    def now(self) -> float:
        return self._now_s + self._ahead_s

    def jump(self, seconds: float) -> None:
        self._now_s += seconds

    def work(self, seconds: float) -> None:
        """What runs in a VirtualThread takes so long."""
        self._ahead_s += seconds

    def in_thread(self, call: Callable[[], T], from_s: float) -> tuple[T, float]:
        """(the result of `call` begun at `from_s`, when it ends): the loop's own time stands."""
        self._ahead_s = from_s - self._now_s
        try:
            return call(), self.now()
        finally:
            self._ahead_s = 0.0


class _Jump(selectors.SelectSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("the loop waits for something that will never happen")
        self._loop.jump(max(0.0, timeout))
        return super().select(0)


class VirtualThread(Executor):
    """One thread in virtual time: a call is run at once, but its result comes when the time it
    took (`VirtualLoop.work`) has passed, and the loop goes on meanwhile."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self._busy_until_s = 0.0

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        began_s = max(self._loop.time(), self._busy_until_s)
        try:
            result, self._busy_until_s = self._loop.in_thread(lambda: fn(*args, **kwargs), began_s)
            self._loop.call_at(self._busy_until_s, future.set_result, result)
        except Exception as error:  # noqa: BLE001 - handed to whoever awaits it, as an executor does
            future.set_exception(error)
        return future


def run_virtual(main: Coroutine[Any, Any, T], loop: VirtualLoop) -> T:
    """Run `main` in `loop` and leave nothing behind."""
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(main)
