"""What a serving process keeps in memory for the sizes of the layers that it has run.

    python benchmarks/engine/memory.py [--layers N] [--tokens MOST] [--json FILE|-]

Layers of MiniLM's size (random weights) over random numbers of rows and tokens, in a process of its own for
each way: matrix products over exactly the tokens that are there, or padded to one of few sizes, as served.
Resident memory above that after the first layer, after so many layers, and what malloc has in use and free.

Then the parts of a layer alone, each over all its shapes twice: the products over all sizes up to --tokens,
attention over rows x length, an exit head over rows.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
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
from offramp_model.backbones.packed import Packed, padded_to
from offramp_model.exits import HeadSpec
from offramp_model.methods import METHODS
from offramp_model.split_model import MultiExitModel, TorchLayers

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
PARTS = ("products", "attention", "head")
_HBLKHD, _UORDBLKS, _FORDBLKS = 4, 7, 8  # fields of glibc's mallinfo2


class _MallInfo(ctypes.Structure):
    _fields_ = [(f"field_{i}", ctypes.c_size_t) for i in range(10)]


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def malloc_mib() -> tuple[float, float]:
    """(in use, free but not given back to the system)"""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _MallInfo
    info = libc.mallinfo2()
    field = [getattr(info, f"field_{i}") / 2**20 for i in range(10)]
    return field[_UORDBLKS] + field[_HBLKHD], field[_FORDBLKS]


def lengths_of(rng: np.random.Generator, most: int) -> Any:
    """Rows of one layer: so many that all lengths and numbers of tokens up to `most` come up."""
    lengths_B = rng.integers(1, LONGEST + 1, int(rng.integers(1, ROWS + 1)))
    return lengths_B[: max(1, int((lengths_B.cumsum() <= most).sum()))]


def minilm() -> MultiExitModel:
    backbone = backbone_from_config(MINILM)
    spec = HeadSpec(TaskSpec("classification", ("a", "b")), backbone.width, 2, (1, 2))
    return MultiExitModel(backbone, METHODS["deebert"], spec).eval()


def shapes_of(part: str, model: MultiExitModel, most: int) -> list[Callable[[], Any]]:
    """Each runs the part at one of its shapes."""
    packed, width = Packed(model.backbone), model.backbone.width
    whole, never = TorchLayers(model, "cpu"), never_exit(model.knobs, 2)

    def products(tokens: int) -> None:  # a layer without rows to attend
        packed.run_layer(0, torch.zeros(tokens, width), (), lambda _: None)

    def attention(rows: int, length: int) -> None:
        qkv_N3D = torch.zeros(rows * length, 3 * width)
        packed._layers[0][0]._attend(qkv_N3D, ((rows, length),), lambda _: None)

    def head(rows: int) -> None:
        whole.look(Activations(torch.zeros(rows, 8, width), np.full(rows, 8), 1), never)

    if part == "products":
        sizes = sorted({padded_to(tokens) for tokens in range(1, most + 1)})
        return [partial(products, tokens) for tokens in sizes]
    if part == "attention":
        shapes = itertools.product(range(1, ROWS + 1), range(1, LONGEST + 1))
        return [
            partial(attention, rows, length) for rows, length in shapes if rows * length <= most
        ]
    return [partial(head, rows) for rows in range(1, 65)]


def of_part(part: str, most: int) -> dict[str, Any]:
    """MiB above those after the first shape, once all have been run, and once they have been run again."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with torch.inference_mode():
        shapes = shapes_of(part, minilm(), most)
        shapes[-1]()
        start_mib, (used_mib, free_mib) = resident_mib(), malloc_mib()
        for turn in ("once", "again"):
            for run in shapes:
                run()
            used_now_mib, free_now_mib = malloc_mib()
            found[turn] = {
                "resident_mib": round(resident_mib() - start_mib, 1),
                "in_use_mib": round(used_now_mib - used_mib, 1),
                "free_mib": round(free_now_mib - free_mib, 1),
            }
    return {"shapes": len(shapes), **found}


def measured(kind: str, layers: int, most: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    if kind == "exact":
        packed_layers.padded_to = lambda tokens: tokens  # type: ignore[attr-defined]
    model = minilm()
    backbone = model.backbone
    packed, never = packed_layers.PackedLayers(model), never_exit(model.knobs, 2)
    rng = np.random.default_rng(SEED)
    marks = [layers // 8, layers // 4, layers // 2, layers]
    tokens, grown, start_mib, used_mib, free_mib = [], {}, 0.0, 0.0, 0.0
    for count in range(1, layers + 1):
        lengths_B = lengths_of(rng, most)
        tokens.append(int(lengths_B.sum()))
        hidden_BTD = torch.zeros(lengths_B.size, int(lengths_B.max()), backbone.width)
        packed.step(Activations(hidden_BTD, lengths_B, 1), never)
        if count == 1:
            start_mib, (used_mib, free_mib) = resident_mib(), malloc_mib()
        if count in marks:
            grown[str(count)] = round(resident_mib() - start_mib)
    sizes = [padded_to(n) if kind == "padded" else n for n in tokens]
    used_end_mib, free_end_mib = malloc_mib()
    return {
        "grown_mib_after_layers": grown,
        "in_use_mib": round(used_end_mib - used_mib),
        "free_mib": round(free_end_mib - free_mib),
        "sizes": len(set(sizes)),
        "padding_over_tokens": sum(sizes) / sum(tokens) - 1,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=4000)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--kind", choices=KINDS + PARTS, help="this one only, in this process")
    parser.add_argument("--json", metavar="FILE", default="-")
    args = parser.parse_args()
    if args.kind in PARTS:
        print(json.dumps(of_part(args.kind, args.tokens)))
        return 0
    if args.kind:
        print(json.dumps(measured(args.kind, args.layers, args.tokens)))
        return 0
    result: dict[str, Any] = {
        **report.about(f"torch {torch.__version__}, one thread"),
    }
    for kind in KINDS + PARTS:
        settings = ["--kind", kind, "--layers", str(args.layers), "--tokens", str(args.tokens)]
        child = subprocess.run(
            [sys.executable, __file__, *settings], check=True, capture_output=True, text=True
        )
        result[kind] = json.loads(child.stdout)
    write_json(result, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
