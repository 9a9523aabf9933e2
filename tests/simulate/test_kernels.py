"""Both kernels: the same answers, the laws of queues, and the limits of physics."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_record import Rows, made_record, made_scenario

from offramp_common.errors import ConfigError
from offramp_simulate.device_model import fixed, resolve
from offramp_simulate.flow import Feedback, Flow
from offramp_simulate.record import Record
from offramp_simulate.results import CLOUD
from offramp_simulate.scenario import Scenario
from offramp_simulate.simulate_run import EVENTS, FLOW, simulate
from offramp_simulate.world import World

# Sums of some hundred thousand floats below 1e4 s.
CLOSE_MS = 1e-4

# No round numbers: with them two engines end at the same moment, and who is first is a last bit.
DEVIATIONS = (0.80113, 0.90371, 1.00019, 1.10757, 1.60031)
RECORD = made_record(
    200, tokens=None, deviations=DEVIATIONS, encode_ms=0.30277, layer_ms=7.79133, engine_ms=2.07191
)


def by_flow(scenario: Scenario, record: Record = RECORD) -> Rows:
    rows: Any = Rows()
    plan = fixed(record, scenario, resolve(scenario.plans[0], scenario, record))
    Flow(scenario, record, scenario.profile(), plan, rows).run()
    found: Rows = rows
    return found


def by_events(scenario: Scenario, record: Record = RECORD) -> Rows:
    rows: Any = Rows()
    plan = resolve(scenario.plans[0], scenario, record)
    World(scenario, record, scenario.profile(), plan, rows).run()
    found: Rows = rows
    return found


def exponential(seed: int = 0) -> Record:
    """A device whose runs take exponentially long, 20 ms on average: nothing beside its layers."""
    shares = (np.arange(20_000) + 0.5) / 20_000
    times = -np.log1p(-shares)
    return made_record(layer_ms=5.0, overhead_ms=0.0, deviations=tuple(times / times.mean()))


@settings(deadline=None, max_examples=25)  # the machine may be busy
@given(
    st.integers(0, 4),
    st.sampled_from(["own", "never"]),
    st.integers(1, 5),
    st.floats(0.5, 12),
    st.sampled_from(["poisson", "regular", "bursts"]),
    st.booleans(),
    st.sampled_from([1, 3]),
    st.booleans(),
)
def test_the_fast_kernel_gives_the_event_kernels_answers(
    split: int,
    point: str,
    count: int,
    rate: float,
    kind: str,
    shared: bool,
    replicas: int,
    markov: bool,
) -> None:
    link: dict[str, Any] = {"uplink_mbps": 8.0, "downlink_mbps": 9.0, "rtt_ms": 30.0}
    if markov:
        link = {"markov_mbps": [1.0, 9.0], "markov_s": [0.5, 2.0], "rtt_ms": 30.0}
    scenario = made_scenario(
        devices={"count": count},
        arrivals={"kind": kind, "rate_per_s": rate, "busy_rate_per_s": 3 * rate},
        link={**link, "shared": shared},
        cloud={"replicas": replicas},
        agent={"hedge_after": math.inf, "deadline_ms": math.inf, "max_in_flight": 400,
               "offload_timeout_ms": 1e9},
        plans=[{"name": "plan", "split": split, "point": point}],
    )  # fmt: skip
    try:
        flow = by_flow(scenario)
    except Feedback as gives_way:
        if not (markov or shared) or "greeted" not in str(gives_way):
            raise
        return  # an answer so late that the cloud may be greeted, which takes the link
    events = by_events(scenario)
    assert len(flow.ms) == len(events.ms) == scenario.requests
    np.testing.assert_allclose(flow.ms, events.ms, atol=CLOSE_MS)
    for name in ("where_N", "exit_N", "cut_N", "right_N", "up_N", "device_N"):
        np.testing.assert_array_equal(flow.column(name), events.column(name))


def test_chunks_of_a_long_run_fit_each_other() -> None:
    scenario = made_scenario(
        requests=140_000,
        devices={"count": 300},
        arrivals={"rate_per_s": 0.5},
        cloud={"replicas": 2},
    )
    flow, events = by_flow(scenario), by_events(scenario)
    np.testing.assert_allclose(flow.ms, events.ms, atol=CLOSE_MS)


@pytest.mark.parametrize(
    ("tables", "what"),
    [
        ({"link": {"uplink_mbps": 0.02, "rtt_ms": 5.0}}, "offload"),
        ({"arrivals": {"rate_per_s": 60.0}, "plans": [{"name": "p", "split": 0}],
          "link": {"uplink_mbps": 50.0, "rtt_ms": 900.0}, "cloud": {"replicas": 4}}, "in the air"),
        ({"agent": {"deadline_ms": 60.0, "hedge_after": math.inf}}, "deadline"),
        ({"cloud": {"max_waiting_rows": 1}, "arrivals": {"rate_per_s": 30.0}}, "refuse"),
        ({"agent": {}}, "hedges"),
        ({"faults": [{"what": "link", "at_s": 1.0, "for_s": 1.0}]}, "faults"),
        ({"arrivals": {"kind": "closed"}}, "closed"),
    ],
)  # fmt: skip
def test_what_feeds_back_is_left_to_the_event_kernel(tables: dict[str, Any], what: str) -> None:
    scenario = made_scenario(**tables)
    with pytest.raises(Feedback, match=what):
        simulate(scenario, RECORD, scenario.plans[0], FLOW)
    ran = simulate(scenario, RECORD, scenario.plans[0])
    assert ran.kernel == EVENTS
    assert what in ran.why
    assert ran.summary["requests"] == scenario.requests


@pytest.mark.parametrize("split", [0, 1, 2, 3])
def test_no_answer_is_faster_than_bytes_over_bandwidth_and_a_round_trip(split: int) -> None:
    scenario = made_scenario(plans=[{"name": "plan", "split": split}])
    rows = by_flow(scenario)
    sent = rows.column("where_N") == CLOUD
    least_ms = 40.0 + rows.column("up_N") * 8e-3 / 5.0 + rows.column("down_N") * 8e-3 / 20.0
    least_ms += rows.column("device_ms_N")
    assert (rows.ms[sent] > least_ms[sent]).all()
    assert (rows.ms >= rows.column("device_ms_N") - CLOSE_MS).all()


def test_a_devices_time_is_the_sum_of_its_requests_times() -> None:
    """Work is conserved: what the device did is what its samples needed, layer by layer."""
    scenario = made_scenario(devices={"count": 1, "jitter": False}, arrivals={"rate_per_s": 500.0},
                             plans=[{"name": "p", "split": 4}])  # fmt: skip
    rows = by_flow(scenario)
    ended = rows.column("ended_s_N")
    busy_s = rows.column("device_ms_N").sum() / 1e3
    assert ended.max() - rows.column("began_s_N")[0] == pytest.approx(busy_s)


@pytest.mark.parametrize("kernel", [by_flow, by_events])
def test_littles_law_holds(kernel: Any) -> None:
    scenario = made_scenario(requests=20_000, warm_up=0)
    rows = kernel(scenario)
    began, ended = rows.column("began_s_N"), rows.column("ended_s_N")
    times = np.concatenate([began, ended])
    steps = np.concatenate([np.ones(len(began)), -np.ones(len(ended))])
    order = np.argsort(times, kind="stable")
    inside = np.cumsum(steps[order])[:-1]
    mean_inside = (inside * np.diff(times[order])).sum() / (times.max() - times.min())
    rate = len(began) / (times.max() - times.min())
    assert mean_inside == pytest.approx(rate * rows.ms.mean() / 1e3)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_a_device_with_exponential_runs_is_an_mm1_queue(load: float) -> None:
    scenario = made_scenario(
        requests=400_000, devices={"count": 1}, arrivals={"rate_per_s": load / 0.02},
        plans=[{"name": "p", "split": 4, "point": "never"}],
    )  # fmt: skip
    rows = by_flow(scenario, exponential())
    # Waits are correlated over about 1/(1 - load)**2 requests: at load 0.8 some percent of noise.
    assert rows.ms.mean() == pytest.approx(20.0 / (1 - load), rel=0.06)
    # The whole distribution: exponential too.
    p90 = float(np.quantile(rows.ms, 0.9))
    assert p90 == pytest.approx(20.0 / (1 - load) * math.log(10), rel=0.08)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_a_device_with_constant_runs_is_an_md1_queue(load: float) -> None:
    record = made_record(layer_ms=5.0, overhead_ms=0.0)
    scenario = made_scenario(
        requests=400_000, devices={"count": 1}, arrivals={"rate_per_s": load / 0.02},
        plans=[{"name": "p", "split": 4, "point": "never"}],
    )  # fmt: skip
    rows = by_flow(scenario, record)
    expected = 20.0 * (1 + load / (2 * (1 - load)))
    assert rows.ms.mean() == pytest.approx(expected, rel=0.05)


def test_an_engine_alone_is_an_md1_queue_too() -> None:
    record = made_record(layer_ms=1e-6, overhead_ms=0.0, engine_ms=4.875)
    scenario = made_scenario(
        requests=200_000, devices={"count": 2000}, arrivals={"rate_per_s": 0.6 / 0.02 / 2000},
        link={}, cloud={"max_batch": 1, "gateway_ms": 0.0},
        agent={"hedge_after": math.inf, "deadline_ms": math.inf, "offload_timeout_ms": 1e9},
        plans=[{"name": "p", "split": 0, "point": "never"}],
    )  # fmt: skip
    rows = by_flow(scenario, record)
    assert rows.ms.mean() == pytest.approx(20.0 * (1 + 0.6 / 0.8), rel=0.05)


def test_the_same_seed_gives_the_same_summary_and_another_seed_another() -> None:
    scenario = made_scenario()
    one = simulate(scenario, RECORD, scenario.plans[0]).summary
    assert simulate(scenario, RECORD, scenario.plans[0]).summary == one
    other = made_scenario(seed=2)
    assert simulate(other, RECORD, other.plans[0]).summary != one


def test_plans_are_compared_over_the_very_same_requests() -> None:
    one, other = (made_scenario(plans=[{"name": "p", "split": split}]) for split in (0, 4))
    for name in ("began_s_N", "device_N"):
        np.testing.assert_array_equal(by_flow(one).column(name), by_flow(other).column(name))


@pytest.mark.parametrize("kernel", [by_flow, by_events])
def test_the_first_requests_run_but_are_not_counted(kernel: Any) -> None:
    whole, rest = kernel(made_scenario()), kernel(made_scenario(warm_up=100))
    np.testing.assert_array_equal(rest.ms, whole.ms[100:])


def test_a_split_beyond_the_model_is_refused_with_the_limit() -> None:
    scenario = made_scenario(plans=[{"name": "deep", "split": 9}])
    with pytest.raises(ConfigError, match=r"'deep': split = 9: made has 4 layers"):
        simulate(scenario, RECORD, scenario.plans[0])


@pytest.mark.parametrize("planner", ["auto", "neurosurgeon", "spinn", "splitee"])
def test_live_planners_answer_every_request(planner: str) -> None:
    scenario = made_scenario(
        plans=[{"name": "p", "planner": planner, "min_split": 1}],
        faults=[{"what": "cloud", "at_s": 8.0, "for_s": 5.0, "how": "silent"}],
        agent={},
    )
    ran = simulate(scenario, RECORD, scenario.plans[0])
    assert ran.summary["requests"] == scenario.requests
    assert ran.summary["missed"] == 0
    assert "0" not in ran.summary["cuts"]


def test_small_messages_over_tcp_arrive_as_if_there_were_no_window() -> None:
    """Below ten segments nothing waits for an ACK, and there is no loss."""
    tables = {"link": {"uplink_mbps": 5.0, "downlink_mbps": 20.0, "rtt_ms": 40.0}}
    plans = [{"name": "input", "split": 0}]
    plain = by_events(made_scenario(**tables, plans=plans))
    tcp = by_events(made_scenario(link={**tables["link"], "tcp": True}, plans=plans))
    # TCP's packets carry 52 bytes of header, at 5 and 20 Mbit/s.
    extra_ms = tcp.ms - plain.ms
    sent = plain.column("where_N") == CLOUD
    assert (extra_ms[sent] >= -CLOSE_MS).all()
    assert np.median(extra_ms[sent]) == pytest.approx(52 * 8e-3 / 5 + 52 * 8e-3 / 20, abs=0.01)


def test_large_messages_over_tcp_wait_for_the_window_and_losses_for_their_repair() -> None:
    base = {"uplink_mbps": 20.0, "downlink_mbps": 50.0, "rtt_ms": 200.0}
    tables: dict[str, Any] = {"requests": 150, "arrivals": {"rate_per_s": 0.2}}
    mean = {}
    for name, link in {
        "plain": base,
        "tcp": {**base, "tcp": True},
        "loss": {**base, "tcp": True, "loss": 0.05},
    }.items():
        rows = by_events(made_scenario(**tables, link=link))
        mean[name] = rows.ms[rows.column("where_N") == CLOUD].mean()
    # Up to 24 KB are 17 segments, seven more than the first window: a round trip for the rest.
    assert mean["plain"] + 20 < mean["tcp"] < mean["plain"] + 230
    assert mean["loss"] > mean["tcp"] + 10


def test_a_planner_of_slow_devices_learns_of_the_fast_cloud_from_its_first_probe() -> None:
    """Until somebody says otherwise it takes the cloud's layers to be as slow as its own."""
    slow = made_record(layer_ms=200.0, engine_ms=2.0)
    scenario = made_scenario(
        arrivals={"rate_per_s": 0.2}, agent={}, plans=[{"name": "p", "planner": "auto"}]
    )
    summary = simulate(scenario, slow, scenario.plans[0]).summary
    assert summary["bytes_beside"] > 0
    assert summary["sent"] > 0.9
    assert summary["ms"]["p50"] < 200
