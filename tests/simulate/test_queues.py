"""Whole arrays of a queue against one request after another."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp_simulate.links import ConstantRate, Shaper
from offramp_simulate.queues import ConstantCourse, TraceCourse, fifo
from offramp_simulate.traces import RateTrace

# Sums of a few hundred floats below 1e4: rounding stays far below a nanosecond.
CLOSE_S = 1e-9

TRACE = RateTrace("stops and goes", (0.0, 1.0, 1.5, 4.0, 4.2), (2.0, 0.0, 0.5, 8.0))

requests = st.lists(
    st.tuples(st.integers(0, 3), st.floats(0, 50), st.floats(0, 3)), min_size=1, max_size=120
)


@settings(deadline=None)  # the machine may be busy
@given(requests, st.lists(st.floats(0, 20), min_size=4, max_size=4))
def test_a_queue_of_arrays_is_the_queue_served_one_by_one(
    drawn: list[tuple[int, float, float]], free: list[float]
) -> None:
    drawn.sort()
    queue, ready, span = (np.array(column) for column in zip(*drawn, strict=True))
    free_q, expected, last = np.array(free), [], list(free)
    for q, r, s in drawn:
        last[q] = max(r, last[q]) + s
        expected.append(last[q])
    np.testing.assert_allclose(fifo(queue, ready, span, free_q), expected, atol=CLOSE_S)
    np.testing.assert_allclose(free_q, last, atol=CLOSE_S)


def test_an_empty_queue_is_left_alone() -> None:
    nothing, free = np.zeros(0), np.array([3.0])
    assert fifo(np.zeros(0, np.int64), nothing, nothing, free).size == 0
    assert free.tolist() == [3.0]


@settings(deadline=None)  # the machine may be busy
@given(
    st.lists(st.tuples(st.floats(0, 40), st.integers(1, 400_000)), min_size=1, max_size=60),
    st.sampled_from(["constant", "trace"]),
)
def test_a_course_delivers_when_the_emulators_shaper_does(
    sends: list[tuple[float, int]], kind: str
) -> None:
    sends.sort()
    rate = ConstantRate(2.0) if kind == "constant" else TRACE
    course = ConstantCourse(2.0) if kind == "constant" else TraceCourse(TRACE)
    shaper = Shaper(rate)
    expected = [shaper.send(nbytes, when).departs_s for when, nbytes in sends]
    when, nbytes = np.array([s for s, _ in sends]), np.array([n for _, n in sends])
    one_queue = np.zeros(len(sends), np.int64)
    ends = fifo(one_queue, course.passed(when), course.spans(nbytes), np.array([-np.inf]))
    # In bits of a trace a nanosecond at the lowest rate is half a bit, and so is their rounding.
    np.testing.assert_allclose(course.when(ends), expected, atol=1e-6)


def test_the_last_bit_before_an_outage_arrives_before_it() -> None:
    course = TraceCourse(TRACE)
    assert course.when(np.array([2e6]))[0] == pytest.approx(1.0, abs=CLOSE_S)
    assert course.when(np.array([2e6 + 5e5]))[0] == pytest.approx(2.5, abs=CLOSE_S)
