"""`offramp train`, `offramp evaluate` and `offramp calibrate`."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from offramp_common.cli import INTERRUPTED, OK, write_json
from offramp_common.errors import ConfigError

_FLAGS = ("name", "backbone", "method", "recipe", "seed", "max_tokens", "task")
_TRAINING_FLAGS = ("epochs", "batch", "lr")


def add_train_command(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "train",
        help="make a bundle from a pretrained backbone and labelled text",
        description="Trains, saves, exports the device's graphs, calibrates on dev, measures on test. "
        "Stopped (Ctrl-C, kill), the same command goes on where it was. Settings: docs/training.md.",
    )
    parser.add_argument(
        "--data", required=True, metavar="DIR", help="train, dev, test files (or one file)"
    )
    parser.add_argument("--out", required=True, metavar="BUNDLE", help="directory to make")
    parser.add_argument("--config", metavar="F.toml", help="all settings; flags win over it")
    parser.add_argument(
        "--backbone", metavar="PATH|NAME", help="checkpoint; pkg:NAME for a weights package"
    )
    parser.add_argument("--method", help="exit method (offramp methods); deebert by default")
    parser.add_argument("--recipe", help="training recipe; the method's own by default")
    parser.add_argument("--name", help="what clients ask for; the directory's name by default")
    parser.add_argument("--task", choices=["classification", "regression"])
    parser.add_argument(
        "--columns", metavar="A,B,LABEL", help="names of the text and label columns"
    )
    parser.add_argument("--epochs", type=int, help="of each stage")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--max-minutes", type=float, help="stop then, to be continued")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--work-dir", metavar="DIR", help="checkpoints; OUT.part by default")
    parser.add_argument(
        "--restart", action="store_true", help="throw a stopped run's checkpoint away"
    )
    parser.add_argument(
        "--keep-work", action="store_true", help="keep the checkpoint of the finished training"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace BUNDLE if it is there")
    parser.set_defaults(run=_train)


def _train(args: argparse.Namespace) -> int:
    import torch

    from offramp_train.build import Request, resolve_config, train_bundle
    from offramp_train.checkpoint import Stopped
    from offramp_train.config import read_table
    from offramp_train.progress import Report

    set_threads(args.threads)
    _quiet_libraries()
    table = read_table(Path(args.config)) if args.config else {}
    flags: dict[str, Any] = {f: getattr(args, f) for f in _FLAGS if getattr(args, f) is not None}
    training = {f: getattr(args, f) for f in _TRAINING_FLAGS if getattr(args, f) is not None}
    if args.columns:
        flags["columns"] = args.columns.split(",")
    config = resolve_config(table, {**flags, "training": training}, where=args.config or "settings")
    report = Report()
    request = Request(
        config,
        Path(args.data),
        Path(args.out),
        _command(args, config.backbone),
        None if args.work_dir is None else Path(args.work_dir),
        args.overwrite,
        args.restart,
        args.max_minutes,
        args.keep_work,
    )
    report.say(f"{torch.get_num_threads()} threads, checkpoints in {request.work_dir}")
    try:
        bundle = train_bundle(request, report)
    except Stopped:
        report.say("stopped; the same command continues")
        return INTERRUPTED
    report.say(f"{bundle.path}: done")
    return OK


def _command(args: argparse.Namespace, backbone: str) -> str:
    """The command for the card, without this machine's directories."""

    def shown(value: str) -> str:
        return Path(value).name if Path(value).is_absolute() else value

    words = ["offramp", "train", "--data", shown(args.data), "--out", shown(args.out)]
    if args.config:
        words += ["--config", shown(args.config)]
    for flag in (*_FLAGS, "columns", *_TRAINING_FLAGS, "threads"):
        value = getattr(args, flag)
        if value is not None:
            value = shown(value) if flag == "backbone" else str(value)
            words += ["--" + flag.replace("_", "-"), value]
    return shlex.join(words)


def add_evaluate_command(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "evaluate",
        help="run a bundle with exits on labelled text: quality against compute, exit by exit",
    )
    _data_arguments(parser)
    parser.add_argument(
        "--precision", choices=["fp32", "int8", "torch"], help="the bundle's own by default"
    )
    parser.add_argument(
        "--oos-label", default="oos", help="out-of-scope label, if the bundle has one"
    )
    parser.add_argument(
        "--plot", metavar="F.svg", help="picture of quality against mean depth: .svg, .png or .pdf"
    )
    parser.set_defaults(run=_evaluate)


