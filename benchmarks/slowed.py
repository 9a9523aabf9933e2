"""A slow device, made of a fast one."""

from __future__ import annotations

import time

from offramp_common.activations import Activations, NumpyArray
from offramp_common.runner import Knobs, Layers, Step

_FEWEST_TOKENS = 16


class Slowed:
    """Real layers, each followed by a sleep until `layer_ms` are over (of 16 tokens or fewer; longer ones in
    proportion): a device that takes no processor time from the cloud beside it."""

    def __init__(self, layers: Layers[NumpyArray], layer_ms: float) -> None:
        self._layers, self._layer_s = layers, layer_ms / 1000
        self.n_layers = layers.n_layers

    def step(self, acts: Activations[NumpyArray], knobs: Knobs) -> Step[NumpyArray]:
        share = max(acts.n_tokens, _FEWEST_TOKENS) / _FEWEST_TOKENS
        until_s = time.perf_counter() + self._layer_s * share
        step = self._layers.step(acts, knobs)
        left_s = until_s - time.perf_counter()
        if left_s > 0:
            time.sleep(left_s)
        return step
