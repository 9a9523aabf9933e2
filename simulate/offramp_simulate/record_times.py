"""The other half of a record: what the device's layers and the engine take on this machine.

The engine is timed from outside: `offramp cloud serve --local` in a process of its own is sent batches
that it runs as one. So this needs no torch here, and what is timed is what runs in production.

What else the machine does is no part of a record. So all is timed by processor time: the device's layers by
this thread's, the engine by its process's, as Linux counts it to the nanosecond; elsewhere by the engine's
own word. Of what is left of disturbance the fastest runs are free (the tenth percentile).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import process_time, thread_time

import numpy as np
from numpy.typing import NDArray

from offramp_common.activations import Activations, NumpyArray
from offramp_common.bundle import Bundle
from offramp_common.codecs import get_codec
from offramp_common.frames import encode_frame
from offramp_common.spec import never_exit
from offramp_common.transport import Offload, Transport
from offramp_edge.runtime import OnnxLayers
from offramp_simulate.processes import Child
from offramp_simulate.record import Record
from offramp_simulate.record_build import travelling

LENGTHS = (8, 16, 32, 64, 128, 256, 512)
BATCHES = (1, 2, 4, 8, 16, 32)
_DEVIATIONS = 64
_START_S = 120.0
_ANSWER_S = 60.0
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


@dataclass(frozen=True, slots=True, eq=False)
class EngineTimes:
    """Names and axes as in Record."""

    batches_R: NDArray[np.float64]
    engine_ms_RG: NDArray[np.float64]
    engine_fixed_ms_R: NDArray[np.float64]
    gateway_ms: float


def lengths_for(bundle: Bundle) -> tuple[int, ...]:
    """The lengths to time: up to the model's limit, which is one of them."""
    longest = bundle.manifest.max_tokens
    return (*(length for length in LENGTHS if length < longest), longest)


def device_times(
    bundle: Bundle, graphs: dict[str, OnnxLayers], texts: list[str], repeats: int, say: Say
) -> DeviceTimes:
    """Time every layer of every precision at each length, the codecs, and the agent itself."""
    lengths, own = lengths_for(bundle), bundle.manifest.precision
    layer_ms, deviations = [], []
    for precision, layers in graphs.items():
        table = []
        for length in lengths:
            say(f"device, {precision}, {length} tokens")
            runs_RL = _layer_runs(bundle, layers, length, repeats)
            table.append(np.median(runs_RL, axis=0))
            if precision == own:
                totals = runs_RL.sum(axis=1)
                deviations.append(totals / np.median(totals))
        layer_ms.append(np.stack(table, axis=1))
    layer_ms_PLG = np.stack(layer_ms)
    shares = (np.arange(_DEVIATIONS) + 0.5) / _DEVIATIONS
    own_ms_G = layer_ms_PLG[list(graphs).index(own)].sum(axis=0)
    say("the agent, with all layers on the device")
    return DeviceTimes(
        np.array(lengths, float),
        layer_ms_PLG,
        _encode_ms(bundle, graphs[own], lengths, repeats),
        np.quantile(np.concatenate(deviations), shares),
        _overhead_ms(bundle, texts, np.array(lengths, float), own_ms_G),
    )


async def engine_times(bundle: Bundle, repeats: int, say: Say) -> EngineTimes:
    """Time a real engine by batch size and length. ConfigError with its words when it does not start."""
    from offramp_edge.grpc_transport import GrpcTransport

    say("the engine, starting")
    arguments = ("--listen", "127.0.0.1:0", "--local", "--insecure")
    cloud = await Child.start("cloud", "cloud", "serve", "--bundle", str(bundle.path), *arguments)
    try:
        ready = await cloud.read(_START_S)
        transport = GrpcTransport(ready["listening"])
        try:
            return await _engine_table(bundle, transport, int(ready["pid"]), repeats, say)
        finally:
            await transport.close()
    finally:
        await cloud.stop()


