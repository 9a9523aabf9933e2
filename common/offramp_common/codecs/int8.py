"""int8 with one scale a token: D + 4 bytes a token.

Each token is scaled so that its largest magnitude becomes 127; the error is at most half a step,
max|x| / 254 of that token, and float32 rounding. Scales are float32 and stand before the values.

A NaN cannot be represented and becomes 0; an infinity becomes the largest float32. A token whose
largest magnitude is below 127 * 2**-126 (1.5e-36), so that its scale would be denormal and too
coarse, becomes zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp_common.codecs.sizes import check_size
from offramp_common.errors import WireError

_LEVELS = 127
_MIN_SCALE = np.finfo(np.float32).smallest_normal
# The quotient rounds up, and 127 times it is infinite: one step down.
_MAX_SCALE = np.nextafter(np.finfo(np.float32).max / np.float32(_LEVELS), np.float32(0))


@dataclass(frozen=True)
class Int8PerToken:
    """Symmetric int8 with a float32 scale for each token."""

    name: str = "int8"
    lossless: bool = False
    integer: bool = False
    fixed_size: bool = True

    def encode(self, hidden_ND: NDArray[Any]) -> bytes:
        hidden = np.asarray(hidden_ND, dtype=np.float32)
        peak_N = peak_of(hidden)
        if not np.isfinite(peak_N).all():
            hidden = np.nan_to_num(hidden)
            peak_N = peak_of(hidden)
        scale_N = np.minimum(peak_N / _LEVELS, _MAX_SCALE)
        scale_N[scale_N < _MIN_SCALE] = 0
        # x / inf is 0: what a token without a scale encodes as.
        step_N = np.where(scale_N > 0, scale_N, np.float32(np.inf))
        steps_ND = hidden / step_N[:, None]
        values_ND = np.rint(steps_ND, out=steps_ND).astype(np.int8)
        return bytes(scale_N.astype("<f4").tobytes() + values_ND.tobytes())

    def decode(self, data: bytes | memoryview, n_tokens: int, width: int) -> NDArray[Any]:
        check_size(self.name, data, self.nbytes(n_tokens, width), n_tokens, width)
        scale_N = np.frombuffer(data, dtype="<f4", count=n_tokens)
        if not np.all((scale_N >= 0) & (scale_N <= _MAX_SCALE)):
            raise WireError(
                f"codec int8: a scale outside 0 to {_MAX_SCALE:.8g}; send finite scales"
            )
        values = np.frombuffer(data, dtype=np.int8, offset=4 * n_tokens)
        # No encoder writes -128, and times the largest scale it is infinite.
        if values.min(initial=0) < -_LEVELS:
            raise WireError(f"codec int8: a value below {-_LEVELS}; clip to +-{_LEVELS}")
        out_ND = values.reshape(n_tokens, width).astype(np.float32)
        out_ND *= scale_N[:, None]
        return out_ND

    def nbytes(self, n_tokens: int, width: int) -> int:
        return n_tokens * (width + 4)

    def expected_nbytes(self, n_tokens: int, width: int) -> int:
        return self.nbytes(n_tokens, width)


def peak_of(hidden: NDArray[np.float32]) -> NDArray[Any]:
    """The largest magnitude along the last axis; NaN where there is one."""
    highest: NDArray[Any] = hidden.max(axis=-1, initial=0)
    lowest: NDArray[Any] = hidden.min(axis=-1, initial=0)
    peak: NDArray[Any] = np.maximum(highest, -lowest)
    return peak
