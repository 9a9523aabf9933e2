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
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable

from offramp_common.retry import Backoff

CONNECTING, UP, ASIDE, REFUSED = "connecting", "up", "aside", "refused"
_STRIKES = 3
_AT_ONCE = ("unavailable", "mismatch", "codec", "setup")
_MISFITS = ("mismatch", "codec", "setup")

log = logging.getLogger("offramp.edge")


class Breaker:
    """The state of the cloud as the worker sees it. `reason` says why it is not up."""

    def __init__(
        self, backoff: Backoff, rng: random.Random, on_lost: Callable[[], None] = lambda: None
    ) -> None:
        """`on_lost` is called when the cloud is put aside: whoever waits for it need not."""
        self.state = CONNECTING
        self.reason = ""
        self.welcomes = (
            0  # handshakes that went well: failures of work from before one do not count
        )
        self.settled = asyncio.Event()  # the first handshake has ended, well or not
        self.ask = asyncio.Event()  # a handshake is wanted
        self._on_lost = on_lost
        self._backoff, self._rng = backoff, rng
        self._strikes = self._setbacks = 0
        self._told: set[str] = set()

    def welcomed(self) -> None:
        if self.state != UP:
            log.info("the cloud is there")
            self.welcomes += 1
        self.state, self.reason = UP, ""
        self.settled.set()

    def answered(self) -> None:
        """Work was answered."""
        self._strikes = self._setbacks = 0
        self._told.clear()

    def failed(self, reason: str, message: str, welcomes: int | None = None) -> None:
        """Work sent after `welcomes` handshakes failed (None: a handshake did)."""
        if welcomes is not None and (welcomes != self.welcomes or self.state != UP):
            return
        self.tell(reason, message)
        self._strikes += 1
        if welcomes is None or reason in _AT_ONCE or self._strikes >= _STRIKES:
            self._put_aside(reason)
        self.ask.set()

    def wait_s(self) -> float:
        """How long to wait before the next handshake."""
        if self.state == REFUSED:
            # Nothing changes by itself in a moment: spread over the second half of the interval.
            cap_s = self._backoff.cap_s
            return cap_s / 2 + self._rng.uniform(0, cap_s / 2)
        return self._backoff.wait_s(self._setbacks - 1, self._rng) if self.state == ASIDE else 0.0

    def _put_aside(self, reason: str) -> None:
        self.state = REFUSED if reason in _MISFITS else ASIDE
        self.reason = reason
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
