"""The record of a bundle: what each sample does at each exit, and what that takes. One file.

A scenario runs over a record without the model, the text or the machine it was made on. It is an .npz
archive: a header of JSON (`header`, as bytes) and plain arrays; no pickle. Axes: N samples, E exits
(shallowest first), K operating points, P precisions of the device, C cuts (C = n_layers, from depth
0), O codecs, L layers, G lengths that were timed, R batch sizes that were timed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from offramp_common.bundle import Bundle
from offramp_common.errors import DataError
from offramp_common.manifest import Manifest

FORMAT = 3
_READ = (2, FORMAT)
"""Format 2 says nothing of an engine's rests."""
NEVER = "never"
"""The operating point at which no sample leaves early."""
OWN = "own"
"""The bundle's calibrated operating point."""


_RESTS = {"rest_s_S", "rest_ms_WS"}


@dataclass(frozen=True, slots=True)
class Point:
    """An operating point: knobs by precision. `name` is OWN, NEVER, or what the sweep called it."""

    name: str
    knobs: Mapping[str, Mapping[str, list[float]]]


@dataclass(frozen=True)
class Header:
    """What the record is of. `digests` are the bundle's, in hex, by depth; `machine` and `data` are for
    people. `overhead_ms` is what the agent adds to a sample beside its layers, `gateway_ms` what gateway
    and loopback add to the engine's own time; `response_nbytes` the cloud's answer to one row."""

    bundle: str
    method: str
    n_layers: int
    max_tokens: int
    exits: tuple[int, ...]
    digests: tuple[str, ...]
    precisions: tuple[str, ...]
    precision: str
    split: int
    codec: str
    codecs: tuple[str, ...]
    through: tuple[str, ...]
    points: tuple[Point, ...]
    data: str
    machine: str
    overhead_ms: float
    gateway_ms: float
    response_nbytes: int

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Header:
        """Raises KeyError, TypeError or ValueError where it is no header of this format."""
        value = json.loads(text)
        if value.pop("format") not in _READ:
            raise ValueError(f"not format {FORMAT}: make it again with `offramp record`")
        value["points"] = tuple(Point(**point) for point in value["points"])
        known = {f.name for f in fields(cls)}
        named: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in value.items() if k in known
        }
        return cls(**named)


