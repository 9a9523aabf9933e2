"""What a serving process keeps in memory for the sizes of the layers that it has run.

    python benchmarks/engine/memory.py [--layers N] [--tokens MOST] [--json FILE|-]

Layers of MiniLM's size (random weights) over random numbers of rows and tokens, in a process of its own for
each way: matrix products over exactly the tokens that are there, or padded to one of few sizes, as served.
Resident memory above that after the first layer, after so many layers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import report

from offramp_common.activations import Activations
from offramp_common.cli import write_json
from offramp_common.spec import TaskSpec, never_exit
from offramp_model import packed_layers
from offramp_model.backbones import backbone_from_config
from offramp_model.backbones.packed import padded_to
from offramp_model.exits import HeadSpec
from offramp_model.methods import METHODS
from offramp_model.split_model import MultiExitModel

MINILM = {
    "model_type": "bert",
    "hidden_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "vocab_size": 1000,
}
ROWS, LONGEST, SEED = 32, 48, 0
KINDS = ("exact", "padded")


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def lengths_of(rng: np.random.Generator, most: int) -> Any:
    """Rows of one layer: so many that all lengths and numbers of tokens up to `most` come up."""
    lengths_B = rng.integers(1, LONGEST + 1, int(rng.integers(1, ROWS + 1)))
    return lengths_B[: max(1, int((lengths_B.cumsum() <= most).sum()))]


def measured(kind: str, layers: int, most: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    if kind == "exact":
        packed_layers.padded_to = lambda tokens: tokens  # type: ignore[attr-defined]
    backbone = backbone_from_config(MINILM)
    method = METHODS["deebert"]
    spec = HeadSpec(TaskSpec("classification", ("a", "b")), backbone.width, 2, (1, 2))
    model = MultiExitModel(backbone, method, spec).eval()
    packed, never = packed_layers.PackedLayers(model), never_exit(model.knobs, 2)
    rng = np.random.default_rng(SEED)
    marks = [layers // 8, layers // 4, layers // 2, layers]
    tokens, grown, start_mib = [], {}, 0.0
    for count in range(1, layers + 1):
        lengths_B = lengths_of(rng, most)
        tokens.append(int(lengths_B.sum()))
        hidden_BTD = torch.zeros(lengths_B.size, int(lengths_B.max()), backbone.width)
        packed.step(Activations(hidden_BTD, lengths_B, 1), never)
        if count == 1:
            start_mib = resident_mib()
        if count in marks:
            grown[str(count)] = round(resident_mib() - start_mib)
    sizes = [padded_to(n) if kind == "padded" else n for n in tokens]
    return {
        "grown_mib_after_layers": grown,
        "sizes": len(set(sizes)),
        "padding_over_tokens": sum(sizes) / sum(tokens) - 1,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=4000)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--kind", choices=KINDS, help="this one only, in this process")
    parser.add_argument("--json", metavar="FILE", default="-")
    args = parser.parse_args()
    if args.kind:
        print(json.dumps(measured(args.kind, args.layers, args.tokens)))
        return 0
    result: dict[str, Any] = {
        **report.about(f"torch {torch.__version__}, one thread"),
    }
    for kind in KINDS:
        settings = ["--kind", kind, "--layers", str(args.layers), "--tokens", str(args.tokens)]
        child = subprocess.run(
            [sys.executable, __file__, *settings], check=True, capture_output=True, text=True
        )
        result[kind] = json.loads(child.stdout)
    write_json(result, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
