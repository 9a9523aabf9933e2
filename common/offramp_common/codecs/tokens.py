"""Token ids: what travels when the input is sent (split point 0).

Channel 0 (token ids) takes two bytes a token when all ids fit and four when they do not, the other
channels (segment ids) one byte. The first byte says which.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp_common.errors import WireError

_NARROW, _WIDE = 2, 4


@dataclass(frozen=True)
class TokenIds:
    """Non-negative integers, lossless: 1 + N (2 + further channels) bytes for vocabularies up to 65536."""

    name: str = "tokens"
    lossless: bool = True
    integer: bool = True

    def encode(self, hidden_ND: NDArray[Any]) -> bytes:
        ids_N, rest = hidden_ND[:, 0], hidden_ND[:, 1:]
        if hidden_ND.min(initial=0) < 0 or rest.max(initial=0) > 0xFF:
            raise ValueError("token ids must not be negative, further channels must fit one byte")
        size = _NARROW if ids_N.max(initial=0) <= 0xFFFF else _WIDE
        return bytes([size]) + ids_N.astype(f"<u{size}").tobytes() + rest.astype(np.uint8).tobytes()

    def decode(self, data: bytes | memoryview, n_tokens: int, width: int) -> NDArray[Any]:
        size = data[0] if len(data) else 0
        if size not in (_NARROW, _WIDE):
            raise WireError(f"codec tokens: id size {size}, must be {_NARROW} or {_WIDE}")
        expected = 1 + n_tokens * (size + width - 1)
        if width < 1 or len(data) != expected:
            raise WireError(
                f"codec tokens: {len(data)} bytes for {n_tokens} tokens of {width} channels, "
                f"which need {expected}"
            )
        out_ND = np.empty((n_tokens, width), dtype=np.int64)
        out_ND[:, 0] = np.frombuffer(data, dtype=f"<u{size}", count=n_tokens, offset=1)
        rest = np.frombuffer(data, dtype=np.uint8, offset=1 + n_tokens * size)
        out_ND[:, 1:] = rest.reshape(n_tokens, width - 1)
        return out_ND

    def nbytes(self, n_tokens: int, width: int) -> int:
        """Exact for vocabularies up to 65536; larger ones may need two bytes a token more."""
        return 1 + n_tokens * (_NARROW + width - 1)
