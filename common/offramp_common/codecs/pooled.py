"""Pooling: a sample of more than `most` tokens becomes `most` of them: its first, and means of stretches.

The tokens behind the first are cut into most - 1 stretches, as even as whole tokens allow, and each becomes
its mean: plain, or weighted by a fitted score, so that a stretch can be all but one of its tokens. A sample
of `most` tokens or fewer stays as it is. Where the stretches are follows from the sample's length, so
nothing about them travels; a mean stands at the middle of its stretch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False, slots=True)
class Pool:
    """weight_D: a token counts in its stretch's mean by exp(hidden state times this); zeros: all alike."""

    weight_D: NDArray[np.float32]
    most: int

    def __post_init__(self) -> None:
        if self.most < 2:
            raise ValueError(f"pooling to {self.most} tokens: at least 2, the first and the rest")

    def tokens_left(self, n_tokens: int) -> int:
        return min(n_tokens, self.most)

    def pooled(
        self, hidden_ND: NDArray[np.float32], lengths_B: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """The tokens that are left of all rows, one after another."""
        starts_M = packed_starts(lengths_B, self.most)
        if len(starts_M) == len(hidden_ND):
            return hidden_ND
        counts_M = np.diff(starts_M, append=len(hidden_ND))
        with np.errstate(invalid="ignore", over="ignore"):
            score_N = hidden_ND @ self.weight_D
            score_N -= np.repeat(np.maximum.reduceat(score_N, starts_M), counts_M)
            share_N = np.exp(score_N)
            share_N /= np.repeat(np.add.reduceat(share_N, starts_M), counts_M)
            pooled_MD: NDArray[np.float32] = np.add.reduceat(hidden_ND * share_N[:, None], starts_M)
        return pooled_MD

    def positions(self, lengths_B: NDArray[np.int64]) -> NDArray[np.int64]:
        """positions_M: where in its sample each token that is left stands."""
        parts = []
        for length in lengths_B.tolist():
            starts = stretches(length, self.most)
            parts.append((starts + np.append(starts[1:], length) - 1) // 2)
        return np.concatenate(parts)


def stretches(length: int, most: int) -> NDArray[np.int64]:
    """Where the stretches of a sample begin: one a token where there are no more than `most`."""
    if length <= most:
        return np.arange(length)
    return np.concatenate([[0], 1 + np.arange(most - 1) * (length - 1) // (most - 1)])


def packed_starts(lengths_B: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """The same for packed rows."""
    firsts = np.cumsum(lengths_B) - lengths_B
    rows = zip(firsts.tolist(), lengths_B.tolist(), strict=True)
    return np.concatenate([first + stretches(length, most) for first, length in rows])
