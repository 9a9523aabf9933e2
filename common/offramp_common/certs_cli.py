"""`offramp certs init|issue|revoke DIR`: a development CA and device certificates."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from offramp_common import certs
from offramp_common.cli import OK, write_json


def add_certs_command(subparsers: Any) -> None:
    """Declare `certs` and its actions; the parsed arguments carry `run`."""
    parser = subparsers.add_parser(
        "certs", help="make a development CA, the cloud's certificate and the devices'"
    )
    actions = parser.add_subparsers(dest="action", required=True)
    init = actions.add_parser("init", help="a new authority and the cloud's certificate")
    init.add_argument(
        "--host",
        action="append",
        metavar="H",
        help="a name or address of the cloud as devices write it; repeat it for more "
        f"(default: {', '.join(certs.DEFAULT_HOSTS)})",
    )
    issue = actions.add_parser("issue", help="a certificate for a device")
    issue.add_argument("--name", required=True, help="what the cloud will know the device by")
    revoke = actions.add_parser("revoke", help="refuse a device's certificate from now on")
    revoke.add_argument("directory", type=Path, metavar="DIR")
    revoke.add_argument("--name", required=True, help="the device")
    revoke.set_defaults(run=run_revoke)
    for action in (init, issue):
        action.add_argument("directory", type=Path, metavar="DIR")
        action.add_argument(
            "--days",
            type=int,
            default=certs.DEFAULT_DAYS,
            metavar="N",
            help="how long it is valid (default: %(default)s)",
        )
        action.add_argument("--force", action="store_true", help="replace what is there")
        action.add_argument(
            "--json", metavar="FILE", help="write what was made as JSON (- for standard output)"
        )
        action.set_defaults(run=run_certs)


def run_certs(args: argparse.Namespace) -> int:
    """Make the certificates; returns the exit code. ConfigError says what is in the way."""
    made = (_init if args.action == "init" else _issue)(args)
    for cert, key in made.values():
        print(f"wrote {cert} and {key}", file=sys.stderr)
    if args.json:
        pairs = {who: {"cert": str(p.cert), "key": str(p.key)} for who, p in made.items()}
        write_json(pairs, args.json)
    return OK


def run_revoke(args: argparse.Namespace) -> int:
    from offramp_common.revocation import revoke

    path = revoke(args.directory, args.name)
    print(f"{args.name} is on {path}; gateways that use it refuse it now", file=sys.stderr)
    return OK


def _init(args: argparse.Namespace) -> dict[str, certs.KeyPair]:
    ca, server = certs.init(
        args.directory, args.host or certs.DEFAULT_HOSTS, days=args.days, force=args.force
    )
    stale = sorted(p.stem for p in args.directory.glob("*.pem") if p not in (ca.cert, server.cert))
    if stale:
        print(f"issue again, the old authority is gone: {', '.join(stale)}", file=sys.stderr)
    return {"ca": ca, "server": server}


def _issue(args: argparse.Namespace) -> dict[str, certs.KeyPair]:
    return {args.name: certs.issue(args.directory, args.name, args.days, args.force)}
