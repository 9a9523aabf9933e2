"""`offramp top`: a gateway at a glance, from its metrics."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from offramp_common.cli import OK
from offramp_common.errors import CloudUnavailable

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from offramp_cloud.top import BundleView, View

_BAR = 20
_EPILOG = """\
Rates and times are those between two readings, --every seconds apart. Without --json everything goes to
standard error, where a terminal shows it in place. A gateway that is started again is waited for, once
it has been seen.
"""


def add_command(subparsers: Any) -> None:
    top = subparsers.add_parser(
        "top",
        help="a live view of a gateway",
        description="Show devices, rates, exit depths, replicas and queues of a running gateway.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument(
        "address", metavar="HOST:PORT", help="what `offramp cloud serve --metrics` listens on"
    )
    top.add_argument(
        "--every", type=_seconds, default=2.0, metavar="S", help="seconds between readings (2)"
    )
    top.add_argument("--once", action="store_true", help="two readings, one view, then end")
    top.add_argument("--json", action="store_true", help="a line of JSON for each view, to stdout")
    top.set_defaults(run=run_top)


def run_top(args: argparse.Namespace) -> int:
    """Raises CloudUnavailable for a gateway that never answered, ConfigError for what is none."""
    if args.json:
        for view in _views(args):
            print(json.dumps(view.to_json()), flush=True)
        return OK
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True)
    if args.once or not console.is_terminal:
        for view in _views(args):
            console.print(screen(view, args.address))
        return OK
    with Live(console=console, screen=True, auto_refresh=False) as live:
        for view in _views(args, lambda words: live.update(words, refresh=True)):
            live.update(screen(view, args.address), refresh=True)
    return OK


def _views(args: argparse.Namespace, tell: Callable[[str], None] | None = None) -> Iterator[View]:
    from offramp_cloud.top import between, scrape

    before = scrape(args.address, time.monotonic)
    while True:
        time.sleep(args.every)
        try:
            after = scrape(args.address, time.monotonic)
        except CloudUnavailable as error:
            if args.once:
                raise
            # It may be on its way back: a view that ends when its gateway restarts is of little use.
            (tell or (lambda words: print(words, file=sys.stderr)))(str(error))
            continue
        yield between(before, after, time.time())
        if args.once:
            return
        before = after


def screen(view: View, address: str) -> RenderableType:
    """The view as a table for each kind of thing."""
    from rich.console import Group
    from rich.text import Text

    days = view.certificate_days
    head = (
        f"{address}   {view.devices} devices   {view.at_work} requests at work   "
        f"in {_bytes(view.bytes_in)}   out {_bytes(view.bytes_out)}"
    )
    lines = [Text(head, style="bold")]
    if days is not None:
        style = "bold red" if days < 14 else ""
        lines.append(Text(f"a certificate ends in {days:.0f} days", style=style))
    return Group(*lines, _bundles(view), *map(_depths, view.bundles), _replicas(view))


def _bundles(view: View) -> Table:
    table = _table(
        "bundle", "replicas", "requests/s", "rows/s", "p50 ms", "p95 ms", "queue", "compute"
    )
    table.add_column("refused/s")
    for bundle in view.bundles:
        table.add_row(
            bundle.name,
            str(bundle.replicas),
            f"{bundle.requests:.1f}",
            f"{bundle.rows:.1f}",
            *map(_ms, (bundle.p50_ms, bundle.p95_ms, bundle.queue_p50_ms, bundle.compute_p50_ms)),
            " ".join(f"{status} {rate:.1f}" for status, rate in bundle.refused.items()) or "-",
        )
    return table


def _depths(bundle: BundleView) -> Table:
    table = _table(f"{bundle.name}: left at depth", "share")
    table.add_column("")
    for depth, share in bundle.depths.items():
        table.add_row(str(depth), f"{share:.0%}", "#" * round(_BAR * share))
    return table


def _replicas(view: View) -> Table:
    table = _table("replica of", "process@node", "work left", "rows/batch", "layer rows/s")
    for replica in view.replicas:
        batch = "-" if replica.batch is None else f"{replica.batch:.1f}"
        left, ran = f"{replica.work_left:.0f}", f"{replica.layer_rows:.0f}"
        table.add_row(replica.bundle, replica.name, left, batch, ran)
    return table


def _table(first: str, *others: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _bytes(rate: float) -> str:
    for unit in ("B/s", "kB/s", "MB/s"):
        if rate < 1000:
            return f"{rate:.0f} {unit}"
        rate /= 1000
    return f"{rate:.1f} GB/s"


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.05 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text}: must be 0.05 to 3600 seconds")
    return value
