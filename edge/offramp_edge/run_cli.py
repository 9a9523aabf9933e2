"""`offramp edge run`: a file or a stream of texts in, JSON lines out."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

from offramp_common.cli import CHECK_FAILED, OK, write_json
from offramp_common.errors import ConfigError
from offramp_edge.answers import Answer, Failed
from offramp_edge.cli import log_to_stderr, traced, worker_from
from offramp_edge.explain import explained, in_words
from offramp_edge.lines import Input
from offramp_edge.stream import Result
from offramp_edge.tally import Tally
from offramp_edge.worker import EdgeWorker


def run(args: argparse.Namespace) -> int:
    """Answer everything; OK, or CHECK_FAILED when a line was no sample."""
    if args.json == "-" and args.output == "-":
        raise ConfigError("--json - and answers to standard output would mix: name a file for one")
    log_to_stderr(args.verbose)
    # A process manager's request to end is a Ctrl-C: what was answered is kept.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    tally, began = Tally(), time.monotonic()
    fd = _opened(args.input)
    with (
        worker_from(args) as worker,
        traced(worker, args.trace),
        _written(args.output) as output,
    ):
        given = Input(fd, worker.bundle.manifest.task.pair)
        try:
            with _progress(given, tally, args.output) as advanced:
                for result in worker.answer_many(
                    given, ordered=not args.unordered, provisional=args.provisional
                ):
                    output.write(json.dumps(_record(result, given, tally)) + "\n")
                    output.flush()
                    advanced()
            if args.spool_wait and not worker.wait_for_spool(args.spool_wait):
                print(f"the spool is not empty after {args.spool_wait:g} s", file=sys.stderr)
        finally:
            given.stop.set()
            _sum_up(args, worker, tally, time.monotonic() - began)
    return CHECK_FAILED if tally.failed else OK


def _sum_up(args: argparse.Namespace, worker: EdgeWorker, tally: Tally, seconds: float) -> None:
    """What the run came to: in words to standard error, and as JSON where it was asked for."""
    about, chooser = tally.to_json(seconds), worker.chooser
    print(tally.words(seconds), file=sys.stderr)
    if chooser is not None:
        about["bandit"] = chooser.to_json()
        print(chooser.words(), file=sys.stderr)
    if args.explain:
        about["explained"] = explained(worker.agent.planner)
        print(in_words(about["explained"]), file=sys.stderr)
    if args.json:
        write_json(about, args.json)


def _record(result: Result, given: Input, tally: Tally) -> dict[str, Any]:
    first = isinstance(result, Answer) and result.provisional
    asked = given.asked.get(result.id) if first else given.asked.pop(result.id, None)
    record = result.to_json()
    if asked is not None:
        record["id"] = asked.id
    if isinstance(result, Failed):
        tally.failed += 1
        return {**record, "line": result.line or (asked and asked.line)}
    expected = None if asked is None else asked.label
    if not first:
        tally.add(result, expected)
    return record if expected is None else {**record, "expected": expected}


def _opened(path: str) -> int:
    """A descriptor for the input. It is not closed: after Ctrl-C the reading thread may still wait
    on it, and the process is about to end."""
    try:
        return 0 if path == "-" else os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"--input {path}: cannot be read ({error.strerror})") from error


@contextlib.contextmanager
def _written(path: str) -> Iterator[IO[str]]:
    if path == "-":
        yield sys.stdout
        return
    try:
        file = open(path, "w", encoding="utf-8")  # noqa: SIM115 - closed below
    except OSError as error:
        raise ConfigError(f"--output {path}: cannot be written ({error.strerror})") from error
    with file:
        yield file


@contextlib.contextmanager
def _progress(given: Input, tally: Tally, output: str) -> Iterator[Callable[[], None]]:
    """A bar on standard error for a file, where a person looks on and answers go elsewhere."""
    about = os.fstat(given.fd)
    to_screen = output == "-" and sys.stdout.isatty()
    if not (stat.S_ISREG(about.st_mode) and sys.stderr.isatty()) or to_screen:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[said]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=about.st_size, said="")

        def advanced() -> None:
            places = " ".join(f"{where} {count}" for where, count in tally.where.items())
            progress.update(task, completed=given.nbytes, said=places)

        yield advanced
