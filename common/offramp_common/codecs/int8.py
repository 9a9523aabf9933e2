"""int8 with one scale a token: D + 4 bytes a token.

Each token is scaled so that its largest magnitude becomes 127; the error is at most half a step,
max|x| / 254 of that token. Scales are float32 and stand before the values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp_common.codecs.sizes import check_size
from offramp_common.errors import WireError

_LEVELS = 127
_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Int8PerToken:
    """Symmetric int8 with a float32 scale for each token."""

    name: str = "int8"
    lossless: bool = False
    integer: bool = False

    def encode(self, hidden_ND: NDArray[Any]) -> bytes:
        # A NaN or infinity cannot be represented: it becomes 0 or the largest float.
        hidden = np.nan_to_num(np.asarray(hidden_ND, dtype=np.float32))
        scale_N1 = np.abs(hidden).max(axis=1, initial=0.0, keepdims=True) / _LEVELS
        scale_N1 = scale_N1.astype("<f4")
        # A token of zeros, or of denormals whose scale underflows, encodes as zeros.
        safe_N1 = np.where(scale_N1 > 0, scale_N1, 1).astype(np.float32)
        values = np.clip(np.rint(hidden / safe_N1), -_LEVELS, _LEVELS).astype(np.int8)
        return scale_N1.tobytes() + values.tobytes()

    def decode(self, data: bytes | memoryview, n_tokens: int, width: int) -> NDArray[Any]:
        check_size(self.name, data, self.nbytes(n_tokens, width), n_tokens, width)
        scale_N = np.frombuffer(data, dtype="<f4", count=n_tokens)
        if not np.all((scale_N >= 0) & (scale_N <= _FLOAT32_MAX / _LEVELS)):
            raise WireError("codec int8: a scale is negative, too large or not a number")
        values_ND = np.frombuffer(data, dtype=np.int8, offset=4 * n_tokens).reshape(n_tokens, width)
        return np.multiply(values_ND, scale_N[:, None], dtype=np.float32)

    def nbytes(self, n_tokens: int, width: int) -> int:
        return n_tokens * (width + 4)
