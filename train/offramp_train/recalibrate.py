"""`offramp calibrate`: a new operating point for a bundle that is already made."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from offramp_common.bundle import CARD, Bundle, write_manifest
from offramp_common.manifest import Manifest
from offramp_common.runner import Knobs
from offramp_train.calibrate import Goal, Point, calibrate
from offramp_train.card import card_text
from offramp_train.conformal import Guarantee, check_guarantee, on_record
from offramp_train.curve_plot import check_picture
from offramp_train.foresight import forecast_of
from offramp_train.measure import PRECISIONS, has_graphs, policy_of, subject
from offramp_train.metrics import metric_of
from offramp_train.progress import Report
from offramp_train.quality import CURVE, curve_points, plot
from offramp_train.tables import Rows


def recalibrate(
    bundle: Bundle,
    rows: Rows,
    goal: Goal,
    precision: str,
    weights: dict[str, float],
    report: Report,
) -> dict[str, Any]:
    """Find operating points on `rows`, write them and their curve into the manifest, and say what was found.

    precision   "fp32", "int8", or "all" that the bundle has graphs for (torch stands in where it has none)
    """
    if goal.epsilon is not None:
        check_guarantee(bundle.manifest.method, "--epsilon")
    check_picture(bundle.path / CURVE)
    metric, _ = metric_of(bundle.manifest.task)
    wanted = PRECISIONS if precision == "all" else (precision,)
    have = [p for p in wanted if has_graphs(bundle, p)] if precision == "all" else list(wanted)
    points: dict[str, Knobs] = dict(bundle.manifest.operating_points)
    curve = list(bundle.manifest.curve)
    result: dict[str, Any] = {}
    promised: dict[str, Guarantee | None] = {}
    forecasts = dict(bundle.manifest.forecasts)
    for runtime in have or ["torch"]:
        key = "fp32" if runtime == "torch" else runtime
        here = subject(bundle, runtime, rows)
        recording = here.record(report, f"recording exits, {runtime}")
        found = calibrate(here.scorer(recording, weights), goal)
        points[key], promised[key] = found.knobs, found.guarantee
        forecasts[key] = forecast_of(policy_of(bundle), recording, found.knobs)
        mine = curve_points(here, recording, found.knobs, rows.path.name)
        curve = [*(p for p in curve if p.get("precision") != runtime), *mine]
        result[key] = _shown(found, metric)
        report.say(_table(key, found, metric, mine[0]))
    manifest = replace(
        bundle.manifest,
        operating_points=points,
        curve=tuple(curve),
        training=on_record(bundle.manifest.training, promised, rows.path.name),
        forecasts=forecasts,
    )
    _renew_card(bundle, manifest, report)
    write_manifest(bundle.path, manifest)
    return result


def _renew_card(bundle: Bundle, manifest: Manifest, report: Report) -> None:
    """The card and its picture with the new numbers, unless somebody has written the card by hand."""
    card = bundle.path / CARD
    if not card.is_file() or "card" not in bundle.manifest.training:
        return
    if card.read_text() != card_text(bundle.manifest):
        report.say(
            f"{card}: was edited, so it is left as it is, with the old operating point's numbers"
        )
        return
    metric, _ = metric_of(manifest.task)
    card.write_text(card_text(manifest))
    title = f"{manifest.name}: {metric} against depth"
    plot(bundle.path / CURVE, title, metric, manifest.n_layers, manifest.curve)


def _shown(point: Point, metric: str) -> dict[str, Any]:
    promised = {} if point.guarantee is None else {"guarantee": point.guarantee.to_json()}
    return {
        **promised,
        "knobs": {name: list(values) for name, values in point.knobs.items()},
        "mean_depth": point.score.mean_depth,
        metric: point.score.quality,
        f"{metric}_full_depth": point.full.quality,
        "drop_points": point.drop,
    }


def _table(key: str, point: Point, metric: str, measured: Any) -> str:
    lines = [
        f"{key}: mean depth {point.score.mean_depth:.3f}, {metric} {100 * point.score.quality:.2f}, at full "
        f"depth {100 * point.full.quality:.2f} (drop {point.drop:.2f} points)"
    ]
    if point.guarantee is not None:
        lines.append(f"  guarantee    {point.guarantee.sentence()}")
    for name, values in point.knobs.items():
        lines.append(f"  {name:<12} {'  '.join(f'{value:.4g}' for value in values)}")
    leaving = "  ".join(f"{d}: {100 * share:.1f} %" for d, share in measured["leaving"].items())
    lines.append(f"  leaving at   {leaving}")
    return "\n".join(lines)
