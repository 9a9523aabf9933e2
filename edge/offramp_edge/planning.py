"""The seam between a sample's way through the device and whoever decides it.

The device asks a `Planner` where a sample stands: before its first layer, after every exit that it has passed
and not left at, and at a depth that the planner chose though no exit stands there. A planner is plain
arithmetic on what it is told and what it has learned: no clock, no event loop, no network, so that the live
device and the simulator run the same one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from offramp_edge.answers import Answer


@dataclass(frozen=True, slots=True)
class Standing:
    """Where one sample stands when a choice is due.

    depth        layers that have run; 0 before the first
    n_tokens     of the sample
    confidence   of the deepest exit passed, in [0, 1]; None where none has been passed
    left_ms      until its deadline; infinity without one
    waiting      samples that wait for the device behind this one
    in_flight    offloads of this device in the air
    reachable    whether the cloud takes work at the moment
    waited       whether this one had to wait for the device
    """

    depth: int
    n_tokens: int
    confidence: float | None = None
    left_ms: float = float("inf")
    waiting: int = 0
    in_flight: int = 0
    reachable: bool = True
    waited: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """Run on to depth `stop` on the device, unless the sample leaves before; `stop` equal to the standing's
    depth: send it now, its hidden states by `codec` (token ids at depth 0 have a codec of their own; empty:
    the codec that the handshake settled on)."""

    stop: int
    codec: str = ""


class Planner(Protocol):
    def choose(self, standing: Standing) -> Choice:
        """Called in the device's thread, between layers. Never raises."""
        ...


@runtime_checkable
class Learns(Protocol):
    """A planner that learns from answers; told in the event loop's thread."""

    def answered(self, answer: Answer) -> None: ...


@dataclass(frozen=True, slots=True)
class FixedPlan:
    """Every sample is cut at `split`; split equal to the model's depth keeps all on the device."""

    split: int
    codec: str

    def choose(self, standing: Standing) -> Choice:
        return Choice(max(self.split, standing.depth), self.codec)