@dataclass(frozen=True, eq=False)
class Record:
    """The table itself.

    tokens_N            length of each sample
    target_N            the right label's index
    predicted_PNE       label at each exit, run to full depth on the device in precision P
    confidence_PNE      the method's, in [0, 1]
    leaves_PKN          depth at which a sample leaves at operating point K
    request_CON         bytes of the request message, cut at C, hidden states by codec O (at cut 0 all
                        codecs are `tokens`)
    through_QCNE        labels that the cloud (fp32) gives at each exit for hidden states cut at C from the
                        device's own precision and sent through codec `header.through[Q]`; -1 at exits
                        not deeper than the cut
    lengths_G, layer_ms_PLG     milliseconds of each layer of the device by length
    encode_ms_OG        of a codec, at the bundle's own split
    deviation_J         quantiles of a run's time on the device over its median, equally probable: a draw
                        among them gives the machine's jitter
    engine_deviation_J  the same of the engine, as many, for one row that comes while nothing else runs
    batches_R, engine_ms_RG     milliseconds of one layer of the engine for R rows of G tokens
    engine_fixed_ms_R   of a run, whatever its layers: joining, copying, answering
    rest_s_S, rest_ms_WS   what an engine takes more for one row after so long a rest than after the one that
                        its table was timed with: of a run, and of each of its layers
    manifest_json       the bundle's manifest, as bytes of JSON: what live planners read of a bundle
    """

    header: Header
    tokens_N: NDArray[np.int64]
    target_N: NDArray[np.int64]
    predicted_PNE: NDArray[np.int16]
    confidence_PNE: NDArray[np.float32]
    leaves_PKN: NDArray[np.uint8]
    request_CON: NDArray[np.int32]
    through_QCNE: NDArray[np.int16]
    lengths_G: NDArray[np.float64]
    layer_ms_PLG: NDArray[np.float64]
    encode_ms_OG: NDArray[np.float64]
    deviation_J: NDArray[np.float64]
    engine_deviation_J: NDArray[np.float64]
    batches_R: NDArray[np.float64]
    engine_ms_RG: NDArray[np.float64]
    engine_fixed_ms_R: NDArray[np.float64]
    manifest_json: NDArray[np.uint8]
    rest_s_S: NDArray[np.float64] = field(default_factory=lambda: np.zeros(1))
    rest_ms_WS: NDArray[np.float64] = field(default_factory=lambda: np.zeros((2, 1)))
    path: Path | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        problem = _problem(self)
        if problem:
            raise DataError(f"{self.path or 'record'}: {problem}; make it again: `offramp record`")

    @cached_property
    def bundle(self) -> Bundle:
        """The recorded bundle without its files: manifest, cuts and codecs' sizes, no weights."""
        manifest = Manifest.from_json(json.loads(self.manifest_json.tobytes()))
        return Bundle(Path(f"{self.header.bundle} (recorded)"), replace(manifest, fitted=()))

    @property
    def n_samples(self) -> int:
        return len(self.tokens_N)

    def precision(self, name: str) -> int:
        """Place of a precision; DataError names those there are."""
        return self._place("precision", self.header.precisions, name)

    def codec(self, name: str) -> int:
        return self._place("codec", self.header.codecs, name)

    def point(self, name: str) -> int:
        """Place of an operating point."""
        return self._place("operating point", tuple(p.name for p in self.header.points), name)

    def cloud_predicted_NE(self, cut: int, codec: str) -> NDArray[np.int16]:
        """What the cloud answers at each exit for hidden states of this cut and codec: as measured
        where the codec was recorded, else as if it lost nothing."""
        found: NDArray[np.int16] = self.predicted_PNE[self.precision("fp32")]
        if cut > 0 and codec in self.header.through:
            found = self.through_QCNE[self.header.through.index(codec), cut]
        return found

    def save(self, path: Path) -> None:
        """Written to a file beside it, then put in its place; the same record gives the same bytes."""
        names = [f.name for f in fields(self) if f.name not in ("header", "path")]
        arrays: dict[str, Any] = {name: getattr(self, name) for name in names}
        text = self.header.to_json().encode()
        part = path.with_name(path.name + ".part")
        with part.open("wb") as file:
            np.savez_compressed(file, header=np.frombuffer(text, np.uint8), **arrays)
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> Record:
        """DataError says what is wrong with the file and what to do."""
        try:
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                header = Header.from_json(bytes(file["header"]).decode())
                names = {f.name for f in fields(cls) if f.name not in ("header", "path")}
                names -= _RESTS - set(file.files)
                return cls(header, **{name: file[name] for name in names}, path=path)
        except FileNotFoundError as error:
            raise DataError(
                f"{path}: no record there; make one with `offramp record BUNDLE --data FILE`"
            ) from error
        except (OSError, KeyError, TypeError, ValueError, EOFError, BadZipFile) as error:
            raise DataError(f"{path}: not a record of this version ({error})") from error

    def _place(self, what: str, names: tuple[str, ...], name: str) -> int:
        try:
            return names.index(name)
        except ValueError:
            raise DataError(
                f"{what} {name!r}: the record has {', '.join(names)}; name one of them, or record again"
            ) from None


def _problem(record: Record) -> str:
    """What contradicts itself; empty when nothing does."""
    h = record.header
    n, exits, layers = len(record.tokens_N), len(h.exits), h.n_layers
    grid, rows = len(record.lengths_G), len(record.batches_R)
    n_precisions, n_points, n_codecs = len(h.precisions), len(h.points), len(h.codecs)
    shapes = {
        "target_N": (n,),
        "predicted_PNE": (n_precisions, n, exits),
        "confidence_PNE": (n_precisions, n, exits),
        "leaves_PKN": (n_precisions, n_points, n),
        "request_CON": (layers, n_codecs, n),
        "through_QCNE": (len(h.through), layers, n, exits),
        "layer_ms_PLG": (n_precisions, layers, grid),
        "encode_ms_OG": (n_codecs, grid),
        "engine_ms_RG": (rows, grid),
        "engine_fixed_ms_R": (rows,),
        "engine_deviation_J": record.deviation_J.shape,
        "rest_ms_WS": (2, len(record.rest_s_S)),
    }
    for name, shape in shapes.items():
        if getattr(record, name).shape != shape:
            return f"{name} has shape {getattr(record, name).shape}, must be {shape}"
    if n < 1 or "fp32" not in h.precisions or h.exits[-1] != layers:
        return "no samples, no fp32, or no exit at full depth"
    if not np.isin(record.leaves_PKN, h.exits).all():
        return f"samples leave at depths without an exit: {h.exits}"
    return ""
