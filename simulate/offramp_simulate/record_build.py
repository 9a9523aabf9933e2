"""Making a record: every sample of a labelled file through the bundle's graphs, once for each question.

Torch is not needed: fp32 graphs hold torch's weights bit for bit, so they stand for the cloud.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from offramp_common.activations import Activations, NumpyArray
from offramp_common.bundle import Bundle
from offramp_common.codecs import CODECS, get_codec
from offramp_common.errors import ConfigError, DataError
from offramp_common.frames import Limits, decode_frame, encode_frame
from offramp_common.messages import completion_to_pb, offload_to_pb
from offramp_common.runner import Knobs, Layers, run
from offramp_common.spec import never_exit
from offramp_common.text import Text, TextEncoder
from offramp_common.transport import Completion, Offload
from offramp_simulate.labelled import field, read_rows
from offramp_simulate.record import NEVER, OWN, Point

Progress = Callable[[str, int, int], None]
"""Told what is being done, how many samples are done, and of how many."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """Texts and the places of their labels among the task's."""

    name: str
    texts: list[Text]
    target_N: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Behaviour:
    """What `behaviour` finds; names and axes as in Record."""

    tokens_N: NDArray[np.int64]
    predicted_PNE: NDArray[np.int16]
    confidence_PNE: NDArray[np.float32]
    leaves_PKN: NDArray[np.uint8]
    request_CON: NDArray[np.int32]
    through_QCNE: NDArray[np.int16]


