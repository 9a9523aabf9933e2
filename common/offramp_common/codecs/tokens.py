"""Token ids: what travels when the input is sent (split point 0).

Channel 0 (token ids) takes two bytes a token when all ids fit and four when they do not, the other
channels (segment ids) one byte. The first byte says which.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp_common.codecs.sizes import check_size
from offramp_common.errors import WireError

_NARROW, _WIDE = 2, 4
MAX_IDS = (1 << 8 * _WIDE, 1 << 8)
"""How many values channel 0 and each further channel can tell apart."""


@dataclass(frozen=True)
class TokenIds:
    """Non-negative integers, lossless: 1 + N (2 + further channels) bytes where all ids are below
    65536, 2 N more where one is not. There is at least one channel."""

    name: str = "tokens"
    lossless: bool = True
    integer: bool = True
    fixed_size: bool = True

    def encode(self, hidden_ND: NDArray[Any]) -> bytes:
        """Raises ValueError for ids that do not fit: our own bug."""
        if hidden_ND.dtype.kind not in "iu" or not hidden_ND.shape[1]:
            raise ValueError(f"token ids of {hidden_ND.dtype}, {hidden_ND.shape[1]} channels")
        ids_N, rest_NC = hidden_ND[:, 0], hidden_ND[:, 1:]
        highest = int(ids_N.max(initial=0)), int(rest_NC.max(initial=0))
        if hidden_ND.min(initial=0) < 0 or highest[0] >= MAX_IDS[0] or highest[1] >= MAX_IDS[1]:
            raise ValueError(
                f"token ids up to {highest[0]}, further channels up to {highest[1]}: must not be "
                f"negative and stay below {MAX_IDS[0]} and {MAX_IDS[1]}"
            )
        size = _NARROW if highest[0] < 1 << 8 * _NARROW else _WIDE
        ids = np.ascontiguousarray(ids_N, dtype=f"<u{size}").tobytes()
        return bytes([size]) + ids + np.ascontiguousarray(rest_NC, dtype=np.uint8).tobytes()

    def decode(self, data: bytes | memoryview, n_tokens: int, width: int) -> NDArray[Any]:
        ids_N, rest_NC = _channels(data, n_tokens, width)
        out_ND = np.empty((n_tokens, width), dtype=np.int64)
        out_ND[:, 0] = ids_N
        out_ND[:, 1:] = rest_NC
        return out_ND

    def nbytes(self, n_tokens: int, width: int) -> int:
        """For ids below 65536; where one is not, two bytes a token more."""
        return 1 + n_tokens * (_NARROW + width - 1)

    def expected_nbytes(self, n_tokens: int, width: int) -> int:
        return self.nbytes(n_tokens, width)


def largest_ids(data: bytes | memoryview, n_tokens: int, width: int) -> tuple[int, ...]:
    """Each channel's largest value, without decoding; raises WireError as `decode` does."""
    ids_N, rest_NC = _channels(data, n_tokens, width)
    return (int(ids_N.max(initial=0)), *rest_NC.max(axis=0, initial=0).tolist())


def _channels(
    data: bytes | memoryview, n_tokens: int, width: int
) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    """Channel 0 (N,) and the others (N, width - 1), where they lie in `data`."""
    size = data[0] if len(data) else 0
    if size not in (_NARROW, _WIDE):
        raise WireError(f"codec tokens: ids of {size} bytes, must be {_NARROW} or {_WIDE}")
    check_size("tokens", data, 1 + n_tokens * (size + width - 1), n_tokens, width)
    ids_N = np.frombuffer(data, dtype=f"<u{size}", count=n_tokens, offset=1)
    rest = np.frombuffer(data, dtype=np.uint8, offset=1 + n_tokens * size)
    return ids_N, rest.reshape(n_tokens, width - 1)
