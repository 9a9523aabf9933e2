"""What each codec costs in quality: a bundle cut at each layer, its hidden states coded on the way.

    python benchmarks/codec_quality.py [--bundle DIR] [--data FOLDER] [--limit N] [--json FILE|-]

On CLINC150's test split; the folder of data sets is $OFFRAMP_DATA, or ../shared/data. Every sentence runs all
layers in torch, without exits. After layer k its hidden state is encoded and decoded, alone, as a device does
it; the last exit's label is compared with the true one and with the uncut model's. Bytes are the hidden
states', as encoded. `offramp codecs measure` does the same and writes it into the bundle.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import report
import torch

from offramp_common.bundle import Bundle
from offramp_common.cli import write_json
from offramp_common.codecs.measured import Measured
from offramp_train.codec_fits.cost import all_codecs, measure_codecs
from offramp_train.measure import subject
from offramp_train.progress import Report
from offramp_train.tables import Rows, read_rows


def drawn(rows: Rows, limit: int | None) -> Rows:
    """So many rows, drawn with a fixed seed."""
    order = np.random.default_rng(0).permutation(len(rows))[:limit]
    texts, labels = ([values[at] for at in order] for values in (rows.texts, rows.labels))
    lines = tuple(rows.lines[at] for at in order)
    return Rows(rows.path, tuple(texts), tuple(labels), lines)


def table(measured: list[Measured]) -> str:
    lines = ["| split | codec | bytes | relative error | points below | same label |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for one in measured:
        error = "-" if one.error is None else f"{one.error:.4f}"
        lines.append(
            f"| {one.depth} | {one.codec} | {one.nbytes:.0f} | {error} | {one.points:+.2f} "
            f"| {100 * (one.same or 0):.2f} % |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = Path(os.environ.get("OFFRAMP_DATA", "../shared/data"))
    parser.add_argument("--data", type=Path, default=default)
    parser.add_argument("--bundle", default="bundles/assistant-intents", metavar="DIR")
    parser.add_argument("--limit", type=int, metavar="N", help="rows, drawn with a fixed seed")
    parser.add_argument("--json", metavar="FILE", help="-: standard output, the table to stderr")
    args = parser.parse_args()
    torch.set_num_threads(1)
    bundle = Bundle.read(args.bundle)
    rows = drawn(read_rows(args.data / "clinc150" / "test.tsv"), args.limit)
    here = subject(bundle, "torch", rows)
    codecs = all_codecs(here, range(1, bundle.n_layers))
    measured, uncut = measure_codecs(here, codecs, Report())
    about = report.about(f"torch {torch.__version__}")
    said = (
        f"{table(measured)}\n\nuncut {100 * uncut:.2f}; {bundle.manifest.name}; {about['machine']}"
    )
    print(said, file=sys.stderr if args.json == "-" else sys.stdout)
    if args.json:
        told = {**about, "uncut": uncut, "rows": [one.to_json() for one in measured]}
        write_json(told, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
