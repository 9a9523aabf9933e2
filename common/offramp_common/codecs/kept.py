"""Token pruning: the tokens of a sample that a fitted score ranks highest travel, the others are left out.

A token's score is linear in its hidden state: one product on the device. How many are kept follows from the
sample's length alone, so a frame's size is known before anything is encoded. The first token always stays:
heads may read it. Which ones stay travels as a bit for each of the sample's tokens, the first token the
highest bit of the first byte; a sample that keeps all of its tokens has none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offramp_common.errors import WireError


@dataclass(frozen=True, eq=False, slots=True)
class Keep:
    """A sample of n tokens keeps min(n, most, max(least, share * n rounded up)) of them.

    weight_D   a token's score is its hidden state times this
    """

    weight_D: NDArray[np.float32]
    most: int
    share: float = 1.0
    least: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1 or not 1 <= self.least <= self.most:
            raise ValueError(
                f"tokens kept: share {self.share}, least {self.least}, most {self.most}; must be above "
                "0 and at most 1, and 1 <= least <= most"
            )

    def tokens_left(self, n_tokens: int) -> int:
        return min(n_tokens, self.most, max(self.least, math.ceil(self.share * n_tokens)))

    def nbytes(self, n_tokens: int) -> int:
        """Of the bits that say which tokens were kept."""
        return 0 if self.tokens_left(n_tokens) == n_tokens else (n_tokens + 7) // 8

    def chosen(
        self, hidden_ND: NDArray[np.float32], lengths_B: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """kept_N: True for the tokens to send. Of equal scores the earlier token is kept; a score that is
        NaN is the lowest."""
        with np.errstate(invalid="ignore", over="ignore"):
            score_N = hidden_ND @ self.weight_D
        kept_N = np.zeros(len(score_N), bool)
        start = 0
        for length in lengths_B.tolist():
            score_T = score_N[start : start + length]
            score_T[0] = np.inf
            best = np.argsort(-score_T, kind="stable")[: self.tokens_left(length)]
            kept_N[start + best] = True
            start += length
        return kept_N

    def bits(self, kept_N: NDArray[np.bool_], lengths_B: NDArray[np.int64]) -> bytes:
        """What says which tokens were kept."""
        rows = np.split(kept_N, np.cumsum(lengths_B)[:-1])
        return b"".join(np.packbits(row).tobytes() for row in rows if not row.all())

    def read(self, data: memoryview, lengths_B: NDArray[np.int64]) -> tuple[NDArray[np.bool_], int]:
        """kept_N and the bytes that said it. Raises WireError for what `bits` does not write."""
        kept_N = np.ones(int(lengths_B.sum()), bool)
        at = start = 0
        for length in lengths_B.tolist():
            size = self.nbytes(length)
            if size:
                packed = np.frombuffer(data[at : at + size], np.uint8)
                if len(packed) < size:
                    raise WireError(
                        f"{len(data)} bytes end before the bits do that say which tokens were kept"
                    )
                bits = np.unpackbits(packed).astype(bool)
                kept_T, left = bits[:length], self.tokens_left(length)
                if not bits[0] or bits[length:].any() or np.count_nonzero(kept_T) != left:
                    raise WireError(
                        f"{np.count_nonzero(bits)} bits for a sample of {length} tokens: {left} of them "
                        "are kept, the first one always"
                    )
                kept_N[start : start + length] = kept_T
            at, start = at + size, start + length
        return kept_N, at
