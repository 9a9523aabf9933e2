"""What a layer of the engine takes, and how many layers a row is expected to need."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np
from numpy.typing import NDArray

from offramp_simulate.record import Record
from offramp_simulate.scenario_parts import Cloud

_LEAST = 0.1  # of a layer's time, whatever a short rest saves: far beyond what was ever measured


class EngineTimes:
    """Seconds of a layer by rows and tokens, from the record's table, bilinear between its points: rows are
    packed, so a group of mixed lengths takes what as many rows of their mean length do.

    fixed_s   of each request, whatever its layers: decoding, handing over
    """

    def __init__(self, record: Record, cloud: Cloud) -> None:
        rows = np.arange(1, cloud.max_batch + 1, dtype=float)
        lengths = np.arange(record.header.max_tokens + 1, dtype=float)
        ms = _spread(record.batches_R, record.engine_ms_RG, rows)
        table = np.stack([np.interp(lengths, record.lengths_G, row) for row in ms])
        scaled = np.maximum(table * cloud.slowdown, cloud.floor_ms) / 1e3
        self._layer_s: list[list[float]] = scaled.tolist()
        self._row_s: list[float] = self._layer_s[0]
        self.fixed_s = float(record.engine_fixed_ms_R[0]) * cloud.slowdown / 1e3
        self.n_layers = record.header.n_layers
        self._rest_s: list[float] = record.rest_s_S.tolist()
        self._rest_run_s, self._rest_layer_s = (record.rest_ms_WS * cloud.slowdown / 1e3).tolist()

    def alone(self, rest_s: float, tokens: int) -> tuple[float, float]:
        """(seconds before the first layer, seconds of each layer) of one row that ends so long a rest; the
        former beyond those in `fixed_s`, so they may be negative."""
        layer_s, rests_s = self._row_s[tokens], self._rest_s
        if len(rests_s) == 1:
            return 0.0, layer_s
        place = min(max(bisect_left(rests_s, rest_s), 1), len(rests_s) - 1)
        before_s, after_s = rests_s[place - 1], rests_s[place]
        share = min(max((rest_s - before_s) / (after_s - before_s), 0.0), 1.0)
        run_s, more_s = (
            costs[place - 1] + share * (costs[place] - costs[place - 1])
            for costs in (self._rest_run_s, self._rest_layer_s)
        )
        layer_s = max(layer_s + more_s, _LEAST * layer_s)
        return max(run_s, -layer_s / 2), layer_s

    def layer_s(self, rows: int, tokens: int) -> float:
        if rows == 1:
            return self._row_s[tokens]
        return self._layer_s[rows - 1][round(tokens / rows)]

    def alone_s(self, layers: int, tokens: int) -> float:
        """So many layers for one row, nobody else there."""
        return layers * self._row_s[tokens]


class Survival:
    """How far rows go on average, from where those before them left: as the live engine counts."""

    def __init__(self, n_layers: int) -> None:
        self._ran, self._left = [1.0] * n_layers, [0.0] * n_layers
        self.layers = [float(n_layers - depth) for depth in range(n_layers + 1)]

    def passed(self, start: int, stop: int) -> None:
        """One row ran layers [start, stop) and left behind none of them."""
        for depth in range(start, stop):
            self._ran[depth] += 1

    def saw(self, depth: int, ran: int, left: int) -> None:
        """Of `ran` rows that ran the layer at `depth`, so many left behind it."""
        self._ran[depth] += ran
        if left:
            self._left[depth] += left
            layers = self.layers
            for layer in range(len(self._ran) - 1, -1, -1):
                stays = 1 - self._left[layer] / self._ran[layer]
                layers[layer] = 1 + stays * layers[layer + 1]


def _spread(
    at_R: NDArray[np.float64], value_RG: NDArray[np.float64], rows: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Values at `rows`: between the points that were measured in proportion, beyond them in their last
    slope."""
    inside = np.stack([np.interp(rows, at_R, column) for column in value_RG.T], axis=1)
    if len(at_R) > 1:
        slope = (value_RG[-1] - value_RG[-2]) / (at_R[-1] - at_R[-2])
        beyond = np.maximum(rows - at_R[-1], 0.0)
        inside = inside + beyond[:, None] * np.maximum(slope, 0.0)[None, :]
    result: NDArray[np.float64] = inside
    return result
