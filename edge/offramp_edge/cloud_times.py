"""What the cloud takes for a sample, from its own reports."""

from __future__ import annotations

from offramp_common.clock import Clock

_NEW = 0.1  # weight of the latest report
_HALF_S = 5.0  # after which what was heard counts half at the most: others ask by then, or do not any more
_FEWEST_TOKENS = 16  # below this a layer costs about the same, as on the device


class CloudTimes:
    """Moving averages of the wait for its turn and of a layer's time. Told and asked by one thread each:
    single numbers, which may be a moment old."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._told_s = clock, clock.now()
        self.queue_ms = 0.0
        self._ms_per_token: float | None = None  # of one layer

    @property
    def known(self) -> bool:
        return self._ms_per_token is not None

    def ran(self, layers: int, n_tokens: int, queue_ms: float, compute_ms: float) -> None:
        """It ran so many layers (at least one) of a sample."""
        ms = compute_ms / max(layers, 1) / max(n_tokens, _FEWEST_TOKENS)
        now_s = self._clock.now()
        newer = max(_NEW, 1 - 0.5 ** ((now_s - self._told_s) / _HALF_S))
        self._told_s = now_s
        if self._ms_per_token is None:
            self._ms_per_token, self.queue_ms = ms, queue_ms
            return
        self._ms_per_token += newer * (ms - self._ms_per_token)
        self.queue_ms += newer * (queue_ms - self.queue_ms)

    def layer_ms(self, n_tokens: int, otherwise: float = 0.0) -> float:
        """Expected for one layer; `otherwise` before the first report."""
        if self._ms_per_token is None:
            return otherwise
        return self._ms_per_token * max(n_tokens, _FEWEST_TOKENS)
