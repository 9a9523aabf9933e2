"""The order in which the engine takes what waits, with the clock turned by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp_cloud.waiting import House, Load, Waiting, WaitingRoom
from offramp_common.activations import Activations
from offramp_common.errors import CloudBusy
from offramp_common.transport import Completion

LOAD = Load(max_batch=8, max_padding=1.25, max_age_s=0.25)


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """Only makes futures; it never runs."""
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


class Room(WaitingRoom):
    """A room with short words for adding and taking."""

    def __init__(self, loop: asyncio.AbstractEventLoop, load: Load = LOAD) -> None:
        super().__init__(load)
        self._loop = loop

    def enter(
        self,
        name: str,
        depth: int = 1,
        *,
        at_s: float = 0.0,
        rows: int = 1,
        length: int = 10,
        threshold: float = 0.5,
        deadline_s: float | None = None,
    ) -> Waiting:
        acts = Activations(
            np.zeros((rows, length, 4), np.float32), np.full(rows, length, np.int64), depth
        )
        done: asyncio.Future[Completion] = self._loop.create_future()
        knobs = (("threshold", (threshold,)),)
        request = Waiting(name, acts, knobs, at_s, deadline_s, done)
        self.add(request)
        return request

    def taken(self, now_s: float = 0.0) -> list[str]:
        return [request.request_id for request in self.take(now_s)]


def test_the_lowest_depth_goes_first_and_takes_along_what_waits_there(
    loop: asyncio.AbstractEventLoop,
) -> None:
    room = Room(loop)
    for name, depth in (("a", 3), ("b", 1), ("c", 2), ("d", 1)):
        room.enter(name, depth)
    assert [room.taken() for _ in range(4)] == [["b", "d"], ["c"], ["a"], []]


def test_at_one_depth_the_oldest_leads(loop: asyncio.AbstractEventLoop) -> None:
    room = Room(loop)
    room.enter("old", length=10)
    room.enter("long", length=100)
    room.enter("new", length=10)
    assert room.taken() == ["old", "new"]
    assert room.taken() == ["long"]


def test_a_deep_request_that_has_waited_long_goes_before_shallow_ones(
    loop: asyncio.AbstractEventLoop,
) -> None:
    room = Room(loop)
    room.enter("deep", 3, at_s=0.0)
    for i in range(3):
        room.enter(f"shallow {i}", 1, at_s=0.1 * i, length=10 * 3**i)
    assert room.taken(0.24) == ["shallow 0"]
    assert room.taken(0.26) == ["deep"]
    assert room.taken(0.27) == ["shallow 1"]


def test_requests_with_other_knobs_never_share_a_batch(loop: asyncio.AbstractEventLoop) -> None:
    room = Room(loop)
    room.enter("a", threshold=0.5)
    room.enter("b", threshold=0.4)
    room.enter("c", threshold=0.5)
    assert room.taken() == ["a", "c"]
    assert room.taken() == ["b"]


def test_a_batch_stays_within_its_rows_and_a_large_frame_goes_alone(
    loop: asyncio.AbstractEventLoop,
) -> None:
    room = Room(loop)
    for name, rows in (("a", 3), ("large", 20), ("b", 3), ("c", 3), ("d", 2)):
        room.enter(name, rows=rows)
    assert room.taken() == ["a", "b", "d"]
    assert room.taken() == ["large"]
    assert room.taken() == ["c"]


def test_unwanted_requests_are_dropped(loop: asyncio.AbstractEventLoop) -> None:
    room = Room(loop)
    room.enter("late", deadline_s=1.0)
    room.enter("cancelled").done.cancel()
    room.enter("wanted", deadline_s=2.0)
    assert room.taken(1.0) == ["wanted"]
    assert not room


REQUESTS = st.lists(
    st.tuples(
        st.integers(0, 3), st.integers(1, 12), st.integers(1, 64), st.sampled_from([0.4, 0.5])
    ),
    min_size=1,
    max_size=24,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(REQUESTS, st.sampled_from([0.0, 1.0]))
def test_everything_is_taken_once_in_batches_within_the_bounds(
    requests: list[tuple[int, int, int, float]], now_s: float
) -> None:
    loop = asyncio.new_event_loop()
    room = Room(loop)
    for i, (depth, rows, length, threshold) in enumerate(requests):
        room.enter(str(i), depth, rows=rows, length=length, threshold=threshold)
    taken = []
    while batch := room.take(now_s):
        taken += [request.request_id for request in batch]
        rows, longest = sum(r.rows for r in batch), max(r.longest for r in batch)
        assert len({(r.acts.depth, r.knobs) for r in batch}) == 1
        assert rows <= LOAD.max_batch or len(batch) == 1
        apart = sum(r.rows * r.longest for r in batch)
        assert rows * longest <= LOAD.max_padding * apart
    loop.close()
    assert sorted(taken, key=int) == [str(i) for i in range(len(requests))]


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
    "wrong", [{"max_batch": 0}, {"max_padding": 0.9}, {"max_age_s": 0.0}, {"max_waiting_rows": 0}]
)
def test_loads_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        Load(**wrong)  # type: ignore[arg-type]
