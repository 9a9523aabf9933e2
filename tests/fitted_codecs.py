"""Fitted codecs with made-up parameters, for tests of what travels."""

from __future__ import annotations

import numpy as np

from offramp_common.codecs import CODECS
from offramp_common.codecs.fitted import Fitted
from offramp_common.codecs.kept import Keep
from offramp_common.codecs.narrow import Narrow
from offramp_common.codecs.pooled import Pool


def random_narrow(width: int, channels: int, seed: int = 0) -> Narrow:
    """An orthogonal map down and its transpose, around a mean."""
    rng = np.random.default_rng(seed)
    down_DR = np.linalg.qr(rng.standard_normal((width, channels)))[0].astype(np.float32)
    mean_D = rng.standard_normal(width).astype(np.float32)
    return Narrow(mean_D, down_DR, down_DR.T.copy(), mean_D)


def random_codecs(width: int, depth: int = 1, seed: int = 0) -> list[Fitted]:
    """One of each kind and some that combine them."""
    rng = np.random.default_rng(seed)
    weight_D = rng.standard_normal(width).astype(np.float32)
    channels = max(1, width // 2)
    keep, pool = Keep(weight_D, most=5, share=0.6, least=2), Pool(weight_D, most=4)
    narrow = random_narrow(width, channels, seed)
    return [
        Fitted("pruned-fp32", depth, width, CODECS["fp32"], keep),
        Fitted("pruned-int4", depth, width, CODECS["int4"], keep),
        Fitted("pruned-int4+z", depth, width, CODECS["int4+z"], keep),
        Fitted("pooled-int8", depth, width, CODECS["int8"], pool),
        Fitted("narrow", depth, width, CODECS["int8"], None, narrow),
        Fitted("bottleneck", depth, width, CODECS["int8"], pool, narrow),
        Fitted("pruned-narrow", depth, width, CODECS["int8"], keep, narrow),
    ]
