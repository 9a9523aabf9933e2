"""`offramp codecs fit|measure`: codecs with parameters of a bundle's own, and what codecs cost in quality."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from offramp_common.cli import INTERRUPTED, OK, write_json
from offramp_common.errors import ConfigError

_WANTED = ("inner", "share", "least", "slots", "label", "rows", "bf16")  # arguments of fit.Wanted


def add_command(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "codecs", help="fit codecs to a bundle, and measure what codecs cost in quality"
    )
    actions = parser.add_subparsers(dest="action", required=True)
    _add_fit(actions)
    _add_measure(actions)


def _add_fit(actions: Any) -> None:
    parser = actions.add_parser(
        "fit",
        help="fit a codec to hidden states at one depth and write it into the bundle",
        description="Learns from the uncut model's answers on the rows' text, not from their labels. Stopped "
        "(Ctrl-C, kill), the same command goes on where it was.",
    )
    _shared(parser)
    parser.add_argument(
        "--split", type=int, required=True, metavar="K", help="layers before the cut"
    )
    parser.add_argument(
        "--codec",
        required=True,
        choices=["pruned", "pooled", "bottleneck"],
        help="tokens left out; stretches of tokens as their means; few means of few channels, trained",
    )
    parser.add_argument(
        "--bytes", type=int, required=True, metavar="N", help="most that a sample's states may take"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        metavar="T",
        help="of the longest sample; the bundle's limit by default",
    )
    _fit_settings(parser)
    parser.set_defaults(run=_fit)


def _fit_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--inner", default="", help="codec of what is left: int4 where pruned, else int8"
    )
    parser.add_argument(
        "--share", type=float, default=1.0, help="pruned: of a sample's tokens, kept at most"
    )
    parser.add_argument("--least", type=int, default=2, help="pruned: tokens kept in any case")
    parser.add_argument("--slots", type=int, default=16, help="bottleneck: its tokens")
    parser.add_argument("--label", default="", help="its name; by default what it is made of")
    parser.add_argument("--rows", type=int, default=2000, help="rows of text to fit to")
    parser.add_argument("--epochs", type=int, default=5, help="bottleneck: over the rows")
    parser.add_argument("--lr", type=float, default=1e-4, help="bottleneck: peak rate")
    parser.add_argument(
        "--bf16", action="store_true", help="fit in bfloat16: fast where the processor has it"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-minutes", type=float, help="stop then, to be continued")
    parser.add_argument("--work-dir", metavar="DIR", help="checkpoints; BUNDLE.codecs by default")


def _add_measure(actions: Any) -> None:
    parser = actions.add_parser(
        "measure",
        help="what codecs cost in quality on labelled rows; goes into the bundle, for planners",
    )
    _shared(parser)
    parser.add_argument(
        "--split", type=int, action="append", metavar="K", help="depths; all by default"
    )
    parser.add_argument(
        "--codec", action="append", metavar="LABEL", help="codecs; all of the bundle by default"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N rows")
    parser.set_defaults(run=_measure)


def _shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", help="the bundle's directory")
    parser.add_argument("--data", required=True, metavar="FILE", help="rows: .tsv, .csv or .jsonl")
    parser.add_argument("--columns", metavar="A,B,LABEL", help="names of text and label columns")
    parser.add_argument("--json", metavar="FILE", help="write JSON to FILE (- for standard output)")
    parser.add_argument("--threads", type=int, help="CPU threads")


def _subject(args: argparse.Namespace, limit: int | None) -> Any:
    from offramp_common.bundle import Bundle
    from offramp_train.cli import set_threads
    from offramp_train.evaluate import limited
    from offramp_train.measure import subject
    from offramp_train.tables import check_columns, read_rows

    set_threads(args.threads)
    columns = check_columns(tuple(args.columns.split(",")) if args.columns else ())
    rows = limited(read_rows(Path(args.data), columns), limit)
    return subject(Bundle.read(args.bundle), "torch", rows)


def _fit(args: argparse.Namespace) -> int:
    from offramp_train.checkpoint import Stopped, StopSignal
    from offramp_train.codec_fits.bottleneck import Learning
    from offramp_train.codec_fits.fit import Wanted, fit_codec, hidden_states, put_codec
    from offramp_train.progress import Report

    subject, report = _subject(args, None), Report()
    learning = Learning(args.epochs, args.lr, args.seed)
    given = {name: getattr(args, name) for name in _WANTED}
    tokens = args.tokens or subject.bundle.manifest.max_tokens
    wanted = Wanted(args.codec, args.split, args.bytes, tokens, learning=learning, **given)
    where = Path(args.work_dir) if args.work_dir else Path(str(args.bundle).rstrip("/") + ".codecs")
    work = where / f"{wanted.named}-{wanted.depth}"
    try:
        with StopSignal(args.max_minutes) as stop:
            batches = hidden_states(subject, [wanted.depth], wanted.rows, args.seed, report)
            codec, on_record = fit_codec(subject, wanted, batches, work, stop, report)
    except Stopped:
        report.say("stopped; the same command continues")
        return INTERRUPTED
    put_codec(subject.bundle, codec, on_record)
    size = codec.nbytes(wanted.tokens, codec.width)
    left = codec.tokens_left(wanted.tokens)
    report.say(
        f"{codec.name}: {wanted.tokens} tokens of {codec.width} channels take {size} bytes as {left} of "
        f"{codec.channels}; `offramp codecs measure` says what that costs in quality"
    )
    if args.json:
        told = {"name": codec.name, **codec.to_json(), "nbytes": size, "tokens_left": left}
        write_json(told | on_record, args.json)
    return OK


def _measure(args: argparse.Namespace) -> int:
    from offramp_train.codec_fits.cost import all_codecs, measure_codecs
    from offramp_train.codec_fits.fit import put_costs
    from offramp_train.metrics import metric_of
    from offramp_train.progress import Report

    subject = _subject(args, args.limit)
    bundle = subject.bundle
    depths = args.split or [depth for depth, cut in bundle.cuts.items() if not cut.integer]
    wrong = [depth for depth in depths if depth not in bundle.cuts or bundle.cuts[depth].integer]
    codecs = all_codecs(subject, depths, args.codec or ()) if not wrong else {}
    known = {label for depth in codecs for label in codecs[depth]}
    missing = [label for label in args.codec or () if label not in known]
    if wrong or missing:
        raise ConfigError(
            f"no hidden states travel by {(wrong or missing)[0]!r} here; depths: 1 to {bundle.n_layers - 1}, "
            f"codecs at those given: {', '.join(sorted(known))}"
        )
    measured, quality = measure_codecs(subject, codecs, Report())
    put_costs(bundle, measured)
    metric, _ = metric_of(bundle.manifest.task)
    print(_table(measured, metric, quality), file=sys.stderr)
    if args.json:
        told = {"uncut": {metric: quality}, "costs": [one.to_json() for one in measured]}
        write_json(told, args.json)
    return OK


def _table(measured: Sequence[Any], metric: str, quality: float) -> str:
    lines = [f"uncut: {metric} {100 * quality:.2f}, {measured[0].rows} rows of {measured[0].data}"]
    lines.append(
        f"{'split':>5}  {'codec':<16}{'bytes':>8}  {'tokens':>6}  {'points below':>12}  same"
    )
    for one in measured:
        same = "-" if one.same is None else f"{100 * one.same:.2f} %"
        lines.append(
            f"{one.depth:>5}  {one.codec:<16}{one.nbytes:>8.0f}  {one.tokens:>6.1f}  "
            f"{one.points:>+12.2f}  {same}"
        )
    return "\n".join(lines)