def _evaluate(args: argparse.Namespace) -> int:
    from offramp_common.bundle import Bundle
    from offramp_train.curve_plot import check_picture
    from offramp_train.evaluate import evaluate, table_of
    from offramp_train.progress import Report
    from offramp_train.quality import plot

    set_threads(args.threads)
    if args.plot:
        check_picture(args.plot)
    bundle = Bundle.read(args.bundle)
    rows = _rows(args)
    result = evaluate(
        bundle, rows, args.precision or bundle.manifest.precision, args.oos_label, Report()
    )
    print(table_of(result), file=sys.stderr)
    if args.json:
        write_json(result, args.json)
    if args.plot:
        metric = next(iter(result["quality"]))
        title = f"{result['bundle']}: {metric} against depth ({rows.path.name})"
        plot(Path(args.plot), title, metric, result["n_layers"], result["curve"])
    return OK


def add_calibrate_command(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "calibrate",
        help="find a bundle's operating point on labelled text and write it into the bundle",
    )
    _data_arguments(parser)
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument(
        "--max-drop", type=float, metavar="X", help="points of quality that may be lost"
    )
    goal.add_argument(
        "--mean-depth", type=float, metavar="D", help="layers that a row may run on average"
    )
    goal.add_argument(
        "--epsilon",
        type=float,
        metavar="E",
        help="risk that an answer is not the full model's, guaranteed, for methods that offer it",
    )
    goal.add_argument(
        "--forecast-only",
        action="store_true",
        help="keep the operating point; only record what confidence says of later exits",
    )
    parser.add_argument(
        "--margin", type=float, default=0.0, help="points of --max-drop kept in hand"
    )
    parser.add_argument(
        "--common", action="store_true", help="one value for all exits, rather than one for each"
    )
    parser.add_argument("--precision", choices=["fp32", "int8", "all"], default="all")
    parser.add_argument(
        "--label-weights",
        metavar="LABEL=W,...",
        help="weight rows by label, where the file's mix is not the real one",
    )
    parser.set_defaults(run=_calibrate)


def _calibrate(args: argparse.Namespace) -> int:
    from offramp_common.bundle import Bundle
    from offramp_train.calibrate import Goal
    from offramp_train.progress import Report
    from offramp_train.recalibrate import recalibrate

    set_threads(args.threads)
    if args.forecast_only:
        from offramp_train.foresight import record_forecasts

        record_forecasts(Bundle.read(args.bundle), _rows(args), args.precision, Report())
        return OK
    goal = Goal(args.max_drop, args.mean_depth, args.margin, not args.common, args.epsilon)
    result = recalibrate(
        Bundle.read(args.bundle),
        _rows(args),
        goal,
        args.precision,
        _weights(args.label_weights),
        Report(),
    )
    if args.json:
        write_json(result, args.json)
    return OK


def _data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", help="the bundle's directory")
    parser.add_argument(
        "--data", required=True, metavar="FILE", help="labelled rows: .tsv, .csv or .jsonl"
    )
    parser.add_argument(
        "--columns", metavar="A,B,LABEL", help="names of the text and label columns"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N rows")
    parser.add_argument("--json", metavar="FILE", help="write JSON to FILE (- for standard output)")
    parser.add_argument("--threads", type=int, help="CPU threads of the torch runtime")


def _rows(args: argparse.Namespace) -> Any:
    from offramp_train.evaluate import limited
    from offramp_train.tables import check_columns, read_rows

    columns = check_columns(tuple(args.columns.split(",")) if args.columns else ())
    return limited(read_rows(Path(args.data), columns), args.limit)


def _weights(text: str | None) -> dict[str, float]:
    out = {}
    for part in text.split(",") if text else []:
        label, _, value = part.rpartition("=")
        try:
            out[label] = float(value)
        except ValueError:
            raise ConfigError(f"--label-weights {part!r}: write LABEL=WEIGHT,...") from None
    return out


def _quiet_libraries() -> None:
    """transformers draws bars of its own for what takes a blink."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]


def set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        if threads < 1:
            raise ConfigError(f"--threads {threads}: must be at least 1")
        torch.set_num_threads(threads)
