"""What the worker costs a sample, beside its layers: milliseconds of wall clock and of CPU.

    python benchmarks/worker_overhead.py --bundle DIR [--samples N] [--rounds N] [--json FILE|-]

All layers run on the device (split n), so that neither link nor cloud is in the figures. "bare" is
what nobody can do without: tokenize, run the layers, read the label, in one thread. The ways to ask
take turns with it, round by round; a way's overhead is its time less the bare time of the same
round, and printed are the median and the 10th to 90th percentile over rounds. `answer` and
`answer_async` wait for each answer before they ask again; `answer_many` does not, and is given a
list or an iterator (which is read in a thread of its own).
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import report

from offramp_common.cli import write_json
from offramp_common.runner import run
from offramp_common.text import TextEncoder, label_of
from offramp_edge import EdgeWorker, load_bundle
from offramp_edge.runtime import OnnxLayers

_TEXT = (
    "please wake me up at seven tomorrow and tell what the weather is going to be like in town "
    "because there is a meeting with some people from the bank about money for our new house"
)


def texts(count: int) -> list[str]:
    """Of 4 to 12 words."""
    words = _TEXT.split()
    return [
        " ".join(words[(i * 7 + k) % len(words)] for k in range(4 + i % 9)) for i in range(count)
    ]


def ways(path: Path, given: Sequence[str]) -> tuple[EdgeWorker, dict[str, Callable[[], None]]]:
    """The worker, and what is timed: each answers all of `given`."""
    bundle = load_bundle(path)
    n, task, knobs = bundle.n_layers, bundle.manifest.task, bundle.knobs("fp32")
    layers, encode = OnnxLayers(bundle, "fp32"), TextEncoder(bundle)
    worker = EdgeWorker(bundle, layers=layers, split=n, precision="fp32")

    def bare() -> None:
        for text in given:
            (left,) = run(layers, encode([text]), n, knobs).left
            label_of(task, left.answer[0])

    def answer() -> None:
        for text in given:
            worker.answer(text)

    def answer_async() -> None:
        async def main() -> None:
            for text in given:
                await worker.answer_async(text)

        asyncio.run(main())

    def many(source: Callable[[], Any]) -> Callable[[], None]:
        def answer_many() -> None:
            for _ in worker.answer_many(source()):
                pass

        return answer_many

    return worker, {
        "bare": bare,
        "answer": answer,
        "answer_async": answer_async,
        "answer_many, list": many(lambda: given),
        "answer_many, iterator": many(lambda: iter(given)),
    }


def measure(path: Path, samples: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds a sample of wall clock and CPU, a value a round."""
    worker, timed = ways(path, texts(samples))
    found: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in timed}
    with worker:
        for number in range(rounds + 1):
            for name, work in timed.items():
                wall_s, cpu_s = time.perf_counter(), time.process_time()
                work()
                wall_ms = 1000 * (time.perf_counter() - wall_s) / samples
                cpu_ms = 1000 * (time.process_time() - cpu_s) / samples
                if number:  # the first round warms up
                    found[name]["wall"].append(wall_ms)
                    found[name]["cpu"].append(cpu_ms)
    return found


def summary(found: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """A row a way: its own times, and what is above the bare ones."""
    rows = []
    for name, times in found.items():
        row: dict[str, Any] = {"way": name}
        for kind, values in times.items():
            above = [v - bare for v, bare in zip(values, found["bare"][kind], strict=True)]
            deciles = statistics.quantiles(above, n=10)
            row |= {
                f"{kind}_ms": statistics.median(values),
                f"{kind}_overhead_ms": statistics.median(above),
                f"{kind}_overhead_p10_p90_ms": [deciles[0], deciles[-1]],
            }
        rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bundle", required=True, type=Path, metavar="DIR")
    parser.add_argument("--samples", type=int, default=100, metavar="N")
    parser.add_argument("--rounds", type=int, default=15, metavar="N")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    rows = summary(measure(args.bundle, args.samples, args.rounds))
    out = sys.stderr if args.json == "-" else sys.stdout
    print(f"{'ms a sample':24}{'wall':>8}{'above bare':>24}{'CPU':>8}{'above bare':>24}", file=out)
    for row in rows:
        line = f"{row['way']:24}"
        for kind in ("wall", "cpu"):
            low, high = row[f"{kind}_overhead_p10_p90_ms"]
            line += f"{row[f'{kind}_ms']:8.3f}"
            line += f"{row[f'{kind}_overhead_ms']:9.3f} ({low:.3f} to {high:.3f})"
        print(line, file=out)
    about = report.about()
    print(
        f"{args.rounds} rounds of {args.samples} samples; {about['machine']}; {about['commit']}",
        file=out,
    )
    if args.json:
        write_json({**about, "bundle": args.bundle.name, "rows": rows}, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
