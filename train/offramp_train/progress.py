"""What a person sees of a long run: a bar with the time left, and lines, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

_LINE_EVERY_S = 60.0


class Report:
    """Lines and bars on standard error. Where that is no terminal, a bar is a line a minute."""

    def __init__(self) -> None:
        self.console = Console(file=sys.stderr, highlight=False, soft_wrap=True)

    def say(self, line: str) -> None:
        self.console.print(line, markup=False)

    @contextmanager
    def bar(self, title: str, total: int, done: int = 0) -> Iterator[Bar]:
        """A bar of `total` steps."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        shown = self.console.is_terminal
        with Progress(
            *columns, console=self.console, disable=not shown, transient=True
        ) as progress:
            task = progress.add_task(title, total=total, completed=done, note="")
            yield Bar(progress, int(task), None if shown else self.say)


class Bar:
    """One bar; `say` writes the lines that stand for it where it cannot be drawn."""

    def __init__(self, progress: Progress, task: int, say: Callable[[str], None] | None) -> None:
        self._progress, self._task, self._say = progress, TaskID(task), say
        self._began = self._said = time.monotonic()
        self._done = 0

    def step(self, n: int = 1, note: str | None = None) -> None:
        fields = {} if note is None else {"note": note}
        self._progress.update(self._task, advance=n, **fields)  # type: ignore[arg-type]
        self._done += n
        now = time.monotonic()
        if self._say is not None and now - self._said >= _LINE_EVERY_S:
            self._said = now
            task = self._progress.tasks[0]
            left_s = (now - self._began) / self._done * (int(task.total or 0) - int(task.completed))
            self._say(
                f"{task.description}: {task.completed:.0f}/{task.total}, {left_s:.0f} s left {note or ''}"
            )
