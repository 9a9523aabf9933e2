"""Where the time of exits goes: ONNX Runtime's own profile of a bundle with exits and of the full model.

The two run the same layers, so what the one has more is its heads: matrix products, whose weights a short
text reads for a single row, and small operators, which mostly take the time to start one.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from offramp_common.activations import Activations
from offramp_common.bundle import Bundle
from offramp_common.runner import run as run_layers
from offramp_common.spec import never_exit
from offramp_edge.runtime import OnnxLayers

RUNS = 60
_MATRICES = ("MatMul", "FusedMatMul", "Gemm", "FusedGemm")


class Profiled(OnnxLayers):
    """Keeps the runtime's profile of every layer in a folder."""

    folder: Path

    def _options(self, index: int) -> Any:
        options = super()._options(index)
        options.enable_profiling = True
        options.profile_file_prefix = str(self.folder / f"layer_{index:02d}")
        return options


def head_profile(bundle: Bundle, plain: Bundle, n_tokens: int, runs: int = RUNS) -> dict[str, Any]:
    """What the exits of `bundle` add to `plain`, which has none but the last; us: microseconds a sample."""
    mine, full = kernels(bundle, n_tokens, runs), kernels(plain, n_tokens, runs)
    matrices, others = mine[0] - full[0], mine[1] - full[1]
    return {
        "tokens": n_tokens,
        "runs": runs,
        "full_model_us": round(full[0] + full[1], 1),
        "matrices_us": round(matrices, 1),
        "operators_us": round(others, 1),
        "operators": mine[2] - full[2],
    }


def kernels(bundle: Bundle, n_tokens: int, runs: int) -> tuple[float, float, int]:
    """Of one sample at full depth: microseconds in matrix products, in all else, and how many of those."""
    ids = np.zeros((1, n_tokens, bundle.cuts[0].width), np.int64)
    start = Activations(ids, np.array([n_tokens]), depth=0)
    never = never_exit(bundle.manifest.knobs, bundle.n_layers)
    with tempfile.TemporaryDirectory() as folder:
        layers = Profiled(bundle, "fp32")
        layers.folder = Path(folder)
        for _ in range(runs + 1):
            run_layers(layers, start, layers.n_layers, never)
        del layers  # ends the sessions, which write their profiles then
        found = [_kernels(path) for path in sorted(Path(folder).glob("*.json"))]
    assert len(found) == bundle.n_layers, f"{len(found)} profiles of {bundle.n_layers} layers"
    return sum(f[0] for f in found), sum(f[1] for f in found), sum(f[2] for f in found)


def _kernels(path: Path) -> tuple[float, float, int]:
    """Of one layer's profile: medians over its runs."""
    took: dict[tuple[str, bool], list[float]] = defaultdict(list)
    for event in json.loads(path.read_text(encoding="utf-8")):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            matrix = event["args"]["op_name"] in _MATRICES
            took[event["name"], matrix].append(float(event["dur"]))
    times = {key: median(values) for key, values in took.items()}
    products = sum(us for (_, matrix), us in times.items() if matrix)
    others = [us for (_, matrix), us in times.items() if not matrix]
    return products, sum(others), len(others)
