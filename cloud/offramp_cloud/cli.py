"""`offramp cloud serve`: the cloud tier on this machine, or placed in a Ray cluster. `offramp cloud
deploy`: another version of a bundle, beside those that are served."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from offramp_common.errors import ConfigError

_DRAIN = "longest wait for requests at work when stopping (20)"
_EPILOG = """\
Standard output gets one JSON line when requests are taken: {"listening", "bundles", "pid",
"replica_pids", "metrics", "health"}. SIGTERM and SIGINT refuse new requests, finish those at work
(--drain-s), stop Ray if it was started here, and exit with 0 (SIGTERM) or 130 (SIGINT); a second signal
skips the waiting.
"""


_DEPLOY = """\
Place a bundle in a Ray cluster that serves already. Gateways there (`cloud serve --attach`) find it by
themselves, and give each device the version that it holds. A bundle that does not start, fails its own
examination or its first requests never replaces anything: it is taken back, and the exit code is 1.
"""


def add_command(subparsers: Any) -> None:
    cloud = subparsers.add_parser("cloud", help="the cloud tier")
    actions = cloud.add_subparsers(dest="action", metavar="ACTION", required=True)
    _add_serve(actions)
    _add_deploy(actions)


def _add_deploy(actions: Any) -> None:
    deploy = actions.add_parser(
        "deploy", help="roll a version of a bundle in, beside the one before", description=_DEPLOY
    )
    deploy.add_argument("bundle", type=Path, metavar="BUNDLE")
    deploy.add_argument("--address", required=True, metavar="RAY", help="the Ray cluster")
    _add_replicas(deploy)
    deploy.add_argument(
        "--keep", type=_positive, default=2, metavar="N", help="versions that stay (default 2)"
    )
    deploy.add_argument(
        "--watch-s",
        type=_amount,
        default=10.0,
        metavar="S",
        help="how long its first requests are watched before older versions go (10)",
    )
    _add_engine_limits(deploy)
    deploy.add_argument("--drain-s", type=_amount, default=20.0, metavar="S", help=_DRAIN)
    deploy.add_argument("--trace", metavar="SINK", help="as of `cloud serve`, of its replicas")
    deploy.add_argument("--json", metavar="FILE", help="write what became of it (- for stdout)")
    deploy.set_defaults(run=run_deploy)


def _add_serve(actions: Any) -> None:
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
    _add_outside(serve)
    serve.add_argument("--json-log", action="store_true", help="log lines as JSON objects")
    serve.set_defaults(run=run_serve)


def _add_outside(serve: argparse.ArgumentParser) -> None:
    group = serve.add_argument_group("seen from outside")
    group.add_argument("--metrics", metavar="HOST:PORT", help="serve Prometheus metrics there")
    group.add_argument(
        "--health",
        metavar="HOST:PORT",
        help="answer the standard health service there, too, in plain text (for probes without TLS)",
    )
    group.add_argument(
        "--trace",
        metavar="SINK",
        help="note where requests' time goes: a FILE for JSON lines (for replicas, on their nodes), "
        "or otlp for a collector (OTEL_EXPORTER_OTLP_ENDPOINT)",
    )


def run_deploy(args: argparse.Namespace) -> int:
    _prepare_grpc()
    from offramp_cloud.rollout import deploy

    return deploy(args)


def _prepare_grpc() -> None:
    """What gRPC reads from the environment when it is imported, and offers no other way to."""
    # What its core prints we report ourselves; Ray starts processes beside gRPC's threads, and it
    # would warn of each.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    # TLS 1.3 alone, whose ciphers the list does not touch: of TLS 1.2 it leaves one that needs a
    # pre-shared key, which nobody has.
    os.environ.setdefault("GRPC_SSL_CIPHER_SUITES", "ECDHE-PSK-CHACHA20-POLY1305")


def run_serve(args: argparse.Namespace) -> int:
    """Raises ConfigError for what can be seen to be wrong before anything is started."""
    _prepare_grpc()
    from offramp_cloud.gateway import is_loopback
    from offramp_cloud.serve import serve

    if bool(args.bundle) == bool(args.attach):
        raise ConfigError("give --bundle DIR, or --attach NAME for what is deployed already")
    if args.attach and not args.address:
        raise ConfigError("--attach needs --address: the Ray in which the application runs")
    if args.local and (args.address or args.attach or args.replicas != 1):
        raise ConfigError(
            "--local runs in this process: leave out --address, --attach and --replicas"
        )
    _check_security(args, is_loopback(args.listen))
    return serve(args)


def _check_security(args: argparse.Namespace, on_loopback: bool) -> None:
    if args.insecure and args.tls_dir:
        raise ConfigError("--insecure and --tls-dir exclude each other")
    if (args.anonymous or args.revoked) and not args.tls_dir:
        raise ConfigError("--anonymous and --revoked need --tls-dir")
    if not (args.tls_dir or args.insecure):
        raise ConfigError(
            "give --tls-dir DIR (`offramp certs init DIR` makes one, `offramp certs issue` devices' "
            "certificates), or --insecure for plain text on this machine"
        )
    if args.insecure and not (on_loopback or args.force_insecure):
        raise ConfigError(
            f"--listen {args.listen} can be reached from other machines: give --tls-dir DIR in place of "
            "--insecure, or --force-insecure too, where the network itself is private"
        )


def _add_security(serve: argparse.ArgumentParser) -> None:
    group = serve.add_argument_group(
        "security", "TLS 1.3, and a certificate of each device, unless said otherwise"
    )
    group.add_argument(
        "--tls-dir", type=Path, metavar="DIR", help="certificates, as `offramp certs init` makes"
    )
    group.add_argument(
        "--revoked",
        type=Path,
        metavar="FILE",
        help="serial numbers or a CRL, read again when it changes (default: DIR/revoked.txt)",
    )
    group.add_argument(
        "--anonymous", action="store_true", help="devices need no certificate of their own"
    )
    group.add_argument("--insecure", action="store_true", help="plain text, on loopback only")
    group.add_argument(
        "--force-insecure", action="store_true", help="with --insecure: on other addresses, too"
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
        metavar="NAME",
        help="only a gateway, before this bundle (or Serve application) in the Ray at --address, in "
        "all its versions",
    )
    _add_replicas(group)


def _add_replicas(group: Any) -> None:
    group.add_argument(
        "--replicas", type=_positive, default=1, metavar="N", help="per bundle (default 1)"
    )
    group.add_argument(
        "--max-replicas",
        type=_positive,
        default=0,
        metavar="N",
        help="as many as the work needs, from --replicas to N (default: always --replicas)",
    )
    group.add_argument(
        "--scale-down-s",
        type=_amount,
        default=30.0,
        metavar="S",
        help="with --max-replicas: how long fewer must have been enough before one goes (30)",
    )
    group.add_argument(
        "--threads", type=_positive, default=1, metavar="N", help="torch's, per replica (default 1)"
    )
    group.add_argument(
        "--cpus",
        type=_amount,
        default=0.0,
        metavar="X",
        help="that a replica takes of Ray's, such as 0.5 (default: as many as --threads)",
    )
    group.add_argument(
        "--device",
        default="cpu",
        metavar="NAME",
        help="torch's name of where layers run, such as cuda (default cpu)",
    )
    group.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="of the layers; bf16 changes answers a little (default fp32)",
    )


def _add_limits(serve: argparse.ArgumentParser) -> None:
    group = serve.add_argument_group("limits")
    _add_engine_limits(group)
    for flag, default, help_text in (
        ("--max-rpcs", 1000, "calls and streams at once"),
        ("--max-connections", 1000, "devices connected at once"),
    ):
        group.add_argument(
            flag, type=_positive, default=default, metavar="N", help=f"{help_text} ({default})"
        )
    for flag, what in (
        ("--device-requests", "requests a second of one device"),
        ("--device-layers", "layers a second run for one device, summed over samples"),
    ):
        group.add_argument(
            flag, type=_amount, default=0.0, metavar="N", help=f"{what} (default: no limit)"
        )
    group.add_argument(
        "--stall-timeout-s",
        type=_positive,
        default=30,
        metavar="S",
        help="how long a call's request may take to come, and a reply to be taken; then the call ends (30)",
    )
    group.add_argument(
        "--idle-timeout-s",
        type=_positive,
        default=900,
        metavar="S",
        help="how long a stream may ask for nothing; then it ends, and a device's next request opens "
        "another one (900)",
    )
    group.add_argument("--drain-s", type=_amount, default=20.0, metavar="S", help=_DRAIN)


def _add_engine_limits(group: Any) -> None:
    for flag, default, help_text in (
        ("--max-batch", 64, "samples that share a layer"),
        ("--max-waiting", 1024, "samples in a replica, waiting or running"),
        ("--max-rows", 256, "samples in one frame"),
        ("--max-frame-bytes", 8 * 2**20, "bytes of one frame"),
    ):
        group.add_argument(
            flag, type=_positive, default=default, metavar="N", help=f"{help_text} ({default})"
        )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: must be at least 1")
    return value


def _amount(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be a number, 0 or more")
    return value
