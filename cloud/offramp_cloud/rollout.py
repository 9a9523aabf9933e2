"""What `offramp cloud deploy` does: put a version of a bundle beside those that are there."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from typing import Any

from offramp_cloud import app, cluster
from offramp_cloud.placement import Placement, check_address, placement_of
from offramp_cloud.stdout import stdout_alone
from offramp_common.bundle import Bundle
from offramp_common.cli import CHECK_FAILED, OK, write_json
from offramp_common.errors import ConfigError

_LOOK_S = 0.5
_UNWELL_S = 5.0  # how long a new version may be without a healthy replica
_MAX_FAILED = 0.01  # the share of a new version's requests that may fail in its replicas


class RolledBack(Exception):
    """The new version does not do; what was there before serves on."""


def deploy(args: argparse.Namespace) -> int:
    """Exit code: 1 when the new version was taken back. Raises ConfigError for a wrong set-up."""
    bundle = Bundle.read(args.bundle)
    bundle.verify()
    with stdout_alone() as stdout:
        result = _deploy(bundle, args)
        if args.json == "-":
            print(json.dumps(result, indent=1), file=stdout)
    if args.json and args.json != "-":
        write_json(result, args.json)
    return OK if result["status"] == "deployed" else CHECK_FAILED


def _deploy(bundle: Bundle, args: argparse.Namespace) -> dict[str, Any]:
    check_address(args.address)
    cluster.join_ray(args.address)
    app.start_serve()
    name, started_s = app.app_name(bundle), time.monotonic()
    result: dict[str, Any] = {"application": name, "bundle": bundle.manifest.name, "retired": []}
    try:
        if name in app.deployed():
            print(f"{name} is there already", file=sys.stderr)
        else:
            _roll_in(bundle, name, placement_of(args), args.watch_s)
        result["retired"] = asyncio.run(_retire(bundle.manifest.name, args.keep))
        result["status"] = "deployed"
    except RolledBack as why:
        print(f"offramp cloud: {name} was taken back: {why}", file=sys.stderr)
        result |= {"status": "rolled back", "reason": str(why)}
    result["seconds"] = round(time.monotonic() - started_s, 1)
    return result


def _roll_in(bundle: Bundle, name: str, placement: Placement, watch_s: float) -> None:
    """Place it, and see how its first requests fare; it is removed again where that goes wrong."""
    print(f"placing {name}", file=sys.stderr)
    try:
        app.place([bundle], placement, cluster.Owned())
        app.await_replicas([name], lambda: False)
        print(f"{name} is up; watching it for {watch_s:g} s", file=sys.stderr)
        asyncio.run(_watch(name, watch_s))
    except (ConfigError, RolledBack) as error:
        app.remove(name)
        raise RolledBack(str(error)) from error
    except BaseException:  # told to stop half way: nothing half done is left
        app.remove(name)
        raise


async def _watch(name: str, watch_s: float) -> None:
    until_s = time.monotonic() + watch_s
    backend = await app.backend(_keep_ray, only=[name])
    try:
        while time.monotonic() < until_s:
            await asyncio.sleep(_LOOK_S)
            await asyncio.to_thread(app.await_replicas, [name], lambda: False, _UNWELL_S)
            for bundle in backend.bundles:
                counters = [each.counters for each in await backend.probe(bundle, _UNWELL_S)]
                done, failed = (
                    sum(each[what] for each in counters) for what in ("requests", "failed")
                )
                if failed > _MAX_FAILED * (done + failed):
                    raise RolledBack(f"{failed} of its {done + failed} requests failed")
    finally:
        await backend.close()


async def _keep_ray() -> None:
    """A backend closes what it came with; this process still needs its Ray."""


async def _retire(bundle: str, keep: int) -> list[str]:
    """Remove all but the newest `keep` versions; the names of their applications. Their replicas
    finish what they have."""
    found = await cluster.RayDirectory().endpoints()
    orders = {each.app: each.order for each in found.values() if each.bundle == bundle}
    old = sorted(orders, key=lambda name: orders[name], reverse=True)[keep:]
    for name in old:
        print(f"removing {name}", file=sys.stderr)
        await asyncio.to_thread(app.remove, name)
    return old
