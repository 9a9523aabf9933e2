"""Does CATs' guarantee hold? Over 200 random splits of held-out rows into calibration and test.

    python benchmarks/methods/conformal_validity.py BUNDLE FILE... [--runtime torch|fp32|int8]
        [--splits N] [--share S] [--columns A,B,LABEL] [--json FILE|-]

FILE: labelled rows on which nothing of the bundle was trained, fitted or chosen, such as dev and test of its
data; they are taken together and split anew each time, a share S (0.8, the paper's) to calibrate on. The
model runs once; each split is a threshold from its calibration part (offramp_train.conformal) and what rows
of its test part leave with. A violation is an answer that is not the full model's. The mean share of them
must be at most epsilon and two standard errors of that mean. A score of random numbers stands beside the
bundle's: the guarantee must hold for it too, and only depth may suffer.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # report.py, of all benchmarks
import report

from offramp_common.activations import NumpyArray
from offramp_common.bundle import Bundle
from offramp_common.cli import write_json
from offramp_train.conformal import (
    Agreeing,
    check_guarantee,
    scores_and_agreement,
    threshold_of,
)
from offramp_train.measure import policy_of, subject
from offramp_train.metrics import metric_of, prediction_of
from offramp_train.progress import Report
from offramp_train.tables import check_columns, read_rows

EPSILONS = (0.01, 0.05, 0.1)
SEED = 0


@dataclass(frozen=True)
class Rows:
    """E early exits and the last, N rows.

    score_EN, agrees_EN   of the early exits
    answer_XN             what every exit would answer (class or value), X = E + 1
    depth_X               layers run up to each exit;  target_N: what is right
    """

    score_EN: NumpyArray
    agrees_EN: NumpyArray
    answer_XN: NumpyArray
    depth_X: NumpyArray
    target_N: NumpyArray


def rows_of(bundle: Bundle, runtime: str, files: list[Path], columns: tuple[str, ...]) -> Rows:
    """All files' rows, recorded once."""
    policy, task = policy_of(bundle), bundle.manifest.task
    assert isinstance(policy, Agreeing)
    scores, agrees, answers, targets = [], [], [], []
    for file in files:
        here = subject(bundle, runtime, read_rows(file, columns))
        recording = here.record(Report(), file.name)
        score_EN, agrees_EN = scores_and_agreement(policy, recording)
        outputs = [recording.outputs[depth]["logits"].numpy() for depth in bundle.manifest.exits]
        scores.append(score_EN)
        agrees.append(agrees_EN)
        answers.append(np.stack([prediction_of(task, answer_NC) for answer_NC in outputs]))
        targets.append(here.target_N)
    return Rows(
        np.concatenate(scores, axis=1),
        np.concatenate(agrees, axis=1),
        np.concatenate(answers, axis=1),
        np.array(bundle.manifest.exits),
        np.concatenate(targets),
    )


def over_splits(
    rows: Rows, score_EN: NumpyArray, epsilon: float, splits: int, share: float, quality: Any
) -> dict[str, Any]:
    """The means over splits of violations, depth and quality."""
    n = len(rows.target_N)
    rng = np.random.default_rng(SEED)  # the same splits for every score and epsilon
    with_last_XN = np.vstack([rows.agrees_EN, np.ones(n, bool)])
    violations, depths, qualities, lambdas = [], [], [], []
    for _ in range(splits):
        order = rng.permutation(n)
        calibration_M, test_M = order[: round(share * n)], order[round(share * n) :]
        found = threshold_of(score_EN[:, calibration_M], rows.agrees_EN[:, calibration_M], epsilon)
        leave_XM = np.vstack([score_EN[:, test_M] > found, np.ones(len(test_M), bool)])
        exit_M = leave_XM.argmax(axis=0)
        violations.append(1 - with_last_XN[exit_M, test_M].mean())
        depths.append(rows.depth_X[exit_M].mean())
        answer_M, target_M = rows.answer_XN[exit_M, test_M], rows.target_N[test_M]
        qualities.append(quality(answer_M, target_M, np.ones(len(test_M))))
        lambdas.append(found)
    error = float(np.std(violations, ddof=1) / math.sqrt(splits))
    finite = [value for value in lambdas if math.isfinite(value)]
    return {
        "epsilon": epsilon,
        "violations": round(float(np.mean(violations)), 5),
        "standard_error": round(error, 5),
        "allowed": round(epsilon + 2 * error, 5),
        "holds": bool(np.mean(violations) <= epsilon + 2 * error),
        "mean_depth": round(float(np.mean(depths)), 4),
        "quality": round(float(np.mean(qualities)), 5),
        "lambda_median": round(float(np.median(finite)), 5) if finite else None,
        "splits_without_exits": splits - len(finite),
    }


def table(results: list[dict[str, Any]], metric: str, n_layers: int) -> str:
    """The results as text for people."""
    lines = [
        f"{'score':<8} {'epsilon':>7} {'violations':>11} {'+- s.e.':>8} {'holds':>6} "
        f"{'mean depth of ' + str(n_layers):>16} {metric + ', %':>12} {'lambda':>8} {'no exits':>9}"
    ]
    for r in results:
        found = "-" if r["lambda_median"] is None else f"{r['lambda_median']:.4f}"
        lines.append(
            f"{r['score']:<8} {r['epsilon']:>7g} {r['violations']:>11.4f} {r['standard_error']:>8.4f} "
            f"{'yes' if r['holds'] else 'NO':>6} {r['mean_depth']:>16.3f} {100 * r['quality']:>12.2f} "
            f"{found:>8} {r['splits_without_exits']:>9}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--runtime", choices=["torch", "fp32", "int8"], default="torch")
    parser.add_argument("--splits", type=int, default=200)
    parser.add_argument("--share", type=float, default=0.8)
    parser.add_argument("--columns", default="")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    if args.splits < 2 or not 0 < args.share < 1:
        parser.error("--splits: at least 2; --share: above 0 and below 1")
    bundle = Bundle.read(args.bundle)
    m = bundle.manifest
    check_guarantee(m.method, str(args.bundle))
    columns = check_columns(tuple(args.columns.split(",")) if args.columns else ())
    rows = rows_of(bundle, args.runtime, args.files, columns)
    metric, quality = metric_of(m.task)
    random_EN = np.random.default_rng(SEED + 1).uniform(size=rows.score_EN.shape)
    results = [
        {
            "score": name,
            **over_splits(rows, score_EN, epsilon, args.splits, args.share, quality),
        }
        for name, score_EN in (("meta", rows.score_EN), ("random", random_EN))
        for epsilon in EPSILONS
    ]
    full = quality(rows.answer_XN[-1], rows.target_N, np.ones(len(rows.target_N)))
    result = {
        **report.about(),
        "bundle": m.name,
        "digest": bundle.digest(0).hex(),
        "runtime": args.runtime,
        "files": [file.name for file in args.files],
        "rows": len(rows.target_N),
        "rows_with_an_exit_that_disagrees": int((~rows.agrees_EN.all(axis=0)).sum()),
        "splits": args.splits,
        "calibration_share": args.share,
        "metric": metric,
        "quality_full_depth": round(full, 5),
        "n_layers": m.n_layers,
        "results": results,
    }
    print(table(results, metric, m.n_layers), file=sys.stderr)
    print(f"{metric} at full depth {100 * full:.2f} %, {result['rows']} rows", file=sys.stderr)
    if args.json:
        write_json(result, args.json)
    return 0 if all(r["holds"] for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
