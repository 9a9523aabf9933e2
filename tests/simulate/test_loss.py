"""Which packets are lost, and how late a lost segment comes."""

from __future__ import annotations

from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp_common.errors import ConfigError
from offramp_simulate.loss import GilbertElliott, LossDraws, RecoveryDelay

N_PACKETS = 40_000


def draws(chances: GilbertElliott, seed: int = 0) -> list[bool]:
    running = LossDraws(chances, seed)
    return [running.lost() for _ in range(N_PACKETS)]


@pytest.mark.parametrize("burst", [None, 1.0, 4.0])
def test_the_share_of_lost_packets_is_the_rate_and_their_runs_are_the_burst(
    burst: float | None,
) -> None:
    chances = GilbertElliott.of(0.05, burst)
    assert chances.rate == pytest.approx(0.05)
    lost = draws(chances)
    # 2000 losses, 500 runs: standard errors of 2 and 5 %, twice as much where runs vary; 3 of them.
    assert sum(lost) / N_PACKETS == pytest.approx(0.05, rel=0.25)
    runs = [len(list(run)) for is_lost, run in groupby(lost) if is_lost]
    independent = 1 / 0.95
    assert sum(runs) / len(runs) == pytest.approx(burst or independent, rel=0.2)


def test_both_states_may_lose_some_packets() -> None:
    chances = GilbertElliott(0.1, 0.3, lost_bad=0.5, lost_good=0.02)
    assert chances.rate == pytest.approx(0.25 * 0.5 + 0.75 * 0.02)
    assert sum(draws(chances)) / N_PACKETS == pytest.approx(chances.rate, rel=0.1)


def test_the_seed_fixes_the_losses() -> None:
    chances = GilbertElliott.of(0.1, 3.0)
    assert draws(chances, 1) == draws(chances, 1) != draws(chances, 2)


def test_without_loss_nothing_is_lost() -> None:
    assert not any(draws(GilbertElliott.of(0.0)))


@settings(deadline=None)  # the machine may be busy
@given(st.floats(0, 0.9), st.floats(1, 50))
def test_every_rate_and_burst_that_is_accepted_gives_that_rate(rate: float, burst: float) -> None:
    burst = max(burst, rate / (1 - rate))
    assert GilbertElliott.of(rate, burst).rate == pytest.approx(rate)


@pytest.mark.parametrize(
    ("rate", "burst", "message"),
    [
        (1.0, None, "rate is 1.0"),
        (-0.1, None, "rate is -0.1"),
        (0.1, 0.5, "burst is 0.5: at a rate of 0.1 give 1 packets or more"),
        (0.9, 2.0, "give 9 packets or more"),
        (float("nan"), None, "rate is nan"),
    ],
)
def test_a_rate_or_burst_that_cannot_be_is_refused(
    rate: float, burst: float | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        GilbertElliott.of(rate, burst)


def test_chances_out_of_range_or_without_a_way_back_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"lost_bad is 1\.5"):
        GilbertElliott(0.1, 0.1, lost_bad=1.5)
    with pytest.raises(ConfigError, match="bad state would last for ever"):
        GilbertElliott(0.1, 0.0)


def test_a_lost_segment_comes_a_round_trip_after_what_follows_or_when_the_timer_ends() -> None:
    recovery = RecoveryDelay(rtt_s=0.05)
    assert recovery.by_ack_s(1.0, losses=1) == pytest.approx(1.05)
    assert recovery.by_timer_s(1.0, losses=1) == pytest.approx(1.25)
    # Lost again, only the timer helps, and it doubles.
    assert recovery.by_ack_s(1.0, losses=2) == pytest.approx(1.05 + 0.25)
    assert recovery.by_timer_s(1.0, losses=3) == pytest.approx(1.0 + 0.25 + 0.5 + 1.0)
