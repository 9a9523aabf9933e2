"""`offramp doctor`: what is installed, what is missing, which command needs it and why it matters."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import socket
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from offramp_common import __version__
from offramp_common.cli import CHECK_FAILED, OK, write_json
from offramp_common.errors import ConfigError, OfframpError

_CONNECT_S = 3.0
_MARKS = {"ok": "ok     ", "missing": "missing", "broken": "BROKEN ", "note": "note   "}

_ZSTD = ("Python", "compression.zstd") if sys.version_info >= (3, 14) else ("backports.zstd",) * 2
# (package, module, what it is for)
_BASE = (
    ("numpy", "numpy", "activations and codecs"),
    ("onnxruntime", "onnxruntime", "runs the device's layers"),
    ("tokenizers", "tokenizers", "text to token ids"),
    ("safetensors", "safetensors", "reads a bundle's weights"),
    ("grpcio", "grpc", "the link to the cloud"),
    ("protobuf", "google.protobuf", "messages on that link"),
    ("msgpack", "msgpack", "frames' headers"),
    (*_ZSTD, "codecs int8+z and int4+z"),
    ("aiohttp", "aiohttp", "the local service of `edge serve`"),
    ("prometheus-client", "prometheus_client", "/metrics"),
    ("rich", "rich", "tables and progress bars"),
)
# (package, module, extra, commands that need it, what it is for)
_OPTIONAL = (
    ("torch", "torch", "torch", "train, evaluate, calibrate, methods, cloud serve", "deep layers; training"),
    ("transformers", "transformers", "torch", "train, cloud serve", "the backbones' layers"),
    ("onnx", "onnx", "torch", "train", "writes the device's graphs"),
    ("onnxscript", "onnxscript", "torch", "train", "writes the device's graphs"),
    ("matplotlib", "matplotlib", "train", "train, evaluate --plot, calibrate", "draws a bundle's curve"),
    ("ray", "ray", "cloud", "cloud serve, demo", "places and scales the cloud's replicas"),
    ("cryptography", "cryptography", "cloud", "certs, demo", "makes development certificates"),
    ("grpcio-health-checking", "grpc_health", "cloud", "cloud serve", "the standard health service"),
    ("grpcio-reflection", "grpc_reflection", "cloud", "cloud serve", "lets tools list the service"),
    ("opentelemetry-sdk", "opentelemetry.sdk", "trace", "--trace", "notes where a request's time goes"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report.

    state   "ok"; "missing": optional and not installed; "broken": needed, and does not work; "note"
    why     what it is for, and what to do where it is not ok
    """

    name: str
    state: str
    found: str
    why: str


