"""Scenarios: what a file may say, and what a mistake is answered with."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_record import made_record, made_scenario

from offramp_common.errors import ConfigError, OfframpError
from offramp_simulate.arrivals import read_arrivals, requests
from offramp_simulate.scenario import Scenario, load_scenario, scenario_of
from offramp_simulate.simulate_cli import _READY

RECORD = made_record()


def written(folder: Path, text: str) -> Path:
    path = folder / "scenario.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("requests = 5", "title is missing"),
        ('title = "x"', r"no \[\[plans\]\]"),
        ('title = "x"\nrequest = 5', "unknown key 'request'; did you mean 'requests'"),
        ('title = "x"\n[link]\nrtt = 5', r"\[link\]: unknown key 'rtt'; did you mean 'rtt_ms'"),
        ('title = "x"\n[link]\nrtt_ms = "5"', r"\[link\]: rtt_ms = '5': must be a number"),
        ('title = "x"\n[link]\nprofile = "wify"', "profile = 'wify'; did you mean 'wifi'"),
        ('title = "x"\n[devices]\ncount = 0', r"\[devices\]: count = 0: must be at least 1"),
        ('title = "x"\n[devices]\ncount = 2.5', "count = 2.5: must be a whole number"),
        ('title = "x"\n[devices]\njitter = 1', "jitter = 1: must be a true or false"),
        ('title = "x"\n[arrivals]\nkind = "posson"', "must be one of poisson"),
        ('title = "x"\n[agent]\nsplit = 2', r"split: not simulated there; name it in \[\[plans\]\]"),
        ('title = "x"\n[agent]\nmargin_ms = -1.0', r"\[agent\]: margin_ms"),
        ('title = "x"\n[[plans]]\nsplit = 2', r"\[\[plans\]\]: name is missing; give a text"),
        ('title = "x"\n[[plans]]\nname = "a"\n[[plans]]\nname = "a"', "each a name of its own"),
        ('title = "x"\nplans = 3', r"write \[\[plans\]\]"),
        ('title = "x"\n[[faults]]\nwhat = "sun"\nat_s = 1.0\nfor_s = 2.0', "must be one of cloud"),
        ('title = "x"\nwarm_up = 30000\n[[plans]]\nname = "a"', "must be below requests"),
        ('title = "x"\n[[plans]]\nname = "a"\n[sweep]\n"link.rt_ms" = [1]', "did you mean 'rtt_ms'"),
        ('title = "x"\n[[plans]]\nname = "a"\n[sweep]\n"rtt_ms" = [1]', "must be TABLE.KEY"),
        ('title = "x"\n[[plans]]\nname = "a"\n[sweep]\n"link.rtt_ms" = 5', "must be a list"),
        ('title = "x"\n[[plans]]\nname = "a"\n[sweep]\n"link.rtt_ms" = [1, -5]', "at least 0"),
        ('title = "x"\n[[plans]]\nname = "a"\nplanner = "auto"\nsplit = 1', "drop one of them"),
        ("title = ", "cannot be read"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_place_and_remedy(tmp_path: Path, text: str, what: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError, match=what) as error:
        load_scenario(path).profile()
    assert str(path) in str(error.value)


def test_a_sweep_changes_one_value_and_checks_every_one(tmp_path: Path) -> None:
    scenario = scenario_of(
        {"title": "x", "plans": [{"name": "a"}], "sweep": {"link.rtt_ms": [10, 20.0]}}
    )
    assert scenario.changed("link.rtt_ms", 20.0).link.rtt_ms == 20.0
    assert scenario.changed("agent.deadline_ms", 100.0).deadline_ms == 100.0


def test_a_profile_may_be_changed_in_one_value() -> None:
    scenario = made_scenario(link={"profile": "lte", "rtt_ms": 99.0})
    profile = scenario.profile()
    assert (profile.uplink_mbps, profile.downlink_mbps, profile.rtt_ms) == (5.0, 20.0, 99.0)


def test_markov_states_make_a_trace_of_the_means_that_were_asked_for() -> None:
    scenario = made_scenario(link={"markov_mbps": [1.0, 4.0], "markov_s": [2.0, 6.0]})
    trace = scenario.profile().trace
    assert trace is not None
    # Shares of time are as the means' (two states take turns): 3.25, to some percent of 2000 stays.
    assert trace.mean_mbps == pytest.approx((2 * 1.0 + 6 * 4.0) / 8, rel=0.05)
    assert made_scenario(
        seed=2, link={"markov_mbps": [1.0, 4.0], "markov_s": [2.0, 6.0]}
    ).profile() != (scenario.profile())


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """Two directions of one link, recorded: a second fast, a second slow, and the other way about."""
    file = tmp_path / "pair.jsonl"
    ways = {"up": [4.0, 1.0], "down": [2.0, 8.0]}
    lines = [{"trace": way, "mbps": mbps, "dt": 1.0} for way, mbps in ways.items()]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_each_direction_of_a_link_may_have_a_trace_of_its_own(pair: Path) -> None:
    link = {"trace": str(pair), "trace_name": "up", "rtt_ms": 20.0}
    both = {**link, "downlink_trace": str(pair), "downlink_trace_name": "down"}
    profile = made_scenario(link=both).profile()
    assert (profile.uplink_mbps, profile.downlink_mbps) == (2.5, 5.0)
    # 0.1 s at each second's own rate.
    for direction, nbytes in (("up", (50_000, 12_500)), ("down", (25_000, 100_000))):
        rate = profile.rate("up" if direction == "up" else "down")
        assert rate.finish_s(0.5, nbytes[0]) == pytest.approx(0.6)
        assert rate.finish_s(1.5, nbytes[1]) == pytest.approx(1.6)
    one = made_scenario(link=link).profile()
    assert one.rate("down").finish_s(0.5, 4 * 50_000) == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("link", "says"),
    [
        ({"downlink_trace": "a.jsonl"}, "name the uplink's too"),
        ({"trace": "a.jsonl", "downlink_trace_name": "down"}, "name its file too"),
    ],
)
def test_a_downlinks_trace_needs_its_file_and_an_uplinks(link: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        made_scenario(link=link)


def test_data_files_need_the_folder_to_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = made_scenario(link={"trace": "data:network_traces/oboe.jsonl"})
    monkeypatch.delenv("OFFRAMP_DATA", raising=False)
    with pytest.raises(ConfigError, match="OFFRAMP_DATA is not set"):
        scenario.profile()


def drawn(scenario: Scenario) -> tuple[np.ndarray, np.ndarray]:
    chunks = list(requests(scenario, RECORD))
    assert all(
        chunk.next_s >= chunk.when_N[-1] and (np.diff(chunk.when_N) >= 0).all() for chunk in chunks
    )
    when = np.concatenate([chunk.when_N for chunk in chunks])
    assert (np.diff(when) >= 0).all()
    return when, np.concatenate([chunk.device_N for chunk in chunks])


@pytest.mark.parametrize("kind", ["poisson", "regular", "bursts"])
def test_arrivals_come_in_order_at_the_rate_that_was_asked_for(kind: str) -> None:
    arrivals = {
        "kind": kind,
        "rate_per_s": 2.0,
        "busy_rate_per_s": 20.0,
        "quiet_s": 9.0,
        "busy_s": 1.0,
    }
    scenario = made_scenario(requests=150_000, devices={"count": 50}, arrivals=arrivals)
    when, device = drawn(scenario)
    rate = {"bursts": (9 * 2.0 + 20.0) / 10}.get(kind, 2.0)
    # Bursts: some 2000 of them, each of a random length.
    assert len(when) / (when[-1] - when[0]) == pytest.approx(50 * rate, rel=0.06)
    counts = np.bincount(device, minlength=50)
    assert counts.min() > 0.7 * counts.mean()


def test_bursts_are_burstier_than_poisson() -> None:
    spread = {}
    for kind in ("poisson", "bursts"):
        scenario = made_scenario(requests=20_000, devices={"count": 1}, arrivals={"kind": kind})
        counts = np.bincount(drawn(scenario)[0].astype(int))
        spread[kind] = counts.var() / counts.mean()
    assert spread["poisson"] == pytest.approx(1.0, abs=0.2)
    assert spread["bursts"] > 2


def test_recorded_arrivals_are_replayed(tmp_path: Path) -> None:
    path = tmp_path / "times.txt"
    path.write_text("# seconds device\n0.5 1\n0.75\n2, 2\n")
    scenario = made_scenario(arrivals={"kind": "recorded", "file": str(path)})
    when, device = drawn(scenario)
    assert (when.tolist(), device.tolist()) == ([0.5, 0.75, 2.0], [1, 0, 2])


@pytest.mark.parametrize("text", ["", "x", "1\n0.5", "-1", "1 -2", "1 99"])
def test_recorded_arrivals_that_cannot_be_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "times.txt"
    path.write_text(text)
    scenario: Any = made_scenario(arrivals={"kind": "recorded", "file": str(path)})
    with pytest.raises(OfframpError, match=r"times\.txt"):
        list(requests(scenario, RECORD))


def test_times_are_read_to_the_digit(tmp_path: Path) -> None:
    path = tmp_path / "times.txt"
    path.write_text("0.1\n0.30000000000000004 3\n")
    when, device = read_arrivals(path)
    assert when.tolist() == [0.1, 0.30000000000000004]
    assert device.tolist() == [0, 3]


@pytest.mark.parametrize("path", sorted(_READY.glob("*.toml")), ids=lambda path: path.stem)
def test_ready_scenarios_are_read_and_have_their_page(path: Path) -> None:
    scenario = load_scenario(path)
    assert scenario.about
    assert math.isfinite(scenario.requests)
    page = Path(__file__).parents[2] / "docs" / "scenarios" / f"{path.stem}.md"
    assert page.is_file(), f"{page} is missing"
