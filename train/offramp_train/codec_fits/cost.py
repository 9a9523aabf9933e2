"""What codecs cost in quality on a data file: cut, encoded, decoded, and run to the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from offramp_common.codecs import Codec
from offramp_common.codecs.measured import Measured
from offramp_model.split_model import to_torch
from offramp_train.codec_fits.coded import coded
from offramp_train.codec_fits.cut_rows import CutBatch, cut_batches, torch_layers
from offramp_train.codec_fits.tail import Tail
from offramp_train.measure import Subject
from offramp_train.metrics import metric_of, prediction_of
from offramp_train.progress import Report

_BATCH = 32


@dataclass
class _Sums:
    """Of one codec at one depth, batch by batch."""

    answers: list[np.ndarray] = field(default_factory=list)
    nbytes: int = 0
    tokens: int = 0
    square_error: float = 0.0
    whole: bool = True


@torch.inference_mode()
def measure_codecs(
    subject: Subject, codecs: Mapping[int, Mapping[str, Codec]], report: Report
) -> tuple[list[Measured], float]:
    """Depth -> label -> codec: what each costs, and the uncut model's quality. All rows run all layers."""
    tail = Tail(torch_layers(subject).model)
    sums = {(depth, label): _Sums() for depth in codecs for label in codecs[depth]}
    rows: list[np.ndarray] = []
    uncut: list[np.ndarray] = []
    with report.bar("measuring codecs", len(subject.rows)) as bar:
        for batch in cut_batches(subject, sorted(codecs), _BATCH):
            rows.append(batch.rows)
            uncut.append(batch.answer_BC)
            for (depth, label), cell in sums.items():
                _add(cell, codecs[depth][label], batch, depth, tail)
            bar.step(len(batch.rows))
    return _measured(subject, sums, np.concatenate(rows), np.concatenate(uncut))


def _add(cell: _Sums, codec: Codec, batch: CutBatch, depth: int, tail: Tail) -> None:
    done = coded(codec, batch.acts[depth])
    cell.answers.append(tail.answer(to_torch(done.acts)).float().numpy())
    cell.nbytes += int(done.nbytes_B.sum())
    cell.tokens += done.acts.n_tokens
    if done.error_B is None:
        cell.whole = False
    else:
        cell.square_error += float(np.square(done.error_B).sum())


def _measured(
    subject: Subject,
    sums: Mapping[tuple[int, str], _Sums],
    order: np.ndarray,
    uncut_NC: np.ndarray,
) -> tuple[list[Measured], float]:
    task = subject.bundle.manifest.task
    _, quality = metric_of(task)
    target_N, one_N = subject.target_N[order], np.ones(len(order))
    uncut_N = prediction_of(task, uncut_NC)
    whole = quality(uncut_N, target_N, one_N)
    out = []
    for (depth, label), cell in sums.items():
        got_N = prediction_of(task, np.concatenate(cell.answers))
        same = float((got_N == uncut_N).mean()) if task.kind == "classification" else None
        error = (cell.square_error / len(order)) ** 0.5 if cell.whole else None
        out.append(
            Measured(
                label,
                depth,
                data_name(subject),
                len(order),
                round(100 * (whole - quality(got_N, target_N, one_N)), 4),
                None if same is None else round(same, 5),
                round(cell.nbytes / len(order), 1),
                round(cell.tokens / len(order), 2),
                None if error is None else round(error, 5),
            )
        )
    return out, whole


def data_name(subject: Subject) -> str:
    """The data file and its folder: files of many data sets have one name."""
    path = subject.rows.path.resolve()
    return f"{path.parent.name}/{path.name}"


def all_codecs(
    subject: Subject, depths: Sequence[int], labels: Sequence[str] = ()
) -> dict[int, dict[str, Codec]]:
    """Those that hidden states can travel by, at each depth; only `labels` where any are given."""
    out = {}
    for depth in depths:
        here = subject.bundle.codecs(depth)
        out[depth] = {n: codec for n, codec in here.items() if not labels or n in labels}
    return out
