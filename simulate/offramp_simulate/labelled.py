"""Tables of labelled text: a header line and fields between tabs, or JSON lines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from offramp_common.errors import DataError

Row = tuple[int, Mapping[str, object]]
"""A row's line in its file, and its fields."""


def read_rows(path: Path) -> list[Row]:
    """The first line that is not blank decides: with "{" at its start it is JSONL. Blank lines are left out.
    Raises DataError, naming file and line."""
    try:
        # Not splitlines(): JSON strings may hold the other Unicode line ends.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        return []
    if numbered[0][1].lstrip().startswith("{"):
        return [(number, _object(path, number, line)) for number, line in numbered]
    columns = numbered[0][1].split("\t")
    return [(number, _fields(path, number, line, columns)) for number, line in numbered[1:]]


def field(path: Path, row: Row, name: str) -> str:
    """A row's field as text. Raises DataError where it has none."""
    number, fields = row
    if fields.get(name) is None:
        raise DataError(
            f"{path}:{number}: no {name}; a row needs text and label, it has {[*fields]}"
        )
    return str(fields[name])


def _object(path: Path, number: int, line: str) -> Mapping[str, object]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}:{number}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}:{number}: not an object with text and label")
    return value


def _fields(path: Path, number: int, line: str, columns: list[str]) -> Mapping[str, object]:
    values = line.split("\t")
    if len(values) != len(columns):
        raise DataError(f"{path}:{number}: {len(values)} fields, the header has {len(columns)}")
    return dict(zip(columns, values, strict=True))
