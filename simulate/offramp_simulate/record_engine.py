"""What the engine takes on this machine, for a record, by rows and length.

It is timed from outside: `offramp cloud serve --local` in a process of its own is sent batches that it runs
as one. So this needs no torch here, and what is timed is what runs in production. By processor time, as
Linux counts it for the process to the nanosecond, elsewhere by the engine's own word; or by the wall clock
where the machine is known to be quiet. One row alone comes after a pause, as rows that come alone do: what
a processor's caches have lost meanwhile is part of its time.
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
_USUAL_TOKENS = 16


@dataclass(frozen=True, slots=True, eq=False)
class EngineTimes:
    """Names and axes as in Record; `deviation_J` is its engine_deviation_J."""

    batches_R: NDArray[np.float64]
    engine_ms_RG: NDArray[np.float64]
    engine_fixed_ms_R: NDArray[np.float64]
    gateway_ms: float
    deviation_J: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Asker:
    """One batch and how it is timed."""

    bundle: Bundle
    transport: Transport
    pid: int
    wall: bool

    async def asked(self, rows: int, length: int, depth: int) -> tuple[float, float]:
        """(milliseconds of the engine, and those beside it); by processor time those of its process, and of
        this one."""
        bundle = self.bundle
        frame = encode_frame(_batch(bundle, rows, length, depth), bundle.cuts[depth], "int8")
        never = never_exit(bundle.manifest.knobs, bundle.n_layers)
        work = Offload("timing", bundle.manifest.name, bundle.digest(depth), frame, never)
        if rows == 1:
            await asyncio.sleep(_PAUSE_S)
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
    deviation_J = np.ones(len(deviation_shares()))
    for rows in BATCHES:
        per_layer, beside = [], []
        for length in lengths:
            say(f"engine, {rows} rows of {length} tokens")
            whole, last, hop = [], [], []
            for turn in range(repeats + 1):
                whole_ms, hop_ms = await asker.asked(rows, length, 0)
                last_ms, _ = await asker.asked(rows, length, deep)
                if turn:  # the first of each warms up
                    whole.append(whole_ms)
                    last.append(last_ms)
                    hop.append(hop_ms)
            layer_ms = max((typical(whole, wall) - typical(last, wall)) / deep, 1e-3)
            per_layer.append(layer_ms)
            beside.append(max(typical(whole, wall) - n * layer_ms, 0.0))
            if rows == 1:
                gateway.append(typical(hop, wall))
                if length <= _USUAL_TOKENS:
                    deviation_J = np.quantile(np.array(whole) / median(whole), deviation_shares())
        table.append(per_layer)
        fixed.append(median(beside))
    engine_ms, rows_R = np.array(table), np.array(BATCHES, float)
    return EngineTimes(rows_R, engine_ms, np.array(fixed), median(gateway), deviation_J)


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
        other.engine_deviation_J,
    )  # fmt: skip
