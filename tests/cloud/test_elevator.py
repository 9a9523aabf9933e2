"""The elevator with its clock turned by hand: who rides when, and that nobody's answer changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from law import Outcome
from subjects import SUBJECTS, TOLERANCE, N, Subject, inputs
from torch import Tensor
from toy_models import eager, mixed_knobs, toy_model

from offramp_cloud.costs import LayerCost
from offramp_cloud.counters import Counters
from offramp_cloud.elevator import Elevator
from offramp_cloud.waiting import Load, Request, knob_key
from offramp_common.activations import Activations, NumpyArray, Rows
from offramp_common.runner import Knobs, Step, run
from offramp_common.spec import never_exit
from offramp_common.transport import Completion
from offramp_model.packed_layers import PackedLayers
from offramp_model.split_model import MultiExitModel, TorchLayers, join_rows, to_numpy, to_torch

DEEP = toy_model("deebert", n_layers=6)
NEVER = never_exit(DEEP.knobs, 6)


@dataclass
class Building:
    """An elevator whose layers turn its clock: so much a layer, so much a token."""

    model: MultiExitModel = DEEP
    load: Load = field(default_factory=Load)
    layer_s: float = 1e-3
    token_s: float = 1e-4
    now_s: float = 0.0
    poison: float = 12345.0
    runs: list[tuple[int, list[int]]] = field(default_factory=list)
    """(depth, rows of each batch) of each layer that was run."""

    def __post_init__(self) -> None:
        self.layers = PackedLayers(self.model)
        self.counters = Counters()
        self.elevator = Elevator(self, self.load, self.counters, clock=lambda: self.now_s)
        self.elevator.cost = LayerCost(self.layer_s, self.token_s, 0.0)
        self.over: dict[str, Completion | Exception] = {}
        self.order: list[str] = []

    @property
    def n_layers(self) -> int:
        return self.layers.n_layers

    def step(self, acts: Activations[Tensor], knobs: Knobs) -> Step[Tensor]:
        return self.steps([(Rows.of(acts), knobs)])[0]

    def steps(self, parts: Sequence[tuple[Rows[Tensor], Knobs]]) -> list[Step[Tensor]]:
        self.runs.append((parts[0][0].depth, [rows.batch_size for rows, _ in parts]))
        self.now_s += self.layer_s + self.token_s * sum(rows.n_tokens for rows, _ in parts)
        if any(bool((join_rows(rows).hidden_BTD == self.poison).any()) for rows, _ in parts):
            raise RuntimeError("poisoned row")
        return self.layers.steps(parts)

    def enter(
        self, name: str, depth: int = 1, rows: int = 1, knobs: Knobs = NEVER, **settings: Any
    ) -> Request:
        """A request of rows of 10 tokens."""
        acts = at_depth(self.model, inputs_of([10] * rows, seed=len(name)), depth)
        request = Request(name, acts, knob_key(knobs), self.now_s, **settings)
        self.elevator.board(request)
        return request

    def go(self, layers: int = 1) -> list[str]:
        """Run so many layers; who is over with it."""
        names = []
        for _ in range(layers):
            for done in self.elevator.run():
                self.over[done.request.request_id] = done.outcome
                self.order.append(done.request.request_id)
                names.append(done.request.request_id)
        return names

    def finish(self) -> list[str]:
        names = []
        while not self.elevator.idle:
            names += self.go()
        return names

    def visited(self) -> list[tuple[int, int]]:
        """(depth, rows) of each layer that was run."""
        return [(depth, sum(rows)) for depth, rows in self.runs]


def inputs_of(lengths: list[int], seed: int = 0) -> Activations[NumpyArray]:
    ids = np.random.default_rng(seed).integers(0, 100, (len(lengths), max(lengths), 1))
    return Activations(ids, np.array(lengths), 0)


def at_depth(
    model: MultiExitModel, acts: Activations[NumpyArray], depth: int
) -> Activations[NumpyArray]:
    """The rows after so many layers, none having left."""
    rest = run(TorchLayers(model), to_torch(acts), depth, never_exit(model.knobs, model.n_layers))
    assert rest.rest is not None
    return to_numpy(rest.rest)


# Who rides when


def test_a_pass_takes_along_who_waits_on_its_way_and_lets_all_out_at_the_top() -> None:
    house = Building()
    for name, depth in (("a", 3), ("b", 1), ("c", 4), ("d", 1)):
        house.enter(name, depth)
    assert set(house.finish()) == {"a", "b", "c", "d"}
    assert house.visited() == [(1, 2), (2, 2), (3, 3), (4, 4), (5, 4)]


def test_rows_leave_on_the_way_and_the_others_go_on() -> None:
    house = Building()
    house.enter("patient", 1)
    house.enter("eager", 2, knobs=eager(DEEP))
    assert house.go(2) == ["eager"]
    assert house.finish() == ["patient"]
    eager_one = house.over["eager"]
    assert isinstance(eager_one, Completion)
    assert eager_one.exit_depth_B.tolist() == [3]


def test_who_comes_in_below_a_full_pass_waits_for_the_next_one() -> None:
    house = Building()
    house.enter("many", 3, rows=8)
    house.go()
    house.enter("late", 1)
    house.finish()
    assert house.visited() == [(3, 8), (4, 8), (5, 8), *((depth, 1) for depth in range(1, 6))]


def test_a_lone_rider_waits_for_many_just_below_where_sharing_saves_much() -> None:
    house = Building(layer_s=1e-2)
    house.enter("lone", 2)
    house.go()
    house.enter("many", 2, rows=4)
    house.finish()
    assert house.visited() == [(2, 1), (2, 4), (3, 5), (4, 5), (5, 5)]


def test_with_nobody_above_the_next_pass_starts_at_the_lowest() -> None:
    house = Building()
    house.enter("first", 4)
    house.finish()
    for name, depth in (("b", 3), ("a", 1)):
        house.enter(name, depth)
    house.go()
    assert house.visited()[-1] == (1, 1)


def test_priority_is_fetched_and_not_kept_waiting() -> None:
    house = Building()
    house.enter("many", 3, rows=8)
    house.go()
    house.enter("urgent", 1, priority=1)
    house.go(3)
    assert house.visited() == [(3, 8), (1, 1), (2, 1), (3, 1)]
    low = Building(layer_s=1e-2)
    low.enter("lone", 2)
    low.go()
    low.enter("many", 2, rows=4, priority=-1)
    low.go()
    assert low.visited() == [(2, 1), (3, 1)]


def test_where_not_all_find_room_rank_decides() -> None:
    house = Building(load=Load(max_batch=2))
    house.enter("plain")
    house.enter("soon", deadline_s=10.0)
    house.enter("urgent", priority=1)
    house.enter("later", deadline_s=20.0)
    house.finish()
    firsts = [sorted(house.order[:2]), sorted(house.order[2:])]
    assert firsts == [["soon", "urgent"], ["later", "plain"]]
    urgent, soon = house.over["urgent"], house.over["soon"]
    assert isinstance(urgent, Completion)
    assert isinstance(soon, Completion)
    assert urgent.queue_ms == soon.queue_ms == 0


def test_a_layer_takes_no_more_rows_and_tokens_than_it_may() -> None:
    for load, most in ((Load(max_batch=3), 3), (Load(max_batch_tokens=45), 4)):
        house = Building(load=load)
        house.enter("large", rows=10)
        for i in range(5):
            house.enter(f"r{i}")
        house.finish()
        assert max(rows for _, rows in house.visited()) == most
        assert len(house.over) == 6


def test_a_row_longer_than_a_layers_tokens_goes_alone() -> None:
    house = Building(load=Load(max_batch_tokens=5))
    house.enter("long")
    house.enter("longer")
    assert sorted(house.finish()) == ["long", "longer"]
    assert {rows for _, rows in house.visited()} == {1}


def test_deep_rows_do_not_starve_under_a_stream_of_shallow_ones() -> None:
    """Each newcomer below would be worth fetching; after max_age_s the pass goes on without it."""
    house = Building(layer_s=1e-2, load=Load(max_age_s=0.1))
    house.enter("deep", 4)
    for i in range(100):
        if "deep" in house.over:
            break
        house.enter(f"shallow{i}", 3, rows=2, priority=1)
        house.go()
    deep = house.over["deep"]
    assert isinstance(deep, Completion)
    # The age, a pass that is under way by then, and its own two layers.
    assert deep.queue_ms + deep.compute_ms <= 100 + 6 * (10 + 6.5) + 2 * (10 + 6.5)


def test_unwanted_and_late_rows_are_dropped_before_they_cost_a_layer() -> None:
    house = Building()
    house.enter("late", 1, deadline_s=0.0025)
    given_up = house.enter("given up", 2)
    house.enter("wanted", 2)
    given_up.unwanted = True
    house.finish()
    assert set(house.over) == {"wanted"}
    # "late" has one layer (2 ms); at the next, which it would have entered at 2 ms, it is in time.
    assert house.visited() == [(1, 1), (2, 2), (3, 1), (4, 1), (5, 1)]
    assert house.counters.dropped == 2


# What comes of them


def test_waiting_and_running_add_up_to_the_time_in_the_house() -> None:
    house = Building()
    house.enter("low", 1)
    house.enter("high", 4)
    house.now_s += 0.5
    house.finish()
    low, high = house.over["low"], house.over["high"]
    assert isinstance(low, Completion)
    assert isinstance(high, Completion)
    # Three layers alone at 2 ms, then two layers shared by two rows of ten tokens at 3 ms.
    assert [low.queue_ms, low.compute_ms] == pytest.approx([500, 12])
    assert [high.queue_ms, high.compute_ms] == pytest.approx([506, 6])


def test_the_work_left_is_layers_times_tokens() -> None:
    house = Building()
    house.enter("a", 1, rows=2)
    house.enter("b", 5)
    assert house.elevator.work_left == 5 * 20 + 1 * 10
    house.go()
    assert house.elevator.work_left == 4 * 20 + 1 * 10
    house.finish()
    assert house.elevator.work_left == 0


def test_a_poisoned_request_fails_alone_and_costs_the_others_nothing_but_time() -> None:
    house = Building(load=Load(max_batch=4))
    for i in range(3):
        house.enter(f"r{i}", 2)
    poisoned = at_depth(DEEP, inputs_of([10] * 6), 2)
    poisoned.hidden_BTD[5, 2, 3] = house.poison
    house.elevator.board(Request("poison", poisoned, knob_key(NEVER), 0.0))
    house.finish()
    assert isinstance(house.over.pop("poison"), RuntimeError)
    assert len(house.over) == 3
    assert house.counters.failed == 1
    for i in range(3):
        got = house.over[f"r{i}"]
        assert isinstance(got, Completion)
        alone = run(TorchLayers(DEEP), to_torch(inputs_of([10], seed=2)), 6, NEVER).left
        np.testing.assert_allclose(got.answers, Outcome.of(alone).answers, atol=TOLERANCE)


def test_what_is_abandoned_is_named_once() -> None:
    house = Building(load=Load(max_batch=2))
    requests = {house.enter("large", rows=5), house.enter("b", 3)}
    house.go()
    assert set(house.elevator.abandon()) == requests
    assert house.elevator.idle


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("subject", SUBJECTS, ids="-".join)
def test_every_methods_rows_get_the_answers_and_exits_that_they_get_alone(
    subject: tuple[str, str], seed: int
) -> None:
    """Three operating points, all depths, requests of one and more rows, arriving while others ride."""
    model = Subject(*subject).model()
    rng = np.random.default_rng(seed)
    house = Building(model, load=Load(max_batch=6, max_batch_tokens=60))
    points = [mixed_knobs(model), eager(model), never_exit(model.knobs, N)]
    wanted: dict[str, Outcome] = {}
    for i in range(12):
        depth, knobs = int(rng.integers(0, N)), points[int(rng.integers(0, 3))]
        acts = at_depth(model, inputs(int(rng.integers(1, 5)), seed=100 * seed + i), depth)
        rows = [acts.take(np.array([row])) for row in range(acts.batch_size)]
        alone = [Outcome.of(run(TorchLayers(model), to_torch(r), N, knobs).left) for r in rows]
        wanted[str(i)] = Outcome(
            np.concatenate([one.answers for one in alone]),
            np.concatenate([one.depth_B for one in alone]),
            np.concatenate([one.confidence_B for one in alone]),
        )
        priority = int(rng.integers(-1, 2))
        house.elevator.board(Request(str(i), acts, knob_key(knobs), house.now_s, priority=priority))
        house.go(int(rng.integers(0, 3)))
    house.finish()
    assert set(house.over) == set(wanted)
    for name, outcome in wanted.items():
        got = house.over[name]
        assert isinstance(got, Completion), got
        np.testing.assert_array_equal(got.exit_depth_B, outcome.depth_B)
        np.testing.assert_allclose(got.answers, outcome.answers, rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(got.confidence_B, outcome.confidence_B, rtol=0, atol=TOLERANCE)


ARRIVALS = st.lists(
    st.tuples(
        st.integers(0, 5),  # depth
        st.integers(1, 9),  # rows
        st.integers(-1, 1),  # priority
        st.integers(0, 3),  # layers run before the next
        st.booleans(),  # leaves as soon as it may
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(ARRIVALS)
def test_everybody_is_answered_once_within_the_bounds_whatever_comes(
    arrivals: list[tuple[int, int, int, int, bool]],
) -> None:
    house = Building(load=Load(max_batch=8))
    for i, (depth, rows, priority, layers, soon) in enumerate(arrivals):
        knobs = eager(DEEP) if soon else NEVER
        house.enter(str(i), depth, rows, knobs, priority=priority)
        house.go(layers)
    house.finish()
    assert sorted(house.over, key=int) == [str(i) for i in range(len(arrivals))]
    assert max(rows for _, rows in house.visited()) <= 8
    for i, (_, rows, _, _, soon) in enumerate(arrivals):
        got = house.over[str(i)]
        assert isinstance(got, Completion)
        assert len(got.exit_depth_B) == rows
        assert soon or (got.exit_depth_B == 6).all()
    assert house.counters.rows == sum(rows for _, rows, *_ in arrivals)
    assert house.elevator.work_left == 0
