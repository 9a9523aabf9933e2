"""Throws mutated frames at `decode_frame` and counts what comes of it.

Whatever arrives, the answer must be Activations within the limits, WireError or UnknownCodec;
anything else is listed as a failure, with the frame in hex, and makes the exit status 1. Seeded:
the same numbers give the same frames.

    python benchmarks/fuzz_frames.py --n 200000 --seed 0 --json -
"""

from __future__ import annotations

import argparse
import random
import re
import resource
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import msgpack
import numpy as np

from offramp_common.activations import Activations, mask_of
from offramp_common.cli import write_json
from offramp_common.codecs import CODECS
from offramp_common.errors import UnknownCodec, WireError
from offramp_common.frames import Limits, decode_frame, encode_frame
from offramp_common.spec import CutSpec, StateField

# Small limits, so that mutations reach them.
LIMITS = Limits(max_frame_bytes=100_000, max_rows=40, max_tokens=130)
COUNTER = {"count": StateField("uint8"), "previous": StateField("int16")}
CUTS = {
    0: CutSpec(0, True, 2, vocabulary=(30522, 2)),
    1: CutSpec(1, False, 8),
    2: CutSpec(2, False, 8, COUNTER),
    3: CutSpec(3, False, 8, {"history": StateField("float32", (2, 3)), **COUNTER}),
    4: CutSpec(
        4,
        False,
        8,
        {
            "halted": StateField("bool", per_token=True),
            "score": StateField("float16", (2,), per_token=True),
            "sum": StateField("float32", (3,)),
        },
    ),
    5: CutSpec(5, True, 1, {"seen": StateField("bool")}, (70_000,)),
    6: CutSpec(6, False, 768),
}
FLOAT_CODECS = tuple(name for name, codec in CODECS.items() if not codec.integer)
_ROWS = ([1], [5], [3, 1], [2, 9, 4, 4], [1] * 40, [8, 30, 16])
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 7, 255, 2**16, 2**63, -1, -(2**40), 0.5, float("nan")),
    *("", *CODECS, "count", "x" * 65, b"", b"\0", b"\1\0", b"\xff" * 600),
    *([], [[]], [1, 2, 3, 4, 5, 6], {}, {"a": b""}, {"count": b"\0"}, {1: b""}, {"a": {"b": {}}}),
    *(msgpack.ExtType(1, b"\0"), msgpack.Timestamp(0, 0)),
)


def valid_frames(seed: int = 0) -> list[bytes]:
    """Frames of every cut, with several batches and codecs."""
    rng, frames = np.random.default_rng(seed), []
    for cut in CUTS.values():
        for lengths in _ROWS if cut.width < 100 else ([128], [1, 2]):
            acts = _batch(cut, lengths, rng)
            codecs = FLOAT_CODECS if cut.width < 100 else ("int8", "int4", "int8+z", "int4+z")
            frames += [encode_frame(acts, cut, c) for c in (("tokens",) if cut.integer else codecs)]
    return frames


def _batch(cut: CutSpec, lengths: list[int], rng: np.random.Generator) -> Activations[Any]:
    lengths_B = np.array(lengths)
    shape = mask_of(lengths_B).shape

    def state(per_token: bool) -> dict[str, Any]:
        axes = shape if per_token else shape[:1]
        return {
            name: rng.integers(0, 2, (*axes, *entry.shape)).astype(entry.dtype)
            for name, entry in cut.state.items()
            if entry.per_token == per_token
        }

    hidden: Any = rng.standard_normal((*shape, cut.width)).astype(np.float32)
    if cut.integer:
        hidden = rng.integers(0, cut.vocabulary, (*shape, cut.width))
    return Activations(hidden, lengths_B, cut.depth, state(False), state(True))


# ---- mutations: (frame, another frame, random) -> frame


def _flip_bits(frame: bytes, other: bytes, rng: random.Random) -> bytes:
    out = bytearray(frame)
    for _ in range(rng.choice((1, 1, 2, 8))):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def _flip_head(frame: bytes, other: bytes, rng: random.Random) -> bytes:
    """In the first bytes, where the structure is."""
    out = bytearray(frame)
    out[rng.randrange(min(24, len(out)))] = rng.randrange(256)
    return bytes(out)


def _truncate(frame: bytes, other: bytes, rng: random.Random) -> bytes:
    return frame[: rng.randrange(len(frame))]


def _extend(frame: bytes, other: bytes, rng: random.Random) -> bytes:
    return frame + rng.choice((rng.randbytes(rng.randrange(1, 40)), other))


