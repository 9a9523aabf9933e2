"""A data set: which task it is, its splits, and targets as numbers."""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from offramp_common.activations import NumpyArray
from offramp_common.errors import DataError
from offramp_common.spec import TaskSpec
from offramp_train.tables import SUFFIXES, Rows, check_columns, read_rows

_SPLITS = {
    "train": ("train",),
    "dev": ("dev", "validation", "valid", "val"),
    "test": ("test",),
}
_MANY_VALUES = 20  # more distinct whole numbers than this are a scale, not classes


@dataclass(frozen=True, slots=True)
class Splits:
    """train and dev always; test where there is one. notes: what was decided on the way, for people."""

    task: TaskSpec
    train: Rows
    dev: Rows
    test: Rows | None
    notes: tuple[str, ...]

    def fingerprint(self) -> str:
        """Hex digest of all texts and labels: whether a stopped training saw the same data."""
        digest = hashlib.sha256()
        for rows in (self.train, self.dev, self.test):
            digest.update(repr((rows.texts, rows.labels) if rows else None).encode())
        return digest.hexdigest()[:32]


def read_splits(
    path: Path,
    *,
    columns: tuple[str, ...] = (),
    task: str | None = None,
    dev_share: float = 0.1,
    seed: int = 0,
) -> Splits:
    """Read a directory with train, dev and test files, or one file.

    Where there is no dev file, `dev_share` of the training rows is set apart by a seeded shuffle.
    task   "classification" or "regression"; None looks at the labels

    Raises DataError, naming file and line.
    """
    check_columns(columns)
    files = _split_files(path)
    read = {split: read_rows(file, columns) for split, file in files.items()}
    train, dev, test = read["train"], read.get("dev"), read.get("test")
    notes = []
    if dev is None:
        train, dev = _set_apart(train, dev_share, seed)
        notes.append(f"no dev file: {len(dev)} of the training rows are set apart as dev")
    for rows in (dev, test):
        if rows is not None and rows.pair != train.pair:
            raise DataError(
                f"{rows.path}: sentence pairs and single sentences are mixed with {train.path}"
            )
    spec, note = detect_task(train, task)
    notes.append(note)
    for rows in (train, dev, test):
        if rows is not None:
            targets_of(rows, spec)
    return Splits(spec, train, dev, test, tuple(notes))


def detect_task(rows: Rows, wanted: str | None) -> tuple[TaskSpec, str]:
    """The task, and a sentence that says what was found. Raises DataError."""
    distinct = set(rows.labels)
    numeric = all(_number(label) is not None for label in distinct)
    whole = numeric and all(float(label).is_integer() for label in distinct)
    scale = numeric and (not whole or len(distinct) > _MANY_VALUES)
    kind = wanted or ("regression" if scale else "classification")
    if kind == "regression":
        targets_of(rows, TaskSpec("regression", (), rows.pair))
        low, high = min(map(float, distinct)), max(map(float, distinct))
        found = f"regression, {len(distinct)} values from {low:g} to {high:g}"
        spec = TaskSpec("regression", (), rows.pair)
    elif len(distinct) < 2:
        raise DataError(f"{rows.path}: every label is {rows.labels[0]!r}; two or more are needed")
    else:
        found = f"classification, {len(distinct)} labels"
        spec = TaskSpec("classification", tuple(sorted(distinct)), rows.pair)
    what = "sentence pairs" if rows.pair else "single sentences"
    how = "as asked" if wanted else "going by the labels; --task overrides"
    return spec, f"{rows.path.name}: {len(rows)} {what}; {found} ({how})"


def targets_of(rows: Rows, task: TaskSpec) -> NumpyArray:
    """int64 class indices or float32 values, one a row. Raises DataError for a label that does not fit."""
    if task.kind == "classification":
        index = {label: i for i, label in enumerate(task.labels)}
        for label, line in zip(rows.labels, rows.lines, strict=True):
            if label not in index:
                shown = ", ".join(task.labels[:8]) + (", ..." if len(task.labels) > 8 else "")
                raise DataError(f"{rows.path}:{line}: label {label!r} is not one of {shown}")
        return np.array([index[label] for label in rows.labels], dtype=np.int64)
    values = []
    for label, line in zip(rows.labels, rows.lines, strict=True):
        number = _number(label)
        if number is None:
            raise DataError(
                f"{rows.path}:{line}: {label!r} is not a number, and the task is regression"
            )
        values.append(number)
    return np.array(values, dtype=np.float32)


def row_weights(rows: Rows, weights: dict[str, float]) -> NumpyArray:
    """float64, one a row: what `weights` says of its label, else 1. Raises DataError for unknown labels."""
    unknown = sorted(set(weights) - set(rows.labels))
    if unknown:
        raise DataError(
            f"{rows.path}: no row has the label {unknown[0]!r} that a weight is given for"
        )
    return np.array([weights.get(label, 1.0) for label in rows.labels], dtype=np.float64)


def _split_files(path: Path) -> dict[str, Path]:
    if path.is_file():
        return {"train": path}
    if not path.is_dir():
        raise DataError(
            f"{path}: no such file or directory; give a data file, or a directory that holds train.tsv"
        )
    found = {}
    for split, names in _SPLITS.items():
        files = [path / (name + suffix) for name in names for suffix in SUFFIXES]
        here = [file for file in files if file.is_file()]
        if len(here) > 1:
            raise DataError(f"{path}: {here[0].name} and {here[1].name} are both there; keep one")
        if here:
            found[split] = here[0]
    if "train" not in found:
        raise DataError(f"{path}: no train{'|'.join(SUFFIXES)} in it")
    return found


def _set_apart(train: Rows, share: float, seed: int) -> tuple[Rows, Rows]:
    order = list(range(len(train)))
    random.Random(f"dev-{seed}").shuffle(order)
    n_dev = max(1, round(share * len(train)))
    if n_dev >= len(train):
        raise DataError(f"{train.path}: {len(train)} rows are too few to set {n_dev} apart as dev")
    return train.take(sorted(order[n_dev:])), train.take(sorted(order[:n_dev]))


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
