"""Fewer channels: a linear map down on the device, and one up in the cloud, fitted together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False, slots=True)
class Narrow:
    """D channels to R and back: (x - mean) @ down, then y @ up + bias."""

    mean_D: NDArray[np.float32]
    down_DR: NDArray[np.float32]
    up_RD: NDArray[np.float32]
    bias_D: NDArray[np.float32]

    def __post_init__(self) -> None:
        width, channels = self.down_DR.shape
        fits = self.mean_D.shape == self.bias_D.shape == (width,)
        if not fits or self.up_RD.shape != (channels, width):
            raise ValueError(f"maps of {self.down_DR.shape} and {self.up_RD.shape} do not fit")

    @property
    def channels(self) -> int:
        return int(self.down_DR.shape[1])

    def down(self, hidden_ND: NDArray[np.float32]) -> NDArray[np.float32]:
        with np.errstate(invalid="ignore", over="ignore"):
            centred_ND: NDArray[np.float32] = hidden_ND - self.mean_D
            narrow_NR: NDArray[np.float32] = np.matmul(centred_ND, self.down_DR)
        return narrow_NR

    def up(self, narrow_NR: NDArray[np.float32]) -> NDArray[np.float32]:
        with np.errstate(invalid="ignore", over="ignore"):
            hidden_ND: NDArray[np.float32] = narrow_NR @ self.up_RD
            hidden_ND += self.bias_D
        return hidden_ND
