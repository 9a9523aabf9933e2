"""What two tiers compare: a digest for each depth, of what decides an answer from there on and nothing else.

Two tiers may differ in operating point, in codecs, or in layers that only one of them runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from offramp_common.activations import NumpyArray
from offramp_common.manifest import FORMAT, Manifest

DIGEST_BYTES = 16


def layer_digests(
    manifest: Manifest, tensors: Mapping[str, NumpyArray], backbone: Mapping[str, Any]
) -> tuple[bytes, ...]:
    """A digest for each depth at which the model can be cut; `backbone` is the family's configuration."""
    m, hashes = manifest, _hashes(manifest, tensors)
    scales = {entry.scale for entry in m.stored.values()}
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


def _hashes(m: Manifest, tensors: Mapping[str, NumpyArray]) -> dict[str, bytes]:
    """Of every tensor by name; a matrix kept as int8 goes with its scales."""
    hashes = {
        name: hashlib.blake2b(value.tobytes() + str(value.shape).encode(), digest_size=32).digest()
        for name, value in tensors.items()
    }
    for alias, name in m.aliases.items():
        hashes[alias] = hashes[name]
    for name, entry in m.stored.items():
        hashes[name] += hashes[entry.scale]
    for alias, name in m.aliases.items():
        hashes[alias] = hashes[name]
    return hashes


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
