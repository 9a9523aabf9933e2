"""From trained weights to a bundle that devices run: graphs, operating points, numbers, the card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from offramp_common.bundle import CARD, Bundle, write_manifest
from offramp_common.forecast import Forecast
from offramp_common.runner import Knobs
from offramp_train.calibrate import Goal, Point, calibrate
from offramp_train.card import card_text
from offramp_train.config import Calibration, TrainConfig
from offramp_train.conformal import Guarantee, on_record
from offramp_train.data import Splits
from offramp_train.foresight import forecast_of
from offramp_train.measure import PRECISIONS, has_graphs, policy_of, subject
from offramp_train.metrics import metric_of
from offramp_train.progress import Report
from offramp_train.quality import CURVE, curve_points, plot


def finish(bundle: Bundle, config: TrainConfig, splits: Splits, report: Report) -> Bundle:
    """Graphs exported, calibrated on dev, measured on test, and a card."""
    from offramp_model.export import add_graphs

    report.say("exporting the device's graphs")
    bundle = _measured(add_graphs(bundle), config, splits, report)
    (bundle.path / CARD).write_text(card_text(bundle.manifest))
    return bundle


def _measured(bundle: Bundle, config: TrainConfig, splits: Splits, report: Report) -> Bundle:
    """Calibrated on dev, measured on test (on dev where there is none)."""
    name, _ = metric_of(bundle.manifest.task)
    goal, weights = _goal(config.calibration), dict(config.calibration.label_weights)
    points: dict[str, Knobs] = {}
    promised: dict[str, Guarantee | None] = {}
    forecasts: dict[str, Forecast] = {}
    curve: list[Mapping[str, Any]] = []
    split = "test" if splits.test is not None else "dev"
    for precision in [p for p in PRECISIONS if has_graphs(bundle, p)] or ["torch"]:
        dev = subject(bundle, precision, splits.dev)
        dev_recording = dev.record(report, f"dev, {precision}")
        found = calibrate(dev.scorer(dev_recording, weights), goal)
        report.say(f"{precision}: {describe(found, name)} (dev)")
        key = "fp32" if precision == "torch" else precision
        points[key], promised[key] = found.knobs, found.guarantee
        forecasts[key] = forecast_of(policy_of(bundle), dev_recording, found.knobs)
        if splits.test is None:
            measured, recording = dev, dev_recording
        else:
            measured = subject(bundle, precision, splits.test)
            recording = measured.record(report, f"test, {precision}")
        curve += (mine := curve_points(measured, recording, found.knobs, split))
        at = mine[0]
        report.say(
            f"{precision}: mean depth {at['mean_depth']:.3f} of {bundle.n_layers}, {name} "
            f"{100 * at[name]:.2f}, at full depth {100 * at['full_depth']:.2f} ({split})"
        )
    precision = config.precision if config.precision in points else "fp32"
    manifest = replace(
        bundle.manifest,
        operating_points=points,
        precision=precision,
        curve=tuple(curve),
        training=on_record(bundle.manifest.training, promised, "dev"),
        forecasts=forecasts,
    )
    title = f"{manifest.name}: {name} against depth ({split})"
    plot(bundle.path / CURVE, title, name, bundle.n_layers, curve)
    write_manifest(bundle.path, manifest)
    return Bundle.read(bundle.path)


def _goal(chosen: Calibration) -> Goal:
    if chosen.epsilon:
        return Goal(epsilon=chosen.epsilon)
    return Goal(max_drop=chosen.max_drop, margin=chosen.margin, per_exit=chosen.per_exit)


def describe(point: Point, metric: str) -> str:
    """One line: what the operating point costs and saves."""
    promised = "" if point.guarantee is None else "; " + point.guarantee.sentence()
    return (
        f"mean depth {point.score.mean_depth:.3f}, {metric} {100 * point.score.quality:.2f}, "
        f"{point.drop:.2f} points below full depth{promised}"
    )
