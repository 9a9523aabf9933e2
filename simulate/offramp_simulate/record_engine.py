"""What the engine takes on this machine, for a record, by rows and length.

It is timed from outside: `offramp cloud serve --local` in a process of its own is sent batches that it runs
as one. So this needs no torch here, and what is timed is what runs in production. By processor time, as
Linux counts it for the process to the nanosecond, elsewhere by the engine's own word; or by the wall clock
where the machine is known to be quiet. One row alone comes after a pause, as rows that come alone do: what
a processor's caches have lost meanwhile is part of its time, and what they lose in other pauses a table.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

import numpy as np
from numpy.typing import NDArray

from offramp_common.activations import Activations, NumpyArray
from offramp_common.bundle import Bundle
from offramp_common.frames import encode_frame
from offramp_common.spec import never_exit
from offramp_common.transport import Offload, Transport
from offramp_simulate.processes import Child
from offramp_simulate.record import Record
from offramp_simulate.record_times import Say, deviation_shares, lengths_for, typical

BATCHES = (1, 2, 4, 8, 16, 32)
_START_S = 120.0
_ANSWER_S = 60.0
_PAUSE_S = 0.05
_RESTS_S = (0.005, 0.02, _PAUSE_S, 0.1, 0.2, 0.5)
_A_REST = 2  # as often as others: rests differ by less than one run from the next
_USUAL_TOKENS = 16


@dataclass(frozen=True, slots=True, eq=False)
class EngineTimes:
    """Names and axes as in Record; `deviation_J` is its engine_deviation_J."""

    batches_R: NDArray[np.float64]
    engine_ms_RG: NDArray[np.float64]
    engine_fixed_ms_R: NDArray[np.float64]
    gateway_ms: float
    deviation_J: NDArray[np.float64]
    rest_s_S: NDArray[np.float64]
    rest_ms_WS: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Asker:
    """One batch and how it is timed."""

    bundle: Bundle
    transport: Transport
    pid: int
    wall: bool

    async def asked(
        self, rows: int, length: int, depth: int, pause_s: float = 0.0
    ) -> tuple[float, float]:
        """(milliseconds of the engine, and those beside it), after a pause; by processor time those of its
        process, and of this one."""
        bundle = self.bundle
        frame = encode_frame(_batch(bundle, rows, length, depth), bundle.cuts[depth], "int8")
        never = never_exit(bundle.manifest.knobs, bundle.n_layers)
        work = Offload("timing", bundle.manifest.name, bundle.digest(depth), frame, never)
        if pause_s:
            await asyncio.sleep(pause_s)
        there, here, began = _cpu_s(self.pid), process_time(), perf_counter()
        done = await asyncio.wait_for(self.transport.complete(work, timeout_s=_ANSWER_S), _ANSWER_S)
        wall_ms, beside_ms = 1e3 * (perf_counter() - began), 1e3 * (process_time() - here)
        said_ms = done.compute_ms + done.queue_ms
        if self.wall:
            return said_ms, wall_ms - said_ms
        if there is None:
            return said_ms, beside_ms
        return 1e3 * ((_cpu_s(self.pid) or 0.0) - there), beside_ms


async def engine_times(bundle: Bundle, repeats: int, wall: bool, say: Say) -> EngineTimes:
    """Time a real engine by batch size and length. ConfigError with its words when it does not start."""
    from offramp_edge.grpc_transport import GrpcTransport

    say("the engine, starting")
    arguments = ("--listen", "127.0.0.1:0", "--local", "--insecure")
    cloud = await Child.start("cloud", "cloud", "serve", "--bundle", str(bundle.path), *arguments)
    try:
        ready = await cloud.read(_START_S)
        transport = GrpcTransport(ready["listening"])
        try:
            asker = _Asker(bundle, transport, int(ready["pid"]), wall)
            return await _engine_table(asker, repeats, say)
        finally:
            await transport.close()
    finally:
        await cloud.stop()


async def _engine_table(asker: _Asker, repeats: int, say: Say) -> EngineTimes:
    """Two cuts of the same batch give a layer's time, and what a run takes beside its layers."""
    lengths, n, wall = lengths_for(asker.bundle), asker.bundle.n_layers, asker.wall
    deep = n - 1
    table, fixed, gateway = [], [], []
    for rows in BATCHES:
        pause_s = _PAUSE_S if rows == 1 else 0.0
        per_layer, beside = [], []
        for length in lengths:
            say(f"engine, {rows} rows of {length} tokens")
            whole, last, hop = [], [], []
            for turn in range(repeats + 1):
                whole_ms, hop_ms = await asker.asked(rows, length, 0, pause_s)
                last_ms, _ = await asker.asked(rows, length, deep, pause_s)
                if turn:  # the first of each warms up
                    whole.append(whole_ms)
                    last.append(last_ms)
                    hop.append(hop_ms)
            layer_ms = max((typical(whole, wall) - typical(last, wall)) / deep, 1e-3)
            per_layer.append(layer_ms)
            beside.append(max(typical(whole, wall) - n * layer_ms, 0.0))
            if rows == 1:
                gateway.append(typical(hop, wall))
        table.append(per_layer)
        fixed.append(median(beside))
    rest_ms_WS, deviation_J = await _rests(asker, _A_REST * repeats, say)
    engine_ms, rows_R = np.array(table), np.array(BATCHES, float)
    return EngineTimes(
        rows_R,
        engine_ms,
        np.array(fixed),
        median(gateway),
        deviation_J,
        np.array(_RESTS_S),
        rest_ms_WS,
    )