def add_command(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "doctor", help="what is installed, what is missing, why it matters"
    )
    parser.add_argument("--json", metavar="FILE", help="write JSON to FILE (- for standard output)")
    parser.add_argument("--bundle", metavar="B", help="read every byte of a bundle, too")
    parser.add_argument(
        "--cloud", metavar="HOST:PORT", help="try whether the cloud's port can be reached, too"
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    checks = list(examine(args.bundle, args.cloud))
    broken = [check.name for check in checks if check.state == "broken"]
    if args.json:
        write_json({"ok": not broken, "checks": [asdict(check) for check in checks]}, args.json)
    for check in checks:
        print(f"{_MARKS[check.state]} {check.name:<24} {check.found}", file=sys.stderr)
        if check.state != "ok":
            print(f"{'':<8}{'':<24} {check.why}", file=sys.stderr)
    verdict = f"needs attention: {', '.join(broken)}" if broken else "all that is needed works"
    print(verdict, file=sys.stderr)
    return CHECK_FAILED if broken else OK


def examine(bundle: str | None = None, cloud: str | None = None) -> Iterator[Check]:
    """All checks, in order. Never raises for what it finds; ConfigError for a malformed `cloud`."""
    address = None if cloud is None else _address(cloud)
    yield _python()
    yield from (_base(*entry) for entry in _BASE)
    yield _wire()
    yield from _commands()
    yield from (_optional(*entry) for entry in _OPTIONAL)
    yield from _processor()
    if bundle is not None:
        yield from _bundle(bundle)
    if address is not None:
        yield _cloud(*address)


def _python() -> Check:
    fits = sys.version_info >= (3, 11)
    found = f"{platform.python_version()} on {platform.machine()}, offramp {__version__}"
    return Check("python", "ok" if fits else "broken", found, "3.11 or newer is needed")


def _base(package: str, module: str, purpose: str) -> Check:
    problem = _import_problem(module)
    if problem is None:
        return Check(package, "ok", _version(package), purpose)
    why = f"{purpose}; every command needs the base install: pip install offramp"
    return Check(package, "broken", problem, why)


def _optional(package: str, module: str, extra: str, commands: str, purpose: str) -> Check:
    # Looked for, not imported: torch and ray take seconds to load.
    try:
        there = find_spec(module) is not None
    except (ImportError, ValueError):
        there = False
    why = f"{purpose}; needed by {commands}: pip install 'offramp[{extra}]'"
    if there:
        return Check(package, "ok", _version(package), why)
    return Check(package, "missing", "not installed", why)


def _wire() -> Check:
    for module in ("offload_pb2", "offload_pb2_grpc"):
        problem = _import_problem(f"offramp_common.wire.{module}")
        if problem is not None:
            why = (
                "generated code wants a newer grpcio or protobuf than is installed: "
                "pip install 'grpcio>=1.85.1' 'protobuf>=7.35.1,<8'"
            )
            return Check("wire code", "broken", problem, why)
    return Check("wire code", "ok", "loads with this grpcio and protobuf", "the link's messages")


def _commands() -> Iterator[Check]:
    loaded, points = [], sorted(entry_points(group="offramp.commands"), key=lambda p: p.name)
    for point in points:
        try:
            point.load()
            loaded.append(point.name)
        except Exception as error:  # noqa: BLE001 - whatever a command's module raises is the finding
            yield Check(f"command {point.name}", "broken", _said(error), "install offramp again")
    if not points:
        why = "offramp is not installed, only on the path: pip install -e ."
        yield Check("commands", "note", "none registered", why)
    else:
        yield Check("commands", "ok", ", ".join(loaded) or "none", "what `offramp` can do here")


def _processor() -> Iterator[Check]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limit = os.environ.get("OMP_NUM_THREADS", "not set")
    found = f"{usable} of {os.cpu_count()} processors usable, OMP_NUM_THREADS {limit}"
    yield Check(
        "processor", "ok", found, "the device's runtime uses one thread unless told otherwise"
    )
    flags = _cpu_flags()
    if not flags:
        why = "this system does not list them; int8 speed is unknown until measured"
        yield Check("instructions", "note", "not known", why)
        return
    avx2 = "avx2" in flags or "asimd" in flags
    vnni = sorted(flags & {"avx512_vnni", "avx_vnni", "asimddp", "i8mm"})
    why = (
        "int8 runs without overflow on any processor (weights have 7 bits); AVX2 or NEON makes it fast, "
        "VNNI or the ARM dot product faster still"
    )
    wide = "AVX2 or NEON" if avx2 else "neither AVX2 nor NEON"
    found = f"{wide}; int8 dot product: {', '.join(vnni) or 'no'}"
    yield Check("instructions", "ok" if avx2 and vnni else "note", found, why)


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    listed = [
        line.partition(":")[2] for line in lines if line.lower().startswith(("flags", "features"))
    ]
    return set(listed[0].split()) if listed else set()


def _bundle(path: str) -> Iterator[Check]:
    from offramp_common.bundle import Bundle

    try:
        bundle = Bundle.read(path)
        bundle.verify()
    except (OfframpError, OSError) as error:
        yield Check("bundle", "broken", str(error), "edge and cloud need it whole")
        return
    m = bundle.manifest
    yield Check(
        "bundle", "ok", f"{m.name}: {m.method}, {m.n_layers} layers, all files as written", ""
    )
    have = sorted(p.name for p in (bundle.path / "graphs").glob("*") if p.is_dir())
    if m.precision in have:
        yield Check("bundle's graphs", "ok", ", ".join(have), "what the device runs")
    else:
        why = f"the device runs {m.precision} graphs, and there are none; copy the whole directory again"
        yield Check("bundle's graphs", "broken", ", ".join(have) or "none", why)


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"--cloud {text!r}: write HOST:PORT, such as gateway.example:8443")
    return host.strip("[]"), int(port)


def _cloud(host: str, port: int) -> Check:
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_S):
            return Check("cloud", "ok", f"{host}:{port} accepts connections", "")
    except OSError as error:
        why = (
            "is `offramp cloud serve` running there, and does the network let this device through?"
        )
        return Check("cloud", "broken", f"{host}:{port}: {error}", why)


def _import_problem(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # noqa: BLE001 - a broken package may raise anything at import
        return _said(error)
    return None


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "version unknown"
