"""Records made up for tests, and what becomes of single requests in a simulation."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp_common.codecs import CODECS
from offramp_common.manifest import Manifest
from offramp_common.spec import CutSpec, KnobSpec, TaskSpec
from offramp_simulate.record import NEVER, OWN, Header, Point, Record
from offramp_simulate.results import Answers
from offramp_simulate.scenario import Scenario, scenario_of

N_LAYERS, EXITS, VOCABULARY = 4, (1, 2, 4), 60_000
CODEC_NAMES = tuple(name for name, codec in CODECS.items() if not codec.integer)


def made_manifest() -> Manifest:
    cuts = [CutSpec(0, True, 1, {}, (VOCABULARY,))]
    cuts += [CutSpec(depth, False, 1) for depth in range(1, N_LAYERS)]
    return Manifest(
        name="made",
        task=TaskSpec("classification", ("no", "yes")),
        family="made",
        n_layers=N_LAYERS,
        max_tokens=64,
        cuts=tuple(cuts),
        method="threshold",
        settings={},
        exits=EXITS,
        knobs=(KnobSpec("threshold", 0.0, 1.0, 2.0, ""),),
        operating_points={"fp32": {"threshold": (0.5,) * N_LAYERS}},
        split=2,
        codec="fp32",
    )


def made_record(
    samples: int = 40,
    *,
    seed: int = 0,
    layer_ms: float = 8.0,
    tokens: int | None = 16,
    deviations: tuple[float, ...] = (1.0,),
    overhead_ms: float = 1.0,
    engine_ms: float = 2.0,
    encode_ms: float = 0.0,
) -> Record:
    """Samples leave at depths drawn from EXITS, half of their answers at early exits are wrong. `tokens`
    None: lengths from 4 to 60."""
    rng = np.random.default_rng(seed)
    lengths = np.array([8.0, 16.0, 32.0, 64.0])
    tokens_N = rng.integers(4, 61, samples) if tokens is None else np.full(samples, tokens)
    target_N = rng.integers(0, 2, samples)
    right = rng.random((samples, len(EXITS))) < np.array([0.6, 0.8, 1.0])
    predicted = np.where(right, target_N[:, None], 1 - target_N[:, None]).astype(np.int16)
    leaves = rng.choice(EXITS, samples).astype(np.uint8)
    request = np.zeros((N_LAYERS, len(CODEC_NAMES), samples), np.int32)
    request[0] = 90 + 2 * tokens_N
    request[1:] = 100 + 400 * tokens_N
    scale = lengths / 16 if tokens is None else np.ones(4)
    points = (Point(OWN, _knobs(0.5)), Point(NEVER, _knobs(2.0)))
    header = Header(
        "made", "threshold", N_LAYERS, 64, EXITS, ("00",) * N_LAYERS, ("fp32",), "fp32", 2, "fp32",
        CODEC_NAMES, (), points, "made up", "no machine", overhead_ms, 1.0, 80,
    )  # fmt: skip
    engine = np.array([[1.0], [1.2], [4.0]]) * scale[None, :] * engine_ms
    manifest = np.frombuffer(json.dumps(made_manifest().to_json()).encode(), np.uint8)
    return Record(
        header,
        tokens_N.astype(np.int64),
        target_N,
        predicted[None],
        rng.random((1, samples, len(EXITS))).astype(np.float32),
        np.stack([leaves, np.full(samples, N_LAYERS, np.uint8)])[None],
        request,
        np.zeros((0, N_LAYERS, samples, len(EXITS)), np.int16),
        lengths,
        np.tile(scale * layer_ms, (1, N_LAYERS, 1)),
        np.full((len(CODEC_NAMES), 4), encode_ms),
        np.array(deviations),
        np.array(deviations),
        np.array([1.0, 2.0, 8.0]),
        engine,
        np.array([0.5, 0.6, 1.0]),
        manifest,
    )


def made_scenario(**tables: Any) -> Scenario:
    """A small one; `tables` in place of its own."""
    values: dict[str, Any] = {
        "title": "made up",
        "requests": 400,
        "devices": {"count": 3},
        "arrivals": {"rate_per_s": 5.0},
        "link": {"uplink_mbps": 5.0, "downlink_mbps": 20.0, "rtt_ms": 40.0},
        "agent": {"hedge_after": math.inf, "deadline_ms": math.inf},
        "plans": [{"name": "plan"}],
    }
    return scenario_of({**values, **tables})


class Rows:
    """In place of a Tally: every answer, in order of asking."""

    def __init__(self) -> None:
        self._parts: list[Answers] = []
        self.last_s = 0.0
        self.wasted_ms = 0.0

    def add(self, answers: Answers) -> None:
        if len(answers.began_s_N):
            self._parts.append(answers)
            self.last_s = max(self.last_s, float(answers.ended_s_N.max()))

    def wasted(self, ms: float) -> None:
        self.wasted_ms += ms

    def beside(self, nbytes: int) -> None:
        """Not looked at."""

    def column(self, name: str) -> NDArray[Any]:
        """A column of Answers."""
        began = np.concatenate([part.began_s_N for part in self._parts])
        values = np.concatenate([getattr(part, name) for part in self._parts])
        ordered: NDArray[Any] = values[np.argsort(began, kind="stable")]
        return ordered

    @property
    def ms(self) -> NDArray[np.float64]:
        ms: NDArray[np.float64] = 1e3 * (self.column("ended_s_N") - self.column("began_s_N"))
        return ms


def _knobs(value: float) -> dict[str, dict[str, list[float]]]:
    return {"fp32": {"threshold": [value] * N_LAYERS}}
