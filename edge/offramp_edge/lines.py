"""Input of `offramp edge run`: one sample a line, as JSON or as plain text.

The first line that is not blank decides for the whole input: with "{" at its start it is JSONL,

    {"text": "wake me at seven"}
    {"id": 7, "text": ["a premise", "a hypothesis"], "label": "entailment", "deadline_ms": 200}

else each line is a text (for a model of pairs: two, with a tab between them). Blank lines are left
out. A line that is no sample becomes a `Failed` that names it, and the run goes on.
"""

from __future__ import annotations

import json
import os
import select
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from offramp_common.errors import DataError
from offramp_common.text import Text
from offramp_edge.answers import Failed, Sample

MAX_LINE_BYTES = 2**20
_CHUNK = 2**16
_LOOK_S = 0.2
"""How soon a reader that waits for input notices that it is to stop."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What the input said of a sample besides its text."""

    id: Any
    label: str | float | None
    line: int


@dataclass
class Input:
    """Samples from an open file; iterated in a thread of its own, ended by `stop`.

    asked   by sample id, for those that have not been answered: whoever takes an answer pops it
    nbytes  of the lines given out so far, for progress
    """

    fd: int
    pair: bool
    asked: dict[str, Asked] = field(default_factory=dict)
    nbytes: int = 0
    stop: threading.Event = field(default_factory=threading.Event)

    def __iter__(self) -> Iterator[Sample | Failed]:
        as_json: bool | None = None
        for number, raw in enumerate(self._lines(), start=1):
            line = raw.strip() if raw is not None else b""
            if raw is not None and not line:
                continue
            if as_json is None and raw is not None:
                line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
                as_json = line.startswith(b"{")
            try:
                if raw is None:
                    raise DataError(f"longer than {MAX_LINE_BYTES} bytes")
                yield self._sample(number, line.decode(), bool(as_json))
            except UnicodeDecodeError as error:
                yield Failed(str(number), f"line {number}: not UTF-8 ({error.reason})", number)
            except DataError as error:
                yield Failed(str(number), f"line {number}: {error}", number)

    def _sample(self, number: int, line: str, as_json: bool) -> Sample:
        key = str(number)
        asked, text, deadline_ms = Asked(key, None, number), _plain(line, self.pair), None
        if as_json:
            value = _object(line)
            text = _text(value.get("text"))
            label, deadline_ms = value.get("label"), value.get("deadline_ms")
            if isinstance(label, bool) or not isinstance(label, str | int | float | None):
                raise DataError(f'"label" {label!r:.80}: must be a text or a number')
            good = isinstance(deadline_ms, int | float) and deadline_ms > 0
            if deadline_ms is not None and not good:
                raise DataError(f'"deadline_ms" {deadline_ms!r:.80}: must be a number above 0')
            asked = Asked(value.get("id", key), label, number)
        self.asked[key] = asked
        return Sample(text, key, deadline_ms, ref=None if asked.id == key else asked.id)

    def _lines(self) -> Iterator[bytes | None]:
        """Lines without their ends as soon as they are complete; None for one that is too long.

        Reads the descriptor itself: Python's own buffered standard input, left in a read by a
        daemon thread, ends the interpreter with a fatal error."""
        held, too_long = b"", False
        while chunk := self._read():
            *lines, held = (held + chunk).split(b"\n")
            for line in lines:
                self.nbytes += len(line) + 1
                yield None if too_long or len(line) > MAX_LINE_BYTES else line
                too_long = False
            if len(held) > MAX_LINE_BYTES:
                held, too_long = b"", True
        if too_long:
            yield None
        elif held and not self.stop.is_set():
            yield held

    def _read(self) -> bytes:
        while not self.stop.is_set():
            if select.select([self.fd], [], [], _LOOK_S)[0]:
                return os.read(self.fd, _CHUNK)
        return b""


def _plain(line: str, pair: bool) -> Text:
    first, tab, second = line.partition("\t")
    return (first, second) if pair and tab else line


def _object(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise DataError(f"not JSON ({error})") from None
    if not isinstance(value, dict):
        raise DataError(f"a JSON {type(value).__name__}, must be an object with a text")
    return value


def _text(value: Any) -> Text:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and len(value) == 2 and all(isinstance(v, str) for v in value):
        return value[0], value[1]
    raise DataError(f'"text" {value!r:.80}: must be a text, or a list of two')
