"""Which forecast a planner works with: the bundle's own, or one learnt as samples leave."""

from __future__ import annotations

from offramp_common.bundle import Bundle
from offramp_common.forecast import Forecast, never, of_rates, uniform
from offramp_edge.settings import EdgeSettings, Plan

_PRIOR = 8.0  # samples that the neutral start counts for
_ANEW = 32  # samples after which what was learnt is looked at again


class Foreseen:
    """A forecast, and whether it follows what is seen."""

    def __init__(self, forecast: Forecast, learns: bool = False) -> None:
        self.forecast = forecast
        self.learns = learns
        self._came = [_PRIOR] * len(forecast.exits)
        self._left = [_PRIOR * outlook.leave[0] for outlook in forecast.outlooks]
        self._seen = 0

    def left(self, exit_depth: int) -> bool:
        """A sample left at `exit_depth`, as its method says it should; True where the forecast has
        changed."""
        if not self.learns or exit_depth not in self.forecast.exits:
            return False
        for place, depth in enumerate(self.forecast.exits):
            if depth > exit_depth:
                break
            self._came[place] += 1
            self._left[place] += depth == exit_depth
        self._seen += 1
        if self._seen % _ANEW:
            return False
        rates = [left / came for left, came in zip(self._left, self._came, strict=True)]
        self.forecast = of_rates(self.forecast.exits, [*rates[:-1], 1.0])
        return True


def foreseen(bundle: Bundle, plan: Plan, settings: EdgeSettings) -> Foreseen:
    """The bundle's table holds at its calibrated operating point. At another, and for a bundle without a
    table, a sample is at first taken to leave at each exit with the same chance, whatever its confidence;
    the chances are learnt from where samples leave."""
    exits = bundle.manifest.exits
    if not settings.exits:
        return Foreseen(never(exits))
    table = bundle.manifest.forecasts.get(plan.precision)
    if table is not None and settings.knobs is None:
        return Foreseen(table)
    return Foreseen(uniform(exits), learns=True)
