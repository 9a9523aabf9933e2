"""How many bytes a row's state takes on the wire when the model is cut at a depth, by the method's sheet.

Counted by hand from the sheets, for subjects.Subject's model: N layers, an exit after each, C classes.
"""

from __future__ import annotations

from collections.abc import Callable

STATE_BYTES: dict[tuple[str, str], Callable[[int], int]] = {
    ("deebert", "classification"): lambda depth: 0,
    # the smaller of k pooled states and the sums of N - k exits, of WIDTH floats
    ("right_tool", "classification"): lambda depth: 4 * 32 * min(depth, 3 - depth),
    ("fastbert", "classification"): lambda depth: 0,
    ("pabee", "classification"): lambda depth: 1 + 2,  # count, class
    ("pabee", "regression"): lambda depth: 1 + 4,  # count, value
    ("past_future", "classification"): lambda depth: 4 * 2 * 5,  # two sums of C
    ("romebert", "classification"): lambda depth: 0,
    ("berxit", "classification"): lambda depth: 0,
    ("berxit", "regression"): lambda depth: 0,
    ("leebert", "classification"): lambda depth: 1 + 2,  # count, class
    ("leebert", "regression"): lambda depth: 1 + 4,  # count, value
    ("ensemble_ic", "classification"): lambda depth: 5,  # a byte for each class
    ("class_means", "classification"): lambda depth: 0,
    ("elbert", "classification"): lambda depth: 1 + 2,  # run, side
    ("cats", "classification"): lambda depth: 4 * 5 * (depth - 1),  # probabilities of exits 2 to k
    ("cats", "regression"): lambda depth: 4 * depth,
    ("dact_bert", "classification"): lambda depth: 4 * 5 + 4,  # a, p
    ("dact_bert", "regression"): lambda depth: 4 + 4,  # a, p
    ("gaml_bert", "classification"): lambda depth: 1 + 2,  # count, class
    ("uee_ucb", "classification"): lambda depth: 2,  # the first exit's class
    ("palbert", "classification"): lambda depth: 4 + 4 * 32,  # s, u
    ("palbert", "regression"): lambda depth: 4 + 4 * 32,
    ("be3r", "classification"): lambda depth: 0,
    ("be3r", "regression"): lambda depth: 0,
    ("elasticbert", "classification"): lambda depth: 0,
    ("elasticbert", "regression"): lambda depth: 1 + 4,  # count, value
    ("pcee_bert", "classification"): lambda depth: 1,  # count
    ("pcee_bert", "regression"): lambda depth: 1 + 4,  # count, value
}
