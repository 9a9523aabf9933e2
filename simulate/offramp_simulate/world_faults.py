"""What fails on the timetable: the link, the cloud, a replica."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from offramp_simulate.farm import Busy
from offramp_simulate.scenario_parts import Fault
from offramp_simulate.world_parts import AIR, LOST, Flight
from offramp_simulate.world_probes import Probe

if TYPE_CHECKING:
    from offramp_simulate.world import World
    from offramp_simulate.world_cloud import InCloud


class Faults:
    def __init__(self, world: World, cloud: InCloud) -> None:
        self._world, self._cloud = world, cloud
        self._active: list[Fault] = []

    def __bool__(self) -> bool:
        return bool(self._active)

    def now(self, what: str) -> Fault | None:
        """The fault that holds at the moment."""
        return next((fault for fault in self._active if fault.what == what), None)

    def schedule(self) -> None:
        """Before the run."""
        for fault in self._world.scenario.faults:
            self._world.at(fault.at_s, self._begins, fault)
            self._world.at(fault.at_s + fault.for_s, self._ends, fault)

    def _begins(self, fault: Fault) -> None:
        farm, now_s = self._world.farm, self._world.clock.now_s
        if fault.what == "replica":
            for job in farm.kill(now_s):
                flight = job.key
                try:  # as the gateway does: once more, on another replica
                    farm.offer(job, now_s)
                except Busy as busy:
                    if isinstance(flight, Probe):
                        self._cloud.probes.lose(flight, str(busy), busy.retry_s)
                        continue
                    assert isinstance(flight, Flight)
                    if flight.job is job and flight.stage == AIR:
                        self._cloud.lose(flight, str(busy))
            return
        self._active.append(fault)
        if (fault.what, fault.how) == ("link", "silent"):
            return  # its time stands still: what is on it comes out afterwards
        for side in self._world.sides():
            side.up.reset()
            side.down.reset()
            side.connected = False
            side.greetings.clear()
            if side.probe is not None:
                self._cloud.probes.reset(side.probe, fault.how == "refused")
        for flight in list(self._cloud.in_air.values()):
            if flight.stage != AIR:
                continue
            if flight.job is not None and flight.job is not LOST:
                flight.job.wanted_s = -math.inf
            flight.job = LOST
            if fault.how == "refused":
                self._cloud.lose(flight, "unavailable")

    def _ends(self, fault: Fault) -> None:
        if fault.what == "replica":
            self._world.farm.replace(self._world.clock.now_s)
        else:
            self._active.remove(fault)
