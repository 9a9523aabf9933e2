"""The settings' planner, made for a device and its session; and what it does about silence."""

from __future__ import annotations

from typing import Any

import pytest
from edge_world import N, World, in_world, texts, toy_bundle

from offramp_common.errors import ConfigError
from offramp_common.forecast import fit
from offramp_edge.answers import Answer
from offramp_edge.baselines import SplitBandit
from offramp_edge.forecast import foreseen
from offramp_edge.planner import AutoPlanner
from offramp_edge.planning import FixedPlan, Planner
from offramp_edge.plans import Attention, planner_for
from offramp_edge.settings import EdgeSettings, plan_for


def test_a_split_makes_the_plan_fixed_and_else_it_is_automatic() -> None:
    bundle = toy_bundle()
    auto, fixed = plan_for(bundle, EdgeSettings()), plan_for(bundle, EdgeSettings(split=2))
    assert (auto.kind, auto.depths) == ("auto", tuple(range(N)))
    assert (fixed.kind, fixed.depths) == ("fixed", (2,))
    assert plan_for(bundle, EdgeSettings(split=N)).depths == ()
    assert plan_for(bundle, EdgeSettings(min_split=2)).depths == tuple(range(2, N))
    assert plan_for(bundle, EdgeSettings(plan="fixed")).split == bundle.manifest.split


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"plan": "lucky"}, "one of auto, fixed"),
        ({"plan": "auto", "split": 2}, "drop one"),
        ({"min_split": N + 1}, "min_split"),
        ({"split": 0, "min_split": 1}, "below min_split"),
        ({"weight_energy": -1.0}, "weight_energy"),
    ],
)
def test_plans_that_cannot_be_meant_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_for(toy_bundle(), EdgeSettings(**wrong))


def planner_in(world: World, **settings: Any) -> Planner:
    session, chosen = world.agent.session, EdgeSettings(**settings)
    assert session is not None
    plan = plan_for(toy_bundle(), chosen)
    device = world.agent._device
    return planner_for(toy_bundle(), plan, chosen, device, session, world.loop)


def test_each_kind_of_plan_has_its_planner() -> None:
    async def scenario(world: World) -> None:
        assert isinstance(planner_in(world), AutoPlanner)
        assert isinstance(planner_in(world, plan="neurosurgeon"), AutoPlanner)
        assert isinstance(planner_in(world, plan="splitee"), SplitBandit)
        assert planner_in(world, split=2) == FixedPlan(2, "")

    in_world(scenario)


@pytest.mark.parametrize("kind", ["auto", "neurosurgeon", "spinn", "splitee"])
def test_whoever_plans_every_sample_is_answered_as_the_whole_model_would(kind: str) -> None:
    class Late:
        """Made once the world is there; the agent asks it."""

        planner: Planner | None = None

        def choose(self, standing: Any) -> Any:
            assert self.planner is not None
            return self.planner.choose(standing)

    late = Late()

    async def scenario(world: World) -> None:
        late.planner = planner_in(world, plan=kind, exits=False)
        for answer in await world.all(texts(30)):
            assert isinstance(answer, Answer)
            assert (answer.exit_depth, answer.complete) == (N, True)
            assert answer.where in ("cloud", "device")

    in_world(scenario, split=None, plan=kind, planner=late, exits=False)


def test_a_new_link_is_probed_and_a_silent_one_once_in_a_while_and_only_when_samples_come() -> None:
    async def scenario(world: World) -> None:
        session, planner = world.agent.session, planner_in(world)
        assert session is not None
        assert isinstance(planner, AutoPlanner)
        probes: list[float] = []
        draws = iter([0.0, 0.8, 0.0])
        attention = Attention(
            session,
            planner.menu,
            5.0,
            world.loop,
            lambda _: probes.append(1.0),
            lambda: next(draws),
        )
        for number in range(4):  # a new link: until four transfers have told of it
            attention.asked()
            assert len(probes) == number + 1
            session.link.answered(session.link.sent(100), 0.0)
        for _ in range(10):
            attention.asked()
        assert len(probes) == 4
        world.loop.jump(4.9)
        attention.asked()
        assert len(probes) == 4
        session.link.answered(session.link.sent(100), 0.0)
        world.loop.jump(4.9)
        attention.asked()
        assert len(probes) == 4  # news, though not of a probe
        world.loop.jump(2.0)
        attention.asked()
        assert len(probes) == 4  # nor when another device would be: not all at the same moment
        world.loop.jump(0.2)
        attention.asked()
        assert len(probes) == 5

    in_world(scenario)


def test_the_bundles_table_counts_at_its_own_operating_point_alone() -> None:
    import numpy as np

    bundle = toy_bundle()
    exits = bundle.manifest.exits
    rng = np.random.default_rng(0)
    table = fit(exits, rng.random((len(exits), 300)), rng.random((len(exits), 300)) < 0.3)
    bundle.manifest.__dict__["forecasts"] = {"fp32": table}
    for settings, learns in (
        (EdgeSettings(), False),
        (EdgeSettings(exits=False), False),
        (EdgeSettings(knobs={"threshold": 0.5}), True),
    ):
        seen = foreseen(bundle, plan_for(bundle, settings), settings)
        assert seen.learns == learns
        assert (seen.forecast == table) == (settings == EdgeSettings())
