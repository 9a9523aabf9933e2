"""`offramp bundle show|verify|digest BUNDLE`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from offramp_common.bundle import Bundle
from offramp_common.cli import CHECK_FAILED, OK, write_json
from offramp_common.errors import BundleError


def add_command(subparsers: Any) -> None:
    parser = subparsers.add_parser("bundle", help="look at a bundle, check it, print its digests")
    actions = parser.add_subparsers(dest="action", required=True)
    for action, text in (
        ("show", "what it is: model, method, exits, operating points, curve"),
        ("verify", "read every byte and compare it with the manifest"),
        ("digest", "what two tiers compare, for each depth at which the model may be cut"),
    ):
        sub = actions.add_parser(action, help=text)
        sub.add_argument("bundle", metavar="BUNDLE", help="the bundle's directory")
        sub.add_argument(
            "--json", metavar="FILE", help="write JSON to FILE (- for standard output)"
        )
        sub.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    bundle = Bundle.read(args.bundle)
    return {"show": _show, "verify": _verify, "digest": _digest}[args.action](bundle, args.json)


def _show(bundle: Bundle, json_path: str | None) -> int:
    m = bundle.manifest
    nbytes = sum(p.stat().st_size for p in bundle.path.rglob("*") if p.is_file())
    if json_path:
        write_json({**m.to_json(), "nbytes": nbytes}, json_path)
        return OK
    labels = f"{len(m.task.labels)} labels" if m.task.labels else "a number"
    lines = [
        f"{m.name}: {m.task.kind} ({labels}{', sentence pairs' if m.task.pair else ''})",
        f"  model      {m.family}, {m.n_layers} layers, at most {m.max_tokens} tokens, {nbytes / 1e6:.1f} MB",
        f"  method     {m.method} {dict(m.settings)}, exits after layers {list(m.exits)}",
        f"  device     precision {m.precision}, split {m.split}, codec {m.codec}",
    ]
    for precision, knobs in m.operating_points.items():
        shown = "; ".join(f"{k} = {', '.join(f'{v:.4g}' for v in vs)}" for k, vs in knobs.items())
        lines.append(f"  {precision:<10} {shown}")
    for point in m.curve:
        if point.get("kind") == "operating point":
            told = {k: v for k, v in point.items() if k not in ("kind", "precision", "leaving")}
            lines.append(f"  measured   {point['precision']}: {_words(told)}")
            lines.append(f"             leaving at {_words(point['leaving'])}")
    lines += _codec_lines(bundle)
    print("\n".join(lines), file=sys.stderr)
    return OK


def _codec_lines(bundle: Bundle) -> list[str]:
    """The codecs fitted to the bundle, and what any codec was measured to cost."""
    longest = bundle.manifest.max_tokens
    lines = [
        f"  codec      {codec.name}: {codec.nbytes(longest, codec.width)} bytes for {longest} tokens"
        for codec in bundle.fitted.values()
    ]
    for one in bundle.manifest.codec_costs:
        same = "" if one.same is None else f", {100 * one.same:.1f} % answered the same"
        lines.append(
            f"  costs      {one.codec} after {one.depth} layers: {one.points:+.2f} points below the uncut "
            f"model{same} ({one.data}, {one.rows} rows)"
        )
    return lines


def _words(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in values.items())


def _verify(bundle: Bundle, json_path: str | None) -> int:
    try:
        bundle.verify()
        problem = None
    except BundleError as error:
        problem = str(error)
    if json_path:
        write_json({"ok": problem is None, "problem": problem}, json_path)
    else:
        print(problem or f"{bundle.path}: all files are as they were written", file=sys.stderr)
    return OK if problem is None else CHECK_FAILED


def _digest(bundle: Bundle, json_path: str | None) -> int:
    digests = {depth: bundle.digest(depth).hex() for depth in range(bundle.n_layers)}
    if json_path:
        write_json(digests, json_path)
    else:
        for depth, digest in digests.items():
            print(f"{digest}  layers {depth} to {bundle.n_layers}")
    return OK
