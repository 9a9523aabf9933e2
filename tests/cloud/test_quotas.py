"""What one device may ask for: token buckets on a clock that the test turns."""

from __future__ import annotations

import pytest

from offramp_cloud.quotas import Bucket, Quota, Quotas
from offramp_common.errors import CloudBusy


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_bucket_fills_at_its_rate_up_to_its_burst() -> None:
    bucket = Bucket(10.0, 2.0, 0.0)
    for _ in range(20):
        assert bucket.wait_s(0.0) == 0
        bucket.take(1)
    assert bucket.wait_s(0.0) == pytest.approx(0.1)
    assert bucket.wait_s(0.05) == pytest.approx(0.05)
    assert bucket.wait_s(0.1) == 0
    assert bucket.wait_s(1000.0) == 0
    bucket.take(21)
    assert bucket.wait_s(1000.0) == pytest.approx(0.2)  # no more than 20 were kept


def test_requests_beyond_the_quota_are_told_when_to_come_again() -> None:
    clock = Clock()
    quotas = Quotas(Quota(requests_per_s=5.0, burst_s=1.0), clock)

    def asks(device: str) -> float:
        """Milliseconds to wait, 0 when let in."""
        try:
            with quotas.request(device):
                return 0.0
        except CloudBusy as busy:
            return busy.retry_after_ms

    assert [asks("a") for _ in range(6)] == [0.0] * 5 + [pytest.approx(200.0)]
    assert asks("b") == 0  # each device has its own
    clock.now_s += 0.2
    assert asks("a") == 0


def test_layers_are_paid_for_after_they_were_run() -> None:
    clock = Clock()
    quotas = Quotas(Quota(layer_runs_per_s=100.0, burst_s=1.0), clock)
    with quotas.request("a"):
        quotas.charge("a", 350)
    with pytest.raises(CloudBusy, match="100 layer runs a second") as caught, quotas.request("a"):
        pass
    assert caught.value.retry_after_ms == pytest.approx(2510.0)
    clock.now_s += 2.52
    with quotas.request("a"):
        pass


def test_a_device_has_only_so_many_requests_at_work() -> None:
    quotas = Quotas(Quota(at_once=1))
    with quotas.request("a"):
        with pytest.raises(CloudBusy, match="at most 1"), quotas.request("a"):
            pass
        with quotas.request("b"):
            pass
    with quotas.request("a"):
        pass


def test_many_devices_do_not_fill_the_memory() -> None:
    quotas = Quotas(Quota(requests_per_s=1.0))
    for number in range(10_050):
        with quotas.request(str(number)):
            pass
    assert len(quotas._devices) == 10_000


def test_a_quota_that_makes_no_sense_is_refused() -> None:
    for settings in ({"requests_per_s": -1.0}, {"burst_s": 0.0}, {"at_once": -1}):
        with pytest.raises(ValueError, match="must not be negative"):
            Quota(**settings)
