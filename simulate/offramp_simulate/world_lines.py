"""One direction of a device's link, as the kernel uses it: bytes in, a call when they have arrived.

Plain: the emulator's shaper, as if the connection's window were never in the way. TCP: tcp_model's sender
over the same shaper: slow start after idle, losses and their recovery, and messages that wait for those
before them on their connection.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from offramp_simulate.links import Direction, Shaper
from offramp_simulate.loss import LossDraws
from offramp_simulate.tcp_model import TcpSender

if TYPE_CHECKING:
    from offramp_simulate.world import World

Then = Callable[..., None]


class Line(Protocol):
    def send(self, nbytes: int, now_s: float, then: Then, *args: Any) -> None:
        """Put a message on it at `now_s`, which may lie ahead but never goes back; `then(*args)` is called
        when its last byte is there."""
        ...

    def reset(self) -> None:
        """The connection was lost; what is under way never arrives."""
        ...


class PlainLine:
    def __init__(self, world: World, shaper: Shaper) -> None:
        self._world, self._shaper = world, shaper

    def send(self, nbytes: int, now_s: float, then: Then, *args: Any) -> None:
        self._world.at(self._shaper.send(nbytes, now_s).arrives_s, then, *args)

    def reset(self) -> None:
        """Nothing is remembered but the queue, which the link keeps."""


class TcpLine:
    """A connection that is there from the start, and made anew after a reset."""

    def __init__(self, world: World, shaper: Shaper, direction: Direction, number: int) -> None:
        self._world, self._shaper = world, shaper
        profile = world.profile
        self._back_s = profile.rtt_ms / 2e3
        self._losses = None
        if profile.loss is not None:
            self._losses = LossDraws(profile.loss, 2 * number + profile.seed_of(direction))
        self._connections = 0
        self._connect()

    def send(self, nbytes: int, now_s: float, then: Then, *args: Any) -> None:
        if now_s > self._world.clock.now_s:
            self._world.at(now_s, self._now, nbytes, then, args)
        else:
            self._now(nbytes, then, args)

    def reset(self) -> None:
        self._connections += 1
        self._connect()

    def _connect(self) -> None:
        self._sender = TcpSender(self._shaper, self._back_s, losses=self._losses)
        self._waiting: dict[int, tuple[Then, tuple[Any, ...]]] = {}
        self._sent, self._due_s = 0, float("inf")

    def _now(self, nbytes: int, then: Then, args: tuple[Any, ...]) -> None:
        self._waiting[self._sent] = then, args
        self._sent += 1
        self._known(self._sender.send(max(nbytes, 1), self._world.clock.now_s))

    def _advance(self, connection: int, due_s: float) -> None:
        if connection == self._connections and due_s == self._due_s:
            self._due_s = float("inf")
            self._known(self._sender.advance(self._world.clock.now_s))

    def _known(self, arrived: list[tuple[int, float]]) -> None:
        for number, arrives_s in arrived:
            then, args = self._waiting.pop(number)
            self._world.at(max(arrives_s, self._world.clock.now_s), then, *args)
        due_s = self._sender.next_s()
        if due_s < self._due_s:
            self._due_s = due_s
            self._world.at(due_s, self._advance, self._connections, due_s)
