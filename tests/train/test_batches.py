from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_checkpoint import SPECIAL, make_checkpoint, tokenizer_text

from offramp_common.bundle import Bundle
from offramp_common.errors import ConfigError
from offramp_common.spec import TaskSpec
from offramp_common.text import TextEncoder
from offramp_model.backbones import backbone_from_pretrained
from offramp_model.exits import HeadSpec
from offramp_model.methods import METHODS
from offramp_model.split_model import MultiExitModel
from offramp_model.store import About, save_model
from offramp_train.batches import Epochs, Example, bucketed, collate, encode, unknown_token
from offramp_train.config import Augment, Calibration
from offramp_train.exit_answers import exit_answers
from offramp_train.shift import least_shift, shift_label
from offramp_train.tables import Rows

TASK = TaskSpec("classification", ("far", "left", "right"))
FAR, LEFT, RIGHT = 0, 1, 2


def _example(first: int, n: int, target: int) -> Example:
    ids = (2, *range(first, first + n), 3)
    return Example(ids, (0,) * len(ids), target)


def _epochs(**augment: Any) -> Epochs:
    examples = [_example(10, 4, LEFT), _example(20, 5, RIGHT), _example(30, 2, FAR)]
    return Epochs(tuple(examples), TASK, Augment(**augment), unknown=1)


def test_labels_are_repeated_and_weighted() -> None:
    epochs = _epochs(repeat={"far": 3}, weights={"left": 2.5})
    made = epochs.make(random.Random(0))
    assert [e.target for e in made] == [LEFT, RIGHT, FAR, FAR, FAR]
    assert [e.weight for e in made] == [2.5, 1.0, 1.0, 1.0, 1.0]
    assert len(made) == epochs.size(True)


def test_a_mix_is_half_of_one_row_and_half_of_another_of_another_label() -> None:
    epochs = _epochs(mix_label="far", mix_share=10.0, mix_weight=0.3)
    made = epochs.make(random.Random(0))
    assert len(made) == epochs.size(True) == 3 + 20
    for mixed in made[3:]:
        assert (mixed.target, mixed.weight) == (FAR, 0.3)
        assert mixed.ids in ((2, 10, 11, 22, 23, 24, 3), (2, 20, 21, 22, 12, 13, 3))
        assert len(mixed.segments) == len(mixed.ids)


def test_words_are_dropped_but_special_tokens_are_not() -> None:
    made = _epochs(word_dropout=0.5).make(random.Random(1))
    assert all((e.ids[0], e.ids[-1]) == (2, 3) for e in made)
    inner = [token for e in made for token in e.ids[1:-1]]
    assert 0 < inner.count(1) < len(inner)


def test_only_the_last_epochs_are_altered_where_that_is_asked_for() -> None:
    epochs = _epochs(mix_label="far", mix_share=1.0, word_dropout=0.9, last_epochs=2)
    assert [epochs.altered(e, 5) for e in range(5)] == [False, False, False, True, True]
    plain = epochs.make(random.Random(0), altered=False)
    assert plain == list(epochs.examples)
    assert epochs.size(False) == 3
    assert epochs.size(True) == 5


@pytest.mark.parametrize(
    ("augment", "says"),
    [
        ({"repeat": {"nope": 2}}, "'nope' is not in the data"),
        ({"mix_label": "nope"}, "'nope' is not in the data"),
    ],
)
def test_labels_that_the_data_lacks_are_named(augment: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        _epochs(**augment)


def test_batches_hold_every_row_once_and_rows_of_like_length() -> None:
    lengths = [random.Random(i).randint(3, 60) for i in range(1000)]
    batches = bucketed(lengths, 16, random.Random(0))
    assert sorted(i for batch in batches for i in batch) == list(range(1000))
    assert len(batches) == 63
    padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)
    assert padded < 1.1 * sum(lengths)
    assert batches == bucketed(lengths, 16, random.Random(0))
    assert batches != bucketed(lengths, 16, random.Random(1))


