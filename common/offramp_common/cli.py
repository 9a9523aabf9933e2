"""The `offramp` command. Each package brings its own commands by entry point, so a device needs only its own.

Exit codes:
    0    done
    1    done, but the answer is no (a check failed: doctor, bundle verify)
    2    wrong arguments, settings or files; the message says which
    3    the cloud cannot be reached, and the command needs it
    70   a bug in offramp: the traceback is printed
    130  interrupted
Machine-readable output goes to standard output alone, everything for people to standard error.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from offramp_common import __version__
from offramp_common.errors import CloudUnavailable, OfframpError

OK, CHECK_FAILED, USAGE, UNREACHABLE, BUG, INTERRUPTED = 0, 1, 2, 3, 70, 130
_GROUP = "offramp.commands"
_EXTRAS = {  # a package that the base install lacks -> the extra that brings it
    "cryptography": "cloud",
    "grpc_health": "cloud",
    "grpc_reflection": "cloud",
    "matplotlib": "train",
    "onnx": "torch",
    "onnxscript": "torch",
    "opentelemetry": "trace",
    "ray": "cloud",
    "torch": "torch",
    "transformers": "torch",
}


def build_parser() -> argparse.ArgumentParser:
    """The parser with every installed command. A command's module adds itself: `add_command(subparsers)`
    makes a parser and sets `run`, a function of the parsed arguments that returns an exit code."""
    parser = argparse.ArgumentParser(
        prog="offramp",
        description="One transformer across a device and a cluster.",
        epilog="exit codes: 0 done, 1 a check failed, 2 wrong arguments or files, 3 cloud unreachable, "
        "70 a bug, 130 interrupted",
    )
    parser.add_argument("--version", action="version", version=f"offramp {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for point in sorted(entry_points(group=_GROUP), key=lambda point: point.name):
        point.load()(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        return int(args.run(args))
    except OfframpError as error:
        print(f"offramp {args.command}: {error}", file=sys.stderr)
        return UNREACHABLE if isinstance(error, CloudUnavailable) else USAGE
    except ModuleNotFoundError as error:
        needed = _EXTRAS.get((error.name or "").partition(".")[0])
        if needed is None:
            return _bug()
        print(
            f"offramp {args.command}: needs {error.name}; install it with: pip install 'offramp[{needed}]'",
            file=sys.stderr,
        )
        return USAGE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone (`| head`): nothing is left to say, not even at exit.
        sys.stdout = None
        return OK
    except Exception:  # noqa: BLE001 - the last resort: its traceback, and an exit code of its own
        return _bug()


def _bug() -> int:
    traceback.print_exc()
    return BUG


def write_json(value: Any, path: str) -> None:
    """Write JSON to a file, or to standard output where `path` is "-"."""
    text = json.dumps(value, indent=1)
    if path == "-":
        print(text)
    else:
        Path(path).write_text(text + "\n")


def console_main() -> None:
    sys.exit(main())
