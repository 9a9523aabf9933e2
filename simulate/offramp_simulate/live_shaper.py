"""One direction of a link as its profile and the faults of the moment have it: rate, loss, corruption.

Both forms of the emulator use it, the TCP proxy for chunks of bytes and the layer-3 link for packets.
"""

from __future__ import annotations

from offramp_simulate.faults import Conditions
from offramp_simulate.links import (
    SEGMENT_NBYTES,
    ConstantRate,
    Direction,
    LinkProfile,
    Passage,
    chunk_nbytes,
)
from offramp_simulate.loss import LossDraws, RecoveryDelay


class LiveShaper:
    """A shaper whose rate, added delay, losses and corruption can change. Times are the caller's."""

    def __init__(self, profile: LinkProfile, direction: Direction) -> None:
        self.profile = profile
        self.shaper = profile.shaper(direction)
        self.chunk_nbytes = profile.chunk_nbytes(direction)
        self.conditions = Conditions()
        self.lost_packets = 0
        self.corrupted_nbytes = 0
        self._own_rate = self.shaper.rate
        self._own_loss = (profile.loss, profile.seed_of(direction)) if profile.loss else None
        self._draws: LossDraws | None = None
        self._until_corrupt = 0  # bytes that pass before the next one is inverted
        self.apply(self.conditions)

    def apply(self, now: Conditions) -> None:
        """Let these faults hold from now on. What is queued leaves at the rate it came at."""
        own = self._own_rate if now.mbps is None else ConstantRate(now.mbps)
        self.shaper.rate = own.scaled(now.factor)
        self.chunk_nbytes = chunk_nbytes(self.shaper.rate.mean_mbps)
        if now.corrupt_nbytes and now.corrupt_nbytes != self.conditions.corrupt_nbytes:
            self._until_corrupt = now.corrupt_nbytes - 1
        loss = now.loss or self._own_loss
        if loss is None:
            self._draws = None
        elif self._draws is None or self._draws.chances != loss[0]:
            self._draws = LossDraws(*loss)
        self.conditions = now

    def send(self, nbytes: int, now_s: float) -> Passage:
        """As `Shaper.send`, with the delay that is added now."""
        departs_s, arrives_s = self.shaper.send(nbytes, now_s)
        return Passage(departs_s, arrives_s + self.conditions.delay_s)

    def loses_packet(self) -> bool:
        """Whether the next packet is lost; counted if so."""
        is_lost = self._draws is not None and self._draws.lost()
        self.lost_packets += is_lost
        return is_lost

    def losses(self, nbytes: int) -> tuple[int, bool]:
        """How often the unluckiest segment of so many bytes is lost, and whether the last one is."""
        draws = self._draws
        if draws is None:
            return 0, False
        lost = [self.loses_packet() for _ in range(-(-nbytes // SEGMENT_NBYTES))]
        return max((draws.losses() for is_lost in lost if is_lost), default=0), any(lost[-1:])

    def recovery(self) -> RecoveryDelay:
        return RecoveryDelay(self.profile.rtt_ms / 1e3 + self.conditions.delay_s)

    def corrupt(self, data: bytes) -> bytes:
        """The bytes as they come out of the link."""
        every = self.conditions.corrupt_nbytes
        if every is None:
            return data
        nbytes = len(data)
        if self._until_corrupt < nbytes:
            spoilt = bytearray(data)
            places = range(self._until_corrupt, nbytes, every)
            for place in places:
                spoilt[place] ^= 0xFF
            self.corrupted_nbytes += len(places)
            data = bytes(spoilt)
            self._until_corrupt = places[-1] + every
        self._until_corrupt -= nbytes
        return data