def _splice(frame: bytes, other: bytes, rng: random.Random) -> bytes:
    return frame[: rng.randrange(len(frame))] + other[rng.randrange(len(other)) :]


def _insert(frame: bytes, other: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(frame))
    return frame[:at] + rng.randbytes(rng.randrange(1, 9)) + frame[at:]


def _edit_length(frame: bytes, other: bytes, rng: random.Random) -> bytes:
    """Overwrites a length field: of an array, a map, a string or bytes."""
    marks = [m.start() for m in re.finditer(rb"[\x80-\xbf\xc4-\xc9\xd9-\xdf]", frame[:4096])]
    if not marks:
        return _flip_bits(frame, other, rng)
    at = rng.choice(marks)
    size = rng.choice((1, 2, 4))
    value = rng.choice((0, 1, 2**31, 2 ** (8 * size) - 1, rng.getrandbits(32))) % 2 ** (8 * size)
    mark = rng.choice((frame[at : at + 1], b"\xc4", b"\xc5", b"\xc6", b"\xd9", b"\xdb", b"\xdf"))
    return b"".join((frame[:at], mark, value.to_bytes(size, "big"), frame[at + 1 + size :]))


def _edit_field(frame: bytes, other: bytes, rng: random.Random) -> bytes:
    """One field becomes something else, of any type, or another frame's field."""
    fields = msgpack.unpackb(frame)
    at = rng.randrange(len(fields))
    fields[at] = rng.choice((rng.choice(_VALUES), msgpack.unpackb(other)[at]))
    if rng.random() < 0.1:
        fields.insert(at, rng.choice(_VALUES))
    return bytes(msgpack.packb(fields))


def _edit_state(frame: bytes, other: bytes, rng: random.Random) -> bytes:
    fields = msgpack.unpackb(frame)
    state: dict[Any, Any] = fields[5]
    name = rng.choice((*state, "count"))
    match rng.randrange(6):
        case 0:
            state.pop(name, None)
        case 1:
            state[name] = rng.choice(_VALUES)
        case 2:
            state[name] = state.get(name, b"")[: rng.randrange(1, 9)]
        case 3:
            state[name] = rng.randbytes(len(state.get(name, b"")))
        case 4:
            fields[5] = dict(sorted(state.items(), reverse=True))
        case _:
            state[rng.choice(("a", "", "\0", "count ", 7, b"count"))] = state.pop(name, b"")
    return bytes(msgpack.packb(fields))


def _edit_rows(frame: bytes, other: bytes, rng: random.Random) -> bytes:
    """The lengths change, with or without their sum."""
    fields = msgpack.unpackb(frame)
    lengths: Any = np.frombuffer(fields[3], "<u2").astype(np.int64)
    row = rng.randrange(len(lengths))
    match rng.randrange(4):
        case 0:
            rng.shuffle(lengths)
        case 1:
            lengths[row] = rng.choice((0, 1, 131, 65535))
        case 2:
            lengths = np.concatenate([lengths, lengths[:row]])
        case _:
            step = rng.randrange(1, 4)
            lengths[row] += step
            lengths[rng.randrange(len(lengths))] -= step
    fields[3] = (lengths % 65536).astype("<u2").tobytes()
    return bytes(msgpack.packb(fields))


def _edit_hidden(frame: bytes, other: bytes, rng: random.Random) -> bytes:
    """The hidden states become noise of the same size, all or in one place: what a codec alone must
    withstand."""
    fields = msgpack.unpackb(frame)
    hidden = bytearray(fields[4])
    size = rng.choice((1, 4, len(hidden)))
    at = rng.randrange(len(hidden) - min(size, len(hidden)) + 1)
    hidden[at : at + size] = rng.randbytes(len(hidden[at : at + size]))
    fields[4] = bytes(hidden)
    if fields[2] == "tokens":
        fields[4] = bytes([rng.choice((2, 4, 7))]) + fields[4][1:]
    return bytes(msgpack.packb(fields))


MUTATIONS: tuple[Callable[[bytes, bytes, random.Random], bytes], ...] = (
    *(_flip_bits, _flip_head, _truncate, _extend, _splice, _insert),
    *(_edit_length, _edit_field, _edit_state, _edit_rows, _edit_hidden),
)


# ---- what must hold


