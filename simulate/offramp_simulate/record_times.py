"""What the device's layers take on this machine, for a record; record_engine.py times the engine.

What else the machine does is no part of a record: layers are timed by this thread's processor time, and of
what is left of disturbance the fastest runs are free (the tenth percentile). On a machine that is known to be
quiet the wall clock says more: what waking and waiting cost is then part of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter, process_time, thread_time

import numpy as np
from numpy.typing import NDArray

from offramp_common.activations import Activations, NumpyArray
from offramp_common.bundle import Bundle
from offramp_common.codecs import get_codec
from offramp_common.runner import Layers
from offramp_common.spec import never_exit
from offramp_edge.runtime import OnnxLayers
from offramp_simulate.record import Record
from offramp_simulate.record_build import travelling

LENGTHS = (8, 16, 32, 64, 128, 256, 512)
DEVIATIONS = 64
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, eq=False)
class DeviceTimes:
    """Names and axes as in Record."""

    lengths_G: NDArray[np.float64]
    layer_ms_PLG: NDArray[np.float64]
    encode_ms_OG: NDArray[np.float64]
    deviation_J: NDArray[np.float64]
    overhead_ms: float
    machine: str = ""  # where they were measured, if not here


def lengths_for(bundle: Bundle) -> tuple[int, ...]:
    """The lengths to time: up to the model's limit, which is one of them."""
    longest = bundle.manifest.max_tokens
    return (*(length for length in LENGTHS if length < longest), longest)


def device_times(
    bundle: Bundle,
    graphs: dict[str, OnnxLayers],
    texts: list[str],
    repeats: int,
    wall: bool,
    say: Say,
) -> DeviceTimes:
    """Time every layer of every precision at each length, the codecs, and the agent itself; `wall`: by the
    wall clock."""
    lengths, own = lengths_for(bundle), bundle.manifest.precision
    layer_ms, deviations = [], []
    for precision, layers in graphs.items():
        table = []
        for length in lengths:
            say(f"device, {precision}, {length} tokens")
            runs_RL = layer_runs(
                bundle, layers, length, repeats, perf_counter if wall else thread_time
            )
            table.append(np.median(runs_RL, axis=0))
            if precision == own:
                totals = runs_RL.sum(axis=1)
                deviations.append(totals / np.median(totals))
        layer_ms.append(np.stack(table, axis=1))
    layer_ms_PLG = np.stack(layer_ms)
    shares = deviation_shares()
    own_ms_G = layer_ms_PLG[list(graphs).index(own)].sum(axis=0)
    say("the agent, with all layers on the device")
    return DeviceTimes(
        np.array(lengths, float),
        layer_ms_PLG,
        _encode_ms(bundle, graphs[own], lengths, repeats),
        np.quantile(np.concatenate(deviations), shares),
        overhead_ms(bundle, texts, np.array(lengths, float), own_ms_G, wall),
    )


def layer_runs(
    bundle: Bundle,
    layers: Layers[NumpyArray],
    length: int,
    repeats: int,
    clock: Callable[[], float],
) -> NDArray[np.float64]:
    """(repeats, L): milliseconds of each layer in each run, one run before them not counted."""
    ids = np.ones((1, length, bundle.cuts[0].width), np.int64)
    start = Activations(ids, np.array([length]), depth=0)
    knobs = never_exit(bundle.manifest.knobs, bundle.n_layers)
    runs = np.zeros((repeats + 1, bundle.n_layers))
    for turn in range(repeats + 1):
        acts = start
        for layer in range(bundle.n_layers):
            began = clock()
            acts = layers.step(acts, knobs).acts
            runs[turn, layer] = 1e3 * (clock() - began)
    return runs[1:]


def _encode_ms(
    bundle: Bundle, layers: OnnxLayers, lengths: tuple[int, ...], repeats: int
) -> NDArray[np.float64]:
    """(O, G), of hidden states at the bundle's own split (after one layer where that is 0)."""
    depth = min(max(bundle.manifest.split, 1), bundle.n_layers - 1)
    knobs = never_exit(bundle.manifest.knobs, bundle.n_layers)
    table = np.zeros((len(travelling()), len(lengths)))
    for column, length in enumerate(lengths):
        ids = np.arange(1, length + 1).reshape(1, length, 1)
        ids = np.repeat(ids, bundle.cuts[0].width, axis=2) % min(bundle.cuts[0].vocabulary)
        acts = Activations(ids.astype(np.int64), np.array([length]), depth=0)
        for _ in range(depth):
            acts = layers.step(acts, knobs).acts
        for row, name in enumerate(travelling()):
            times = []
            for _ in range(repeats + 1):
                began = thread_time()
                get_codec(name).encode(acts.hidden_BTD[0])
                times.append(1e3 * (thread_time() - began))
            table[row, column] = median(times[1:])
    return table


def overhead_ms(
    bundle: Bundle,
    texts: list[str],
    lengths_G: NDArray[np.float64],
    all_ms_G: NDArray[np.float64],
    wall: bool,
    layers: Layers[NumpyArray] | None = None,
) -> float:
    """What the real agent takes for a sample beside its layers: tokenizing, threads, bookkeeping. `all_ms_G`
    is what all layers take (of `layers`, where the worker is not to have its own)."""
    from offramp_common.text import TextEncoder
    from offramp_edge.worker import EdgeWorker

    encode, over = TextEncoder(bundle), []
    with EdgeWorker(bundle, layers=layers, exits=False) as worker:
        for text in texts:
            layers_ms = float(np.interp(encode([text]).n_tokens, lengths_G, all_ms_G))
            began = process_time()
            ms = worker.answer(text).ms
            over.append((ms if wall else 1e3 * (process_time() - began)) - layers_ms)
    return max(typical(over, wall), 0.0)


def typical(values: list[float], wall: bool) -> float:
    """The median on a quiet machine; else the tenth percentile, which others have not disturbed."""
    return float(np.quantile(values, 0.5 if wall else 0.1))


def deviation_shares() -> NDArray[np.float64]:
    """At which quantiles deviations are kept."""
    shares: NDArray[np.float64] = (np.arange(DEVIATIONS) + 0.5) / DEVIATIONS
    return shares


def device_from(other: Record) -> DeviceTimes:
    """What another record of the same bundle says."""
    return DeviceTimes(
        other.lengths_G,
        other.layer_ms_PLG,
        other.encode_ms_OG,
        other.deviation_J,
        other.header.overhead_ms,
        other.header.machine,
    )
