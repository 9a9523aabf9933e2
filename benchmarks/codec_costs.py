"""What each codec costs: bytes, and milliseconds to encode and decode, on one core.

    python benchmarks/codec_costs.py [--runs N] [--json FILE|-]

Hidden states [1, tokens, width] of a standard normal distribution (speed does not depend on the
values, unless they are NaN or infinite; the bytes of int8+z and int4+z do, by some percent).
"frame" is the whole of encode_frame or decode_frame,
codec included. The codecs take turns, so that a busy minute hits them all; printed are medians and
the 10th to 90th percentile.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import report

from offramp_common.activations import Activations
from offramp_common.cli import write_json
from offramp_common.codecs import CODECS
from offramp_common.frames import Limits, decode_frame, encode_frame
from offramp_common.spec import CutSpec

_SHAPES = ((32, 384), (128, 768))
_CODECS = tuple(name for name, codec in CODECS.items() if not codec.integer)
_STEPS = ("encode", "decode", "encode_frame", "decode_frame")


def steps(
    name: str, acts: Activations[Any], cut: CutSpec
) -> tuple[int, int, list[Callable[[], Any]]]:
    """Bytes of the hidden states and of the frame, and what is timed."""
    codec, hidden_ND = CODECS[name], acts.hidden_BTD[0]
    data, frame = codec.encode(hidden_ND), encode_frame(acts, cut, name)
    cuts, limits = {cut.depth: cut}, Limits()
    timed: list[Callable[[], Any]] = [
        lambda: codec.encode(hidden_ND),
        lambda: codec.decode(data, *hidden_ND.shape),
        lambda: encode_frame(acts, cut, name),
        lambda: decode_frame(frame, cuts, limits),
    ]
    most = codec.nbytes(*hidden_ND.shape)
    assert len(data) == most if codec.fixed_size else len(data) <= most
    return len(data), len(frame), timed


def measure(tokens: int, width: int, runs: int) -> list[dict[str, Any]]:
    hidden = np.random.default_rng(0).standard_normal((1, tokens, width)).astype(np.float32)
    acts, cut = Activations(hidden, np.array([tokens]), 1), CutSpec(1, False, width)
    prepared = {name: steps(name, acts, cut) for name in _CODECS}
    times: dict[str, list[list[float]]] = {name: [[] for _ in _STEPS] for name in _CODECS}
    for run in range(runs + 5):
        for name, (_, _, timed) in prepared.items():
            for seconds, step in zip(times[name], timed, strict=True):
                start = time.perf_counter()
                step()
                if run >= 5:  # the first ones warm caches up
                    seconds.append(time.perf_counter() - start)
    return [
        {
            "codec": name,
            "shape": [1, tokens, width],
            "bytes": nbytes,
            "frame_bytes": frame_nbytes,
            **{
                f"{step}_ms": dict(
                    zip(
                        ("p10", "median", "p90"),
                        np.percentile(seconds, (10, 50, 90)) * 1e3,
                        strict=True,
                    )
                )
                for step, seconds in zip(_STEPS, times[name], strict=True)
            },
        }
        for name, (nbytes, frame_nbytes, _) in prepared.items()
    ]


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| codec | shape | bytes | encode ms | decode ms | frame encode | frame decode |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        cells = [row["codec"], str(row["shape"]), str(row["bytes"])]
        for step in _STEPS:
            ms = row[f"{step}_ms"]
            cells.append(f"{ms['median']:.3f} ({ms['p10']:.3f}-{ms['p90']:.3f})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument(
        "--json", metavar="FILE", help="-: standard output, the table then to stderr"
    )
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    about = report.about(f"numpy {np.__version__}")
    rows = [row for tokens, width in _SHAPES for row in measure(tokens, width, args.runs)]
    print(
        f"{table(rows)}\n\nmedian (p10-p90) of {args.runs} runs; {about['machine']}; {about['commit']}",
        file=sys.stderr if args.json == "-" else sys.stdout,
    )
    if args.json:
        write_json({**about, "rows": rows}, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
