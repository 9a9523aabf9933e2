"""Rates that jump between states, as a trace: long enough that its repetition does not show."""

from __future__ import annotations

import numpy as np

from offramp_common.errors import ConfigError
from offramp_simulate.traces import RateTrace

_CHANGES = 4000


def markov_trace(mbps: tuple[float, ...], mean_s: tuple[float, ...], seed: int) -> RateTrace:
    """State i has rate `mbps[i]` for an exponential time of mean `mean_s[i]`, then any other state, each
    as likely. The same seed gives the same trace. ConfigError for values that allow none."""
    if len(mbps) < 2 or not all(s > 0 for s in mean_s):
        raise ConfigError(f"Markov states {mbps} of {mean_s} s: two at least, times above 0")
    rng = np.random.default_rng(np.random.SeedSequence([seed, 7]))
    steps = rng.integers(1, len(mbps), _CHANGES)
    states = np.cumsum(steps) % len(mbps)
    spans_s = rng.exponential(1.0, _CHANGES) * np.array(mean_s)[states]
    edges_s = np.concatenate([[0.0], np.cumsum(np.maximum(spans_s, 1e-6))])
    return RateTrace("markov", tuple(edges_s.tolist()), tuple(np.array(mbps)[states].tolist()))
