"""The bundles that benchmarks/codec_table.py measures: fine-tuned, with codecs fitted at several depths.

    python benchmarks/codec_bundles.py WORK --mpnet DIR [--minilm-sst2 BUNDLE] [--minilm-trec BUNDLE]
                                       [--only NAME,...] [--depths K,...]

--mpnet holds all-mpnet-base-v2 (config.json, model.safetensors, tokenizer.json); the MiniLM bundles are
those of `python benchmarks/methods/one_run.py sst2|trec full 0`, copied before they are written to. The
folder of data sets is $OFFRAMP_DATA, or ../shared/data. Each step is a command of offramp's and skipped
where its result is there, so the script can be stopped and run again.

MPNet learns from 5,000 phrases of SST-2 of five words and more, or from TREC, for one epoch. Codecs for SST-2
are fitted to 900 of those phrases and the first 128 tokens of 300 whole film reviews, whose labels play no
part; those for TREC to 900 of its training questions. All codecs of a bundle share one pass over that text;
else each fit is what `offramp codecs fit` does.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from offramp_common.bundle import Bundle
from offramp_train.checkpoint import StopSignal
from offramp_train.codec_fits.bottleneck import Learning
from offramp_train.codec_fits.fit import Wanted, fit_codec, hidden_states, put_codec
from offramp_train.measure import subject
from offramp_train.progress import Report
from offramp_train.tables import read_rows

_RECIPE = """
method = "deebert"
recipe = "self-distilled-joint"
seed = 0
max_tokens = 128
exits = [4, 8, 12]
split = 4
[settings]
pooling = "mean"
[training]
epochs = 1
batch = 16
lr = 5e-5
head_lr = 1e-3
warmup = 0.1
weight_decay = 0.01
freeze_embeddings = true
bf16 = true
"""
# label, kind, bytes, further settings
_CODECS: tuple[tuple[str, str, int, dict[str, Any]], ...] = (
    ("pruned-int4", "pruned", 20_000, {"share": 0.375, "least": 4}),
    ("pooled-int8", "pooled", 4_000, {}),
    ("bottleneck-4k", "bottleneck", 4_000, {}),
    ("bottleneck-2k", "bottleneck", 2_000, {}),
)
_LEARNING = Learning(epochs=2)
_DEPTHS = {"mpnet": (4, 8, 2, 6, 10), "minilm": (2, 4, 1, 3, 5)}


def rows_of(path: Path, least_words: int = 0) -> tuple[str, list[str]]:
    """The header and the rows with so many words."""
    header, *rows = path.read_text(encoding="utf-8").splitlines()
    return header, [row for row in rows if len(row.split("\t")[0].split()) >= least_words]


def drawn(source: Path, target: Path, rows: int | None, least_words: int = 0) -> None:
    header, found = rows_of(source, least_words)
    chosen = found if rows is None else random.Random(0).sample(found, rows)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n".join([header, *chosen]) + "\n", encoding="utf-8")


def prepare(work: Path, data: Path) -> dict[str, Path]:
    """The data that is trained on and fitted to, by set."""
    sst2, trec = work / "data" / "sst2", work / "data" / "trec"
    drawn(data / "sst2" / "train.tsv", sst2 / "train.tsv", 5000, 5)
    drawn(data / "sst2" / "dev.tsv", sst2 / "dev.tsv", 600, 5)
    drawn(data / "sst2" / "test.tsv", sst2 / "test.tsv", None)
    _, phrases = rows_of(sst2 / "train.tsv")
    _, reviews = rows_of(data / "movie_reviews_long" / "train.tsv")
    rng = random.Random(0)
    mixed = [*rng.sample(phrases, 900), *rng.sample(reviews, 300)]
    fit = work / "data" / "fit-sst2.tsv"
    fit.write_text("\n".join(["text\tlabel", *mixed]) + "\n", encoding="utf-8")
    drawn(data / "trec_question_type" / "train.tsv", trec.with_name("fit-trec.tsv"), 900)
    return {"sst2": sst2, "trec": data / "trec_question_type"}


def offramp(*words: object) -> None:
    print("offramp", *words, file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "offramp_common", *map(str, words)]
    subprocess.run(command, check=True)


def train(work: Path, name: str, backbone: Path, data: Path) -> None:
    recipe = work / "mpnet.toml"
    recipe.write_text(_RECIPE, encoding="utf-8")
    offramp(
        *("train", "--config", recipe, "--backbone", backbone, "--data", data),
        *("--out", work / name, "--name", name, "--threads", 1),
    )


def fit(work: Path, name: str, depths: tuple[int, ...]) -> None:
    """What the bundle lacks of _CODECS at these depths."""
    missing = [
        Wanted(kind, depth, nbytes, 128, label=label, bf16=True, learning=_LEARNING, **more)
        for depth in depths
        for label, kind, nbytes, more in _CODECS
        if label not in Bundle.read(work / name).codecs(depth)
    ]
    if not missing:
        return
    report, text = Report(), read_rows(work / "data" / f"fit-{name.split('-')[1]}.tsv")
    whole = subject(Bundle.read(work / name), "torch", text)
    lacking = sorted({wanted.depth for wanted in missing})
    batches = hidden_states(whole, lacking, len(text), _LEARNING.seed, report)
    with StopSignal() as stop:
        for wanted in missing:
            report.say(f"{name}: {wanted.named} after {wanted.depth} layers")
            here = replace(whole, bundle=Bundle.read(work / name))
            folder = work / f"{name}.codecs" / f"{wanted.named}-{wanted.depth}"
            codec, on_record = fit_codec(here, wanted, batches, folder, stop, report)
            put_codec(here.bundle, codec, on_record)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path)
    default = Path(os.environ.get("OFFRAMP_DATA", "../shared/data"))
    parser.add_argument("--data", type=Path, default=default)
    parser.add_argument("--mpnet", type=Path, metavar="DIR")
    parser.add_argument("--minilm-sst2", type=Path, metavar="BUNDLE")
    parser.add_argument("--minilm-trec", type=Path, metavar="BUNDLE")
    parser.add_argument("--only", default="mpnet-sst2,mpnet-trec,minilm-sst2,minilm-trec")
    parser.add_argument("--depths", help="K,...: all that the table has by default")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sets = prepare(args.work, args.data)
    for name in args.only.split(","):
        family, data_set = name.split("-")
        given = args.mpnet if family == "mpnet" else getattr(args, name.replace("-", "_"))
        if not (args.work / name).is_dir():
            if given is None:
                parser.error(f"{args.work / name} is not there: give --{name} or --mpnet")
            if family == "mpnet":
                train(args.work, name, given, sets[data_set])
            else:
                shutil.copytree(given, args.work / name)
        depths: tuple[int, ...] = _DEPTHS[family]
        if args.depths:
            depths = tuple(int(depth) for depth in args.depths.split(","))
        fit(args.work, name, depths)
    return 0


if __name__ == "__main__":
    sys.exit(main())
