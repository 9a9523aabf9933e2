"""Whether the cloud is worth asking, and since when it is not.

    connecting   no handshake has ended yet: samples wait for it
    up           the last handshake was welcome
    aside        put aside after failures; a handshake in the background brings it back
    refused      the two sides do not fit; asked again at the longest interval

A link or a cloud that is gone puts it aside at once. Anything else that may be one sample's bad luck
(no answer in time, refused for load) raises a doubt, which a handshake settles, and three in a row
put it aside: a cloud that greets but does not answer must not cost every sample its time-out.
Setbacks are forgotten when work is answered, not when a handshake is: a cloud that only greets is
asked ever more rarely.

It is half open twice over. A handshake is the first probe, and costs no sample anything; after it samples
are sent one at a time until one is answered. A cloud that refuses for load and says for how long is left
alone for that long: samples are answered here, not queued.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
from collections.abc import Callable

from offramp_common.clock import Clock
from offramp_common.retry import Backoff

CONNECTING, UP, ASIDE, REFUSED = "connecting", "up", "aside", "refused"
_STRIKES = 3
_AT_ONCE = ("unavailable", "mismatch", "codec", "setup")
_MISFITS = ("mismatch", "codec", "setup")
_LONGEST_BUSY_S = 60.0
"""A cloud that asks for more is asked again all the same."""

log = logging.getLogger("offramp.edge")


class Breaker:
    """The state of the cloud as the worker sees it. `reason` says why it is not up."""

    def __init__(
        self,
        backoff: Backoff,
        rng: random.Random,
        clock: Clock,
        on_lost: Callable[[], None] = lambda: None,
        return_s: float = 1.0,
    ) -> None:
        """`return_s` bounds the wait between handshakes while samples miss the cloud; `on_lost` is called
        when the cloud is put aside: whoever waits for it need not."""
        self.state = CONNECTING
        self.reason = ""
        # Handshakes that went well: failures of work from before one do not count.
        self.welcomes = 0
        self.settled = asyncio.Event()  # the first handshake has ended, well or not
        self.ask = asyncio.Event()  # a handshake is wanted
        self.up = asyncio.Event()
        self.missed = asyncio.Event()  # a sample was answered here because of the state
        self.at_work = 0  # requests in the air
        self._on_lost = on_lost
        self._backoff, self._rng, self._clock = backoff, rng, clock
        self._trial = ""  # why one sample at a time is sent; empty: as many as there are
        self._busy_until_s = -math.inf
        self._strikes = self._setbacks = 0
        self._return_s = return_s
        self._fruitless = 0  # setbacks of work, after handshakes that went well
        self._told: set[str] = set()

    def welcomed(self) -> None:
        if self.state != UP:
            log.info("the cloud is there")
            self.welcomes += 1
        self.state, self.reason = UP, ""
        self.settled.set()
        self.up.set()

    def answered(self) -> None:
        """Work was answered."""
        self._strikes = self._setbacks = self._fruitless = 0
        self._trial = ""
        self._told.clear()

    def refusal(self) -> str:
        """Why no work is to be sent at the moment; empty where it may be."""
        if self.state in (ASIDE, REFUSED):
            return self.reason
        if self._clock.now() < self._busy_until_s:
            return "busy"
        return self._trial if self.at_work else ""

    def busy_for(self, seconds: float, message: str) -> None:
        """The cloud refused for load, and wants to be left alone for so long."""
        self.tell("busy", message)
        self._trial = "busy"
        until_s = self._clock.now() + min(seconds, _LONGEST_BUSY_S)
        self._busy_until_s = max(self._busy_until_s, until_s)

    def failed(self, reason: str, message: str, welcomes: int | None = None) -> None:
        """Work sent after `welcomes` handshakes failed (None: a handshake did)."""
        if welcomes is not None and (welcomes != self.welcomes or self.state != UP):
            return
        self.tell(reason, message)
        self._strikes += 1
        if welcomes is None or reason in _AT_ONCE or self._strikes >= _STRIKES:
            self._fruitless += welcomes is not None
            # Only a handshake says for certain that the two do not fit: a byte that was changed on the way
            # makes one request look so.
            self._put_aside(reason, refused=welcomes is None and reason in _MISFITS)
        self.ask.set()

    async def pause(self) -> None:
        """Wait until the next handshake is due. While samples miss the cloud that is soon, unless it is one
        that greets and then fails its work."""
        soon_s, longest_s = self.pauses()
        if self.state != ASIDE:
            await asyncio.sleep(longest_s)
            return
        self.missed.clear()
        await asyncio.sleep(soon_s)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(longest_s - soon_s):
                await self.missed.wait()

    def pauses(self) -> tuple[float, float]:
        """(seconds before the next handshake while samples miss the cloud, and if nobody does), drawn
        anew. The simulator waits them in its own time."""
        longest_s = self.wait_s()
        if self.state != ASIDE:
            return longest_s, longest_s
        fruitless_s = self._backoff.longest_s(self._fruitless - 1) if self._fruitless else 0.0
        return min(longest_s, self._rng.uniform(0.0, max(self._return_s, fruitless_s))), longest_s

    def wait_s(self) -> float:
        """How long to wait before the next handshake, if nobody misses the cloud."""
        if self.state == REFUSED:
            # Nothing changes by itself in a moment: spread over the second half of the interval.
            cap_s = self._backoff.cap_s
            return cap_s / 2 + self._rng.uniform(0, cap_s / 2)
        return self._backoff.wait_s(self._setbacks - 1, self._rng) if self.state == ASIDE else 0.0

    def _put_aside(self, reason: str, refused: bool) -> None:
        self.state = REFUSED if refused else ASIDE
        self.reason = self._trial = reason
        self.up.clear()
        self._strikes = 0
        self._setbacks += 1
        self.settled.set()
        self._on_lost()

    def tell(self, reason: str, message: str) -> None:
        """Once until work is answered again: a lost cloud must not fill the log."""
        if reason in self._told:
            return
        self._told.add(reason)
        level = logging.ERROR if reason in (*_MISFITS, "refused", "malformed") else logging.WARNING
        log.log(level, "the device answers alone for now (%s): %s", reason, message)
