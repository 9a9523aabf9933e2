"""How long methods take on the device's runtime: ONNX Runtime, fp32, one thread, one sample at a time.

On the comparison's kept bundles. Two questions, each answered by contenders that take turns (A B A B), the
median of the ratios within a round:

operating points   rows of the test split at about 2 and 1.5 times fewer FLOPs and at full depth with every
                   exit evaluated, against the separately fine-tuned full model, which has no exits
cost of exits      full depth with every exit evaluated against that same model, for 16 and 64 tokens

A model whose only exit is its last has the method's layers without its heads: what the runtime does for them
is the same, with other numbers in the matrices. Ratios are of CPU time, which on an idle machine is the time
that passes and on a busy one leaves out the waiting; the time that passed stands beside it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import report
from comparison import FULL, RESULTS, TREC_SEEDS, Run
from kept import kept, test_rows, with_graphs

from offramp_common.activations import Activations, NumpyArray
from offramp_common.bundle import Bundle
from offramp_common.cli import write_json
from offramp_common.runner import Knobs
from offramp_common.runner import run as run_layers
from offramp_common.spec import never_exit
from offramp_common.text import TextEncoder
from offramp_edge.runtime import OnnxLayers

TIMED = RESULTS / "timings"
SET = "sst2"  # whose bundles are timed unless told otherwise: sentences of a usual length
SPEEDUPS = (2.0, 1.5)
TOKENS = (16, 64)
BAR = 1.10  # of the cost of exits at full depth
ROWS, ROUNDS = 200, 9  # of the operating points
CALLS, TURNS = 12, 31  # of the cost of exits: calls timed together, turns

Call = Callable[[], None]


def path_of(entry: str) -> Path:
    return TIMED / f"{entry}.json"


def time_method(set_name: str, entry: str, work: Path, data: Path) -> str:
    """Write the timings of a method's kept bundle; what came of it, in words.

    It is that of the lowest seed that the full model's bundle was kept of, too.
    """
    for seed in range(TREC_SEEDS):
        run = Run(set_name, entry, seed)
        mine, full = kept(run, work), kept(Run(set_name, FULL, seed), work)
        if mine is not None and full is not None:
            break
    else:
        return f"no seed of which both its bundle and the full model's are in {work}"
    (bundle, result), (plain, plain_result) = mine, full
    bundle, plain = with_graphs(bundle), with_graphs(plain)
    texts = list(test_rows(run, data, work, result).texts)
    random.Random(0).shuffle(texts)
    chosen = chosen_points(result["measured"][run.entry], plain_result["measured"][FULL])
    timed = {
        "entry": run.entry,
        "set": run.set,
        "seed": run.seed,
        "digest": result["digest"],
        **report.about(f"onnxruntime {onnxruntime.__version__}", "one thread"),
        "runtime": "onnxruntime fp32, one thread, one sample at a time",
        "points": time_points(bundle, plain, texts[:ROWS], chosen, ROUNDS),
        "exit_cost": [time_exits(bundle, plain, n_tokens) for n_tokens in TOKENS],
        "bar": BAR,
    }
    TIMED.mkdir(parents=True, exist_ok=True)
    write_json(timed, str(path_of(run.entry)))
    at_full = ", ".join(f"{c['ratio']['median']:.3f}" for c in timed["exit_cost"])
    return f"exits cost {at_full} at {' and '.join(map(str, TOKENS))} tokens"


def chosen_points(measured: dict[str, Any], full: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The measured points nearest to the wanted shares of the full model's FLOPs, and full depth; by name."""
    whole = full["full_depth"]["flops"]
    points = [*measured["points"], measured["full_depth"]]
    out = {}
    for speedup in SPEEDUPS:
        near = min(points, key=lambda p, s=speedup: abs(p["flops"] / whole - 1 / s))  # type: ignore[misc]
        out[f"{speedup:g}x"] = near
    out["full depth"] = measured["full_depth"]
    return {name: {**p, "flops_share": round(p["flops"] / whole, 4)} for name, p in out.items()}


def time_points(
    bundle: Bundle, plain: Bundle, texts: Sequence[Any], chosen: dict[str, Any], rounds: int
) -> dict[str, Any]:
    """Milliseconds a sample of the full model and of each point; ratio: the point's share of the model's."""
    encode = TextEncoder(bundle)
    samples = [encode([text]) for text in texts]
    n, depths = bundle.n_layers, dict[str, float]()
    calls: dict[str, Call] = {"full model": _calls(plain, samples, _never(plain), {}, "")}
    for name, point in chosen.items():
        knobs = {knob: (float(value),) * n for knob, value in point["knobs"].items()}
        calls[name] = _calls(bundle, samples, knobs, depths, name)
    for call in calls.values():
        call()  # warms caches, and counts layers
    cpu, wall = _turns(calls, rounds, len(samples))
    out: dict[str, Any] = {"rows": len(samples), "rounds": rounds}
    for name in calls:
        about: dict[str, Any] = {} if name == "full model" else {
            "knobs": chosen[name]["knobs"],
            "flops_share": chosen[name]["flops_share"],
            "mean_layers": round(depths[name], 4),
            "ratio": report.ratio(cpu[name], cpu["full model"]),
            "wall_ratio": report.ratio(wall[name], wall["full model"]),
        }  # fmt: skip
        out[name] = {
            **about,
            "cpu_ms": report.spread(cpu[name]),
            "wall_ms": report.spread(wall[name]),
        }
    return out


def time_exits(bundle: Bundle, plain: Bundle, n_tokens: int, turns: int = TURNS) -> dict[str, Any]:
    """Full depth with every exit evaluated against none but the last; ratio: so many times as long."""
    rng = np.random.default_rng(0)
    channels = bundle.cuts[0].width
    ids = rng.integers(0, bundle.cuts[0].vocabulary[0], (1, n_tokens, channels))
    if channels > 1:
        ids[..., 1:] = 0  # segments
    samples = [Activations(ids, np.array([n_tokens]), depth=0)] * CALLS
    calls: dict[str, Call] = {
        "with exits": _calls(bundle, samples, _never(bundle), {}, ""),
        "without": _calls(plain, samples, _never(plain), {}, ""),
    }
    for call in calls.values():
        call()
    cpu, wall = _turns(calls, turns, CALLS)
    return {
        "tokens": n_tokens,
        "ratio": report.ratio(cpu["with exits"], cpu["without"]),
        "wall_ratio": report.ratio(wall["with exits"], wall["without"]),
        "cpu_ms": {name: report.spread(values) for name, values in cpu.items()},
    }


def _never(bundle: Bundle) -> Knobs:
    return never_exit(bundle.manifest.knobs, bundle.n_layers)


def _calls(
    bundle: Bundle,
    samples: Sequence[Activations[NumpyArray]],
    knobs: Knobs,
    depths: dict[str, float],
    name: str,
) -> Call:
    """All samples in turn, through the device's loop; their mean depth goes to `depths`."""
    layers = OnnxLayers(bundle, "fp32")
    layers.load()

    def call() -> None:
        total = 0
        for acts in samples:
            total += run_layers(layers, acts, layers.n_layers, knobs).left[0].depth
        depths[name] = total / len(samples)

    return call


def _turns(
    calls: dict[str, Call], rounds: int, samples: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Milliseconds a sample in each round, of the processor and on the clock."""
    cpu: dict[str, list[float]] = {name: [] for name in calls}
    wall: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            began, cpu_began = time.perf_counter(), time.process_time()
            call()
            cpu[name].append((time.process_time() - cpu_began) / samples * 1e3)
            wall[name].append((time.perf_counter() - began) / samples * 1e3)
    return cpu, wall
