"""Trying again: how long to wait before it (exponential back-off with full jitter), and how often at all.

Many devices lose the same cloud at the same moment; jitter over the whole interval keeps them from
coming back at the same moment too (Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog,
2015). A budget keeps retries a share of the requests: without one, a cloud that fails most of its work is
sent several times as much of it (Beyer et al., "Site Reliability Engineering", 2016, chapter 22). It is a
token bucket, as Finagle's RetryBudget and gRPC's retry throttling (gRFC A6) are.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from offramp_common.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Backoff:
    """After failure number k (from 0) wait between 0 and min(cap_s, base_s * 2**k) seconds."""

    base_s: float = 0.2
    cap_s: float = 10.0

    def __post_init__(self) -> None:
        if not 0 < self.base_s <= self.cap_s:
            raise ConfigError(
                f"back-off from {self.base_s} to {self.cap_s} s: both above 0, the first the smaller"
            )

    def longest_s(self, failures: int) -> float:
        """The longest wait after `failures` earlier failures."""
        # 2**60 is beyond any cap; a larger exponent would only overflow.
        return float(min(self.cap_s, self.base_s * 2.0 ** min(failures, 60)))

    def wait_s(self, failures: int, rng: random.Random) -> float:
        """A wait drawn evenly from 0 to `longest_s`."""
        return rng.uniform(0.0, self.longest_s(failures))


class RetryBudget:
    """Of n requests at most `share` * n + `most` are sent again."""

    def __init__(self, share: float = 0.1, most: float = 10.0) -> None:
        """`most` is there at the start, and never more is saved up. ConfigError for a share that is none."""
        if not 0 <= share <= 1 or not 0 <= most < float("inf"):
            raise ConfigError(
                f"a budget of {share} retries a request, {most} saved up: from 0 to 1, and 0 or more"
            )
        self.retries = 0
        self._share, self._most, self._saved = share, most, most if share else 0.0

    def requested(self) -> None:
        """A request was made for the first time."""
        self._saved = min(self._most, self._saved + self._share)

    def take(self) -> bool:
        """Whether one may be sent again; if so, it is taken from the budget."""
        if self._saved < 1:
            return False
        self._saved -= 1
        self.retries += 1
        return True
