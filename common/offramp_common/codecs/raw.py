"""Floating point as it is: fp32 (lossless), fp16 and bf16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp_common.codecs.sizes import check_size

_FP16_MAX = float(np.finfo(np.float16).max)
_BF16_MAX = np.uint32(0x7F7F0000).view(np.float32)
_BF16_NAN = 0x7FC0


@dataclass(frozen=True)
class Float32:
    """Little-endian float32: the lossless reference, 4 D bytes a token. NaN and infinity pass."""

    name: str = "fp32"
    lossless: bool = True
    integer: bool = False
    fixed_size: bool = True

    def encode(self, hidden_ND: NDArray[Any]) -> bytes:
        return np.ascontiguousarray(hidden_ND, dtype="<f4").tobytes()

    def decode(self, data: bytes | memoryview, n_tokens: int, width: int) -> NDArray[Any]:
        check_size(self.name, data, self.nbytes(n_tokens, width), n_tokens, width)
        return np.frombuffer(data, dtype="<f4").reshape(n_tokens, width).astype(np.float32)

    def nbytes(self, n_tokens: int, width: int) -> int:
        return 4 * n_tokens * width

    def expected_nbytes(self, n_tokens: int, width: int) -> int:
        return self.nbytes(n_tokens, width)


@dataclass(frozen=True)
class Float16:
    """Little-endian float16, 2 D bytes a token.

    Relative error at most 2**-11 for magnitudes from 2**-14 to 65504, absolute error at most 2**-25
    below. Larger magnitudes and infinities become 65504; NaN stays NaN.
    """

    name: str = "fp16"
    lossless: bool = False
    integer: bool = False
    fixed_size: bool = True

    def encode(self, hidden_ND: NDArray[Any]) -> bytes:
        # Saturate rather than overflow: an infinity would poison every token through attention.
        half_ND: NDArray[Any] = np.clip(hidden_ND, -_FP16_MAX, _FP16_MAX).astype("<f2")
        return half_ND.tobytes()

    def decode(self, data: bytes | memoryview, n_tokens: int, width: int) -> NDArray[Any]:
        check_size(self.name, data, self.nbytes(n_tokens, width), n_tokens, width)
        return np.frombuffer(data, dtype="<f2").reshape(n_tokens, width).astype(np.float32)

    def nbytes(self, n_tokens: int, width: int) -> int:
        return 2 * n_tokens * width

    def expected_nbytes(self, n_tokens: int, width: int) -> int:
        return self.nbytes(n_tokens, width)


@dataclass(frozen=True)
class BFloat16:
    """The upper half of a little-endian float32, 2 D bytes a token.

    Relative error at most 2**-8 over the whole range of float32 (denormals: half the smallest step,
    2**-134, at most); ties go to the even neighbour. Magnitudes that would round to infinity, and
    infinities, become the largest bf16, 3.39e38; NaN stays NaN.
    """

    name: str = "bf16"
    lossless: bool = False
    integer: bool = False
    fixed_size: bool = True

    def encode(self, hidden_ND: NDArray[Any]) -> bytes:
        hidden_ND = np.clip(np.asarray(hidden_ND, dtype=np.float32), -_BF16_MAX, _BF16_MAX)
        bits_ND = hidden_ND.view(np.uint32)
        # Half a step less one, plus the last bit that stays: ties to even.
        upper_ND = ((bits_ND + (((bits_ND >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype("<u2")
        upper_ND[np.isnan(hidden_ND)] = _BF16_NAN  # its payload may lie in the half that is cut off
        return bytes(upper_ND.tobytes())

    def decode(self, data: bytes | memoryview, n_tokens: int, width: int) -> NDArray[Any]:
        check_size(self.name, data, self.nbytes(n_tokens, width), n_tokens, width)
        upper_ND = np.frombuffer(data, dtype="<u2").reshape(n_tokens, width)
        return (upper_ND.astype(np.uint32) << 16).view(np.float32)

    def nbytes(self, n_tokens: int, width: int) -> int:
        return 2 * n_tokens * width

    def expected_nbytes(self, n_tokens: int, width: int) -> int:
        return self.nbytes(n_tokens, width)
