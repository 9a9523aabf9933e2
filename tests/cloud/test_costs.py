"""What a layer costs, and when waiting is worth it: on numbers made by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp_cloud.costs import Group, LayerCost, Survival, meeting


def test_the_cost_of_a_layer_is_learned_from_what_layers_took() -> None:
    rng = np.random.default_rng(0)
    cost = LayerCost()
    for _ in range(200):
        rows = int(rng.integers(1, 32))
        tokens = rows * int(rng.integers(4, 64))
        cost.saw(Group(rows, tokens), 3e-4 + 4e-5 * tokens + 1e-5 * rows)
    for group in (Group(1, 10), Group(16, 200), Group(32, 1000)):
        wanted = 3e-4 + 4e-5 * group.tokens + 1e-5 * group.rows
        # What was assumed at first still counts for a little.
        assert cost.seconds(group) == pytest.approx(wanted, rel=0.05)


def test_a_layer_that_somebody_else_held_up_does_not_spoil_the_estimate() -> None:
    cost = LayerCost()
    for i in range(100):
        group = Group(1, 10 + i)
        cost.saw(group, 5e-4 + 5e-5 * group.tokens)
    before = cost.seconds(Group(1, 50))
    cost.saw(Group(1, 50), 3.0)
    for i in range(16):
        cost.saw(Group(1, 10 + i), 5e-4 + 5e-5 * (10 + i))
    assert cost.seconds(Group(1, 50)) == pytest.approx(before, rel=0.2)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(1, 64), st.integers(1, 512), st.floats(1e-6, 10.0)), max_size=40)
)
def test_no_layer_is_ever_expected_to_take_less_than_nothing(
    seen: list[tuple[int, int, float]],
) -> None:
    cost = LayerCost()
    for rows, tokens, seconds in seen:
        cost.saw(Group(rows, tokens), seconds)
    costs = [cost.seconds(Group(1, 1)), cost.seconds(Group(1, 100)), cost.seconds(Group(32, 100))]
    assert 0 <= costs[0] <= costs[1] <= costs[2]


def test_what_takes_no_time_or_no_rows_teaches_nothing() -> None:
    cost = LayerCost()
    before = cost.seconds(Group(2, 20))
    cost.saw(Group(0, 0), 1.0)
    cost.saw(Group(2, 20), 0.0)
    assert cost.seconds(Group(2, 20)) == before


def test_rows_are_expected_to_go_as_far_as_those_before_them() -> None:
    survival = Survival(4)
    assert [survival.layers(depth) for depth in range(5)] == [4, 3, 2, 1, 0]
    for _ in range(1000):
        survival.saw(1, 10, 5)  # half leave behind the layer at depth 1
    assert survival.layers(1) == pytest.approx(1 + 0.5 * 2, rel=0.01)
    assert survival.layers(0) == pytest.approx(1 + 1 + 0.5 * 2, rel=0.01)
    assert survival.layers(2) == 2


class TestWorthFetching:
    """A layer: 10 ms, and 0.1 ms a token. Rows have 10 tokens."""

    cost = LayerCost(1e-2, 1e-4, 0.0)

    def fetched(self, lower: int, upper: int, climb: int, shared: float) -> bool:
        below = [(0, Group(lower, 10 * lower))]
        return meeting(self.cost, below, Group(upper, 10 * upper), climb, shared).worth

    def test_many_short_rows_just_below_are_worth_a_lone_ones_wait(self) -> None:
        # They gain 5 x 10 ms each; it loses a climb of 14 ms and 5 layers that are 4 ms longer.
        assert self.fetched(lower=4, upper=1, climb=1, shared=5)

    def test_what_many_would_lose_counts_against_what_few_gain(self) -> None:
        # 4 x 50 ms against 8 x (14 + 20) ms.
        assert not self.fetched(lower=4, upper=8, climb=1, shared=5)

    def test_a_long_climb_is_not_worth_it(self) -> None:
        # 4 x 50 ms against 20 x 14 + 20 ms.
        assert not self.fetched(lower=4, upper=1, climb=20, shared=5)

    def test_nothing_is_fetched_where_sharing_saves_nothing(self) -> None:
        linear = LayerCost(0.0, 1e-4, 0.0)
        assert not meeting(linear, [(0, Group(30, 300))], Group(1, 1), 1, 12).worth

    def test_those_who_wait_nearer_shorten_the_climb(self) -> None:
        upper = Group(4, 40)
        near = [(3, Group(2, 20)), (4, Group(2, 20))]
        far = [(0, Group(2, 20)), (4, Group(2, 20))]
        # 4 x 50 ms against 4 x (12 + 14 + 20) and 4 x (4 x 12 + 14 + 20).
        assert meeting(self.cost, near, upper, 5, 5).worth
        assert not meeting(self.cost, far, upper, 5, 5).worth

    def test_a_deadline_decides_where_it_hangs_on_the_order(self) -> None:
        # Fetched, both are done after 14 + 5 x 15 = 89 ms; else the upper one after 55 ms and those below
        # after 55 + 14 + 70 = 139 ms.
        plan = meeting(self.cost, [(0, Group(4, 40))], Group(1, 10), 1, 5)
        assert plan.rescues(slack_below_s=0.120, slack_upper_s=9.0) is True
        assert plan.rescues(slack_below_s=0.120, slack_upper_s=0.060) is False
        assert plan.rescues(slack_below_s=0.120, slack_upper_s=0.050) is True  # late anyhow
        assert plan.rescues(slack_below_s=0.080, slack_upper_s=9.0) is None  # late anyhow
        assert plan.rescues(slack_below_s=9.0, slack_upper_s=9.0) is None
