"""`offramp edge run` and `offramp edge serve`: their options, and the worker made from them."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offramp_edge.worker import EdgeWorker

_RUN = """\
Answers every line of the input: JSON ({"id", "text" or ["a", "b"], "label", "deadline_ms"}; all but
the text may be missing) or plain text; the first line decides which. Answers are JSON lines, written
as they come; a line that is no sample gives {"id", "line", "error"}, and the run goes on."""


def add_command(subparsers: Any) -> None:
    parser = subparsers.add_parser("edge", help="answer on this device, with a cloud behind it")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _add_run(actions)
    _add_serve(actions)


def _add_run(actions: Any) -> None:
    run = actions.add_parser(
        "run",
        help="answer a file or a stream of texts",
        description=_RUN,
        epilog="exit codes: 0 all answered, 1 some lines were no samples, 2 wrong arguments or files, "
        "130 interrupted",
    )
    _add_worker_options(run)
    run.add_argument("--input", default="-", metavar="FILE", help="- (default): standard input")
    run.add_argument("--output", default="-", metavar="FILE", help="- (default): standard output")
    run.add_argument("--unordered", action="store_true", help="write answers as they finish")
    run.add_argument(
        "--provisional",
        action="store_true",
        help='for a sample that is sent, first a line with the answer of this device ("provisional": true); '
        "as --unordered",
    )
    run.add_argument(
        "--spool-wait",
        type=float,
        metavar="S",
        help="after the input's end wait so long for the spool to empty",
    )
    run.add_argument("--json", metavar="FILE", help="write the summary as JSON (- for stdout)")
    run.add_argument(
        "--explain",
        action="store_true",
        help="at the end, the table by which samples were kept here or sent (also into --json)",
    )
    run.set_defaults(run=_run)


def _add_serve(actions: Any) -> None:
    serve = actions.add_parser(
        "serve",
        help="a local HTTP service for the device's apps",
        description="Open Inference Protocol v2 (/v2/models/NAME/infer) and /metrics.",
    )
    _add_worker_options(serve)
    serve.add_argument(
        "--listen", default="127.0.0.1:8080", metavar="HOST:PORT", help="default: 127.0.0.1:8080"
    )
    serve.set_defaults(run=_serve)


def _add_worker_options(parser: argparse.ArgumentParser) -> None:
    cloud = parser.add_argument_group("where the deep layers run")
    parser.add_argument("--bundle", required=True, metavar="DIR", help="the model's bundle")
    cloud.add_argument("--cloud", metavar="HOST:PORT", help="without it all layers run here")
    cloud.add_argument("--ca", metavar="FILE", help="TLS: whom to trust (PEM)")
    cloud.add_argument("--cert", metavar="FILE", help="TLS: this device's certificate (PEM)")
    cloud.add_argument("--key", metavar="FILE", help="TLS: its private key (PEM)")
    cloud.add_argument("--insecure", action="store_true", help="no TLS; needless on loopback")
    how = parser.add_argument_group("how to answer (all of it, and more, also in --config)")
    how.add_argument("--config", metavar="FILE.toml", help="settings; options here win")
    how.add_argument("--deadline-ms", type=float, metavar="N", help="answer within so long")
    plans = (
        "where samples are cut: auto (default), fixed (with --split), or by a rule to compare with"
    )
    how.add_argument("--plan", metavar="NAME", help=f"{plans} (neurosurgeon, spinn, splitee)")
    how.add_argument("--split", type=int, metavar="K", help="layers run here; 0 sends the input")
    how.add_argument(
        "--min-split", type=int, metavar="K", help="1: the input never leaves this device"
    )
    codecs = "of hidden states: fp32, fp16, bf16, int8, int4, int8+z, int4+z"
    how.add_argument("--codec", metavar="NAME", help=codecs)
    how.add_argument("--precision", metavar="NAME", help="of the layers here: fp32, int8")
    how.add_argument("--no-exits", action="store_true", help="no sample leaves early")
    how.add_argument(
        "--spool",
        metavar="DIR",
        help="keep samples without a complete answer there until the cloud is back; final answers are "
        "appended to DIR/answers.jsonl, each once",
    )
    how.add_argument(
        "--spool-mb", type=float, metavar="N", help="beyond it the oldest are dropped (default: 64)"
    )
    how.add_argument("--logits", action="store_true", help="answers carry their logits")
    parser.add_argument("--verbose", action="store_true", help="a line for each answer to stderr")
    parser.add_argument(
        "--trace",
        metavar="SINK",
        help="note where samples' time goes: a FILE for JSON lines, or otlp for a collector "
        "(OTEL_EXPORTER_OTLP_ENDPOINT)",
    )


_PLANNED = ("plan", "split", "min_split", "codec")


def worker_from(args: argparse.Namespace) -> EdgeWorker:
    """Raises ConfigError, in words of the options."""
    from offramp_edge.settings import EdgeSettings
    from offramp_edge.worker import EdgeWorker

    settings = EdgeSettings.from_toml(args.config) if args.config else EdgeSettings()
    given = {
        name: getattr(args, name)
        for name in (*_PLANNED, "deadline_ms", "precision", "spool", "spool_mb")
        if getattr(args, name) is not None
    }
    given |= {"exits": False} if args.no_exits else {}
    given |= {"logits": True} if args.logits else {}
    tls = {name: getattr(args, name) for name in ("ca", "cert", "key", "insecure")}
    return EdgeWorker(args.bundle, args.cloud, settings=settings, **tls, **given)


@contextmanager
def traced(worker: EdgeWorker, sink: str | None) -> Iterator[None]:
    """Note the worker's samples meanwhile, where that is asked for. Raises ConfigError as tracer_to."""
    from offramp_common.tracing import tracer_to

    with tracer_to(sink, "offramp-edge") as tracer:
        worker.agent.tracer = tracer
        yield


def log_to_stderr(verbose: bool) -> None:
    import logging
    import os

    # What gRPC's core says of a lost connection, the worker says once and in its own words.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    logging.getLogger("offramp.edge").setLevel(logging.DEBUG if verbose else logging.INFO)


def _run(args: argparse.Namespace) -> int:
    from offramp_edge.run_cli import run

    return run(args)


def _serve(args: argparse.Namespace) -> int:
    from offramp_edge.serve_cli import serve

    return serve(args)
