"""What the shipped bundle is worth on CLINC150's test split, on torch and on the device's graphs.

    python benchmarks/shipped_bundle.py [--bundle DIR] [--data FOLDER] [--json FILE|-]

Rows really run with exits (batches for torch, one by one for the graphs); the exit at full depth comes
from a second run with exits turned off. "same exit" compares with torch at the same thresholds. The
folder of data sets is $OFFRAMP_DATA, or ../shared/data.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import report

from offramp_common.bundle import Bundle
from offramp_common.cli import write_json
from offramp_common.spec import never_exit
from offramp_train.measure import Subject, subject
from offramp_train.progress import Report
from offramp_train.tables import read_rows

OOS = "oos"
RUNTIMES = (("torch", "fp32"), ("fp32", "fp32"), ("int8", "int8"))
"""(runtime, whose operating point)."""


def measure(here: Subject, point: str, progress: Report) -> tuple[dict[str, Any], np.ndarray]:
    """The numbers of one runtime, and each row's exit depth."""
    manifest = here.bundle.manifest
    never = never_exit(manifest.knobs, manifest.n_layers)
    depth_N, answer_NC = here.run(here.bundle.knobs(point), progress, f"{here.runtime}, exits")
    _, full_NC = here.run(never, progress, f"{here.runtime}, full depth")
    right_N = answer_NC.argmax(axis=1) == here.target_N
    full_N = full_NC.argmax(axis=1) == here.target_N
    in_scope_N = here.target_N != manifest.task.labels.index(OOS)
    return {
        "runtime": here.runtime,
        "in_scope_full_depth": percent(full_N[in_scope_N]),
        "oos_recall_full_depth": percent(full_N[~in_scope_N]),
        "accuracy_full_depth": percent(full_N),
        "accuracy": percent(right_N),
        "in_scope": percent(right_N[in_scope_N]),
        "oos_recall": percent(right_N[~in_scope_N]),
        "drop_points": round(percent(full_N) - percent(right_N), 2),
        "mean_depth": round(float(depth_N.mean()), 3),
        "leave_by_depth_3": percent(depth_N <= 3),
    }, depth_N


def percent(values: np.ndarray) -> float:
    return round(100 * float(values.mean()), 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--bundle", type=Path, default=Path("bundles/assistant-intents"))
    default = Path(os.environ.get("OFFRAMP_DATA", "../shared/data"))
    parser.add_argument("--data", type=Path, default=default)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    bundle, progress = Bundle.read(args.bundle), Report()
    rows = read_rows(args.data / "clinc150" / "test.tsv")
    results, reference = [], None
    for runtime, point in RUNTIMES:
        numbers, depth_N = measure(subject(bundle, runtime, rows), point, progress)
        reference = depth_N if reference is None else reference
        numbers["same_exit_as_torch"] = percent(depth_N == reference)
        results.append(numbers)
    nbytes = sum(path.stat().st_size for path in args.bundle.rglob("*") if path.is_file())
    result = {
        **report.about(),
        "bundle": bundle.manifest.name,
        "digest": bundle.digest(0).hex(),
        "megabytes": round(nbytes / 1e6, 2),
        "rows": len(rows),
        "results": results,
    }
    for numbers in results:
        print(json.dumps(numbers), file=sys.stderr)
    if args.json:
        write_json(result, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
