"""What an engine takes on, and who goes first."""

from __future__ import annotations

import numpy as np
import pytest

from offramp_cloud.waiting import House, Load, Request
from offramp_common.activations import Activations
from offramp_common.errors import CloudBusy


def request(arrived_s: float = 0.0, **settings: float) -> Request:
    acts = Activations(np.zeros((2, 5, 4), np.float32), np.array([5, 3]), 1)
    return Request("r", acts, (), arrived_s, **settings)  # type: ignore[arg-type]


def order(now_s: float, *requests: Request) -> list[int]:
    ranks = [request.rank(now_s, max_age_s=0.25) for request in requests]
    return sorted(range(len(requests)), key=ranks.__getitem__)


def test_priority_goes_before_deadline_and_that_before_arrival() -> None:
    plain, late, urgent, soon = (
        request(0.0),
        request(0.1),
        request(0.1, priority=1),
        request(0.1, deadline_s=0.5),
    )
    assert order(0.2, plain, late, urgent, soon) == [2, 3, 0, 1]


def test_whoever_is_old_goes_first_whatever_the_others_are() -> None:
    old, older, urgent = request(0.1), request(0.0), request(0.3, priority=100)
    assert order(0.34, old, older, urgent) == [1, 2, 0]
    assert order(0.36, old, older, urgent) == [1, 0, 2]


def test_a_request_is_wanted_until_its_deadline_or_until_nobody_waits() -> None:
    timed, given_up = request(deadline_s=1.0), request()
    assert timed.wanted(0.99)
    assert not timed.wanted(1.0)
    assert given_up.wanted(1e9)
    given_up.unwanted = True
    assert not given_up.wanted(0.0)


def test_the_work_of_a_request_is_its_layers_times_its_tokens() -> None:
    assert request().work(n_layers=6) == 5 * 8


def test_a_full_house_refuses_and_says_how_full_it_is() -> None:
    house = House(Load(max_waiting_rows=4, max_waiting_bytes=100))
    with house.room_for(3, 60):
        with pytest.raises(CloudBusy, match="3 rows wait, at most 4; retry later"):
            house.room_for(2, 1).__enter__()
        with pytest.raises(CloudBusy, match="60 bytes wait, at most 100"):
            house.room_for(1, 50).__enter__()
        with house.room_for(1, 40):
            pass
    with house.room_for(400, 4000):
        pass  # an empty house takes anything: it would never fit otherwise


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_batch": 0},
        {"max_batch_tokens": 0},
        {"max_padding": 0.9},
        {"max_age_s": 0.0},
        {"max_waiting_rows": 0},
    ],
)
def test_loads_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        Load(**wrong)  # type: ignore[arg-type]
