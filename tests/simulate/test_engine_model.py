"""The engines' model: the live elevator's decisions, recorded times, and that no work is lost or made up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_record import made_record
from torch import Tensor

from offramp_cloud.costs import Group
from offramp_cloud.counters import Counters
from offramp_cloud.elevator import Elevator
from offramp_cloud.waiting import Load, Request
from offramp_common.activations import Activations, Rows
from offramp_common.runner import Knobs, Look, Step
from offramp_model.split_model import join_rows
from offramp_simulate.engine_model import Job
from offramp_simulate.engine_times import EngineTimes
from offramp_simulate.farm import Busy, Farm
from offramp_simulate.record import Record
from offramp_simulate.scenario_parts import Cloud

N, TOKENS = 4, 16
FIXED_S, TOKEN_S, ROW_S = 2e-3, 5e-5, 1e-4

RECORD = made_record(tokens=None)


def linear_record() -> Record:
    """An engine whose layer takes FIXED_S + TOKEN_S x tokens + ROW_S x rows."""
    record = made_record()
    rows, lengths = record.batches_R[:, None], record.lengths_G[None, :]
    seconds = FIXED_S + TOKEN_S * rows * lengths + ROW_S * rows
    record.engine_ms_RG[:] = 1e3 * seconds
    return record


def job(key: int, depth: int = 0, exit: int = 4, tokens: int = TOKENS) -> Job:
    return Job(key, depth, exit, tokens, 1.0, math.inf)


def farm(record: Record = RECORD, **cloud: Any) -> Farm:
    chosen = Cloud(**cloud)
    return Farm(EngineTimes(record, chosen), chosen, seed=3)


class Climb:
    """Live layers whose rows leave at the depth that their hidden state names, on a clock of their own."""

    n_layers = N

    def __init__(self) -> None:
        self.now_s = 0.0

    def step(self, acts: Activations[Tensor], knobs: Knobs) -> Step[Tensor]:
        return self.steps([(Rows.of(acts), knobs)])[0]

    def steps(self, parts: Sequence[tuple[Rows[Tensor], Knobs]]) -> list[Step[Tensor]]:
        rows = sum(given.batch_size for given, _ in parts)
        tokens = sum(given.n_tokens for given, _ in parts)
        self.now_s += FIXED_S + TOKEN_S * tokens + ROW_S * rows
        return [self._step(join_rows(given)) for given, _ in parts]

    def _step(self, acts: Activations[Tensor]) -> Step[Tensor]:
        further = Activations(acts.hidden_BTD, acts.lengths_B, acts.depth + 1)
        leave = (acts.hidden_BTD[:, 0, 0] <= further.depth).numpy()
        rows = acts.batch_size
        return Step(further, Look(leave, torch.zeros(rows, 2), np.ones(rows, np.float32)))


def live(drawn: list[tuple[float, int, int]], most: int) -> list[tuple[int, float]]:
    """(key, when it is done) by the live elevator, which knows what its layers take."""
    layers = Climb()
    load = Load(max_batch=most)
    elevator = Elevator(layers, load, Counters(), clock=lambda: layers.now_s)
    for rows in range(1, 9):
        for _ in range(8):
            seconds = FIXED_S + TOKEN_S * TOKENS * rows + ROW_S * rows
            elevator.cost.saw(Group(rows, TOKENS * rows), seconds)
            elevator.cost.saw(Group(rows, 64 * rows), seconds + TOKEN_S * (64 - TOKENS) * rows)
    coming, done = list(enumerate(drawn)), []
    while coming or not elevator.idle:
        if elevator.idle:
            layers.now_s = max(layers.now_s, coming[0][1][0])
        while coming and coming[0][1][0] <= layers.now_s:
            key, (when_s, depth, exit) = coming.pop(0)
            hidden = np.full((1, TOKENS, 1), float(exit), np.float32)
            acts = Activations(hidden, np.array([TOKENS]), depth)
            elevator.board(Request(str(key), acts, (), when_s))
        done += [(int(over.request.request_id), layers.now_s) for over in elevator.run()]
    return done


@settings(deadline=None)  # the machine may be busy
@given(
    st.lists(
        st.tuples(st.floats(1e-5, 0.006), st.integers(0, 3), st.integers(1, 4)),
        min_size=1,
        max_size=40,
    ),
    st.integers(2, 8),
)
def test_everybody_is_done_when_the_live_elevator_is_done_with_them(
    gaps: list[tuple[float, int, int]], most: int
) -> None:
    times = np.cumsum([gap for gap, _, _ in gaps]).tolist()
    drawn = [
        (t, depth, max(exit, depth + 1)) for t, (_, depth, exit) in zip(times, gaps, strict=True)
    ]
    house, finished = farm(linear_record(), max_batch=most), []
    for key, (when_s, depth, exit) in enumerate(drawn):
        finished += house.advance(when_s)
        house.offer(job(key, depth, exit), when_s)
    finished += house.advance(math.inf)
    mine = sorted((j.key, when) for when, jobs in finished for j in jobs)
    theirs = sorted(live(drawn, most))
    assert [key for key, _ in mine] == [key for key, _ in theirs]
    # Theirs is a fit to what was seen: equal to some parts in a million.
    np.testing.assert_allclose([w for _, w in mine], [w for _, w in theirs], rtol=1e-5, atol=1e-7)


def test_one_row_takes_longer_the_longer_the_engine_has_rested_and_the_next_at_once_is_fast() -> (
    None
):
    record = replace(
        made_record(),
        rest_s_S=np.array([0.0, 0.1, 0.5]),
        rest_ms_WS=np.array([[-0.2, 0.0, 3.0], [-0.5, 0.0, 1.0]]),
    )
    house, took_ms, ended_s = farm(record), [], -math.inf
    for key, rest_s in enumerate((math.inf, 0.3, 0.05, 0.0, 2.0)):
        when_s = 0.0 if rest_s == math.inf else ended_s + rest_s
        house.offer(job(key), when_s)
        ((ended_s, _),) = house.advance(when_s + 0.02)
        took_ms.append(1e3 * (ended_s - when_s))
    # Four layers of 2 ms, and what each rest costs, between the table's points in proportion.
    expected = [3.0 + 4 * 3.0, 1.5 + 4 * 2.5, -0.1 + 4 * 1.75, -0.2 + 4 * 1.5, 3.0 + 4 * 3.0]
    assert took_ms == pytest.approx(expected)


def test_a_layer_takes_its_rows_time_until_each_has_left() -> None:
    record = linear_record()
    house = farm(record)
    for key, exit in enumerate((4, 1, 4)):
        house.offer(job(key, exit=exit), 0.0)
    finished = house.advance(math.inf)

    def layer_s(rows: int) -> float:
        return FIXED_S + (TOKEN_S * TOKENS + ROW_S) * rows

    # The first is under way when the others come; they climb until they meet it, or it ends first.
    assert house.busy_s == pytest.approx(finished[-1][0])
    assert finished[0][0] >= layer_s(1)
    assert sum(len(jobs) for _, jobs in finished) == 3


def test_a_faster_engine_takes_its_share_of_the_time_and_never_less_than_the_floor() -> None:
    fast = EngineTimes(RECORD, Cloud(slowdown=0.1))
    assert fast.alone_s(4, 16) == pytest.approx(0.1 * EngineTimes(RECORD, Cloud()).alone_s(4, 16))
    floored = EngineTimes(RECORD, Cloud(slowdown=1e-6, floor_ms=0.5))
    assert floored.alone_s(4, 16) == pytest.approx(4 * 0.5e-3, rel=1e-3)


@settings(deadline=None)  # the machine may be busy
@given(
    st.lists(st.tuples(st.floats(0, 2), st.sampled_from([1, 2, 4])), min_size=1, max_size=80),
    st.integers(1, 3),
)
def test_every_job_is_finished_once_and_no_engine_rests_while_one_waits_for_it(
    drawn: list[tuple[float, int]], replicas: int
) -> None:
    drawn.sort()
    house, finished = farm(replicas=replicas), []
    for key, (when_s, exit) in enumerate(drawn):
        finished += house.advance(when_s)
        house.offer(job(key, 0, exit), when_s)
        assert all(engine.running or not engine.held for engine in house.engines)
    finished += house.advance(math.inf)
    keys = [j.key for _, jobs in finished for j in jobs]
    assert sorted(keys) == list(range(len(drawn)))
    assert house.held == 0
    assert all(engine.work == pytest.approx(0.0, abs=1e-6) for engine in house.engines)
    assert [when for when, _ in finished] == sorted(when for when, _ in finished)
    layers = sum(exit for _, exit in drawn)
    assert sum(engine.rows for engine in house.engines) == layers


def test_a_full_house_refuses_and_what_nobody_wants_any_more_is_dropped() -> None:
    house = farm(max_waiting_rows=2)
    house.offer(job(0), 0.0)
    late = job(1)
    house.offer(late, 0.0)
    with pytest.raises(Busy, match="busy"):
        house.offer(job(2), 0.0)
    late.wanted_s = -math.inf
    assert [j.key for _, jobs in house.advance(math.inf) for j in jobs] == [0]
    assert house.held == 0


def test_what_would_be_late_is_refused_with_the_time_to_come_back() -> None:
    house = farm()
    house.offer(job(0), 0.0)
    house.advance(math.inf)
    for key in range(1, 60):
        house.offer(job(key), 1.0)
    with pytest.raises(Busy) as refused:
        house.offer(Job(99, 0, 4, TOKENS, 1.0, 1.001), 1.0)
    assert refused.value.retry_s > 0


def test_replicas_come_after_a_while_of_load_and_go_after_a_while_without() -> None:
    house = farm(max_replicas=3, up_s=2.0, down_s=4.0, start_s=1.0, done_in_s=0.1)
    when_s = 0.0
    for key in range(4000):
        when_s += 0.0015
        house.advance(when_s)
        if house.engines[0].held < 50:
            house.offer(job(key), when_s)
    assert len(house.engines) == 3
    house.advance(when_s + 60)
    assert len(house.engines) == 1
    assert house.most == 3


def test_an_engine_that_starts_takes_no_jobs_yet_and_a_scaler_may_be_handed_in() -> None:
    class Two:
        every_s = 0.5

        def wanted(self, farm: Farm, now_s: float) -> int:
            return 2

    chosen = Cloud(start_s=3.0)
    house = Farm(EngineTimes(RECORD, chosen), chosen, 3, Two())
    house.advance(1.0)
    assert (len(house.engines), house.here) == (1, 2)
    house.advance(3.5)
    assert len(house.engines) == 2
    house.closed(4.5)
    assert house.replica_s == 1 * 0.5 + 2 * 4.0


def test_a_dead_engine_gives_back_what_it_held() -> None:
    house = farm(replicas=1)
    for key in range(3):
        house.offer(job(key), 0.0)
    assert sorted(j.key for j in house.kill(0.001)) == [0, 1, 2]
    with pytest.raises(Busy, match="unavailable"):
        house.offer(job(9), 0.002)
    house.replace(0.01)
    house.offer(job(9), 0.02)
    assert [j.key for _, jobs in house.advance(math.inf) for j in jobs] == [9]
