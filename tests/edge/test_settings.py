"""Settings: from TOML and code, checked, made definite for a bundle."""

from __future__ import annotations

from pathlib import Path

import pytest
from edge_world import N, toy_bundle
from toy import NEVER

from offramp_common.errors import ConfigError
from offramp_edge.settings import EdgeSettings, plan_for


def test_a_file_sets_what_it_names(tmp_path: Path) -> None:
    path = tmp_path / "edge.toml"
    path.write_text(
        'split = 2\ncodec = "fp16"\ndeadline_ms = 150\nfallback = "exit"\n[knobs]\nthreshold = 0.5\n'
    )
    settings = EdgeSettings.from_toml(path)
    assert settings == EdgeSettings(
        split=2, codec="fp16", deadline_ms=150, fallback="exit", knobs={"threshold": 0.5}
    )
    plan = plan_for(toy_bundle(), settings)
    assert plan.knobs == {"threshold": (0.5,) * N}
    assert plan.codecs[0] == "fp16"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("splitt = 2", "unknown setting 'splitt'; there are: plan, split,"),
        ("split = true", "split = True"),
        ('deadline_ms = "10"', "deadline_ms"),
        ("deadline_ms = 0", "above 0"),
        ("deadline_ms = nan", "above 0"),
        ("max_in_flight = 0", "above 0"),
        ("margin_ms = -1", "negative"),
        ('fallback = "give up"', '"finish" or "exit"'),
        ("backoff_ms = 20000", "backoff_max_ms"),
        ("exits = false\nknobs = {threshold = 1}", "drop one"),
        ("split = [", "cannot be read"),
    ],
)
def test_a_wrong_file_is_refused_with_its_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "edge.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        EdgeSettings.from_toml(path)
    assert message in str(caught.value)
    assert "edge.toml" in str(caught.value)


def test_a_missing_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        EdgeSettings.from_toml(tmp_path / "none.toml")


@pytest.mark.parametrize(
    "wrong",
    [
        {"split": N + 1},
        {"split": -1},
        {"codec": "tokens"},
        {"codec": "zip"},
        {"precision": "int3"},
        {"knobs": {"other": 1.0}},
        {"knobs": {}},
        {"knobs": {"threshold": [0.1, 0.2]}},
        {"knobs": {"threshold": "high"}},
    ],
)
def test_what_a_bundle_cannot_do_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        plan_for(toy_bundle(), EdgeSettings().changed(wrong))


def test_the_bundle_decides_what_is_left_open() -> None:
    plan = plan_for(toy_bundle(split=3), EdgeSettings())
    assert (plan.split, plan.precision, plan.codecs[0]) == (3, "fp32", "fp32")
    assert plan.knobs == {"threshold": (0.25,) * N}


def test_without_exits_nothing_leaves_early() -> None:
    plan = plan_for(toy_bundle(), EdgeSettings(exits=False))
    assert plan.knobs == {"threshold": (NEVER,) * N}
