"""What each codec costs in quality: a bundle cut at each layer, its hidden states coded on the way.

    python benchmarks/codec_quality.py [--bundle DIR] [--data FOLDER] [--limit N] [--json FILE|-]

On CLINC150's test split; the folder of data sets is $OFFRAMP_DATA, or ../shared/data.
Every sentence runs all layers in torch, without exits. After layer k its hidden state is encoded
and decoded, alone, as a device sends it; the last exit's label is compared with the true one and
with the uncut model's. Bytes are the hidden states', as encoded.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import report
import torch

from offramp_common.activations import mask_of, pack, unpack
from offramp_common.bundle import Bundle
from offramp_common.cli import write_json
from offramp_common.codecs import CODECS, get_codec
from offramp_common.text import TextEncoder
from offramp_model.split_model import MultiExitModel
from offramp_model.store import load_model
from offramp_train.tables import read_rows

_BATCH = 64
_CODECS = tuple(name for name, codec in CODECS.items() if not codec.integer)


def coded(name: str, hidden_BTD: Any, lengths_B: Any) -> tuple[Any, list[int], float]:
    """Each row through the codec, alone; bytes, and the relative error's square summed over rows."""
    codec, packed = get_codec(name), pack(hidden_BTD, lengths_B)
    parts, sizes, error = [], [], 0.0
    for row in np.split(packed, np.cumsum(lengths_B)[:-1]):
        data = codec.encode(row)
        parts.append(codec.decode(data, *row.shape))
        sizes.append(len(data))
        error += float(np.square(row - parts[-1]).sum() / np.square(row).sum())
    return unpack(np.concatenate(parts), lengths_B), sizes, error


def answers(model: MultiExitModel, hidden_BTD: Any, mask_BT: Any, start: int) -> Any:
    """The last exit's label, from the hidden state after `start` layers."""
    n = model.n_layers
    hidden_BTD = model.backbone.run_layers(hidden_BTD, mask_BT, start, n)
    return model.exits[str(n)](hidden_BTD, mask_BT, {})["logits"].argmax(-1).numpy()


@torch.inference_mode()
def measure(model: MultiExitModel, batches: list[tuple[Any, Any]]) -> list[dict[str, Any]]:
    cells = [(k, name) for k in range(1, model.n_layers) for name in _CODECS]
    sums = {cell: {"right": 0, "same": 0, "bytes": 0, "error": 0.0} for cell in cells}
    rows, uncut_right = 0, 0
    for acts, truth_B in batches:
        mask_BT = torch.from_numpy(mask_of(acts.lengths_B))
        hidden_BTD = model.backbone.embed(torch.from_numpy(acts.hidden_BTD))
        states = {}
        for k in range(1, model.n_layers):
            hidden_BTD = states[k] = model.backbone.run_layers(hidden_BTD, mask_BT, k - 1, k)
        uncut_B = answers(model, hidden_BTD, mask_BT, model.n_layers - 1)
        rows, uncut_right = rows + len(truth_B), uncut_right + int((uncut_B == truth_B).sum())
        for k, name in cells:
            out, sizes, error = coded(name, states[k].numpy(), acts.lengths_B)
            got_B = answers(model, torch.from_numpy(out), mask_BT, k)
            cell = sums[k, name]
            cell["right"] += int((got_B == truth_B).sum())
            cell["same"] += int((got_B == uncut_B).sum())
            cell["bytes"] += sum(sizes)
            cell["error"] += error
    return [
        {
            "split": k,
            "codec": name,
            "rows": rows,
            "mean_bytes": cell["bytes"] / rows,
            "relative_error": (cell["error"] / rows) ** 0.5,
            "accuracy": cell["right"] / rows,
            "points_below_uncut": 100 * (uncut_right - cell["right"]) / rows,
            "same_label": cell["same"] / rows,
        }
        for (k, name), cell in sums.items()
    ]


def batches_of(bundle: Bundle, file: Path, limit: int | None) -> list[tuple[Any, Any]]:
    labels = {label: at for at, label in enumerate(bundle.manifest.task.labels)}
    read = read_rows(file)
    rows = [(text, labels.get(y, -1)) for text, y in zip(read.texts, read.labels, strict=True)]
    rows = [rows[at] for at in np.random.default_rng(0).permutation(len(rows))[:limit]]
    rows.sort(key=lambda row: len(row[0]))
    encode = TextEncoder(bundle)
    return [
        (encode([text for text, _ in part]), np.array([label for _, label in part]))
        for part in (rows[at : at + _BATCH] for at in range(0, len(rows), _BATCH))
    ]


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| split | codec | bytes | relative error | accuracy | points below | same label |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    lines += [
        f"| {row['split']} | {row['codec']} | {row['mean_bytes']:.0f} | {row['relative_error']:.4f} "
        f"| {100 * row['accuracy']:.2f} | {row['points_below_uncut']:+.2f} "
        f"| {100 * row['same_label']:.2f} % |"
        for row in rows
    ]
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
    batches = batches_of(bundle, args.data / "clinc150" / "test.tsv", args.limit)
    rows = measure(load_model(bundle).eval(), batches)
    on = report.machine(f"torch {torch.__version__}")
    print(
        f"{table(rows)}\n\n{bundle.manifest.name}; {on}; {report.commit()}",
        file=sys.stderr if args.json == "-" else sys.stdout,
    )
    if args.json:
        write_json({"hardware": on, "commit": report.commit(), "rows": rows}, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
