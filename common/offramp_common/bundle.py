"""The bundle: a directory with everything that both tiers need of one multi-exit model. No pickle, ever.

    bundle.json         the manifest below
    model.safetensors   all weights, once (weights.py says how they are stored)
    backbone.json       the pretrained family's configuration
    tokenizer.json      the tokenizer, as the tokenizers library reads it
    graphs/PRECISION/   layer_00.onnx ...: what the device runs; their weights are model.safetensors
    README.md           the model card

The digest of a layer range covers all that decides an answer from a depth on, and nothing else: two tiers
may differ in operating point or in layers that only one of them runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from offramp_common.activations import NumpyArray
from offramp_common.errors import BundleError
from offramp_common.runner import Knobs
from offramp_common.spec import CutSpec, KnobSpec, TaskSpec
from offramp_common.weights import Stored

FORMAT = 1
MANIFEST = "bundle.json"
WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.json"
BACKBONE = "backbone.json"
CARD = "README.md"
GRAPHS = "graphs"
DIGEST_BYTES = 16


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
            online=value.get("online", False),  # bundles from before there were such methods
        )


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk. `read` checks the manifest; `verify` reads every byte."""

    path: Path
    manifest: Manifest

    @classmethod
    def read(cls, path: str | Path) -> Bundle:
        """Raises BundleError, which says what is missing or damaged and what to do."""
        path = Path(path)
        if not (path / MANIFEST).is_file():
            raise BundleError(
                f"{path}: no bundle there ({MANIFEST} is missing); `offramp train` makes one"
            )
        try:
            manifest = Manifest.from_json(json.loads((path / MANIFEST).read_text()))
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError(
                f"{path / MANIFEST}: damaged ({type(error).__name__}: {error})"
            ) from error
        for name in (WEIGHTS, TOKENIZER, BACKBONE):
            if not (path / name).is_file():
                raise BundleError(f"{path}: {name} is missing; copy the whole directory again")
        return cls(path, manifest)

    @property
    def n_layers(self) -> int:
        return self.manifest.n_layers

    @property
    def cuts(self) -> dict[int, CutSpec]:
        """What crosses at each depth at which the model can be cut for the cloud."""
        return {cut.depth: cut for cut in self.manifest.cuts}

    @cached_property
    def tensors(self) -> dict[str, NumpyArray]:
        """All stored tensors by name, as they are stored (weights.unpack_weights dequantises)."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            return dict(load_file(self.path / WEIGHTS))
        except (SafetensorError, OSError) as error:
            raise BundleError(f"{self.path / WEIGHTS}: cannot be read ({error})") from error

    def knobs(self, precision: str) -> Knobs:
        """The calibrated operating point of a precision; raises BundleError when there is none."""
        try:
            return self.manifest.operating_points[precision]
        except KeyError:
            have = ", ".join(self.manifest.operating_points) or "none"
            raise BundleError(
                f"{self.path}: not calibrated for {precision} (has: {have}); run `offramp calibrate`"
            ) from None

    def digest(self, depth: int) -> bytes:
        """Digest (16 bytes) of everything that decides the answer of a sample cut at `depth`."""
        return self._digests[depth]

    @cached_property
    def _digests(self) -> tuple[bytes, ...]:
        m = self.manifest
        hashes = {
            name: hashlib.blake2b(
                value.tobytes() + str(value.shape).encode(), digest_size=32
            ).digest()
            for name, value in self.tensors.items()
        }
        for alias, name in m.aliases.items():
            hashes[alias] = hashes[name]
        for name, entry in m.stored.items():  # a matrix goes with its scales
            hashes[name] += hashes[entry.scale]
        for alias, name in m.aliases.items():
            hashes[alias] = hashes[name]
        scales = {entry.scale for entry in m.stored.values()}
        backbone = json.loads((self.path / BACKBONE).read_text())
        out = []
        for depth in range(m.n_layers):
            decides = [
                FORMAT, m.task.kind, m.task.labels, m.family, m.n_layers, m.max_tokens, backbone,
                m.cuts[depth].to_json(), m.method, m.settings, [e for e in m.exits if e > depth],
            ]  # fmt: skip
            digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
            digest.update(json.dumps(decides, sort_keys=True).encode())
            for name in sorted(hashes.keys() - scales):
                if runs_from(name, depth):
                    digest.update(name.encode() + b"\0" + hashes[name])
            out.append(digest.digest())
        return tuple(out)

    def verify(self) -> None:
        """Read every file and compare it with the manifest; raises BundleError naming what differs."""
        for name, expected in self.manifest.files.items():
            path = self.path / name
            if not path.is_file():
                raise BundleError(f"{path}: missing; copy the whole directory again")
            actual = hash_file(path)
            if actual != expected:
                raise BundleError(
                    f"{path}: SHA-256 {actual[:16]}..., the manifest says {expected[:16]}...; the file was "
                    "changed or damaged: copy it again"
                )
        missing = [n for n in self.manifest.aliases.values() if n not in self.tensors]
        missing += [e.scale for e in self.manifest.stored.values() if e.scale not in self.tensors]
        if missing:
            raise BundleError(
                f"{self.path / WEIGHTS}: no tensor {missing[0]}; the file is of another bundle"
            )


def runs_from(name: str, depth: int) -> bool:
    """Whether a tensor plays a part when layers [depth, n) and the exit heads above `depth` run.

    Names are "embeddings...", "layers.I...", "exits.D..."; anything else always counts.
    """
    part, _, rest = name.partition(".")
    if part == "embeddings":
        return depth == 0
    if part == "layers":
        return int(rest.split(".", 1)[0]) >= depth
    if part == "exits":
        return int(rest.split(".", 1)[0]) > depth
    return True


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write bundle.json, with the SHA-256 of every other file in the directory, atomically."""
    from dataclasses import replace

    files = {
        str(p.relative_to(path)): hash_file(p)
        for p in sorted(path.rglob("*"))
        if p.is_file() and p.name not in (MANIFEST, CARD)
    }
    text = json.dumps(replace(manifest, files=files).to_json(), indent=1)
    temporary = path / (MANIFEST + ".part")
    temporary.write_text(text + "\n")
    temporary.replace(path / MANIFEST)


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
