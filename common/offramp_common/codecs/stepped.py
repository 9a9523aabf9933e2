"""Entropy-coded steps: `int8+z` and `int4+z`, whose bytes may be cut short.

Each token is divided by a step in proportion to its root mean square, and rounded. Nothing is
clipped, and no range is given away to a token's few large values: they get long codes instead. So
all tokens' values have one distribution, which codes of about `bits` bits a value fit whatever the
layer or model, and at equal error the bytes are 10 to 30 % fewer than those of ranges per token or
per group, entropy coded as well (docs/decisions/0006-codecs.md).

    steps     N bf16, little-endian
    coarse    N x D int8 as one zstd frame: the values without their `planes` lowest bits
    planes    `planes` times ceil(N x D / 8) bytes: one bit of each value, the highest first, as it
              is, for low bits are noise that no code shortens

Data cut after any plane decode to twice the step with each plane that is missing, to the middle of
what the value may have been.

The error is at most half a step. The step is `relative` of the token's root mean square rounded up
to a bf16, but at least 1 / (127 * 2**planes) of its largest magnitude (which tokens of 2000
channels or fewer never need), and doubled until `nbytes` holds, which no data tried
has ever needed. A NaN becomes 0, magnitudes above 2**126 and infinities become 2**126. A token
whose step would be below 2**-126 becomes zeros.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp_common.codecs.entropy import compress, decompress, most
from offramp_common.codecs.int8 import peak_of
from offramp_common.codecs.sizes import check_size
from offramp_common.errors import WireError

_LARGEST = np.float32(2.0**126)
_MIN_STEP = np.finfo(np.float32).smallest_normal
_PLAIN = (np.float32(1e-15), np.float32(1e15))  # squares of these neither overflow nor vanish
_COARSE = 127  # largest coarse value
_LARGEST_BF16 = 0x7F7F
_SAFE_STEP = np.float32(2.0**117)  # no value is 1024 steps
_TABLE_BYTES = 40  # of the expected size: zstd's header and table
_SLACK_BITS, _SLACK_BYTES = 0.25, 160  # of `nbytes`, over the bound of entropy: codes, their tables


@dataclass(frozen=True)
class Stepped:
    """`relative`: the step, in root mean squares; `bits`: a coarse value's share of the expected
    size, tables included, as measured; `planes`: low bits that stand apart."""

    name: str
    relative: float
    bits: float
    planes: int = 0
    lossless: bool = False
    integer: bool = False
    fixed_size: bool = False

    def __post_init__(self) -> None:
        # Coarser steps could need less than the bit a value that is always sent.
        if not 0 < self.relative * (1 << self.planes) <= 1:
            raise ValueError(f"codec {self.name}: coarse steps must be at most a root mean square")

    def encode(self, hidden_ND: NDArray[Any]) -> bytes:
        hidden_ND, step_N = self._steps(np.asarray(hidden_ND, dtype=np.float32))
        while True:
            bits_N = _bf16_bits(step_N)
            step_N = _from_bf16_bits(bits_N)
            low_ND, coarse = self._rounded(hidden_ND, step_N)
            coded = compress(coarse)
            if len(coded) <= self._most_coarse(hidden_ND.size):
                break
            step_N = step_N * 2
        planes = (
            np.packbits(low_ND & (1 << bit), axis=None).tobytes()
            for bit in reversed(range(self.planes))
        )
        return b"".join((bits_N.astype("<u2").tobytes(), coded, *planes))

    def decode(self, data: bytes | memoryview, n_tokens: int, width: int) -> NDArray[Any]:
        planes = self.planes * _plane(n_tokens * width)
        fewest, largest = 2 * n_tokens + planes, self.nbytes(n_tokens, width)
        if not fewest <= len(data) <= largest:
            raise WireError(
                f"codec {self.name}: {len(data)} bytes of hidden states; {n_tokens} tokens of width "
                f"{width} need {fewest} to {largest}"
            )
        whole = memoryview(data)
        step_N, coarse, end = self._read(whole, n_tokens, width)
        check_size(self.name, data, end + planes, n_tokens, width)
        return self._values(step_N, coarse, whole[end:], (n_tokens, width))

    def nbytes(self, n_tokens: int, width: int) -> int:
        """A bound that `encode` keeps to: that of the entropy of whole numbers whose root mean
        square is one over the coarse step, a quarter of a bit for codes that are not ideal, and
        their table."""
        size = n_tokens * width
        return 2 * n_tokens + self._most_coarse(size) + self.planes * _plane(size)

    def expected_nbytes(self, n_tokens: int, width: int) -> int:
        size = n_tokens * width
        coarse = math.ceil(self.bits * size / 8) + _TABLE_BYTES
        expected = 2 * n_tokens + coarse + self.planes * _plane(size)
        return min(expected, self.nbytes(n_tokens, width))

    def cuts(self, data: bytes | memoryview, n_tokens: int, width: int) -> tuple[int, ...]:
        end = self._read(memoryview(data), n_tokens, width)[2]
        plane = _plane(n_tokens * width)
        return tuple(end + plane * planes for planes in range(self.planes + 1))

    def decode_prefix(self, data: bytes | memoryview, n_tokens: int, width: int) -> NDArray[Any]:
        whole = memoryview(data)
        step_N, coarse, end = self._read(whole, n_tokens, width)
        whole_size = end + self.planes * _plane(n_tokens * width)
        if len(data) > whole_size:
            raise WireError(
                f"codec {self.name}: {len(data)} bytes, where {whole_size} are all there is"
            )
        return self._values(step_N, coarse, whole[end:], (n_tokens, width))

    def _steps(
        self, hidden_ND: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The values to encode, all finite, and each token's step."""
        peak_N = peak_of(hidden_ND)
        if ((peak_N > _PLAIN[0]) & (peak_N < _PLAIN[1])).all():
            mean_N = np.einsum("nd,nd->n", hidden_ND, hidden_ND) / np.float32(hidden_ND.shape[1])
            rms_N = np.sqrt(mean_N)
        else:
            hidden_ND = np.clip(np.nan_to_num(hidden_ND), -_LARGEST, _LARGEST)
            peak_N = peak_of(hidden_ND)
            part_ND = hidden_ND / np.where(peak_N > 0, peak_N, np.float32(1))[:, None]
            rms_N = peak_N * np.sqrt(np.square(part_ND).sum(axis=1) / max(1, part_ND.shape[1]))
        least_N = peak_N / np.float32(_COARSE << self.planes)
        step_N = np.maximum(rms_N * np.float32(self.relative), least_N)
        step_N[step_N < _MIN_STEP] = 0
        return hidden_ND, step_N

    def _rounded(
        self, hidden_ND: NDArray[np.float32], step_N: NDArray[np.float32]
    ) -> tuple[NDArray[np.uint8], bytes]:
        """The low bits of each value, and the coarse values' bytes."""
        # x / inf is 0: what a token without a step encodes as.
        divisor_N = np.where(step_N > 0, step_N, np.float32(np.inf))
        steps_ND = hidden_ND / divisor_N[:, None]
        np.rint(steps_ND, out=steps_ND)
        if not self.planes:
            return np.empty(0, np.uint8), steps_ND.astype(np.int8).tobytes()
        values_ND = steps_ND.astype(np.int16) + np.int16(self._middle)
        low_ND = values_ND.astype(np.uint8) & np.uint8((1 << self.planes) - 1)
        return low_ND, (values_ND >> self.planes).astype(np.int8).tobytes()

    def _read(
        self, data: memoryview, n_tokens: int, width: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int8], int]:
        """Steps, coarse values and where the planes begin."""
        if len(data) < 2 * n_tokens:
            raise WireError(
                f"codec {self.name}: {len(data)} bytes of hidden states end before the steps of "
                f"{n_tokens} tokens do"
            )
        bits_N = np.frombuffer(data, "<u2", n_tokens)
        if bits_N.max(initial=0) > _LARGEST_BF16:
            raise WireError(f"codec {self.name}: a step that is negative or not finite")
        values, used = decompress(self.name, data[2 * n_tokens :], n_tokens * width)
        coarse = np.frombuffer(values, np.int8)
        if coarse.min(initial=0) < -_COARSE:
            raise WireError(
                f"codec {self.name}: a value below {-_COARSE} steps; no encoder writes it"
            )
        step_N = _from_bf16_bits(bits_N)
        if step_N.max(initial=0) > _SAFE_STEP:
            widest_N = np.abs(coarse.reshape(n_tokens, width).astype(np.int16)).max(
                axis=1, initial=0
            )
            whole_N = step_N.astype(np.float64) * ((widest_N + 1) << self.planes)
            if whole_N.max() > np.finfo(np.float32).max:
                raise WireError(f"codec {self.name}: a step of {step_N.max():.3g}: values overflow")
        return step_N, coarse, 2 * n_tokens + used

    def _values(
        self,
        step_N: NDArray[np.float32],
        coarse: NDArray[np.int8],
        planes: memoryview,
        shape: tuple[int, int],
    ) -> NDArray[Any]:
        """What the coarse values and the planes that are whole say."""
        size = _plane(coarse.size)
        there = min(self.planes, len(planes) // size) if size else self.planes
        missing = self.planes - there
        values = coarse
        if there:
            values = coarse.astype(np.int16) << there
            for plane in range(there):
                packed = np.frombuffer(planes, np.uint8, size, plane * size)
                bits = np.unpackbits(packed, count=coarse.size)
                values += bits << np.uint8(there - 1 - plane)
        out_ND = values.reshape(shape).astype(np.float32)
        if self.planes:
            # In the middle of the 2**missing values that this one may be.
            out_ND += np.float32(
                ((1 << missing) - 1) / 2 / (1 << missing) - self._middle / (1 << missing)
            )
        scale_N = step_N * np.float32(1 << missing)
        out_ND *= scale_N[:, None]
        return out_ND

    @property
    def _middle(self) -> int:
        return (1 << self.planes) >> 1

    def _most_coarse(self, size: int) -> int:
        step = self.relative * (1 << self.planes)
        entropy = math.log2(2 * math.pi * math.e * (step**-2 + 1 / 12)) / 2
        return min(most(size), math.floor((entropy + _SLACK_BITS) * size / 8) + _SLACK_BYTES)


def _plane(size: int) -> int:
    """Bytes of a plane of so many bits."""
    return (size + 7) // 8


def _bf16_bits(step_N: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Rounded up: a step never is finer than wanted, so values stay in their range."""
    upper_N: NDArray[np.uint16] = ((step_N.view(np.uint32) + 0xFFFF) >> 16).astype(np.uint16)
    return upper_N


def _from_bf16_bits(bits_N: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits_N.astype(np.uint32) << 16).view(np.float32)
