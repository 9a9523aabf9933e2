"""The table of exit methods, in order of year. One paper, one file.

A method is a plain record; what it does is in its policy (when to leave), its branches (what is looked at)
and its recipe (how it is trained). A new method is a file here and a line in the table, and is held to
tests/test_methods_contract.py from that day.
"""

from __future__ import annotations

from offramp_model.methods import deebert, pabee
from offramp_model.methods.method import Method, Paper

_LISTED: tuple[Method, ...] = (deebert.METHOD, pabee.METHOD)
METHODS: dict[str, Method] = {method.name: method for method in _LISTED}
if len(METHODS) != len(_LISTED):
    raise RuntimeError("two methods share a name")

__all__ = ["METHODS", "Method", "Paper"]
