"""The elevator's thread. Requests go in from the event loop, outcomes come back on it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from queue import Empty, SimpleQueue
from threading import Thread

import torch

from offramp_cloud.elevator import Done, Elevator
from offramp_cloud.waiting import Request

log = logging.getLogger(__name__)


class Shaft:
    """post() as often as you like, close() once; both from the event loop of the first post."""

    def __init__(
        self, elevator: Elevator, n_layers: int, deliver: Callable[[list[Done]], None]
    ) -> None:
        """`deliver` is called on the event loop, with what is over."""
        self._elevator, self._n_layers, self._deliver = elevator, n_layers, deliver
        self._inbox: SimpleQueue[Request | None] = SimpleQueue()  # None: no more will come
        self._thread: Thread | None = None
        self._posted = 0

    @property
    def work_left(self) -> int:
        """Layers x tokens that wait or run."""
        on_the_way_in = max(0, self._posted - self._elevator.boarded)
        return on_the_way_in + self._elevator.work_left

    def post(self, request: Request) -> None:
        self._posted += request.work(self._n_layers)
        self._inbox.put(request)
        if self._thread is None:
            loop = asyncio.get_running_loop()
            self._thread = Thread(
                target=self._work, args=(loop,), name="offramp-engine", daemon=True
            )
            self._thread.start()

    async def close(self) -> None:
        """Finish what is wanted, and end the thread."""
        self._inbox.put(None)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        torch.set_num_threads(torch.get_num_threads())  # OpenMP counts for each thread by itself
        more = True
        while more or not self._elevator.idle:
            done: list[Done] = []
            try:
                more = self._let_in(more, done)
                done += self._elevator.run()
            except Exception as error:  # a bug of ours: nobody must wait for ever
                log.exception("the engine failed; what it had is given up")
                done += [Done(request, error) for request in self._elevator.abandon()]
            if done:
                try:
                    loop.call_soon_threadsafe(self._deliver, done)
                except RuntimeError:  # the loop is closed: nobody waits
                    return

    def _let_in(self, more: bool, done: list[Done]) -> bool:
        """Board what has come; sleep where there is nothing to do. False once no more will come."""
        while more:
            try:
                request = self._inbox.get(block=self._elevator.idle and not done)
            except Empty:
                return True
            if request is None:
                return False
            try:
                self._elevator.board(request)
            except Exception as error:  # noqa: BLE001 - of this request alone
                done.append(Done(request, error))
        return False
