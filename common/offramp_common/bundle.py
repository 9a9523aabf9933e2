"""The bundle: a directory with everything that both tiers need of one multi-exit model. No pickle, ever.

bundle.json         the manifest (manifest.py)
model.safetensors   all weights, once (weights.py says how they are stored)
backbone.json       the pretrained family's configuration
tokenizer.json      the tokenizer, as the tokenizers library reads it
graphs/PRECISION/   layer_00.onnx ...: what the device runs; their weights are model.safetensors
codecs.safetensors  parameters of the codecs that were fitted to this bundle, where there are any
README.md           the model card
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from offramp_common.activations import NumpyArray
from offramp_common.codecs import CODECS, Codec
from offramp_common.codecs.fitted import Fitted
from offramp_common.codecs.measured import cost
from offramp_common.digests import layer_digests
from offramp_common.errors import BundleError
from offramp_common.manifest import Manifest
from offramp_common.runner import Knobs
from offramp_common.spec import CutSpec

MANIFEST = "bundle.json"
WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.json"
BACKBONE = "backbone.json"
CODEC_WEIGHTS = "codecs.safetensors"
CARD = "README.md"
GRAPHS = "graphs"


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
        return _load(self.path / WEIGHTS)

    @cached_property
    def fitted(self) -> Mapping[str, Fitted]:
        """The codecs that were fitted to this bundle, by the name that travels. Raises BundleError."""
        tensors = _load(self.path / CODEC_WEIGHTS) if self.manifest.fitted else {}
        out = {}
        for entry in self.manifest.fitted:
            try:
                prefix = codec_prefix(entry["label"], entry["depth"])
                own = {
                    name.removeprefix(prefix): value
                    for name, value in tensors.items()
                    if name.startswith(prefix)
                }
                codec = Fitted.from_json(entry, CODECS[entry["inner"]], own)
            except (KeyError, TypeError, ValueError) as error:
                raise BundleError(
                    f"{self.path}: {MANIFEST} and {CODEC_WEIGHTS} do not fit each other "
                    f"({type(error).__name__}: {error}); copy the whole directory again"
                ) from error
            out[codec.name] = codec
        return out

    def codecs(self, depth: int) -> dict[str, Codec]:
        """Label -> codec: all that hidden states cut at `depth` may travel by; of token ids that one."""
        cut = self.cuts[depth]
        out = {name: codec for name, codec in CODECS.items() if codec.integer == cut.integer}
        per_token = any(field.per_token for field in cut.state.values())
        for codec in self.fitted.values():
            if codec.depth == depth and (codec.carries_tokens or not per_token):
                out[codec.label] = codec
        return out

    def codec_cost(self, label: str, depth: int) -> float | None:
        """Points of quality below the uncut model that a codec costs at a depth: the most measured on any
        data; None where nothing was. What loses nothing costs 0."""
        codec = self.codecs(depth).get(label)
        if codec is not None and codec.lossless:
            return 0.0
        return cost(self.manifest.codec_costs, label, depth)

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
        backbone = json.loads((self.path / BACKBONE).read_text())
        return layer_digests(self.manifest, self.tensors, backbone)

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
        _ = self.fitted  # raises for parameters that are not those of the manifest


def codec_prefix(label: str, depth: int) -> str:
    """What the names of a fitted codec's tensors begin with."""
    return f"{label}@{depth}."


def _load(path: Path) -> dict[str, NumpyArray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{path}: cannot be read ({error})") from error


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write bundle.json, with the SHA-256 of every other file in the directory, atomically."""
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
