"""Methods that are another method's rule with a training of their own."""

from __future__ import annotations

from collections.abc import Sequence

import subjects
from law import whole
from toy_models import toy_model

from offramp_common.runner import Knobs
from offramp_common.spec import TaskSpec
from offramp_model.split_model import TorchLayers


def assert_decides_as(
    name: str, other: str, task: TaskSpec, points: Sequence[dict[str, float]]
) -> None:
    """With the same weights both methods let the same rows leave with the same answers, to the bit, at every
    operating point (knob -> value at each of 4 exits), and carry the same."""
    model = toy_model(name, n_layers=4, task=task, seed=3)
    twin = toy_model(other, n_layers=4, task=task, seed=4)
    twin.load_state_dict(model.state_dict())
    assert (model.policy, model.knobs) == (twin.policy, twin.knobs)
    assert all(model.cut(depth) == twin.cut(depth) for depth in range(5))
    inputs = subjects.inputs(32, below=30)
    depths: set[int] = set()
    for point in points:
        knobs: Knobs = {knob: (value,) * 4 for knob, value in point.items()}
        got = whole(TorchLayers(model), inputs, knobs)
        assert got.same_as(whole(TorchLayers(twin), inputs, knobs))
        depths |= set(got.depth_B.tolist())
    assert len(depths) > 1, "the points must make a difference"
