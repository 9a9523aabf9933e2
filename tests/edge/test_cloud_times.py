"""What a device believes of the cloud's queue and layers."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from offramp_edge.cloud_times import CloudTimes


@dataclass
class Clock:
    now_s: float = 100.0

    def now(self) -> float:
        return self.now_s


def told(*queue_ms: float, every_s: float) -> float:
    clock = Clock()
    times = CloudTimes(clock)
    for each in queue_ms:
        times.ran(4, 16, each, 4.0)
        clock.now_s += every_s
    return times.queue_ms


def test_one_busy_moment_among_many_reports_is_averaged() -> None:
    assert told(*[0.0] * 20, 300.0, every_s=0.1) == pytest.approx(30.0)


def test_a_queue_heard_of_long_ago_counts_for_little_beside_news() -> None:
    assert told(300.0, 0.0, every_s=5.0) == pytest.approx(150.0)
    assert told(300.0, 0.0, every_s=60.0) < 0.1
    assert told(300.0, 0.0, every_s=0.1) == pytest.approx(270.0)


def test_so_does_a_layers_time_which_rows_of_others_share() -> None:
    clock = Clock()
    times = CloudTimes(clock)
    times.ran(4, 16, 0.0, 40.0)
    for _ in range(3):
        clock.now_s += 5.0
        times.ran(4, 16, 0.0, 4.0)
    assert times.layer_ms(16) == pytest.approx(1.0 + 9.0 / 8)
