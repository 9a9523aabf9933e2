"""What exits predict of the rows that pass them."""

from __future__ import annotations

import numpy as np
import pytest

from offramp_common.exit_classes import NO_CLASS, ExitClasses, classes_of


def test_the_class_is_the_largest_logit() -> None:
    answer_BC = np.array([[0, 2, 1], [3, 0, 0], [1, 1, 0]], np.float32)
    got = classes_of(answer_BC)
    assert got.dtype == np.int32
    assert got.tolist() == [1, 0, 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_all_numbers_have_no_class(bad: float) -> None:
    assert classes_of(np.array([[0, bad], [0, 1]], np.float32)).tolist() == [NO_CLASS, 1]


def test_exits_that_a_row_did_not_pass_stay_without_a_class() -> None:
    seen = ExitClasses(3, [2, 3, 6])
    seen.add(2, np.array([0, 1, 2]), np.eye(3, dtype=np.float32))
    seen.add(3, np.array([0, 2]), np.array([[0, 0, 5], [5, 0, 0]], np.float32))
    seen.add(6, np.array([2]), np.array([[0, 5, 0]], np.float32))
    assert seen.classes_BE.tolist() == [[0, 2, -1], [1, -1, -1], [2, 0, 1]]
