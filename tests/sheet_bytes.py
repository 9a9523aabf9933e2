"""How many bytes a row's state takes on the wire when the model is cut at a depth, by the method's sheet.

Counted by hand from the sheets, for subjects.Subject's model: N layers, an exit after each, C classes.
"""

from __future__ import annotations

from collections.abc import Callable

STATE_BYTES: dict[tuple[str, str], Callable[[int], int]] = {
    ("deebert", "classification"): lambda depth: 0,
    ("pabee", "classification"): lambda depth: 1 + 2,  # count, class
    ("pabee", "regression"): lambda depth: 1 + 4,  # count, value
}
