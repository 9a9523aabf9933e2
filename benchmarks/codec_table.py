"""The table of all codecs: bytes and milliseconds of a sample of 128 tokens, and what quality they cost.

    python benchmarks/codec_table.py quality WORK [--only BUNDLE,...] [--depths K,...] [--sets FILE,...]
                                                  [--codecs LABEL,...]
    python benchmarks/codec_table.py costs WORK [--runs N]
    python benchmarks/codec_table.py table

WORK holds the bundles of benchmarks/codec_bundles.py; the folder of data sets is $OFFRAMP_DATA, or
../shared/data. `quality` runs each data set's rows uncut, and cut after k layers with their hidden states
coded as a device sends them, all layers run; what is there already is not measured again. `costs` times real
hidden states, of the first film review of 128 tokens after 4 layers of MPNet and 2 of MiniLM, the codecs
in turns, on one core. `table` prints the page's tables from benchmarks/results/codec_table.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import report
import torch
from codec_peers import Peer, hivemind, token_ids, torch_save, zstd_text
from codec_table_text import tables

from offramp_common.bundle import Bundle
from offramp_common.text import TextEncoder
from offramp_train.codec_fits.cost import data_name, measure_codecs
from offramp_train.codec_fits.cut_rows import cut_batches
from offramp_train.codec_fits.fit import put_costs
from offramp_train.evaluate import limited
from offramp_train.measure import Subject, subject
from offramp_train.progress import Report
from offramp_train.tables import read_rows

RESULTS = Path(__file__).parent / "results" / "codec_table.json"
TOKENS = 128
_PLAIN = ("int8", "int8+z", "int4", "int4+z")
_FITTED = ("pruned-int4", "pooled-int8", "bottleneck-4k", "bottleneck-2k")
CODECS = (*_PLAIN, *_FITTED)
_REVIEWS = "movie_reviews_long/test.tsv"
# bundle -> the data sets' files and how many rows of them
SETS: dict[str, dict[str, int | None]] = {
    "mpnet-sst2": {"sst2/test.tsv": None, _REVIEWS: 200},
    "mpnet-trec": {"trec_question_type/test.tsv": None},
    "minilm-sst2": {"sst2/test.tsv": None, _REVIEWS: None},
    "minilm-trec": {"trec_question_type/test.tsv": None},
}
DEPTHS = {"mpnet": (4, 8, 2, 6, 10), "minilm": (2, 4, 1, 3, 5)}
COST_DEPTH = {"mpnet-sst2": 4, "minilm-sst2": 2}


def read_results() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"quality": {}, "costs": {}}


def keep(results: dict[str, Any]) -> None:
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def quality(args: argparse.Namespace) -> None:
    for name in args.only or SETS:
        bundle = Bundle.read(args.work / name)
        depths = args.depths or DEPTHS[name.split("-")[0]]
        for file, limit in SETS[name].items():
            if args.sets and file not in args.sets:
                continue
            rows = limited(read_rows(args.data / file), limit)
            here = subject(bundle, "torch", rows)
            for depth in depths:
                measure_depth(here, name, depth, args.codecs or CODECS)


def measure_depth(here: Subject, name: str, depth: int, labels: Sequence[str]) -> None:
    """Those of these codecs at one depth that the results do not have for this bundle."""
    results, data = read_results(), data_name(here)
    cell = results["quality"].setdefault(name, {}).setdefault(data, {})
    have = {one["name"] for one in cell.get("rows", []) if one["depth"] == depth}
    bundle = Bundle.read(here.bundle.path)  # codecs may have been fitted meanwhile
    codecs = {label: codec for label, codec in bundle.codecs(depth).items() if label in labels}
    missing = {label: codec for label, codec in codecs.items() if codec.name not in have}
    if not missing:
        return
    print(f"{name}, {data}, depth {depth}: {', '.join(missing)}", file=sys.stderr, flush=True)
    measured, uncut = measure_codecs(here, {depth: missing}, Report())
    put_costs(bundle, measured)
    results = read_results()
    cell = results["quality"].setdefault(name, {}).setdefault(data, {"rows": []})
    old = [one for one in cell["rows"] if (one["codec"], one["depth"]) not in
           {(new.codec, depth) for new in measured}]  # fmt: skip
    new = [{**one.to_json(), "name": missing[one.codec].name} for one in measured]
    cell |= {"uncut": uncut, "command": report.command(), "commit": report.commit()}
    cell["rows"] = sorted([*old, *new], key=lambda one: (one["depth"], CODECS.index(one["codec"])))
    keep(results)


def costs(args: argparse.Namespace) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    results = read_results()
    about = report.about(f"numpy {np.__version__}", f"torch {torch.__version__}")
    for name in args.only or COST_DEPTH:
        depth = COST_DEPTH[name]
        hidden_ND, ids_N, text = sample(args, name, depth)
        timed = prepared(Bundle.read(args.work / name), depth, hidden_ND, ids_N, text)
        rows = times(timed, args.runs)
        results["costs"][name] = {
            "depth": depth,
            "shape": [1, *hidden_ND.shape],
            **about,
            "runs": args.runs,
            "rows": rows,
        }
    keep(results)


def sample(args: argparse.Namespace, name: str, depth: int) -> tuple[np.ndarray, np.ndarray, str]:
    """Hidden states of a review of 128 tokens, its token ids, and the words that they are of."""
    bundle = Bundle.read(args.work / name)
    rows = limited(read_rows(args.data / _REVIEWS), 1)
    (batch,) = cut_batches(subject(bundle, "torch", rows), [depth], 1)
    acts, text = batch.acts[depth], str(rows.texts[0])
    ids_N = TextEncoder(bundle)([text]).hidden_BTD[0, :, 0]
    assert acts.lengths_B.tolist() == [TOKENS], acts.lengths_B
    words = text.split()
    while len(TextEncoder(bundle)([" ".join(words[:-1])]).hidden_BTD[0]) == TOKENS:
        words.pop()
    return np.ascontiguousarray(acts.hidden_BTD[0]), ids_N, " ".join(words)


def prepared(
    bundle: Bundle, depth: int, hidden_ND: np.ndarray, ids_N: np.ndarray, text: str
) -> list[Peer]:
    out = [token_ids(ids_N), zstd_text(text, 3), zstd_text(text, 19), torch_save(hidden_ND)]
    out += hivemind(hidden_ND)
    for label, codec in bundle.codecs(depth).items():
        data = codec.encode(hidden_ND)
        encode = (lambda c: lambda: c.encode(hidden_ND))(codec)
        decode = (lambda c, d: lambda: c.decode(d, *hidden_ND.shape))(codec, data)
        out.append(Peer(label, len(data), encode, decode))
    return out


def times(timed: list[Peer], runs: int) -> list[dict[str, Any]]:
    """In turns, so that a busy minute hits them all; the first five warm caches up."""
    spent: dict[str, dict[str, list[float]]] = {
        peer.name: {"encode_ms": [], "decode_ms": []} for peer in timed
    }
    for run in range(runs + 5):
        for peer in timed:
            for step, call in (("encode_ms", peer.encode), ("decode_ms", peer.decode)):
                if call is not None:
                    took = _seconds(call)
                    if run >= 5:
                        spent[peer.name][step].append(1e3 * took)
    return [
        {"codec": peer.name, "bytes": peer.nbytes, "error": peer.error}
        | {step: report.spread(values) for step, values in spent[peer.name].items() if values}
        for peer in timed
    ]


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    default = Path(os.environ.get("OFFRAMP_DATA", "../shared/data"))
    for action in ("quality", "costs"):
        sub = actions.add_parser(action)
        sub.add_argument("work", type=Path)
        sub.add_argument("--data", type=Path, default=default)
        sub.add_argument("--runs", type=int, default=100)
        sub.add_argument("--only", type=lambda text: text.split(","))
        sub.add_argument("--sets", type=lambda text: text.split(","))
        sub.add_argument("--codecs", type=lambda text: text.split(","))
        sub.add_argument("--depths", type=lambda text: [int(d) for d in text.split(",")])
    actions.add_parser("table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.action == "table":
        print(tables(read_results()))
    else:
        {"quality": quality, "costs": costs}[args.action](args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
