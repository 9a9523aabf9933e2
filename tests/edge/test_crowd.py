"""How busy the device is, seen from who comes while a sample has it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from statistics import mean

import pytest

from offramp_edge.crowd import Crowd

WORK_MS = 30.0


@dataclass
class Desk:
    """One device, and samples that come to it by chance; `crowd` is told what the planner is told."""

    crowd: Crowd = field(default_factory=Crowd)
    rng: random.Random = field(default_factory=lambda: random.Random(3))
    now_ms: float = 0.0

    def serve(self, count: int, apart_ms: float, spread: bool = True) -> list[tuple[int, float]]:
        """So many samples, one every `apart_ms` on average from now on, each WORK_MS on the device: what the
        crowd said after each, (fifths, arrivals)."""
        said = []
        came, next_ms = [], self.now_ms
        for _ in range(count):
            next_ms += self.rng.expovariate(1 / apart_ms) if spread else apart_ms
            came.append(next_ms)
        for number, came_ms in enumerate(came):
            began_ms = max(came_ms, self.now_ms)
            behind = sum(other <= began_ms for other in came[number + 1 :])
            self.crowd.came(behind, waited=began_ms > came_ms)
            self.now_ms = began_ms + WORK_MS
            self.crowd.took(WORK_MS)
            said.append((self.crowd.fifths(), self.crowd.arrivals()))
        return said

    def serve_one_by_one(self, count: int) -> None:
        """Each comes when the one before it is answered."""
        for _ in range(count):
            self.crowd.came(0, waited=False)
            self.crowd.took(WORK_MS)


def test_where_each_comes_when_the_last_is_answered_nobody_is_delayed() -> None:
    desk = Desk()
    desk.serve_one_by_one(200)
    assert desk.crowd.fifths() == 0
    assert desk.crowd.arrivals() == 0


@pytest.mark.parametrize("idle", [0, 8, 200], ids=lambda n: f"{n} one by one before")
def test_a_device_that_is_swamped_knows_it_within_a_dozen_samples(idle: int) -> None:
    desk = Desk()
    desk.serve_one_by_one(idle)
    desk.serve(12, apart_ms=WORK_MS / 1.3, spread=False)
    assert desk.crowd.fifths() >= 3
    assert desk.crowd.arrivals() >= 0.4 * 1.3 / WORK_MS


def test_a_queue_that_is_worked_off_while_nobody_comes_is_no_crowd() -> None:
    desk = Desk()
    for behind in range(80, -1, -1):
        desk.crowd.came(behind, waited=behind < 80)
        desk.crowd.took(WORK_MS)
    assert desk.crowd.fifths() == 0


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_samples_that_come_by_chance_are_counted_as_often_as_they_come(share: float) -> None:
    said = Desk().serve(4000, apart_ms=WORK_MS / share)[100:]
    assert mean(rate for _, rate in said) * WORK_MS == pytest.approx(share, abs=0.05)
    assert mean(fifths for fifths, _ in said) / 5 == pytest.approx(share, abs=0.1)


def test_those_who_come_are_not_forgotten_when_samples_no_longer_stay() -> None:
    desk = Desk()
    desk.serve(60, apart_ms=WORK_MS)
    known = desk.crowd.arrivals()
    for _ in range(40):  # sent at once: nobody comes in no time
        desk.crowd.came(0, waited=False)
        desk.crowd.took(0.0)
    assert desk.crowd.fifths() == 0
    assert desk.crowd.arrivals() == pytest.approx(known, rel=0.5)