async def _rests(
    asker: _Asker, repeats: int, say: Say
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(what rests cost, and how whole runs deviate from their rest's usual one), at a usual length. Rests
    come in turns, so that what else changes meanwhile changes all of them."""
    say("the engine, after rests")
    deep = asker.bundle.n_layers - 1
    ms_SDN: list[tuple[list[float], list[float]]] = [([], []) for _ in _RESTS_S]
    for turn in range(repeats + 1):
        for rest_s, ms_DN in zip(_RESTS_S, ms_SDN, strict=True):
            for place, depth in enumerate((0, deep)):
                ms, _ = await asker.asked(1, _USUAL_TOKENS, depth, rest_s)
                if turn:
                    ms_DN[place].append(ms)
    whole_S, last_S = (
        np.array([typical(ms_DN[place], asker.wall) for ms_DN in ms_SDN]) for place in (0, 1)
    )
    deviations = [np.array(whole) / median(whole) for whole, _ in ms_SDN]
    return rests_of(whole_S, last_S, deep), np.quantile(
        np.concatenate(deviations), deviation_shares()
    )


def rests_of(
    whole_S: NDArray[np.float64], last_S: NDArray[np.float64], deep: int
) -> NDArray[np.float64]:
    """(2, S), as Record.rest_ms_WS, from whole runs and runs of `deep` layers less. A longer rest costs no
    less than a shorter one: what looks so is noise, and is spread over both."""
    own = _RESTS_S.index(_PAUSE_S)
    layer_S = _rising((whole_S - last_S) / deep)
    run_S = _rising(last_S - layer_S)
    return np.stack([run_S - run_S[own], layer_S - layer_S[own]])


def _rising(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The closest that never falls (pool adjacent violators)."""
    pools: list[list[float]] = []
    for value in values.tolist():
        pools.append([value])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    return np.concatenate([np.full(len(pool), np.mean(pool)) for pool in pools])


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


def engine_from(other: Record) -> EngineTimes:
    """What another record says, perhaps of another machine: how a GPU's times come into a record."""
    return EngineTimes(
        other.batches_R, other.engine_ms_RG, other.engine_fixed_ms_R, other.header.gateway_ms,
        other.engine_deviation_J, other.rest_s_S, other.rest_ms_WS,
    )  # fmt: skip
