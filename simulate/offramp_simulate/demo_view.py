"""What the demo shows while it runs: each answer as it comes, and the table at the end.

All of it goes to standard error. On a terminal the answers scroll in a live panel; elsewhere they are plain
lines, so that a log of a run can be read.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from offramp_simulate.demo import FALLBACK, Record, Sentence, Strategy

_SHOWN = 14
_LOG_COLUMNS = 132  # a file has no width to fit
_PLACES = {"device": "green", "cloud": "cyan", "fallback": "yellow"}


class View:
    """Used as a context manager around the run."""

    def __init__(self, n_sentences: int, plan: Sequence[Strategy]) -> None:
        self._console = Console(stderr=True)
        if not self._console.is_terminal:
            self._console = Console(stderr=True, width=_LOG_COLUMNS)
        self._n, self._plan = n_sentences, list(plan)
        self._strategy: Strategy | None = None
        self._status = ""
        self._done = 0
        self._places: Counter[str] = Counter()
        self._recent: deque[tuple[Sentence, Record]] = deque(maxlen=_SHOWN)
        self._live = Live(console=self._console, refresh_per_second=8, transient=True)

    def __enter__(self) -> View:
        if self._console.is_terminal:
            self._live.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._console.is_terminal:
            self._live.__exit__(kind, error, trace)

    def starting(self, what: str) -> None:
        self._say(f"starting {what} ...")

    def stopping(self) -> None:
        self._say("stopping ...")

    def begin(self, strategy: Strategy) -> None:
        self._strategy, self._done, self._places = strategy, 0, Counter()
        self._recent.clear()
        number = self._plan.index(strategy) + 1
        self._say(f"{number}/{len(self._plan)}  {strategy.title}: {self._n} sentences")

    def answered(self, sentence: Sentence, record: Record) -> None:
        self._done += 1
        self._places[record["where"]] += 1
        self._recent.append((sentence, record))
        if self._console.is_terminal:
            self._live.update(self._panel())
        elif self._strategy is self._plan[0]:
            self._console.print(_line(sentence, record), highlight=False, soft_wrap=True)

    def table(self, rows: Sequence[Record], about: Record, link: str) -> None:
        title = (
            f"{about['sentences']} sentences of {about['source']} over {link}; {about['hardware']}"
        )
        table = Table(title=title, title_justify="left", box=None, padding=(0, 1), pad_edge=False)
        table.add_column("")
        for name in COLUMNS:
            table.add_column(name, justify="right")
        for row in rows:
            table.add_row(row["title"], *cells(row))
        self._console.print()
        self._console.print(table, soft_wrap=True)
        for line in (*chosen(rows), *fell_back(rows)):
            self._console.print(line, highlight=False, soft_wrap=True)

    def _say(self, text: str) -> None:
        self._status = text
        if self._console.is_terminal:
            self._live.update(self._panel())
        else:
            self._console.print(text, highlight=False)

    def _panel(self) -> RenderableType:
        parts: list[RenderableType] = [Text(self._status, style="bold")]
        parts += [_line(sentence, record) for sentence, record in self._recent]
        if self._strategy is not None:
            counts = Text("  ").join(
                Text(f"{place} {count}", style=_PLACES.get(place, ""))
                for place, count in sorted(self._places.items())
            )
            parts.append(ProgressBar(total=self._n, completed=self._done, width=40))
            parts.append(Text(f"{self._done}/{self._n}  ") + counts)
        return Group(*parts)


def _line(sentence: Sentence, record: dict[str, Any]) -> Text:
    right = record["label"] == sentence.label
    line = Text(f"{sentence.text[:52]:<52}  ", no_wrap=True, overflow="ellipsis")
    line.append(f"{record['label'][:26]:<26}", style="" if right else "red")
    line.append(f" exit {record['exit_depth']}  ")
    line.append(f"{record['where']:<8}", style=_PLACES.get(record["where"], ""))
    line.append(f" {record['ms']:6.1f} ms {record['bytes_up']:6d} B")
    if record.get("reason"):
        line.append(f"  {record['reason'][:60]}", style="yellow")
    return line


def fell_back(rows: Sequence[Record]) -> list[str]:
    """Of each strategy that had to: how many the device answered because the cloud could not, and why."""
    lines = []
    for row in rows:
        whys = [
            f"{name.removeprefix(FALLBACK)} {count}"
            for name, count in row["choices"].items()
            if name.startswith(FALLBACK)
        ]
        if whys:
            lines.append(f"{row['title']}: the cloud did not answer: {', '.join(whys)}")
    return lines


def chosen(rows: Sequence[Record]) -> list[str]:
    """What the planner chose, a line a choice, the commonest first."""
    ours = next(row for row in rows if row["strategy"] == "offramp")
    return [
        "the planner chose",
        *(f"  {count:5d}  {name}" for name, count in ours["choices"].items()),
    ]


COLUMNS = (
    "accuracy", "agree", "p50 ms", "p95 ms", "bytes up", "on device", "layers dev", "layers cloud"
)  # fmt: skip
"""The table's columns, here and in the report."""


def cells(row: Record) -> list[str]:
    return [
        f"{row['accuracy']:.1%}",
        f"{row['agreement']:.1%}",
        f"{row['p50_ms']:.1f}",
        f"{row['p95_ms']:.1f}",
        f"{row['bytes_up']:.0f}",
        f"{row['on_device']:.1%}",
        f"{row['device_layers']:.2f}",
        f"{row['cloud_layers']:.2f}",
    ]
