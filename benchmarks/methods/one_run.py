"""One run of the comparison, in a process of its own: trained, measured, its result written.

    python benchmarks/methods/one_run.py SET ENTRY SEED --work FOLDER --data FOLDER

compare.py starts it. Asked to stop (SIGTERM, Ctrl-C) it saves a checkpoint, and goes on from there the
next time.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from comparison import BACKBONE, N_LAYERS, SETS, DataSet, Run, recipe_of
from measures import measure, with_settings

from offramp_common.bundle import MANIFEST, Bundle
from offramp_common.cli import write_json
from offramp_common.errors import ConfigError
from offramp_train.build import Request, resolve_backbone, resolve_config, train_bundle
from offramp_train.checkpoint import Stopped
from offramp_train.data import read_splits
from offramp_train.progress import Report

STOPPED = 75  # EX_TEMPFAIL: not done, the same command goes on


def trained(run: Run, work: Path, data: Path, report: Report) -> Bundle:
    """The run's bundle, without graphs; the one that is there, or a stopped training's continued."""
    folder = run.folder(work)
    out = folder / "bundle"
    if not (out / MANIFEST).is_file():
        where = f"{run.set}/{run.name}"
        table = run.table()
        if run.layers < N_LAYERS:
            table["backbone"] = str(truncated_backbone(work / "backbones", run.layers))
        config = resolve_config(table, where=where)
        request = Request(config, data, out, "benchmarks/methods/compare.py", finish=False)
        began = time.process_time()
        try:
            train_bundle(request, report)
        finally:
            _add_seconds(folder, time.process_time() - began)
    return Bundle.read(out)


def truncated_backbone(folder: Path, layers: int) -> Path:
    """The backbone's lowest layers as a checkpoint of its own."""
    from transformers import AutoModel

    path, whole = folder / f"{layers}-layers", Path(resolve_backbone(BACKBONE))
    if not path.is_dir():
        model = AutoModel.from_pretrained(whole, num_hidden_layers=layers)
        made = path.with_name(f"{path.name}.{random.SystemRandom().getrandbits(32):08x}")
        model.save_pretrained(made)
        (made / "tokenizer.json").write_bytes((whole / "tokenizer.json").read_bytes())
        try:
            made.rename(path)
        except OSError:  # a run beside this one was faster
            if not path.is_dir():
                raise
    return path


def data_folder(chosen: DataSet, data: Path, work: Path) -> Path:
    """The set's folder; a copy with fewer training rows where the budget says so."""
    source = data / chosen.folder
    if not chosen.rows:
        return source
    folder = work / "data" / f"{chosen.folder}-{chosen.rows}"
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.glob("*.tsv")):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        if path.stem == "train":
            order = list(range(1, len(lines)))
            random.Random(f"{chosen.name} {chosen.rows}").shuffle(order)
            lines = [lines[0], *(lines[i] for i in sorted(order[: chosen.rows]))]
        new = folder / f"{path.name}.{random.SystemRandom().getrandbits(32):08x}"
        new.write_text("".join(lines), encoding="utf-8")
        new.replace(folder / path.name)
    return folder


def result_of(run: Run, work: Path, data: Path, report: Report) -> dict[str, Any]:
    """Train and measure. What goes wrong in one run is that run's result."""
    folder = run.folder(work)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        data = data_folder(SETS[run.set], data, work)
        bundle = trained(run, work, data, report)
        training = bundle.manifest.training
        splits = read_splits(
            data,
            task=SETS[run.set].kind,
            dev_share=training["settings"]["dev_share"],
            seed=run.seed,
        )
        began = time.process_time()
        measured = {run.entry: measure(bundle, splits, report)}
        for name, settings in run.variants.items():
            other = with_settings(bundle, settings, folder / f"bundle {name}")
            measured[f"{run.entry} ({name})"] = measure(other, splits, report)
    except ConfigError as error:
        return {"status": "refused", "reason": str(error)}
    except Exception as error:  # noqa: BLE001 - the other runs must go on, and this one is on record
        trace = traceback.format_exc()
        print(trace, file=sys.stderr)
        where = trace.strip().splitlines()[-12:]
        return {"status": "failed", "reason": f"{type(error).__name__}: {error}", "trace": where}
    return {
        "status": "done",
        "training": {
            "cpu_seconds": round(_add_seconds(folder, 0.0), 1),
            "epochs": SETS[run.set].epochs,
            "stages": len({e["stage"] for e in training["history"] if "epoch" in e}),
            "rows_passed": sum(_last_of_stage(training["history"])),
            "rows": training["rows"],
            "settings": training["settings"],
            "data_sha256": training["data_sha256"],
            "history": training["history"],
            "software": training["software"],
        },
        "measuring_cpu_seconds": round(time.process_time() - began, 1),
        "measured": measured,
    }


def _last_of_stage(history: list[dict[str, Any]]) -> list[int]:
    """Rows that each stage passed forward: the count runs on from epoch to epoch."""
    last = {entry["stage"]: entry["rows_passed"] for entry in history if "rows_passed" in entry}
    return list(last.values())


def _add_seconds(folder: Path, seconds: float) -> float:
    """CPU seconds of training in all starts of the run, these added."""
    path = folder / "seconds.json"
    total = (json.loads(path.read_text()) if path.is_file() else 0.0) + seconds
    path.write_text(json.dumps(total))
    return float(total)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("set", choices=list(SETS))
    parser.add_argument("entry")
    parser.add_argument("seed", type=int)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    args = parser.parse_args()
    import report
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    torch.set_num_threads(1)
    run, began = Run(args.set, args.entry, args.seed), time.monotonic()
    commit = report.commit()  # of the code that is imported now, not when the run ends
    head = {
        "set": run.set,
        "entry": run.entry,
        "method": run.method,
        "recipe": recipe_of(run),
        "seed": run.seed,
        "digest": run.digest(),
        "code": run.code(),
        "commit": commit,
        "machine": report.machine(f"torch {torch.__version__}", "one thread"),
    }
    try:
        found = result_of(run, args.work, args.data, Report())
    except Stopped:
        return STOPPED
    run.result.parent.mkdir(parents=True, exist_ok=True)
    when = datetime.now(UTC).isoformat(timespec="seconds")
    done = {**head, "ended": when, "seconds": round(time.monotonic() - began), **found}
    write_json(done, str(run.result))
    print(f"{run.set}/{run.name}: {found['status']} {found.get('reason', '')}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
