"""A replica's own examination, before it takes requests: a bad bundle fails here."""

from __future__ import annotations

import numpy as np

from offramp_cloud.engine import Engine
from offramp_common.activations import Activations
from offramp_common.errors import BundleError, OfframpError
from offramp_common.frames import encode_frame
from offramp_common.transport import Offload

_TOKENS = (8, 3)  # of the two samples: unequal, so that one is padded


async def try_out(engine: Engine) -> None:
    """Answer two samples through all layers. Raises BundleError when that fails, or the answers are
    no numbers."""
    bundle = engine.bundle
    bundle.verify()  # this node's copy
    cut = bundle.cuts[0]
    lengths = [min(tokens, engine.limits.max_tokens) for tokens in _TOKENS]
    ids = np.zeros((len(lengths), max(lengths), cut.width), np.int64)
    frame = encode_frame(Activations(ids, np.array(lengths), depth=0), cut, "fp32")
    never = {spec.name: (spec.never,) * bundle.n_layers for spec in bundle.manifest.knobs}
    name = bundle.manifest.name
    try:
        done = await engine.complete(Offload("trial", name, bundle.digest(0), frame, never))
    except OfframpError as error:
        raise BundleError(f"{name}: cannot answer: {error}") from error
    if not np.isfinite(done.answers).all():
        raise BundleError(f"{name}: its answers are no numbers; it is damaged, or badly trained")
