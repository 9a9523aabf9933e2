"""`offramp demo`: everything on one machine, with real input."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp_common.cli import OK, write_json
from offramp_common.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from offramp_common.bundle import Bundle
    from offramp_simulate.demo import Record, Sentence, Settings, Strategy

_BUNDLE = Path("bundles/assistant-intents")
_UTTERANCES = Path("examples/assistant-utterances.jsonl")
_TEST_SPLIT = Path("clinc150/test.tsv")
_OF_TEST_SPLIT = 500


def add_command(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="a cloud, a slow link and a device on this machine, with real sentences",
        description="Runs sentences through offramp and through its rivals and prints one table.",
    )
    _add_options(parser.add_argument)
    parser.set_defaults(run=run)


def _add_options(add: Callable[..., Any]) -> None:
    add(
        "--link",
        metavar="PROFILE",
        default="lte",
        help="profile of `offramp link`, such as lossy, flaky or train-3g (default: lte)",
    )
    add("--bundle", type=Path, help="bundle to run (default: the shipped assistant-intents)")
    add(
        "--data",
        metavar="FILE",
        nargs="?",
        const="",
        help="sentences to run: TSV or JSONL with text and label; without FILE the test split of CLINC150 "
        "in $OFFRAMP_DATA (default: the shipped utterances)",
    )
    add("--limit", type=int, metavar="N", help="run the first N sentences")
    add(
        "--split",
        type=int,
        metavar="K",
        help="of the rivals that always cut there: the device runs layers [0, K) (default: the bundle's)",
    )
    add("--deadline-ms", type=float, metavar="N", help="answer each sentence within N ms")
    add("--cut-link-at", type=int, metavar="N", help="the link dies before sentence N, for a while")
    add(
        "--local", action="store_true", help="cloud tier in one process, without Ray: starts faster"
    )
    add(
        "--json",
        metavar="FILE",
        help="write every number and record to FILE (- for standard output)",
    )
    add(
        "--report",
        type=Path,
        metavar="FILE.html",
        help="write the table and plots as one HTML page",
    )


def run(args: argparse.Namespace) -> int:
    import asyncio

    from offramp_common.bundle import Bundle
    from offramp_simulate import demo, demo_report

    bundle = Bundle.read(args.bundle or _shipped(_BUNDLE))
    sentences, source = _sentences(args.data, args.limit)
    _check(args, bundle, sentences, source)
    extra = () if args.deadline_ms is None else ("--deadline-ms", str(args.deadline_ms))
    settings = demo.Settings(
        bundle.path, args.link, args.local, cut_link_at=args.cut_link_at, extra=extra
    )
    plan = demo.strategies(bundle, args.split)
    about = {"sentences": len(sentences), "source": source, "hardware": hardware()}
    result = asyncio.run(_all(bundle, sentences, settings, plan, about))
    if args.json:
        write_json(result, args.json)
    if args.report:
        args.report.write_text(demo_report.render(result), encoding="utf-8")
        print(f"report: {args.report}", file=sys.stderr)
    return OK


async def _all(
    bundle: Bundle,
    sentences: Sequence[Sentence],
    settings: Settings,
    plan: Sequence[Strategy],
    about: Record,
) -> Record:
    """Every strategy over the same cloud and link, shown as it goes."""
    from offramp_simulate import demo
    from offramp_simulate.demo_view import View

    outcomes = []
    with View(len(sentences), plan) as view:
        view.starting("the cloud tier" + (" (no Ray)" if settings.local else " (Ray Serve, TLS)"))
        async with demo.cloud_tier(settings) as cloud:
            for strategy in plan:
                view.begin(strategy)
                outcomes.append(
                    await demo.run_strategy(
                        strategy, sentences, settings, bundle, cloud, view.answered
                    )
                )
            view.stopping()
    rows = demo.summarise(outcomes)
    view.table(rows, about, settings.link)
    return demo.to_json(outcomes, rows, settings, about)


def _check(
    args: argparse.Namespace, bundle: Bundle, sentences: Sequence[Sentence], source: str
) -> None:
    """Raises ConfigError for what would fail later, before anything is started."""
    from offramp_simulate.links import PROFILES
    from offramp_simulate.rough_links import ROUGH_LINKS

    known_links = (*PROFILES, *ROUGH_LINKS)
    if args.link not in known_links:
        raise ConfigError(
            f"--link {args.link}: no such profile; there are {', '.join(known_links)}"
        )
    if args.report and not args.report.parent.is_dir():
        raise ConfigError(f"--report {args.report}: no directory {args.report.parent}")
    if args.split is not None and not 1 <= args.split < bundle.n_layers:
        raise ConfigError(
            f"--split {args.split}: between 1 and {bundle.n_layers - 1} for this bundle"
        )
    known = set(bundle.manifest.task.labels)
    if unknown := sorted({s.label for s in sentences} - known):
        raise ConfigError(f"{source}: label {unknown[0]!r} is none of the bundle's {len(known)}")


def hardware() -> str:
    """One line about this machine, to stand beside numbers."""
    model = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else ""
    return f"{os.cpu_count()} cores, {model or 'unknown processor'}"


def _shipped(relative: Path) -> Path:
    """A file of the checkout: beside the current directory or beside this source tree."""
    for root in (Path.cwd(), Path(__file__).resolve().parents[2]):
        if (root / relative).exists():
            return root / relative
    raise ConfigError(
        f"{relative} is not here: run from a checkout of offramp, or name your own with --bundle and --data"
    )


def _sentences(data: str | None, limit: int | None) -> tuple[list[Sentence], str]:
    """The sentences and what to call them."""
    if data is None:
        path = _shipped(_UTTERANCES)
    elif data:
        path = Path(data)
    else:
        folder = Path(os.environ.get("OFFRAMP_DATA", "../shared/data"))
        path = folder / _TEST_SPLIT
        limit = _OF_TEST_SPLIT if limit is None else limit
    if not path.is_file():
        raise ConfigError(
            f"{path}: no such file; name one with --data FILE, or the folder of data sets with OFFRAMP_DATA"
        )
    sentences = _read(path)
    if data == "":
        # The test split is sorted by label: take a spread of it, not its beginning.
        step = max(1, len(sentences) // (limit or len(sentences)))
        sentences = sentences[::step]
    sentences = sentences[:limit]
    if not sentences:
        raise ConfigError(f"{path}: no sentences in it")
    return sentences, path.name if data is None else "/".join(path.parts[-2:])


def _read(path: Path) -> list[Sentence]:
    from offramp_simulate.demo import Sentence
    from offramp_simulate.labelled import field, read_rows

    return [
        Sentence(
            str(row[1].get("id", row[0])),
            field(path, row, "text"),
            field(path, row, "label"),
            str(row[1].get("kind", "")),
        )
        for row in read_rows(path)
    ]
