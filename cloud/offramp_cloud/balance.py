"""The replicas of one version of a bundle: which one is asked, and what happens when it dies."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Collection

from offramp_cloud.rates import refuse_late
from offramp_cloud.replica_link import Endpoint, ReplicaGone, ReplicaLink
from offramp_cloud.statuses import Outcome
from offramp_common.errors import CloudBusy, CloudUnavailable
from offramp_common.wire import replica_pb2 as pb

log = logging.getLogger(__name__)

_TRIES = 3  # replicas that a request may take down with it, or lose, before it is given up
_RETRY_S = 2.0  # how long a replica is waited for where there is none


class Pool:
    """Links come and go; requests find one, or the reason why not."""

    def __init__(self, first: Endpoint, retry_s: float = _RETRY_S) -> None:
        self.bundle, self.order = first.bundle, first.order
        self.depths = {bytes.fromhex(digest): depth for digest, depth in first.depths.items()}
        self.links: dict[str, ReplicaLink] = {}
        self.empty_since_s = time.monotonic()
        self._retry_s = retry_s
        self._rng = random.Random()
        self._usable = asyncio.Event()

    @property
    def usable(self) -> bool:
        return self._usable.is_set()

    def changed(self) -> None:
        """Some link came, went, or is about to."""
        if any(link.usable for link in self.links.values()):
            self._usable.set()
        else:
            self._usable.clear()
            self.empty_since_s = time.monotonic()

    async def ask(self, method: pb.Method, payload: bytes, budget_ms: float) -> Outcome:
        """A request whose replica dies is repeated on another: it has changed nothing there.

        Raises CloudUnavailable where no replica is left, CloudBusy where all have too much to do
        for an answer in time.
        """
        until_s = time.monotonic() + budget_ms / 1e3
        lost: list[ReplicaLink] = []
        while True:
            link = await self._one(lost)
            left_ms = (until_s - time.monotonic()) * 1e3
            if method == pb.METHOD_COMPLETE:
                link = self._in_time(link, left_ms)
            try:
                return await link.call(method, payload, left_ms)
            except ReplicaGone as error:
                log.warning("a replica of %s died under a request: %s", self.bundle, error)
                lost.append(link)
                if len(lost) >= _TRIES:
                    raise

    async def _one(self, lost: Collection[ReplicaLink]) -> ReplicaLink:
        if (link := self.pick(lost)) is not None:
            return link  # as nearly always: a timeout is not made for nothing
        try:
            async with asyncio.timeout(self._retry_s):
                while (link := self.pick(lost)) is None:
                    await self._usable.wait()
        except TimeoutError:
            raise CloudUnavailable(
                f"no replica of {self.bundle!r} answered within {self._retry_s:g} s; retry later"
            ) from None
        return link

    def pick(self, lost: Collection[ReplicaLink] = ()) -> ReplicaLink | None:
        """The less loaded of two at random: as good as knowing the best, without everybody's
        running to it (Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001)."""
        usable = [link for link in self.links.values() if link.usable]
        # One that was lost and has come back is better than none.
        choice = [link for link in usable if link not in lost] or usable
        if len(choice) < 2:
            return choice[0] if choice else None
        return min(self._rng.sample(choice, 2), key=lambda link: link.load)

    def _in_time(self, link: ReplicaLink, left_ms: float) -> ReplicaLink:
        """`link`, or the least loaded where that would be late. Raises CloudBusy."""
        try:
            refuse_late(link.load, link.capacity, left_ms)
        except CloudBusy:
            usable = [each for each in self.links.values() if each.usable] or [link]
            link = min(usable, key=lambda each: each.load)
            refuse_late(link.load, link.capacity, left_ms)
        return link
