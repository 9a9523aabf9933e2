"""Files of recorded rates, in the four forms that they are found in; told apart by their first line.

JSON lines   an object a line: `trace` (its name), `mbps` (a list, Mbit/s) and either `dt` (seconds
             between samples) or `t_s` (the samples' times in seconds, rising); many traces a file
mahimahi     a whole number a line, rising: a millisecond at which 1500 bytes can pass (mm-link(1));
             the last one is the period. Read as a rate for each 20 ms
logs         HSDPA (Riiser et al., MMSys 2013) and Ghent 4G (van der Hooft et al., IEEE Communications
             Letters 2016): a time of day, ms since the start, latitude, longitude, bytes since the
             line before, ms since then. A line is a sample that lasts those ms
columns      time in seconds and Mbit/s, between them blanks or a comma; a line of names may come first

In JSON lines and columns a sample holds until the next one, and the last as long as the one before
it. Empty lines, and in the last three forms lines that begin with #, are left out. A file of the last
three forms is one trace, called as the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from offramp_common.errors import ConfigError

_PACKET_BITS = 1500 * 8
_BIN_MS = 20  # a mean LTE rate has 15 packets in it; an outage is still seen
_FORMS = (
    "an object of JSON, one whole number (mahimahi), two columns (seconds and Mbit/s) or the six of "
    "an HSDPA or Ghent log"
)


class Recorded(NamedTuple):
    """One trace as it was read; not yet checked as a whole."""

    line: int  # that it begins at
    name: str
    edges_s: tuple[float, ...]  # from 0 on, one more than rates
    mbps: tuple[float, ...]


class BadLine(ConfigError):
    """What is wrong with a line of a file, and which line it is, from 1."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


class _Line(NamedTuple):
    number: int
    text: str


def read_traces(text: str, name: str) -> Iterator[Recorded]:
    """All traces of a file called `name`, in order; BadLine where it is malformed."""
    lines = [
        _Line(number, line.strip())
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip()
    ]
    if lines and lines[0].text[0] in "{[":
        yield from map(_object, lines)
        return
    lines = [line for line in lines if line.text[0] != "#"]
    if lines:
        yield _reader(lines)(lines, name)


def _reader(lines: Sequence[_Line]) -> Callable[[Sequence[_Line], str], Recorded]:
    """By the second line, since the first may be one of names."""
    probe = lines[min(1, len(lines) - 1)]
    readers = {1: _mahimahi, 2: _columns, 6: _log}
    reader = readers.get(len(_words(probe)))
    if reader is None:
        raise BadLine(probe.number, f"{probe.text[:40]!r} is none of the known forms: {_FORMS}")
    return reader


def _words(line: _Line) -> list[str]:
    return line.text.replace(",", " ").split()


def _object(line: _Line) -> Recorded:
    try:
        return Recorded(line.number, *_parse(json.loads(line.text)))
    except (ValueError, OverflowError, ConfigError) as error:
        raise BadLine(line.number, str(error)) from error


def _parse(row: Any) -> tuple[str, tuple[float, ...], tuple[float, ...]]:
    """One line's object as name, edges and rates; ConfigError says what is wrong with it."""
    if not isinstance(row, dict):
        raise ConfigError('not an object: write {"trace": NAME, "mbps": [...], "dt": SECONDS}')
    name = row.get("trace")
    if not isinstance(name, str) or not name:
        raise ConfigError('"trace" is missing or not a name: give a text')
    mbps = _numbers(row, "mbps")
    if ("dt" in row) == ("t_s" in row):
        raise ConfigError('give either "dt" (seconds a sample) or "t_s" (a time for each sample)')
    if "dt" in row:
        (dt_s,) = _numbers({"dt": [row["dt"]]}, "dt")
        return name, tuple(i * dt_s for i in range(len(mbps) + 1)), mbps
    times_s = _numbers(row, "t_s")
    if len(times_s) != len(mbps) or len(times_s) < 2:
        raise ConfigError(
            f'"t_s" has {len(times_s)} entries and "mbps" {len(mbps)}: as many, and two at least'
        )
    return name, _edges(times_s), mbps


def _numbers(row: dict[str, Any], key: str) -> tuple[float, ...]:
    values = row.get(key)
    if not isinstance(values, list) or not values:
        raise ConfigError(f'"{key}" is missing or not a list with an entry: give numbers')
    for index, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f'"{key}"[{index}] is {value!r}, not a number')
    return tuple(float(value) for value in values)


def _edges(times_s: Sequence[float]) -> tuple[float, ...]:
    """Nothing says how long the last sample holds: as long as the one before it."""
    edges_s = (*times_s, 2 * times_s[-1] - times_s[-2])
    return tuple(time_s - times_s[0] for time_s in edges_s)


def _mahimahi(lines: Sequence[_Line], name: str) -> Recorded:
    times_ms: list[int] = []
    for line in lines:
        if not (line.text.isascii() and line.text.isdigit()):
            raise BadLine(line.number, f"{line.text[:40]!r}: give a whole number of milliseconds")
        times_ms.append(int(line.text))
        if len(times_ms) > 1 and times_ms[-1] < times_ms[-2]:
            raise BadLine(line.number, f"{times_ms[-1]} after {times_ms[-2]}: times must not fall")
    period_ms = times_ms[-1]
    if not period_ms:
        raise BadLine(lines[-1].number, "a period of 0 ms: the last time must be above 0")
    n_bins = math.ceil(period_ms / _BIN_MS)
    packets = [0] * n_bins
    for time_ms in times_ms:
        packets[max(0, time_ms - 1) // _BIN_MS] += 1
    edges_ms = [min(index * _BIN_MS, period_ms) for index in range(n_bins + 1)]
    mbps = tuple(
        count * _PACKET_BITS / 1e3 / (edges_ms[index + 1] - edges_ms[index])
        for index, count in enumerate(packets)
    )
    return Recorded(lines[0].number, name, tuple(edge / 1e3 for edge in edges_ms), mbps)


def _log(lines: Sequence[_Line], name: str) -> Recorded:
    edges_s, mbps = [0.0], []
    for line in lines:
        words = _words(line)
        if len(words) != 6:
            raise BadLine(line.number, f"{len(words)} columns: six, as in the lines before")
        nbytes, span_ms = _number(line, words[4]), _number(line, words[5])
        if not span_ms > 0:
            raise BadLine(line.number, f"a sample of {words[5]} ms: leave the line out")
        edges_s.append(edges_s[-1] + span_ms / 1e3)
        mbps.append(nbytes * 8 / span_ms / 1e3)
    return Recorded(lines[0].number, name, tuple(edges_s), tuple(mbps))


def _columns(lines: Sequence[_Line], name: str) -> Recorded:
    times_s, mbps = [], []
    for index, line in enumerate(lines):
        words = _words(line)
        if len(words) != 2:
            raise BadLine(line.number, f"{len(words)} columns: give two, seconds and Mbit/s")
        if index == 0 and not _is_number(words[0]):
            continue  # the columns' names
        times_s.append(_number(line, words[0]))
        mbps.append(_number(line, words[1]))
        if len(times_s) > 1 and not times_s[-1] > times_s[-2]:
            raise BadLine(line.number, f"{words[0]} s after {times_s[-2]:g} s: times must rise")
    if len(times_s) < 2:
        raise BadLine(lines[-1].number, "one sample: give two at least")
    return Recorded(lines[0].number, name, _edges(times_s), tuple(mbps))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _number(line: _Line, text: str) -> float:
    if not _is_number(text) or not math.isfinite(float(text)):
        raise BadLine(line.number, f"{text!r} is not a finite number: give one")
    return float(text)
