"""int4 with a scale for each group of 32 channels of a token: D / 2 + D / 32 + 4 bytes a token.

A group's values are divided by its scale, so that they lie within +-1, and each becomes the nearest
of sixteen levels: close together around zero, where most values of a group are. The levels were
fitted to hidden states of MiniLM and MPNet (docs/decisions/0006-codecs.md), which made clipping a
group's largest values not worth its time. A group's scale is a byte, in 1/255 of the token's
largest magnitude, rounded up. The error is at most half the widest gap between levels, 31/254 of
the group's scale, and rounding: of values to 1/127 of the scale before they are compared with the
levels (1/254), and of floats.

A NaN becomes 0, an infinity the largest float32. A token whose largest magnitude is below 32385 *
2**-126 (3.8e-34) becomes zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp_common.codecs.int8 import peak_of
from offramp_common.codecs.sizes import check_size
from offramp_common.errors import WireError

GROUP = 32
LEVELS = (-127, -92, -69, -50, -35, -22, -10, 0, 9, 19, 30, 42, 57, 74, 96, 127)
"""In 1/127 of a group's scale. Zero is one of them: a channel that is switched off stays so."""

_UNITS = 127 * 255  # of a token's largest magnitude
_MIN_UNIT = np.finfo(np.float32).smallest_normal
# One step down, as for int8: all levels times all scales stay finite.
_MAX_UNIT = np.nextafter(np.finfo(np.float32).max / np.float32(_UNITS), np.float32(0))


def _nearest_level() -> NDArray[np.uint8]:
    """For each int8, read as a byte, the number of the level that is nearest; of two the lower."""
    values = np.arange(256, dtype=np.uint8).view(np.int8).astype(np.int64)
    nearest: NDArray[np.intp] = np.abs(values[:, None] - np.array(LEVELS)).argmin(axis=1)
    return nearest.astype(np.uint8)


_NEAREST = _nearest_level()
_PAIRS = np.array([(LEVELS[b & 15], LEVELS[b >> 4]) for b in range(256)], np.float32)


@dataclass(frozen=True)
class Int4PerGroup:
    """Sixteen levels, with a byte of scale for each 32 channels, and a float32 for each token."""

    name: str = "int4"
    lossless: bool = False
    integer: bool = False
    fixed_size: bool = True

    def encode(self, hidden_ND: NDArray[Any]) -> bytes:
        hidden_NGC = _grouped(np.asarray(hidden_ND, dtype=np.float32))
        peak_NG = peak_of(hidden_NGC)
        if not np.isfinite(peak_NG).all():
            hidden_NGC = np.nan_to_num(hidden_NGC)
            peak_NG = peak_of(hidden_NGC)
        unit_N = np.minimum(peak_NG.max(axis=1, initial=0) / np.float32(_UNITS), _MAX_UNIT)
        unit_N[unit_N < _MIN_UNIT] = 0
        # x / inf is 0: what a token without a scale encodes as.
        whole_N1 = np.where(unit_N > 0, unit_N, np.float32(np.inf))[:, None]
        scale_NG = np.clip(np.ceil(peak_NG / (whole_N1 * 127)), 0, 255)
        step_NG = scale_NG * unit_N[:, None]
        step_NG[step_NG == 0] = np.inf
        steps_NGC = hidden_NGC / step_NG[:, :, None]
        values_NGC = np.rint(steps_NGC, out=steps_NGC).astype(np.int8)
        levels = _NEAREST[values_NGC.view(np.uint8)].reshape(
            len(hidden_ND), peak_NG.shape[1] * GROUP
        )
        width = hidden_ND.shape[1]
        levels = levels[:, : width + width % 2]
        packed = levels[:, 0::2] | levels[:, 1::2] << 4
        scales = scale_NG.astype(np.uint8).tobytes()
        return bytes(unit_N.astype("<f4").tobytes() + scales + packed.tobytes())

    def decode(self, data: bytes | memoryview, n_tokens: int, width: int) -> NDArray[Any]:
        check_size(self.name, data, self.nbytes(n_tokens, width), n_tokens, width)
        unit_N = np.frombuffer(data, dtype="<f4", count=n_tokens)
        if not np.all((unit_N >= 0) & (unit_N <= _MAX_UNIT)):
            raise WireError(f"codec int4: a scale outside 0 to {_MAX_UNIT:.8g}; send finite scales")
        groups, pairs = -(-width // GROUP), (width + 1) // 2
        scales = np.frombuffer(data, np.uint8, n_tokens * groups, 4 * n_tokens)
        packed = np.frombuffer(data, np.uint8, offset=(4 + groups) * n_tokens)
        out_ND = _PAIRS[packed].reshape(n_tokens, 2 * pairs)[:, :width]
        step_NG = scales.reshape(n_tokens, groups) * unit_N[:, None]
        if width % GROUP:
            out_ND = out_ND * np.repeat(step_NG, GROUP, axis=1)[:, :width]
        else:
            out_NGC = out_ND.reshape(n_tokens, groups, GROUP)
            out_NGC *= step_NG[:, :, None]
        return out_ND

    def nbytes(self, n_tokens: int, width: int) -> int:
        return n_tokens * (4 + -(-width // GROUP) + (width + 1) // 2)

    def expected_nbytes(self, n_tokens: int, width: int) -> int:
        return self.nbytes(n_tokens, width)


def _grouped(hidden_ND: NDArray[np.float32]) -> NDArray[np.float32]:
    """(N, groups, 32), the last group filled up with zeros."""
    n_tokens, width = hidden_ND.shape
    groups = -(-width // GROUP)
    if width % GROUP:
        padded = np.zeros((n_tokens, groups * GROUP), np.float32)
        padded[:, :width] = hidden_ND
        hidden_ND = padded
    return hidden_ND.reshape(n_tokens, groups, GROUP)
