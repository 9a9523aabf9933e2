"""The small tables from which a report's page works out every plan by itself: a record, summed up.

Samples of one length that leave at the same depths are one group: their latency without queues is the
same arithmetic, whatever link, device or threshold the sliders say. Queues are what the simulation adds.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from offramp_simulate.device_model import Samples, cut, resolve, samples
from offramp_simulate.engine_times import EngineTimes
from offramp_simulate.record import OWN, Record
from offramp_simulate.scenario import Scenario
from offramp_simulate.scenario_parts import Plan

_MOST_LENGTHS = 24


def explorer_tables(record: Record, scenario: Scenario) -> dict[str, Any]:
    """Milliseconds and bytes by length, groups and quality by operating point. The device's own slowdown is
    left out: it is a slider."""
    h, profile = record.header, scenario.profile()
    lengths = _lengths(record)
    nearest_N = np.abs(record.tokens_N[:, None] - lengths[None, :]).argmin(axis=1)
    codecs = list(dict.fromkeys((h.codec, *h.through)))
    gateway_ms, beside = scenario.cloud.gateway_ms, scenario.link.beside_nbytes
    points = [_point(record, scenario, p.name, nearest_N, codecs) for p in h.points]
    points.sort(key=lambda point: (point["meanDepth"], point["name"]))
    return {
        "layers": h.n_layers,
        "exits": list(h.exits),
        "lengths": lengths.tolist(),
        "codecs": codecs,
        "beforeMs": h.overhead_ms,
        **_times(record, scenario, lengths, codecs),
        "bytes": _bytes(record, nearest_N, len(lengths), codecs, beside),
        "down": h.response_nbytes + beside,
        "downPerUp": _ratio(profile.downlink_mbps, profile.uplink_mbps),
        "gatewayMs": h.gateway_ms if gateway_ms < 0 else gateway_ms,
        "points": points,
        "own": next(i for i, point in enumerate(points) if point["name"] == OWN),
        "start": {
            "mbps": _within(profile.uplink_mbps, 0.1, 100.0),
            "rtt": _within(profile.rtt_ms, 1.0, 1000.0),
            "slow": _within(scenario.devices.slowdown, 0.125, 512.0),
        },
    }


def _times(
    record: Record, scenario: Scenario, lengths: np.ndarray, codecs: list[str]
) -> dict[str, Any]:
    """Milliseconds by length: of each device layer, each codec, an engine's layer."""
    precision = record.precision(scenario.devices.precision or record.header.precision)
    engine = EngineTimes(record, scenario.cloud)

    def at(length: int, table_G: np.ndarray) -> float:
        return _short(np.interp(length, record.lengths_G, table_G))

    return {
        "deviceMs": [[at(t, layer) for layer in record.layer_ms_PLG[precision]] for t in lengths],
        "encodeMs": [
            [at(t, record.encode_ms_OG[record.codec(codec)]) for t in lengths] for codec in codecs
        ],
        "engineMs": [_short(1e3 * engine.alone_s(1, int(t))) for t in lengths],
        "engineFixedMs": _short(1e3 * engine.fixed_s),
    }


def trace_course(scenario: Scenario, until_s: float, steps: int = 300) -> list[list[float]]:
    """[seconds, Mbit/s] of the uplink as device 0 sees it; empty for a constant rate."""
    profile = scenario.profile()
    if profile.trace is None:
        return []
    from offramp_simulate.arrivals import phases

    trace, phase_s = profile.trace, float(phases(scenario, profile.trace.period_s)[0])
    edges, factor = np.array(trace.edges_s), profile.uplink_mbps / trace.mean_mbps
    times = np.linspace(0.0, until_s, steps)
    places = np.searchsorted(edges, (times + phase_s) % trace.period_s, side="right") - 1
    rates = np.array(trace.mbps)[np.minimum(places, len(trace.mbps) - 1)] * factor
    return [[_short(t), _short(rate)] for t, rate in zip(times, rates, strict=True)]


def _point(
    record: Record, scenario: Scenario, name: str, nearest_N: np.ndarray, codecs: list[str]
) -> dict[str, Any]:
    """One operating point: groups [length, leaves on the device, leaves in the cloud, count], and the share
    of right answers by split and codec."""
    resolved = resolve(Plan("any", split=0, point=name), scenario, record)
    of = samples(record, scenario, resolved)
    keys = zip(nearest_N.tolist(), of.leaves_N.tolist(), of.cloud_leaves_N.tolist(), strict=True)
    groups = [[*key, count] for key, count in sorted(Counter(keys).items())]
    return {
        "name": name,
        "meanDepth": _short(of.leaves_N.mean()),
        "groups": groups,
        "right": [
            [_right(record, scenario, of, split, codec) for codec in codecs]
            for split in range(record.header.n_layers + 1)
        ],
    }


def _right(record: Record, scenario: Scenario, of: Samples, split: int, codec: str) -> float:
    stays_N = of.leaves_N <= split
    columns_N = np.searchsorted(np.array(of.exits), of.leaves_N)
    right_N = of.right_NE[np.arange(len(stays_N)), columns_N]
    if split < of.n_layers:
        right_N = np.where(stays_N, right_N, cut(record, scenario, of, split, codec).right_N)
    return _short(right_N.mean())


def _bytes(
    record: Record, nearest_N: np.ndarray, lengths: int, codecs: list[str], beside: int
) -> list[list[list[float]]]:
    """By cut, codec, length: the mean of what was measured."""
    counts = np.maximum(np.bincount(nearest_N, minlength=lengths), 1)
    return [
        [
            [
                _short(total)
                for total in np.bincount(
                    nearest_N,
                    weights=record.request_CON[depth, record.codec(codec)],
                    minlength=lengths,
                )
                / counts
                + beside
            ]
            for codec in codecs
        ]
        for depth in range(record.header.n_layers)
    ]


def _lengths(record: Record) -> np.ndarray:
    """The lengths that occur; where they are too many, as many that stand for them."""
    found = np.unique(record.tokens_N)
    if len(found) > _MOST_LENGTHS:
        shares = (np.arange(_MOST_LENGTHS) + 0.5) / _MOST_LENGTHS
        found = np.unique(np.quantile(record.tokens_N, shares).round().astype(np.int64))
    return found


def _within(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def _ratio(down: float, up: float) -> float:
    return _short(down / up) if np.isfinite(down) and np.isfinite(up) else 4.0


def _short(value: float) -> float:
    return float(f"{float(value):.5g}")
