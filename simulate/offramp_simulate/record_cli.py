"""`offramp record`: a bundle's table for the simulator."""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from offramp_common.cli import OK
from offramp_common.errors import ConfigError

_TEXTS_FOR_OVERHEAD = 60
_EVERY_S = 0.5


def add_record_command(subparsers: Any) -> None:
    """Declare `record` and its options; the parsed arguments carry `run`."""
    parser = subparsers.add_parser(
        "record",
        help="what each sample does at each exit and what it takes, in one file for `simulate`",
        description="Runs a labelled file through the bundle's graphs, times the device's layers and a real "
        "engine on this machine, and writes one file. Let the machine be quiet meanwhile.",
    )
    _add_options(parser.add_argument)
    parser.set_defaults(run=run_record)


def _add_options(add: Callable[..., Any]) -> None:
    add("bundle", type=Path, metavar="BUNDLE")
    data = "TSV or JSON lines: text and label"
    add("--data", type=Path, required=True, metavar="FILE", help=data)
    out = "where to (default: the bundle's name + .record.npz)"
    add("--out", type=Path, metavar="FILE", help=out)
    for name, default, what in (
        ("--limit", 2000, "N rows, evenly spaced through the file"),
        ("--points", 8, "operating points of the bundle's curve to run beside its own"),
        ("--repeats", 20, "of each timing"),
    ):
        add(name, type=int, default=default, metavar="N", help=f"{what} (default: %(default)s)")
    add(
        "--wall",
        action="store_true",
        help="this machine does nothing else: time by the wall clock instead of by processor time",
    )
    add(
        "--through",
        action="append",
        metavar="CODEC",
        help="measure what this codec does to answers, at every cut (default: the bundle's and int4+z)",
    )
    for name, what in (("device", "the device's layers and codecs"), ("engine", "the engine")):
        add(
            f"--{name}-times-of",
            type=Path,
            metavar="RECORD",
            help=f"do not time {what} here: take what another record of this bundle says",
        )


def run_record(args: argparse.Namespace) -> int:
    from offramp_common.bundle import Bundle

    for name in ("limit", "repeats"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.points < 0:
        raise ConfigError(f"--points {args.points}: must not be negative")
    bundle = Bundle.read(args.bundle)
    out = args.out or Path(f"{bundle.manifest.name}.record.npz")
    record = _made(bundle, args)
    record.save(out)
    print(
        f"{out}: {record.n_samples} samples, {len(record.header.points)} operating points, "
        f"{out.stat().st_size / 1024:.0f} KiB",
        file=sys.stderr,
    )
    return OK


def _made(bundle: Any, args: argparse.Namespace) -> Any:
    from offramp_edge.runtime import OnnxLayers, precisions
    from offramp_simulate import record_build
    from offramp_simulate.record import Header, Record

    m, say = bundle.manifest, _Progress()
    names = precisions(bundle)
    if "fp32" not in names or m.precision not in names:
        raise ConfigError(f"{bundle.path}: graphs of {names}; fp32 and {m.precision} are needed")
    timed = {
        name: None if path is None else _same(bundle, path)
        for name, path in (("device", args.device_times_of), ("engine", args.engine_times_of))
    }
    through = record_build.check_through(args.through or [m.codec, "int4+z"])
    labelled = record_build.read_labelled(args.data, bundle, args.limit)
    points = record_build.points_of(bundle, names, args.points)
    graphs = {name: OnnxLayers(bundle, name) for name in names}
    found = record_build.behaviour(
        bundle, dict(graphs), labelled, points, m.precision, through, say.rows
    )
    device, engine = _times(bundle, graphs, labelled.texts, args, timed, say)
    say.done()
    header = Header(
        m.name, m.method, m.n_layers, m.max_tokens, tuple(m.exits),
        tuple(bundle.digest(depth).hex() for depth in range(m.n_layers)),
        tuple(names), m.precision, m.split, m.codec, record_build.travelling(), through, points,
        labelled.name, device.machine or _machine(), device.overhead_ms, engine.gateway_ms,
        record_build.response_nbytes(bundle),
    )  # fmt: skip
    return Record(
        header, found.tokens_N, labelled.target_N, found.predicted_PNE, found.confidence_PNE,
        found.leaves_PKN, found.request_CON, found.through_QCNE, device.lengths_G,
        device.layer_ms_PLG, device.encode_ms_OG, device.deviation_J, engine.deviation_J,
        engine.batches_R, engine.engine_ms_RG, engine.engine_fixed_ms_R, record_build.manifest_bytes(bundle),
        engine.rest_s_S, engine.rest_ms_WS,
    )  # fmt: skip


def _times(
    bundle: Any, graphs: Any, every: list[Any], args: Any, timed: dict[str, Any], say: _Progress
) -> tuple[Any, Any]:
    """What the device and the engine take: measured here, where no other record says it."""
    import asyncio

    from offramp_simulate import record_engine, record_times

    texts = [text for text in every[:_TEXTS_FOR_OVERHEAD] if isinstance(text, str)]
    if timed["device"] is not None:
        device = record_times.device_from(timed["device"])
    else:
        device = record_times.device_times(bundle, graphs, texts, args.repeats, args.wall, say.step)
    if timed["engine"] is not None:
        return device, record_engine.engine_from(timed["engine"])
    engine = record_engine.engine_times(bundle, args.repeats, args.wall, say.step)
    return device, asyncio.run(engine)


def _same(bundle: Any, path: Path) -> Any:
    """A record of the same layers: only then do its times hold."""
    from offramp_simulate.record import Record

    record = Record.load(path)
    if record.header.digests[0] != bundle.digest(0).hex():
        raise ConfigError(
            f"{path}: a record of another {record.header.bundle!r} than {bundle.path}: record that one"
        )
    return record


def _machine() -> str:
    """The processor and the software, for people."""
    from importlib.metadata import version

    cpuinfo, model = Path("/proc/cpuinfo"), platform.processor() or platform.machine()
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), model)
    return f"{model}, one core; onnxruntime {version('onnxruntime')}, offramp {version('offramp')}"


class _Progress:
    """One line on standard error, rewritten."""

    def __init__(self) -> None:
        self._what, self._began, self._said = "", time.monotonic(), 0.0

    def rows(self, what: str, done: int, of: int) -> None:
        now = time.monotonic()
        if what != self._what:
            self._what, self._began = what, now
        if now - self._said >= _EVERY_S or done == of:
            left_s = (now - self._began) / done * (of - done)
            self._line(f"{what}: {done} of {of}, {left_s:.0f} s left for this")

    def step(self, what: str) -> None:
        self._line(what)

    def done(self) -> None:
        print(file=sys.stderr)

    def _line(self, text: str) -> None:
        self._said = time.monotonic()
        print(f"\r{text:<78}", end="", file=sys.stderr, flush=True)