def broken_invariant(acts: Activations[Any]) -> str | None:
    """What is wrong with decoded activations, or None."""
    cut, lengths_B = CUTS[acts.depth], acts.lengths_B
    rows = acts.batch_size
    if lengths_B.dtype != np.int64 or not 1 <= rows <= LIMITS.max_rows:
        return f"lengths {lengths_B}"
    if lengths_B.min() < 1 or lengths_B.max() > LIMITS.max_tokens:
        return f"lengths {lengths_B}"
    axes = (rows, int(lengths_B.max()))
    padding_BT = ~mask_of(lengths_B)
    entries: list[Any] = [
        ("hidden", acts.hidden_BTD, np.int64 if cut.integer else np.float32, (cut.width,), True)
    ]
    for name, spec in cut.state.items():
        owner = acts.token_state if spec.per_token else acts.state
        entries.append((name, owner[name], np.dtype(spec.dtype), spec.shape, spec.per_token))
    if len(acts.state) + len(acts.token_state) != len(cut.state):
        return "more state than the cut has"
    for name, array, dtype, shape, per_token in entries:
        if array.dtype != dtype or array.shape != (
            (*axes, *shape) if per_token else (rows, *shape)
        ):
            return f"{name}: {array.dtype} {array.shape}"
        if not array.flags.writeable or (per_token and array[padding_BT].any()):
            return f"{name}: read-only, or padding that is not zeros"
    if cut.integer and not ((acts.hidden_BTD >= 0) & (acts.hidden_BTD < cut.vocabulary)).all():
        return "ids outside the vocabulary"
    return None


@dataclass
class Report:
    """outcomes counts what came of the frames; peak_bytes is the most memory one decoding took, in
    numpy arrays and Python objects, beside the frame."""

    frames: int = 0
    seconds: float = 0.0
    outcomes: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    peak_bytes: int = 0
    peak_bytes_refusing: int = 0
    longest_message: int = 0
    max_rss_mib: float = 0.0
    failures: list[str] = field(default_factory=list)


def fuzz(n: int, seed: int = 0, measure_memory: bool = True) -> Report:
    """Decodes `n` mutated frames."""
    rng, seeds, report = random.Random(seed), valid_frames(seed), Report(frames=n)
    outcomes: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    if measure_memory:
        tracemalloc.start()
    start = time.perf_counter()
    for _ in range(n):
        frame = rng.choice(seeds)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            # The msgpack-aware mutations need a frame that still can be read.
            mutate = rng.choice(MUTATIONS)
            try:
                frame = mutate(frame, rng.choice(seeds), rng) or b"\0"
            except Exception:  # noqa: BLE001 (whatever it is, it is the mutation's)
                frame = _flip_bits(frame, frame, rng)
        before = _memory_before(measure_memory)
        try:
            acts = decode_frame(frame, CUTS, LIMITS)
            outcome, wrong = "decoded", broken_invariant(acts)
        except (WireError, UnknownCodec) as error:
            outcome, wrong = type(error).__name__, None
            report.longest_message = max(report.longest_message, len(str(error)))
            reasons[re.sub(r"'.*?'|0x\w+|[\d.]+|\[.*|\(.*", "#", str(error))[:40]] += 1
        except Exception as error:  # noqa: BLE001 (the very thing that is looked for)
            outcome, wrong = "failed", f"{type(error).__name__}: {error}"
        if wrong is not None:
            report.failures.append(f"{wrong}: {frame.hex()}")
            outcome = "failed"
        outcomes[outcome] += 1
        if measure_memory:
            peak = tracemalloc.get_traced_memory()[1] - before
            report.peak_bytes = max(report.peak_bytes, peak)
            if outcome != "decoded":
                report.peak_bytes_refusing = max(report.peak_bytes_refusing, peak)
    report.seconds = time.perf_counter() - start
    if measure_memory:
        tracemalloc.stop()
    report.outcomes = dict(outcomes.most_common())
    report.reasons = dict(reasons.most_common())
    report.max_rss_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return report


def _memory_before(measure: bool) -> int:
    if not measure:
        return 0
    tracemalloc.reset_peak()
    return tracemalloc.get_traced_memory()[0]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--n", type=int, default=200_000, help="frames (default 200000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--json", metavar="FILE", help="write the report there; - is standard output"
    )
    args = parser.parse_args()
    report = fuzz(args.n, args.seed)
    result = {"command": "fuzz_frames", "seed": args.seed, **asdict(report)}
    for name, count in report.outcomes.items():
        print(f"{name:14} {count:8}", file=sys.stderr)
    print(
        f"{report.frames} frames in {report.seconds:.1f} s; one decoding took at most "
        f"{report.peak_bytes} bytes, a refusal {report.peak_bytes_refusing}; "
        f"process {report.max_rss_mib:.0f} MiB; {len(report.failures)} failures",
        file=sys.stderr,
    )
    for failure in report.failures[:5]:
        print(failure[:500], file=sys.stderr)
    if args.json:
        write_json(result, args.json)
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
