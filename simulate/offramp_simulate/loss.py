"""Loss: which packets a link loses, and what a lost one costs on a connection that cannot lose any.

Packets are lost by a Gilbert-Elliott chain: the link is in a good or a bad state, each with its own
chance to lose a packet, and may change state after each packet (Gilbert, Bell System Technical
Journal 39, 1960; Elliott, same journal 42, 1963).

Where packets pass (the layer-3 link), a lost one is dropped and TCP does the rest. Where only bytes
pass (the TCP proxy), nothing can be lost, and `RecoveryDelay` is a model of what the loss would have
done: the receiver waits for the segment sent again. It follows Linux (RACK and SACK on): an ACK of
anything sent later betrays the loss, so that the segment arrives a round trip after what followed
it; with nothing behind it the retransmission timer has to run out, at least 200 ms after the round
trip, doubled for each further loss of the same segment. Left out: that the sender slows down after a
loss, tail loss probes (which help where two or more segments are in flight), and lost ACKs.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from offramp_common.errors import ConfigError

RTO_MIN_S = 0.2  # TCP_RTO_MIN of Linux
SYN_TIMEOUT_S = 1.0  # TCP_TIMEOUT_INIT of Linux, RFC 6298: no round trip is known yet


@dataclass(frozen=True)
class GilbertElliott:
    """Chances per packet, each in [0, 1]. ConfigError when out of range or stuck in a lossy state."""

    to_bad: float  # from the good state to the bad one, after a packet
    to_good: float  # and back
    lost_bad: float = 1.0  # that a packet is lost in the bad state
    lost_good: float = 0.0

    def __post_init__(self) -> None:
        for field in ("to_bad", "to_good", "lost_bad", "lost_good"):
            value = getattr(self, field)
            if not 0 <= value <= 1:
                raise ConfigError(f"loss: {field} is {value}: give a chance between 0 and 1")
        if self.to_bad > 0 and self.to_good == 0:
            raise ConfigError("loss: to_good is 0, so the bad state would last for ever: give more")

    @classmethod
    def of(cls, rate: float, burst: float | None = None) -> GilbertElliott:
        """Packets lost at `rate`, in [0, 1), in runs of `burst` packets on average.

        Without `burst` each packet is lost independently. ConfigError when out of range.
        """
        if not 0 <= rate < 1:
            raise ConfigError(f"loss: rate is {rate}: give a share of packets, from 0 to below 1")
        if burst is None:
            return cls(0.0, 1.0, lost_good=rate)
        least = max(1.0, rate / (1 - rate))
        if not burst >= least:
            raise ConfigError(
                f"loss: burst is {burst}: at a rate of {rate:g} give {least:g} packets or more"
            )
        return cls(min(1.0, rate / (burst * (1 - rate))), 1 / burst)  # rounding may exceed 1

    @property
    def rate(self) -> float:
        """The share of packets that are lost in the long run."""
        bad = self.to_bad / (self.to_bad + self.to_good) if self.to_bad else 0.0
        return bad * self.lost_bad + (1 - bad) * self.lost_good


class LossDraws:
    """The chain as it runs: one draw for each packet, the same ones for the same seed."""

    def __init__(self, chances: GilbertElliott, seed: int) -> None:
        self.chances = chances
        self._random = random.Random(seed)
        self._bad = False

    def lost(self) -> bool:
        """Whether the next packet is lost."""
        chances, draw = self.chances, self._random.random
        is_lost = draw() < (chances.lost_bad if self._bad else chances.lost_good)
        if chances.to_bad:
            changes = draw() < (chances.to_good if self._bad else chances.to_bad)
            self._bad ^= changes
        return is_lost

    def losses(self, most: int = 8) -> int:
        """How often a segment is lost that was lost once: 1 or more, `most` at most.

        Sent again at least a round trip later, it meets the chances of the long run.
        """
        count = 1
        while count < most and self._random.random() < self.chances.rate:
            count += 1
        return count


@dataclass(frozen=True)
class RecoveryDelay:
    """When a lost segment arrives after all, from the round trip without queueing, seconds."""

    rtt_s: float

    @property
    def timeout_s(self) -> float:
        return self.rtt_s + RTO_MIN_S

    def by_timer_s(self, arrives_s: float, losses: int) -> float:
        """Nothing follows it: `arrives_s` is when it would have arrived, had it not been lost."""
        return arrives_s + self.timeout_s * (2.0**losses - 1)

    def by_ack_s(self, later_arrives_s: float, losses: int) -> float:
        """What was sent later arrives at `later_arrives_s`; its ACK has the segment sent again."""
        return later_arrives_s + self.rtt_s + self.timeout_s * (2.0 ** (losses - 1) - 1)
