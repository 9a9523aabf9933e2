"""What the exits that samples pass predict: feedback for a device that chooses their exit beforehand.

Axes: B rows, E exits, shallowest first, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

NO_CLASS = -1
"""Of an exit that a row did not pass, or at which its logits were not all numbers."""


def classes_of(answer_BC: NDArray[np.float32]) -> NDArray[np.int32]:
    """The class of each row's logits; NO_CLASS where they are not all numbers."""
    sound_B = np.isfinite(answer_BC).all(axis=1)
    return np.where(sound_B, answer_BC.argmax(axis=1), NO_CLASS).astype(np.int32)


class ExitClasses:
    """Collects `classes_BE` for the exits at `exits`, look by look."""

    def __init__(self, rows: int, exits: Sequence[int]) -> None:
        self.classes_BE = np.full((rows, len(exits)), NO_CLASS, np.int32)
        self._columns = {depth: column for column, depth in enumerate(exits)}

    def add(self, depth: int, rows: NDArray[np.int64], answer_BC: NDArray[np.float32]) -> None:
        """The exit at `depth` answered these rows; both as runner.run's observer is told them."""
        self.classes_BE[rows, self._columns[depth]] = classes_of(answer_BC)
