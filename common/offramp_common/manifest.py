"""bundle.json as a dataclass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from offramp_common.codecs.measured import Measured
from offramp_common.errors import BundleError
from offramp_common.forecast import Forecast
from offramp_common.runner import Knobs
from offramp_common.spec import CutSpec, KnobSpec, TaskSpec
from offramp_common.weights import Stored

FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """bundle.json.

    name              what clients ask for
    task              what an answer means
    family            the backbone's family, such as "bert"
    n_layers          depth of the whole model
    max_tokens        longest input; longer text is cut
    cuts              what crosses when the model is cut at depth 0 .. n_layers - 1
    method            name of the exit method;  settings: its structural settings
    online            the device chooses a sample's exit before it runs (offramp_edge.chooser), and the cloud
                      reports what its exits predicted
    exits             depths with an exit head; the last is n_layers
    knobs             what calibration may move
    operating_points  precision ("fp32", "int8") -> the calibrated knobs
    precision, split, codec   what the device uses unless told otherwise
    stored            matrices that are kept as int8
    aliases           names that share another name's tensor (shared layers, shared poolers)
    files             SHA-256 of every other file
    curve             quality against depth, measured when it was trained (for the card and `bundle show`)
    training          how it was made: recipe, data, software, seed
    fitted            settings of the codecs that were fitted to this bundle (codecs/fitted.py)
    codec_costs       what codecs were measured to cost in quality
    forecasts         precision -> what confidence says of later exits, at its operating point (for planners)
    """

    name: str
    task: TaskSpec
    family: str
    n_layers: int
    max_tokens: int
    cuts: tuple[CutSpec, ...]
    method: str
    settings: Mapping[str, Any]
    exits: tuple[int, ...]
    knobs: tuple[KnobSpec, ...]
    operating_points: Mapping[str, Knobs]
    precision: str = "fp32"
    split: int = 0
    codec: str = "int8"
    stored: Mapping[str, Stored] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    curve: tuple[Mapping[str, Any], ...] = ()
    training: Mapping[str, Any] = field(default_factory=dict)
    online: bool = False
    fitted: tuple[Mapping[str, Any], ...] = ()
    codec_costs: tuple[Measured, ...] = ()
    forecasts: Mapping[str, Forecast] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "name": self.name,
            "task": {
                "kind": self.task.kind,
                "labels": list(self.task.labels),
                "pair": self.task.pair,
            },
            "family": self.family,
            "n_layers": self.n_layers,
            "max_tokens": self.max_tokens,
            "cuts": [cut.to_json() for cut in self.cuts],
            "method": self.method,
            "settings": dict(self.settings),
            "exits": list(self.exits),
            "knobs": {knob.name: knob.to_json() for knob in self.knobs},
            "operating_points": {
                precision: {name: list(values) for name, values in knobs.items()}
                for precision, knobs in self.operating_points.items()
            },
            "precision": self.precision,
            "split": self.split,
            "codec": self.codec,
            "stored": {name: [entry.kind, entry.scale] for name, entry in self.stored.items()},
            "aliases": dict(self.aliases),
            "files": dict(self.files),
            "curve": [dict(point) for point in self.curve],
            "training": dict(self.training),
            "online": self.online,
            "fitted": [dict(entry) for entry in self.fitted],
            "codec_costs": [measured.to_json() for measured in self.codec_costs],
            "forecasts": {name: forecast.to_json() for name, forecast in self.forecasts.items()},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Manifest:
        if value.get("format") != FORMAT:
            raise BundleError(
                f"bundle format {value.get('format')!r}: this version reads {FORMAT}; "
                "make the bundle again with `offramp train`, or update offramp"
            )
        task = value["task"]
        return cls(
            name=value["name"],
            task=TaskSpec(task["kind"], tuple(task["labels"]), task["pair"]),
            family=value["family"],
            n_layers=value["n_layers"],
            max_tokens=value["max_tokens"],
            cuts=tuple(CutSpec.from_json(depth, cut) for depth, cut in enumerate(value["cuts"])),
            method=value["method"],
            settings=value["settings"],
            exits=tuple(value["exits"]),
            knobs=tuple(KnobSpec(name=name, **knob) for name, knob in value["knobs"].items()),
            operating_points={
                precision: {name: tuple(values) for name, values in knobs.items()}
                for precision, knobs in value["operating_points"].items()
            },
            precision=value["precision"],
            split=value["split"],
            codec=value["codec"],
            stored={name: Stored(*entry) for name, entry in value["stored"].items()},
            aliases=value["aliases"],
            files=value["files"],
            curve=tuple(value["curve"]),
            training=value["training"],
            # What bundles of earlier versions lack.
            online=value.get("online", False),
            fitted=tuple(value.get("fitted", ())),
            codec_costs=tuple(Measured.from_json(m) for m in value.get("codec_costs", ())),
            forecasts={
                precision: Forecast.from_json(value["exits"], forecast)
                for precision, forecast in value.get("forecasts", {}).items()
            },
        )
