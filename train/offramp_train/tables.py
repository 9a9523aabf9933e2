"""Reading labelled rows from a TSV, CSV or JSONL file; every complaint names the file and the line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from offramp_common.errors import DataError
from offramp_common.text import Text

SUFFIXES = (".tsv", ".csv", ".jsonl")

# Names that public data sets give their columns, the first that is there counts.
_PAIRS = (
    ("text_a", "text_b"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question1", "question2"),
    ("query", "passage"),
)
_SINGLES = ("text", "sentence", "utterance", "question", "review")
_LABELS = ("label", "score", "intent", "class", "target", "relevant")


@dataclass(frozen=True, slots=True)
class Rows:
    """A file's samples: texts (sentences, or pairs), labels as written, and the line of each."""

    path: Path
    texts: tuple[Text, ...]
    labels: tuple[str, ...]
    lines: tuple[int, ...]

    @property
    def pair(self) -> bool:
        return not isinstance(self.texts[0], str)

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: list[int]) -> Rows:
        """The given rows, in that order."""
        return Rows(
            self.path,
            tuple(self.texts[i] for i in rows),
            tuple(self.labels[i] for i in rows),
            tuple(self.lines[i] for i in rows),
        )


def read_rows(path: Path, columns: tuple[str, ...] = ()) -> Rows:
    """Read a file whose suffix says its form: .tsv (no quoting), .csv (quoted), .jsonl.

    columns   names of the text column (or of both) and the label column, in that order; () finds
              them by the names that public data sets use

    Raises DataError.
    """
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: files end in {', '.join(SUFFIXES)}; rename it or convert it")
    text = _decode(path)
    read = {".tsv": _tsv, ".csv": _csv, ".jsonl": _jsonl}[path.suffix]
    texts: list[Text] = []
    labels: list[str] = []
    lines: list[int] = []
    named = columns
    for line, record in read(path, text):
        named = named or _find_columns(path, record)
        values = [_field(path, line, record, name) for name in named]
        texts.append((values[0], values[1]) if len(values) == 3 else values[0])
        labels.append(values[-1])
        lines.append(line)
    if not texts:
        raise DataError(f"{path}: no rows; a header line and at least one row are needed")
    return Rows(path, tuple(texts), tuple(labels), tuple(lines))


def check_columns(columns: tuple[str, ...]) -> tuple[str, ...]:
    """Raises DataError unless two or three columns are named (or none)."""
    if len(columns) not in (0, 2, 3):
        raise DataError(
            f"columns {', '.join(columns)}: name TEXT,LABEL or TEXT_A,TEXT_B,LABEL, in that order"
        )
    return columns


def _decode(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: not UTF-8 (byte {raw[error.start]:#04x})") from error


def _tsv(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, object]]]:
    header: list[str] | None = None
    for line, content in enumerate(io.StringIO(text, newline=None), start=1):
        fields = content.rstrip("\n").split("\t")
        if header is None:
            header = fields
        elif fields != [""]:
            yield line, _record(path, line, header, fields)


def _csv(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, object]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    try:
        for fields in reader:
            if header is None:
                header = fields
            elif fields:
                yield reader.line_num, _record(path, reader.line_num, header, fields)
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not CSV ({error})") from error


def _jsonl(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, object]]]:
    # Not splitlines(): JSON strings may hold the other Unicode line ends.
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            record = json.loads(content)
        except ValueError as error:
            raise DataError(f"{path}:{line}: not JSON ({error})") from error
        if not isinstance(record, dict):
            raise DataError(f"{path}:{line}: one JSON object a line is wanted")
        yield line, record


def _record(path: Path, line: int, header: list[str], fields: list[str]) -> Mapping[str, object]:
    if len(fields) != len(header):
        raise DataError(
            f"{path}:{line}: {len(fields)} fields, the header has {len(header)} ({', '.join(header)})"
        )
    return dict(zip(header, fields, strict=True))


def _find_columns(path: Path, record: Mapping[str, object]) -> tuple[str, ...]:
    label = next((name for name in _LABELS if name in record), None)
    pair = next((names for names in _PAIRS if all(name in record for name in names)), None)
    single = next((name for name in _SINGLES if name in record), None)
    if label is None or (pair is None and single is None):
        raise DataError(
            f"{path}: columns {', '.join(record)} do not say which is the text and which the label; "
            "name them: --columns TEXT,LABEL or --columns TEXT_A,TEXT_B,LABEL (a header line is needed)"
        )
    return (*pair, label) if pair else (str(single), label)


def _field(path: Path, line: int, record: Mapping[str, object], name: str) -> str:
    if name not in record:
        raise DataError(f"{path}:{line}: no column {name!r} (has: {', '.join(record)})")
    value = record[name]
    if isinstance(value, bool | int | float):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{path}:{line}: {name} is {value!r:.40}; text or a number is wanted")
    return value