def test_a_batch_is_padded_at_the_end() -> None:
    batch = collate([_example(10, 1, LEFT), _example(20, 3, RIGHT)], channels=2)
    assert batch.inputs_BTF.shape == (2, 5, 2)
    assert batch.inputs_BTF[0, :, 0].tolist() == [2, 10, 3, 0, 0]
    assert batch.mask_BT.tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    assert batch.target_B.dtype == torch.int64
    values = [Example((2, 3), (0, 0), 0.5)]
    assert collate(values, channels=1).target_B.dtype == torch.float32


def test_training_tokenizes_as_the_bundle_does(tmp_path: Path) -> None:
    backbone = backbone_from_pretrained(str(make_checkpoint(tmp_path / "checkpoint", layers=2)))
    pair = TaskSpec("classification", ("x", "y"), pair=True)
    spec = HeadSpec(pair, 32, 2, (1, 2), METHODS["deebert"].settings)
    model = MultiExitModel(backbone, METHODS["deebert"], spec)
    bundle: Bundle = save_model(tmp_path / "bundle", model, tokenizer_text(), About("toy", 8, 1))
    texts = (("the cat", "a dog"), ("some old cheese and more of it", "rice"))
    rows = Rows(Path("x"), texts, ("x", "y"), (2, 3))
    examples = encode(rows, pair, tokenizer_text(), 8)
    mine = collate(examples, model.channels)
    theirs = TextEncoder(bundle)(texts)
    assert np.array_equal(mine.inputs_BTF.numpy(), theirs.hidden_BTD)
    assert mine.mask_BT.sum(1).tolist() == theirs.lengths_B.tolist()
    assert (examples[0].head, examples[0].tail) == (1, 1)
    assert unknown_token(tokenizer_text()) == SPECIAL.index("[UNK]")


def test_the_least_shift_that_does_it_is_found() -> None:
    # Rows 0..3 are of "left"; "far" wins them by 0.1, 0.6, 1.1 and 1.6. Row 4 is of "far".
    logits = np.zeros((5, 3), np.float32)
    logits[:4, LEFT], logits[4, FAR] = 1.0, 9.0
    logits[:4, FAR] = [1.1, 1.6, 2.1, 2.6]
    target = np.array([LEFT] * 4 + [FAR])
    assert least_shift(logits, target, FAR, 0.0) == 0.0
    assert least_shift(logits, target, FAR, 0.25) == -0.125
    assert least_shift(logits, target, FAR, 0.75) == -1.125
    assert least_shift(logits, target, FAR, 1.0) == -1.625
    logits[3, RIGHT] = 5.0  # never right now: the best that can be had is 75 %
    assert least_shift(logits, target, FAR, 1.0) == -1.125


@pytest.mark.parametrize("method", ["pabee", "elbert"])
def test_a_shift_moves_one_logit_at_every_exit_by_the_same(method: str, tmp_path: Path) -> None:
    """Whether exits have classifiers of their own (pabee) or share one (elbert)."""
    backbone = backbone_from_pretrained(str(make_checkpoint(tmp_path / "checkpoint", layers=2)))
    spec = HeadSpec(TASK, 32, 2, (1, 2), METHODS[method].settings)
    model = MultiExitModel(backbone, METHODS[method], spec)
    with torch.no_grad():
        model.exits["2"].get_parameter("classifier.bias")[FAR] += 3.0
    examples = [_example(5 + i, 4, LEFT + i % 2) for i in range(8)]
    before, _ = exit_answers(model, examples)
    shift = shift_label(model, examples, Calibration(shift_label="far", shift_others=40.0))
    after, _ = exit_answers(model, examples)
    assert shift < 0
    for depth in (1, 2):
        moved = after[depth] - before[depth]
        np.testing.assert_allclose(moved[:, FAR], shift, atol=1e-5)
        np.testing.assert_allclose(moved[:, LEFT:], 0.0, atol=1e-5)
    with pytest.raises(ConfigError, match="'nope' is not a label"):
        shift_label(model, examples, Calibration(shift_label="nope"))