async def _engine_table(
    bundle: Bundle, transport: Transport, pid: int, repeats: int, say: Say
) -> EngineTimes:
    """Two cuts of the same batch give a layer's time, and what a run takes beside its layers."""
    lengths, n = lengths_for(bundle), bundle.n_layers
    deep = n - 1
    table, fixed, gateway = [], [], []
    for rows in BATCHES:
        per_layer, beside = [], []
        for length in lengths:
            say(f"engine, {rows} rows of {length} tokens")
            whole, last, hop = [], [], []
            for turn in range(repeats + 1):
                whole_ms, hop_ms = await _asked(bundle, transport, pid, rows, length, 0)
                last_ms, _ = await _asked(bundle, transport, pid, rows, length, deep)
                if turn:  # the first of each warms up
                    whole.append(whole_ms)
                    last.append(last_ms)
                    hop.append(hop_ms)
            layer_ms = max((_fastest(whole) - _fastest(last)) / deep, 1e-3)
            per_layer.append(layer_ms)
            beside.append(max(_fastest(whole) - n * layer_ms, 0.0))
            gateway.append(_fastest(hop))
        table.append(per_layer)
        fixed.append(median(beside))
    engine_ms, rows_R = np.array(table), np.array(BATCHES, float)
    return EngineTimes(rows_R, engine_ms, np.array(fixed), median(gateway))


async def _asked(
    bundle: Bundle, transport: Transport, pid: int, rows: int, length: int, depth: int
) -> tuple[float, float]:
    """(milliseconds of the engine's process, and those of this one beside it)."""
    acts = _batch(bundle, rows, length, depth)
    frame = encode_frame(acts, bundle.cuts[depth], "int8")
    never = never_exit(bundle.manifest.knobs, bundle.n_layers)
    work = Offload("timing", bundle.manifest.name, bundle.digest(depth), frame, never)
    there, here = _cpu_s(pid), process_time()
    done = await asyncio.wait_for(transport.complete(work, timeout_s=_ANSWER_S), _ANSWER_S)
    beside_ms = 1e3 * (process_time() - here)
    if there is None:
        return done.compute_ms + done.queue_ms, beside_ms
    return 1e3 * ((_cpu_s(pid) or 0.0) - there), beside_ms


def _cpu_s(pid: int) -> float | None:
    """Seconds that all threads of a process have run; None where the system does not say."""
    total = 0
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += int((task / "schedstat").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None
    return total / 1e9


def _batch(bundle: Bundle, rows: int, length: int, depth: int) -> Activations[NumpyArray]:
    """Rows without content that may be cut there."""
    cut = bundle.cuts[depth]
    if cut.integer:
        hidden = np.ones((rows, length, cut.width), np.int64)
    else:
        hidden = np.random.default_rng(0).normal(size=(rows, length, cut.width)).astype(np.float32)
    state = {
        name: np.zeros((rows, *entry.shape), entry.dtype)
        for name, entry in cut.state.items()
        if not entry.per_token
    }
    per_token = {
        name: np.zeros((rows, length, *entry.shape), entry.dtype)
        for name, entry in cut.state.items()
        if entry.per_token
    }
    return Activations(hidden, np.full(rows, length), depth, state, per_token)


def _layer_runs(
    bundle: Bundle, layers: OnnxLayers, length: int, repeats: int
) -> NDArray[np.float64]:
    """(repeats, L): milliseconds of each layer in each run, one run before them not counted."""
    ids = np.ones((1, length, bundle.cuts[0].width), np.int64)
    start = Activations(ids, np.array([length]), depth=0)
    knobs = never_exit(bundle.manifest.knobs, bundle.n_layers)
    runs = np.zeros((repeats + 1, bundle.n_layers))
    for turn in range(repeats + 1):
        acts = start
        for layer in range(bundle.n_layers):
            began = thread_time()
            acts = layers.step(acts, knobs).acts
            runs[turn, layer] = 1e3 * (thread_time() - began)
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


def _overhead_ms(
    bundle: Bundle, texts: list[str], lengths_G: NDArray[np.float64], all_ms_G: NDArray[np.float64]
) -> float:
    """What the real agent takes for a sample beside its layers: tokenizing, threads, bookkeeping."""
    from offramp_common.text import TextEncoder
    from offramp_edge.worker import EdgeWorker

    encode, over = TextEncoder(bundle), []
    with EdgeWorker(bundle, exits=False) as worker:
        for text in texts:
            layers_ms = float(np.interp(encode([text]).n_tokens, lengths_G, all_ms_G))
            began = process_time()
            worker.answer(text)
            over.append(1e3 * (process_time() - began) - layers_ms)
    return max(_fastest(over), 0.0)


def _fastest(values: list[float]) -> float:
    return float(np.quantile(values, 0.1))


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


def engine_from(other: Record) -> EngineTimes:
    """The same of the engine, perhaps of another machine: how a GPU's times come into a record."""
    return EngineTimes(
        other.batches_R, other.engine_ms_RG, other.engine_fixed_ms_R, other.header.gateway_ms
    )
