"""What goes over a device's link in the event kernel: messages, and what cancels them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from offramp_simulate.beside import CANCEL_NBYTES
from offramp_simulate.engine_model import Job
from offramp_simulate.world_faults import Faults
from offramp_simulate.world_lines import Line, Then
from offramp_simulate.world_parts import AIR, LOST, Flight, Side

if TYPE_CHECKING:
    from offramp_simulate.world import World


class OnLink:
    """A silent link's time stands still, as the emulator's does: what is on it comes out afterwards."""

    def __init__(self, world: World, faults: Faults, hop_s: float) -> None:
        self._world, self._faults, self._hop_s = world, faults, hop_s
        kinds = {(fault.what, fault.how) for fault in world.scenario.faults}
        self._stands_still = ("link", "silent") in kinds

    def carry(self, line: Line, nbytes: int, when_s: float, then: Then, *args: Any) -> None:
        """Over one direction, from `when_s` on."""
        if not self._stands_still:
            line.send(nbytes, when_s, then, *args)
            return
        fault = self._faults.now("link")
        if fault is not None:
            when_s = max(when_s, fault.at_s + fault.for_s)
        line.send(nbytes, when_s, self._out, then, args)

    def cancel(self, flight: Flight) -> None:
        """Tell the cloud that nobody waits for it any more: the engine drops it if it has not begun."""
        if flight.stage == AIR and flight.ready_s < self._world.clock.now_s:
            self.tell_cancelled(flight.side, flight.job)

    def tell_cancelled(self, side: Side, job: Job | None) -> None:
        """The same of anything that was sent."""
        self._world.beside(CANCEL_NBYTES)
        self.carry(side.up, CANCEL_NBYTES, self._world.clock.now_s, self._cancelled, job)

    def _out(self, then: Then, args: tuple[Any, ...]) -> None:
        fault = self._faults.now("link")
        if fault is None or fault.how == "refused":
            then(*args)
        else:
            self._world.at(self._world.clock.now_s + fault.for_s, self._out, then, args)

    def _cancelled(self, job: Job | None) -> None:
        if job is not None and job is not LOST:
            self._world.at(self._world.clock.now_s + self._hop_s, job.unwanted)
