"""The table of exit methods, in order of year. One paper, one file.

A method is a plain record; what it does is in its policy (when to leave), its branches (what is looked at)
and its recipe (how it is trained). A new method is a file here and a line in the table, and is held to
tests/test_methods_contract.py from that day.
"""

from __future__ import annotations

from offramp_model.methods import (
    be3r,
    berxit,
    cats,
    class_means,
    dact_bert,
    deebert,
    elasticbert,
    elbert,
    ensemble_ic,
    fastbert,
    gaml_bert,
    leebert,
    pabee,
    palbert,
    past_future,
    pcee_bert,
    right_tool,
    romebert,
    uee_ucb,
)
from offramp_model.methods.method import Method, Paper

_LISTED: tuple[Method, ...] = (
    deebert.METHOD,
    right_tool.METHOD,
    fastbert.METHOD,
    pabee.METHOD,
    past_future.METHOD,
    romebert.METHOD,
    berxit.METHOD,
    leebert.METHOD,
    class_means.METHOD,
    ensemble_ic.METHOD,
    elbert.METHOD,
    cats.METHOD,
    dact_bert.METHOD,
    elasticbert.METHOD,
    gaml_bert.METHOD,
    palbert.METHOD,
    be3r.METHOD,
    pcee_bert.METHOD,
    uee_ucb.METHOD,
)
METHODS: dict[str, Method] = {method.name: method for method in _LISTED}
if len(METHODS) != len(_LISTED):
    raise RuntimeError("two methods share a name")

__all__ = ["METHODS", "Method", "Paper"]
