"""Faults as data: how they are written, what is refused, what several do together."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from offramp_common.errors import ConfigError, DataError
from offramp_simulate.faults import Conditions, Fault, conditions, load_faults, parse_fault
from offramp_simulate.loss import GilbertElliott


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("at=5,for=3,kind=blackhole", Fault("blackhole", at_s=5.0, for_s=3.0)),
        ("kind=cut", Fault("cut")),
        ("kind=reset every=2 for=9", Fault("reset", every_s=2.0, for_s=9.0)),
        ("kind=stall, direction=down", Fault("stall", direction="down")),
        ("kind=delay,ms=200,direction=up", Fault("delay", ms=200.0, direction="up")),
        ("kind=corrupt,bytes=1e4", Fault("corrupt", nbytes=10_000)),
        ("kind=loss,rate=0.1", Fault("loss", loss=GilbertElliott.of(0.1))),
        (
            "kind=loss,rate=0.1,burst=3,seed=7",
            Fault("loss", loss=GilbertElliott.of(0.1, 3.0), seed=7),
        ),
        ("kind=rate,mbps=0.5", Fault("rate", mbps=0.5)),
        ("kind=rate,factor=0.1", Fault("rate", factor=0.1)),
    ],
)
def test_a_fault_is_written_as_words(text: str, fault: Fault) -> None:
    assert parse_fault(text) == fault


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no kind given: one of blackhole"),
        ("blackhole", "'blackhole' is not key=value"),
        ("kind=flood", "kind is 'flood': one of blackhole"),
        ("kind=cut,kind=cut", "kind is there twice"),
        ("kind=cut,ms=3", "fault cut: it has no 'ms': one of kind, at, for"),
        ("kind=cut,for=soon", "for is 'soon', not a number"),
        ("kind=cut,for=0", "for is 0.0: give more than 0"),
        ("kind=cut,at=-1", "at is -1.0: give 0 or more"),
        ("kind=cut,at=nan", "at is nan"),
        ("kind=cut,direction=up", "it takes the whole link"),
        ("kind=stall,direction=left", "direction is 'left'"),
        ("kind=delay", "fault delay: give ms"),
        ("kind=corrupt", "fault corrupt: give bytes"),
        ("kind=corrupt,bytes=0", "bytes is 0"),
        ("kind=loss", "fault loss: give rate"),
        ("kind=loss,rate=2", "rate is 2.0"),
        ("kind=rate", "give either mbps or factor"),
        ("kind=rate,mbps=1,factor=2", "give either mbps or factor"),
        ("kind=rate,mbps=0", "mbps is 0.0"),
        ("kind=rate,factor=inf", "factor is inf"),
        ("kind=reset,for=3", "needs `every`"),
    ],
)
def test_a_fault_that_cannot_be_is_refused_and_the_message_says_why(
    text: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_fault(text)


def test_a_timetable_is_read_from_toml_and_from_json(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"kind": "stall", "at": 1, "for": 2, "direction": "down"},
        {"kind": "loss", "at": 4, "for": 2.5, "rate": 0.02, "burst": 4},
    ]
    (tmp_path / "t.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "t.toml").write_text(
        '[[fault]]\nkind = "stall"\nat = 1\nfor = 2\ndirection = "down"\n'
        '[[fault]]\nkind = "loss"\nat = 4\nfor = 2.5\nrate = 0.02\nburst = 4\n',
        encoding="utf-8",
    )
    wanted = (
        Fault("stall", at_s=1.0, for_s=2.0, direction="down"),
        Fault("loss", at_s=4.0, for_s=2.5, loss=GilbertElliott.of(0.02, 4.0)),
    )
    assert load_faults(tmp_path / "t.json") == load_faults(tmp_path / "t.toml") == wanted


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.toml", None, "cannot read the faults"),
        ("t.toml", "[[fault]", "cannot read the faults"),
        ("t.json", "{", "cannot read the faults"),
        ("t.json", "[]", "no fault in it"),
        ("t.json", "3", "no fault in it"),
        ("t.toml", "faults = 3", "unknown key 'faults'"),
        ("t.json", '[{"kind": "cut"}, {"kind": "cut", "for": true}]', "fault 2: .* True, not"),
        ("t.json", "[[1]]", "fault 1: fault: no kind given"),
    ],
)
def test_a_malformed_timetable_is_reported_with_its_file(
    name: str, text: str | None, message: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=rf"{name}: {message}"):
        load_faults(tmp_path / name)


def test_several_faults_act_together_each_in_its_direction() -> None:
    late, later = Fault("delay", ms=100.0), Fault("delay", ms=50.0, direction="down")
    slow, slower = Fault("rate", factor=0.5), Fault("rate", factor=0.2, direction="up")
    fixed = Fault("rate", mbps=3.0, direction="down")
    now = [late, later, slow, slower, fixed, Fault("stall", direction="up")]
    up, down = conditions(now, "up"), conditions(now, "down")
    assert (up.delay_s, down.delay_s) == pytest.approx((0.1, 0.15))
    assert (up.factor, down.factor) == pytest.approx((0.1, 0.5))
    assert (up.mbps, down.mbps) == (None, 3.0)
    assert (up.stalled, down.stalled) == (True, False)


def test_no_fault_changes_nothing() -> None:
    assert conditions([], "up") == Conditions()
    assert Fault("cut").for_s == math.inf
