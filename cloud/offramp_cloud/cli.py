"""`offramp cloud serve`: the cloud tier on this machine, or placed in a Ray cluster."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from offramp_common.errors import ConfigError

_EPILOG = """\
Standard output gets one JSON line when requests are taken: {"listening", "bundles", "pid",
"replica_pids", "metrics"}. SIGTERM and SIGINT refuse new requests, finish those at work (--drain-s),
stop Ray if it was started here, and exit with 0 (SIGTERM) or 130 (SIGINT); a second signal skips the
waiting.
"""


def add_command(subparsers: Any) -> None:
    cloud = subparsers.add_parser("cloud", help="the cloud tier")
    actions = cloud.add_subparsers(dest="action", metavar="ACTION", required=True)
    serve = actions.add_parser(
        "serve",
        help="answer devices over gRPC",
        description="Finish the deep layers for devices, over gRPC.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serve.add_argument(
        "--bundle", action="append", default=[], type=Path, metavar="DIR", help="may be repeated"
    )
    serve.add_argument(
        "--listen", default="127.0.0.1:7443", metavar="HOST:PORT", help="port 0: any"
    )
    _add_security(serve)
    _add_placement(serve)
    _add_limits(serve)
    serve.add_argument("--metrics", metavar="HOST:PORT", help="serve Prometheus metrics there")
    serve.add_argument("--json-log", action="store_true", help="log lines as JSON objects")
    serve.set_defaults(run=run_serve)


def run_serve(args: argparse.Namespace) -> int:
    """Raises ConfigError for what can be seen to be wrong before anything is started."""
    # What gRPC's core prints we report ourselves; Ray starts processes beside gRPC's threads, and it
    # would warn of each. Both are read when grpc is imported.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    from offramp_cloud.gateway import is_loopback
    from offramp_cloud.serve import serve

    if bool(args.bundle) == bool(args.attach):
        raise ConfigError("give --bundle DIR, or --attach APP for what is deployed already")
    if args.attach and not args.address:
        raise ConfigError("--attach needs --address: the Ray in which the application runs")
    if args.local and (args.address or args.attach or args.replicas != 1):
        raise ConfigError(
            "--local runs in this process: leave out --address, --attach and --replicas"
        )
    if args.require_client_cert and not args.tls_dir:
        raise ConfigError("--require-client-cert needs --tls-dir")
    if args.insecure and args.tls_dir:
        raise ConfigError("--insecure and --tls-dir exclude each other")
    if not (args.tls_dir or args.insecure or is_loopback(args.listen)):
        raise ConfigError(
            f"--listen {args.listen} can be reached from other machines: give --tls-dir DIR "
            "(`offramp certs init DIR` makes one), or --insecure to send everything in plain text"
        )
    return serve(args)


def _add_security(serve: argparse.ArgumentParser) -> None:
    group = serve.add_argument_group("security")
    group.add_argument(
        "--tls-dir", type=Path, metavar="DIR", help="certificates, as `offramp certs init` makes"
    )
    group.add_argument(
        "--require-client-cert", action="store_true", help="let only devices with a certificate in"
    )
    group.add_argument(
        "--insecure", action="store_true", help="plain text on other than loopback addresses"
    )


def _add_placement(serve: argparse.ArgumentParser) -> None:
    group = serve.add_argument_group("placement")
    group.add_argument(
        "--local", action="store_true", help="engines in this process, without Ray (starts faster)"
    )
    group.add_argument(
        "--address", metavar="RAY", help="join this Ray cluster (default: start one)"
    )
    group.add_argument(
        "--attach",
        action="append",
        default=[],
        metavar="APP",
        help="only a gateway, before this Serve application in the Ray at --address",
    )
    group.add_argument(
        "--replicas", type=_positive, default=1, metavar="N", help="per bundle (default 1)"
    )
    group.add_argument(
        "--threads", type=_positive, default=1, metavar="N", help="torch's, per replica (default 1)"
    )


def _add_limits(serve: argparse.ArgumentParser) -> None:
    group = serve.add_argument_group("limits")
    for flag, default, help_text in (
        ("--max-batch", 32, "samples run together"),
        ("--max-waiting", 1024, "samples in a replica, waiting or running"),
        ("--max-rows", 256, "samples in one frame"),
        ("--max-frame-bytes", 8 * 2**20, "bytes of one frame"),
        ("--max-rpcs", 1000, "calls and streams at once"),
    ):
        group.add_argument(
            flag, type=_positive, default=default, metavar="N", help=f"{help_text} ({default})"
        )
    group.add_argument(
        "--drain-s",
        type=_seconds,
        default=20.0,
        metavar="S",
        help="longest wait for requests at work when stopping (20)",
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: must be at least 1")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be a number of seconds, 0 or more")
    return value
