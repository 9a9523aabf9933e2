"""Recorded rates: exact integration, the traces of a file, what is said of one that is malformed."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp_common.errors import ConfigError, DataError
from offramp_simulate.traces import RateTrace, load_trace, load_traces

# 1 MB in the first second, none in the next, 0.5 MB in the third.
OUTAGE = RateTrace("outage", (0.0, 1.0, 2.0, 3.0), (8.0, 0.0, 4.0))

traces = st.lists(
    st.tuples(st.floats(0.01, 10), st.one_of(st.just(0.0), st.floats(0.01, 500))),
    min_size=1,
    max_size=12,
).filter(lambda samples: any(mbps for _, mbps in samples))


def trace_of(samples: list[tuple[float, float]]) -> RateTrace:
    edges_s = [0.0]
    for span_s, _ in samples:
        edges_s.append(edges_s[-1] + span_s)
    return RateTrace("drawn", tuple(edges_s), tuple(mbps for _, mbps in samples))


def bits_between(trace: RateTrace, start_s: float, stop_s: float) -> float:
    """The integral of the rate, sample by sample and period by period."""
    bits = 0.0
    for period in range(int(start_s // trace.period_s), int(stop_s // trace.period_s) + 1):
        for (low_s, high_s), mbps in zip(pairwise(trace.edges_s), trace.mbps, strict=True):
            low_s, high_s = low_s + period * trace.period_s, high_s + period * trace.period_s
            bits += mbps * 1e6 * max(0.0, min(high_s, stop_s) - max(low_s, start_s))
    return bits


@pytest.mark.parametrize(
    ("start_s", "nbytes", "finish_s"),
    [
        (0.0, 500_000, 0.5),
        (0.0, 1_000_000, 1.0),  # all through at the moment the outage begins
        (0.0, 1_250_000, 2.5),  # across the outage
        (1.5, 0, 1.5),
        (1.5, 250_000, 2.5),  # starts in the outage
        (0.0, 1_500_000, 3.0),  # one period to the bit
        (0.0, 2_000_000, 3.5),  # the trace starts again
        (2.5, 250_000, 3.0),
        (0.5, 15_000_000, 30.5),  # ten periods
        (3000.0, 1_250_000, 3002.5),
    ],
)
def test_bytes_take_as_long_as_the_integral_of_the_rate_says(
    start_s: float, nbytes: int, finish_s: float
) -> None:
    assert OUTAGE.finish_s(start_s, nbytes) == pytest.approx(finish_s, abs=1e-9)


@settings(deadline=None)  # the machine may be busy
@given(traces, st.floats(0, 1000), st.integers(1, 10**7))
def test_the_integral_up_to_the_finish_is_the_bytes(
    samples: list[tuple[float, float]], start_s: float, nbytes: int
) -> None:
    trace = trace_of(samples)
    nbytes = min(nbytes, int(50 * trace.mean_mbps * trace.period_s * 1e6 / 8) + 1)
    finish_s = trace.finish_s(start_s, nbytes)
    # A double at 1000 s resolves 1e-13 s, at up to 500 Mbit/s and over up to 50 periods.
    slack_bits = 1e-2 + 1e-9 * nbytes * 8
    assert bits_between(trace, start_s, finish_s) == pytest.approx(nbytes * 8, abs=slack_bits)


@settings(deadline=None)  # the machine may be busy
@given(traces, st.lists(st.integers(1, 100_000), min_size=1, max_size=30))
def test_bytes_sent_in_pieces_are_through_when_all_of_them_at_once_would_be(
    samples: list[tuple[float, float]], pieces: list[int]
) -> None:
    trace = trace_of(samples)
    finish_s = 0.0
    for nbytes in pieces:
        before_s, finish_s = finish_s, trace.finish_s(finish_s, nbytes)
        assert finish_s >= before_s
    whole_s = trace.finish_s(0.0, sum(pieces))
    assert bits_between(trace, 0.0, finish_s) == pytest.approx(
        bits_between(trace, 0.0, whole_s), abs=1
    )


@settings(deadline=None)  # the machine may be busy
@given(traces, st.floats(0, 1000))
def test_the_bits_by_a_time_are_the_integral_of_the_rate(
    samples: list[tuple[float, float]], time_s: float
) -> None:
    trace = trace_of(samples)
    assert trace.bits_by(time_s) == pytest.approx(bits_between(trace, 0.0, time_s), rel=1e-6, abs=1)


def test_the_mean_and_the_peak_of_a_trace_weigh_samples_by_their_length() -> None:
    trace = RateTrace("uneven", (0.0, 1.0, 4.0), (8.0, 4.0))
    assert (trace.mean_mbps, trace.peak_mbps, trace.period_s) == (5.0, 8.0, 4.0)
    assert trace.scaled(2.0).mean_mbps == 10.0


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_samples_hold_until_the_next_and_the_last_as_long_as_the_one_before(
    tmp_path: Path,
) -> None:
    file = write(
        tmp_path / "t.jsonl",
        {"trace": "even", "dt": 0.5, "mbps": [1, 2]},
        {"trace": "timed", "t_s": [10.0, 11.0, 13.0], "mbps": [1.0, 2, 0]},
    )
    assert load_traces(file) == {
        "even": RateTrace("even", (0.0, 0.5, 1.0), (1.0, 2.0)),
        "timed": RateTrace("timed", (0.0, 1.0, 3.0, 5.0), (1.0, 2.0, 0.0)),
    }
    assert load_trace(file).name == "even"
    assert load_trace(file, "timed").period_s == 5.0


GOOD = {"trace": "good", "dt": 1, "mbps": [1]}


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ([1], "not an object"),
        ({"dt": 1, "mbps": [1]}, '"trace" is missing'),
        ({"trace": "", "dt": 1, "mbps": [1]}, '"trace" is missing'),
        ({"trace": "x", "dt": 1}, '"mbps" is missing'),
        ({"trace": "x", "dt": 1, "mbps": []}, '"mbps" is missing'),
        ({"trace": "x", "dt": 1, "mbps": [1, "2"]}, r"\"mbps\"\[1\] is '2', not a number"),
        ({"trace": "x", "dt": 1, "mbps": [True]}, "not a number"),
        ({"trace": "x", "dt": 1, "mbps": [1, -2]}, r"\"mbps\"\[1\] is -2"),
        ({"trace": "x", "dt": 1, "mbps": [float("nan")]}, "finite rate"),
        ({"trace": "x", "dt": 1, "mbps": [10**400]}, "too large"),
        ({"trace": "x", "dt": 1, "mbps": [0, 0]}, "every rate is 0"),
        ({"trace": "x", "mbps": [1]}, 'either "dt"'),
        ({"trace": "x", "dt": 1, "t_s": [0], "mbps": [1]}, 'either "dt"'),
        ({"trace": "x", "dt": 0, "mbps": [1]}, "times must rise"),
        ({"trace": "x", "dt": "1", "mbps": [1]}, "not a number"),
        ({"trace": "x", "t_s": [0, 1], "mbps": [1]}, "as many"),
        ({"trace": "x", "t_s": [0], "mbps": [1]}, "two at least"),
        ({"trace": "x", "t_s": [0, 2, 1], "mbps": [1, 1, 1]}, "sample 1 lasts -1.0 s"),
        (GOOD, "there twice"),
    ],
)
def test_a_malformed_trace_is_reported_with_file_line_and_fault(
    tmp_path: Path, row: Any, fault: str
) -> None:
    file = write(tmp_path / "t.jsonl", GOOD, row)
    with pytest.raises(DataError, match=rf"t\.jsonl:2: .*{fault}"):
        load_traces(file)


def test_a_line_that_is_not_json_is_reported_with_its_number(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text(json.dumps(GOOD) + "\n\n{oops\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"t\.jsonl:3: "):
        load_traces(file)


def test_a_file_that_is_absent_or_empty_or_lacks_the_name_is_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read the traces"):
        load_traces(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="no trace in it"):
        load_traces(write(tmp_path / "empty.jsonl"))
    with pytest.raises(DataError, match="no trace 'bus' among its 1: good"):
        load_trace(write(tmp_path / "t.jsonl", GOOD), "bus")


def test_a_trace_whose_times_do_not_fit_its_rates_is_refused() -> None:
    with pytest.raises(ConfigError, match="2 rates need 3 times"):
        RateTrace("short", (0.0, 1.0), (1.0, 2.0))


@pytest.mark.data
def test_every_collected_trace_can_be_read_and_delivers_its_mean(data_dir: Path) -> None:
    files = sorted((data_dir / "network_traces").glob("*.jsonl"))
    assert files
    for file in files:
        for trace in load_traces(file).values():
            nbytes = int(trace.mean_mbps * 1e6 / 8 * trace.period_s)
            last_zeros = next(n for n, mbps in enumerate(reversed(trace.mbps)) if mbps)
            end_s = trace.edges_s[len(trace.mbps) - last_zeros]
            # The bytes were rounded down to a whole one; at the slowest rate that takes 10 ms.
            assert trace.finish_s(0.0, nbytes) == pytest.approx(end_s, abs=0.01)
