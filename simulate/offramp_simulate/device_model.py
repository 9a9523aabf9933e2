"""What the record says of each sample on this scenario's devices: times, bytes, exits, right or wrong.

Times are milliseconds of the median run, the device's slowdown included. Scaling is plain: a device or
an engine with slowdown s takes s times as long for every layer, whatever the length.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offramp_common.errors import ConfigError
from offramp_common.frames import Limits
from offramp_common.messages import knobs_to_pb
from offramp_edge.handshake import Agreed
from offramp_simulate.record import OWN, Record
from offramp_simulate.scenario import Scenario
from offramp_simulate.scenario_parts import Plan


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """Per sample, whatever the plan. Axes as in Record.

    before_ms    what the agent takes beside layers;  layer_ms_NL  of each layer on the device
    leaves_N     depth at which it leaves on the device;  cloud_leaves_N  in the cloud's precision
    right_NE     whether the device's answer at each exit is right;  confidence_NE  and how sure it is
    knobs_nbytes_C   of the operating point in a request cut at C, where it is not the cloud's own
    """

    exits: tuple[int, ...]
    n_layers: int
    tokens_N: NDArray[np.int64]
    before_ms: float
    layer_ms_NL: NDArray[np.float64]
    leaves_N: NDArray[np.int64]
    cloud_leaves_N: NDArray[np.int64]
    right_NE: NDArray[np.bool_]
    confidence_NE: NDArray[np.float32]
    knobs_nbytes_C: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """Per sample, sent after `depth` layers by one codec.

    up_N, down_nbytes   on the link, with what HTTP/2, gRPC and TLS put beside
    exit_N, right_N     where the cloud's answer comes from and whether it is right
    """

    depth: int
    codec: str
    encode_ms_N: NDArray[np.float64]
    up_N: NDArray[np.int64]
    down_nbytes: int
    exit_N: NDArray[np.int64]
    right_N: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Resolved:
    """A plan with the record's own choices filled in. `split` n_layers: never sent."""

    split: int
    codec: str
    point: str
    precision: str


def resolve(plan: Plan, scenario: Scenario, record: Record) -> Resolved:
    """ConfigError or DataError for a plan that this record cannot run."""
    h = record.header
    split = h.split if plan.split < 0 else plan.split
    if split > h.n_layers:
        raise ConfigError(
            f"plan {plan.name!r}: split = {split}: {h.bundle} has {h.n_layers} layers, so 0 (send the "
            f"input) to {h.n_layers} (all on the device)"
        )
    resolved = Resolved(
        split, plan.codec or h.codec, plan.point, scenario.devices.precision or h.precision
    )
    record.codec(resolved.codec)
    record.point(resolved.point)
    record.precision(resolved.precision)
    return resolved


def samples(record: Record, scenario: Scenario, plan: Resolved) -> Samples:
    h, slow = record.header, scenario.devices.slowdown
    p, fp32, k = (
        record.precision(plan.precision),
        record.precision("fp32"),
        record.point(plan.point),
    )
    layer_ms_LN = [
        np.interp(record.tokens_N, record.lengths_G, layer) for layer in record.layer_ms_PLG[p]
    ]
    return Samples(
        h.exits,
        h.n_layers,
        record.tokens_N,
        h.overhead_ms * slow,
        np.stack(layer_ms_LN, axis=1) * slow,
        record.leaves_PKN[p, k].astype(np.int64),
        record.leaves_PKN[fp32, k].astype(np.int64),
        record.predicted_PNE[p] == record.target_N[:, None],
        record.confidence_PNE[p],
        tuple(_knobs_nbytes(record, plan, depth) for depth in range(h.n_layers)),
    )


def _knobs_nbytes(record: Record, plan: Resolved, depth: int) -> int:
    """As the agent has it: knobs travel where the cloud's own say otherwise of layers to come."""
    points = record.header.points
    mine, theirs = (
        {name: tuple(values) for name, values in knobs.items()}
        for knobs in (
            points[record.point(plan.point)].knobs[plan.precision],
            points[record.point(OWN)].knobs["fp32"],
        )
    )
    travel = Agreed((), mine, theirs, Limits()).knobs_at(depth)
    sizes = [knob.ByteSize() for knob in knobs_to_pb(travel)]
    return sum(size + (2 if size < 128 else 3) for size in sizes)  # tag and length before each


def cut(record: Record, scenario: Scenario, of: Samples, depth: int, codec: str) -> Cut:
    """What becomes of samples that are sent after `depth` layers, which is below n_layers."""
    exits = np.array(of.exits)
    beside, place = scenario.link.beside_nbytes, record.codec(codec)
    # The device's precision said "not sure" where the cloud's would have let it go: next exit there.
    following = int(exits[np.searchsorted(exits, depth, side="right")])
    exit_N = np.maximum(of.cloud_leaves_N, following)
    predicted_NE = record.cloud_predicted_NE(depth, codec)
    columns_N = np.searchsorted(exits, exit_N)
    right_N = predicted_NE[np.arange(len(exit_N)), columns_N] == record.target_N
    encode_ms_N = np.interp(record.tokens_N, record.lengths_G, record.encode_ms_OG[place])
    if depth == 0:
        encode_ms_N = np.zeros_like(encode_ms_N)  # two bytes a token, as they are
    return Cut(
        depth,
        codec,
        encode_ms_N * scenario.devices.slowdown,
        record.request_CON[depth, place].astype(np.int64) + of.knobs_nbytes_C[depth] + beside,
        record.header.response_nbytes + beside,
        exit_N,
        right_N,
    )


@dataclass(frozen=True, slots=True, eq=False)
class Fixed:
    """A fixed plan, worked out: what each sample does on the device, and if it is sent.

    device_ms_N   with what the agent takes;  stays_N  leaves on the device, at depth_N
    depth_N       where it leaves or is cut;  right_N  of the device's own answer there (False where
                  no exit was passed)
    """

    samples: Samples
    cut: Cut | None
    device_ms_N: NDArray[np.float64]
    stays_N: NDArray[np.bool_]
    depth_N: NDArray[np.int64]
    right_N: NDArray[np.bool_]


def fixed(record: Record, scenario: Scenario, plan: Resolved) -> Fixed:
    of = samples(record, scenario, plan)
    stays_N = of.leaves_N <= plan.split
    depth_N = np.where(stays_N, of.leaves_N, plan.split)
    run_NL = np.arange(of.n_layers)[None, :] < depth_N[:, None]
    device_ms_N = of.before_ms + (of.layer_ms_NL * run_NL).sum(axis=1)
    exits = np.array(of.exits)
    columns_N = np.searchsorted(exits, depth_N, side="right") - 1
    right_N = of.right_NE[np.arange(len(depth_N)), np.maximum(columns_N, 0)] & (columns_N >= 0)
    sent = None if stays_N.all() else cut(record, scenario, of, plan.split, plan.codec)
    return Fixed(of, sent, device_ms_N, stays_N, depth_N, right_N)