def read_labelled(path: Path, bundle: Bundle, limit: int | None) -> Labelled:
    """TSV with a header line or JSON lines, with `text` (or `premise` and `hypothesis`) and `label`; at
    most `limit` rows, evenly spaced through the file.

    Raises DataError, naming file and line; ConfigError for a task that has no labels."""
    task = bundle.manifest.task
    if task.kind != "classification":
        raise ConfigError(
            f"{bundle.manifest.name}: a {task.kind} task; the simulator counts right labels, so it "
            "records classification only"
        )
    places = {label: place for place, label in enumerate(task.labels)}
    texts: list[Text] = []
    targets: list[int] = []
    rows = read_rows(path)
    if limit is not None and len(rows) > limit:
        # Files are often sorted by label: take from all of it.
        rows = [rows[at * len(rows) // limit] for at in range(limit)]
    for row in rows:
        label = field(path, row, "label")
        if label not in places:
            some = ", ".join(list(places)[:6])
            raise DataError(f"{path}:{row[0]}: label {label!r:.60}: the bundle knows {some}, ...")
        if task.pair and row[1].get("text") is None:
            first = "premise" if "premise" in row[1] else "sentence1"
            texts.append((field(path, row, first), field(path, row, "hypothesis")))
        else:
            texts.append(field(path, row, "text"))
        targets.append(places[label])
    if not texts:
        raise DataError(f"{path}: no labelled line in it; give texts with their labels")
    return Labelled(path.name, texts, np.array(targets))


def points_of(bundle: Bundle, precisions: Sequence[str], sweep: int) -> tuple[Point, ...]:
    """OWN, NEVER, and at most `sweep` operating points of the bundle's own curve, most eager first."""
    specs, n = bundle.manifest.knobs, bundle.n_layers
    own = {p: {k: list(v) for k, v in bundle.knobs(p).items()} for p in precisions}
    never = {p: {k: list(v) for k, v in never_exit(specs, n).items()} for p in precisions}
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for row in bundle.manifest.curve:
        if row.get("kind") != "sweep" or row["precision"] not in precisions:
            continue
        name = f"depth {row['mean_depth']:.1f}"
        knobs = {k: [float(v)] * n for k, v in row["knobs"].items()}
        for precision in precisions:  # where the curve has one precision only, it serves both
            found.setdefault(name, {}).setdefault(precision, knobs)
    # Points at which all or no sample leaves early say what the exits' own labels say already.
    names = [name for name in found if name != f"depth {n:.1f}"]
    if len(names) > sweep:
        names = [names[round(i)] for i in np.linspace(0, len(names) - 1, sweep)] if sweep else []
    swept = [Point(name, found[name]) for name in dict.fromkeys(names)]
    return (Point(OWN, own), Point(NEVER, never), *swept)


def behaviour(
    bundle: Bundle,
    layers_by_precision: dict[str, Layers[NumpyArray]],
    labelled: Labelled,
    points: Sequence[Point],
    device: str,
    through: Sequence[str],
    progress: Progress,
) -> Behaviour:
    """Run everything. `device` is the precision whose hidden states are cut and sent."""
    acts = [TextEncoder(bundle)([text]) for text in labelled.texts]
    n, n_exits, n_layers = len(acts), len(bundle.manifest.exits), bundle.n_layers
    codecs = travelling()
    predicted, confidence, leaves = [], [], []
    request = np.zeros((n_layers, len(codecs), n), np.int32)
    sent = np.full((len(through), n_layers, n, n_exits), -1, np.int16)
    for precision, layers in layers_by_precision.items():
        one, sure = np.zeros((n, n_exits), np.int16), np.zeros((n, n_exits), np.float32)
        for row, act in enumerate(acts):
            cuts = _to_full_depth(bundle, layers, act, points[1].knobs[precision], one, sure, row)
            if precision == device:
                _send(bundle, cuts, layers_by_precision["fp32"], through, request, sent, row)
            progress(f"{precision}, to full depth", row + 1, n)
        predicted.append(one)
        confidence.append(sure)
        leaves.append(_leaving(layers, acts, points, precision, progress))
    return Behaviour(
        np.array([act.n_tokens for act in acts]),
        np.stack(predicted),
        np.stack(confidence),
        np.stack(leaves),
        request,
        sent,
    )


def travelling() -> tuple[str, ...]:
    """The codecs of hidden states, in the table's order."""
    return tuple(name for name, codec in CODECS.items() if not codec.integer)


def response_nbytes(bundle: Bundle) -> int:
    """Of the cloud's answer to one row."""
    width = bundle.manifest.task.answer_width
    answers = np.ones((1, width), np.float32)
    done = Completion("0123456789ab-fff", answers, np.array([1]), np.ones(1, np.float32), 0.1, 5.1)
    return int(completion_to_pb(done).ByteSize())


def manifest_bytes(bundle: Bundle) -> NDArray[np.uint8]:
    """As Record keeps it: without hashes of files that do not come along."""
    value = replace(bundle.manifest, files={}, training={}).to_json()
    return np.frombuffer(json.dumps(value, sort_keys=True).encode(), np.uint8)


def _leaving(
    layers: Layers[NumpyArray],
    acts: Sequence[Activations[NumpyArray]],
    points: Sequence[Point],
    precision: str,
    progress: Progress,
) -> NDArray[np.uint8]:
    """(K, N): depth at which each sample leaves."""
    leaves = np.full((len(points), len(acts)), layers.n_layers, np.uint8)
    for place, point in enumerate(points):
        if point.name == NEVER:
            continue
        knobs = _knobs(point.knobs[precision])
        for row, act in enumerate(acts):
            leaves[place, row] = run(layers, act, layers.n_layers, knobs).left[0].depth
            progress(f"{precision}, operating point {point.name}", row + 1, len(acts))
    return leaves


def _to_full_depth(
    bundle: Bundle,
    layers: Layers[NumpyArray],
    act: Activations[NumpyArray],
    never: object,
    one: NDArray[np.int16],
    sure: NDArray[np.float32],
    row: int,
) -> list[Activations[NumpyArray]]:
    """Fill in what every exit says of a row; what would cross after each depth."""
    assert isinstance(never, dict)
    knobs, places = _knobs(never), {d: i for i, d in enumerate(bundle.manifest.exits)}
    cuts = [act]
    while act.depth < bundle.n_layers:
        step = layers.step(act, knobs)
        act = step.acts
        if step.look is not None:
            place = places[act.depth]
            one[row, place] = int(np.nan_to_num(step.look.answer[0], nan=-np.inf).argmax())
            sure[row, place] = step.look.confidence_B[0]
        cuts.append(act)
    return cuts[:-1]


def _send(
    bundle: Bundle,
    cuts: Sequence[Activations[NumpyArray]],
    cloud: Layers[NumpyArray],
    through: Sequence[str],
    request: NDArray[np.int32],
    sent: NDArray[np.int16],
    row: int,
) -> None:
    """Fill in what a row's request weighs at each cut and by each codec, and what comes of it."""
    never = {k: list(v) for k, v in never_exit(bundle.manifest.knobs, bundle.n_layers).items()}
    nothing = np.zeros(sent.shape[2:], np.float32)
    for act in cuts:
        cut = bundle.cuts[act.depth]
        for place, codec in enumerate(travelling()):
            frame = encode_frame(act, cut, codec)
            request[act.depth, place, row] = _message_nbytes(bundle, act.depth, frame)
            if act.depth and codec in through:
                back = decode_frame(frame, {act.depth: cut}, Limits())
                at = sent[through.index(codec), act.depth]
                _to_full_depth(bundle, cloud, back, never, at, nothing, row)


def _message_nbytes(bundle: Bundle, depth: int, frame: bytes) -> int:
    """Of the message that the agent sends: a bundle's own knobs do not travel."""
    name, digest = bundle.manifest.name, bytes(16)
    work = Offload("0123456789ab-fff", name, digest, frame, {}, deadline_ms=1999.9)
    return int(offload_to_pb(work).ByteSize())


def _knobs(values: object) -> Knobs:
    assert isinstance(values, dict)
    return {name: tuple(float(v) for v in column) for name, column in values.items()}


def check_through(names: Sequence[str]) -> tuple[str, ...]:
    """The codecs whose effect on answers is to be measured. UnknownCodec, ConfigError."""
    for name in names:
        if get_codec(name).integer:
            raise ConfigError(f"codec {name}: carries token ids, which lose nothing; leave it out")
    return tuple(dict.fromkeys(names))
