"""Waiting between attempts: exponential back-off with full jitter.

Many devices lose the same cloud at the same moment; jitter over the whole interval keeps them from
coming back at the same moment too (Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog,
2015).
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
