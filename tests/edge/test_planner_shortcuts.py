"""What the planner does not compute anew, it decides as if it did."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from offramp_common.bundle import Bundle
from offramp_edge.answers import CLOUD, Answer, Stages
from offramp_edge.cloud_times import CloudTimes
from offramp_edge.device import LayerTimes
from offramp_edge.forecast import foreseen
from offramp_edge.link import Link
from offramp_edge.menu import EncodeTimes, Menu, within
from offramp_edge.planner import AutoPlanner, World
from offramp_edge.planning import Choice, Standing
from offramp_edge.settings import EdgeSettings, plan_for

SHIPPED = Path(__file__).parents[2] / "bundles" / "assistant-intents"
RECORDED = {
    2.0: "b31fa232c17132fc",
    10.0: "16ebed8680413ff1",
    40.0: "e9e8817e622d33ee",
}
"""By a layer's milliseconds: the decisions of the planner that solved for every sample."""


class Clock:
    now_s = 0.0

    def now(self) -> float:
        return self.now_s


def asked(layer_ms: float, count: int) -> Iterator[tuple[AutoPlanner, Standing]]:
    """A planner whose estimates move as in use, and standings of all kinds, the same ones every time."""
    bundle, settings = Bundle.read(SHIPPED), EdgeSettings()
    rng, clock = random.Random(1), Clock()
    plan, n = plan_for(bundle, settings), bundle.n_layers
    link, cloud, times = Link(clock), CloudTimes(clock), LayerTimes(n)
    menu = Menu(bundle, plan.depths, within(bundle, 0.5, None), EncodeTimes({}), {})
    planner = AutoPlanner(menu, foreseen(bundle, plan, settings), World(lambda: times, link, cloud))
    cloud.ran(n, 16, 0.5, 1.0 * n)
    for number in range(count):
        if number % 3 == 0:
            for depth in range(n):
                times.ran(depth, 16, layer_ms * rng.uniform(0.9, 1.1))
        if number % 10 == 0:
            nbytes = rng.choice((100, 2_000, 5_000))
            transfer = link.sent(nbytes, 5.0)
            clock.now_s += (5.0 + (40 + nbytes * 8e-3 / 5) * rng.uniform(0.8, 1.2)) / 1000
            link.answered(transfer, 5.0)
        if number % 50 == 0:
            link.sent(rng.choice((100, 5_000)), 5.0)  # in the air for a while: a queue
            clock.now_s += rng.choice((0.0, 0.01, 0.3))
        if number % 7 == 0:
            planner.answered(_answer(rng.uniform(0.5, 4) * layer_ms))
        depth = rng.randrange(n)
        yield (
            planner,
            Standing(
                depth,
                rng.randrange(5, 30),
                rng.random() if depth else None,
                rng.choice((math.inf, math.inf, 5.0, 60.0, 200.0)),
                waiting=rng.choice((0, 0, 0, 1, 4) if number > count // 2 else (0,)),
                in_flight=rng.choice((0, 1)),
                reachable=rng.random() > 0.05,
                waited=number > count // 2 and number % 4 == 0,
            ),
        )


def _answer(device_ms: float) -> Answer:
    return Answer(
        id="", text="", label="", probability=None, exit_depth=2, where=CLOUD, reason="", split=1,
        complete=True, confidence=0.5, ms=50.0, stages_ms=Stages(device=device_ms),
    )  # fmt: skip


def by_the_stages(planner: AutoPlanner, standing: Standing) -> Choice:
    """The decision from the solved problem alone."""
    outlook = planner.solver.outlooks[planner.solver.place[standing.depth]]
    bin_ = outlook.bin_of(standing.confidence)
    for stage in planner.stages(standing):
        if stage.depth > standing.depth and stage.depth in planner.solver.exits:
            return Choice(stage.depth)
        if stage.sends(bin_):
            option = stage.option[bin_]
            return Choice(stage.depth, "" if option is None else option.codec)
    return Choice(planner.menu.n_layers)


@pytest.mark.parametrize("layer_ms", RECORDED)
def test_a_decision_without_solving_is_the_one_that_solving_gives(layer_ms: float) -> None:
    spared = 0
    for planner, standing in asked(layer_ms, 3000):
        chosen, solved = planner.choose(standing), planner.solved
        assert chosen == by_the_stages(planner, standing), standing
        spared += planner.solved > solved
    assert spared, "no decision was made without solving, so nothing was compared"


@pytest.mark.parametrize("layer_ms", RECORDED)
def test_decisions_are_those_on_record(layer_ms: float) -> None:
    told = hashlib.sha256()
    for planner, standing in asked(layer_ms, 3000):
        chosen = planner.choose(standing)
        told.update(f"{chosen.stop} {chosen.codec}\n".encode())
    assert told.hexdigest()[:16] == RECORDED[layer_ms]
