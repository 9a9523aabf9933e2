"""Whose turn it is on the device's one compute thread.

A lock with ranks: samples before hedges. Samples come in the order they asked, so that none is overtaken;
hedges (hedge.py) in that of their samples, the oldest first, and only while no sample waits.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools

SAMPLE, LAST = 0, 2**62
"""Ranks: a sample's, and one behind all hedges (whose rank is their sample's number)."""


class Turn:
    """`async with turn` is a sample's turn. Used from one event loop; `samples`, how many of them wait, is
    read by the compute thread too."""

    def __init__(self) -> None:
        self.samples = 0
        self._held = False
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()

    async def acquire(self, rank: int = SAMPLE) -> bool:
        """Wait for the turn; of those who wait, the lowest rank gets it first. False where it was free."""
        if not self._held:
            self._held = True
            return False
        coming: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (rank, next(self._numbers), coming))
        self.samples += rank == SAMPLE
        try:
            await coming
            return True
        except asyncio.CancelledError:
            if coming.done() and not coming.cancelled():  # it came at the same moment
                self.release()
            raise
        finally:
            self.samples -= rank == SAMPLE

    def release(self) -> None:
        """Hand it to the next, straight: nobody who asks meanwhile comes between."""
        while self._waiting:
            _, _, coming = heapq.heappop(self._waiting)
            if not coming.done():
                coming.set_result(None)
                return
        self._held = False

    async def __aenter__(self) -> None:
        await self.acquire()

    async def __aexit__(self, *_: object) -> None:
        self.release()
