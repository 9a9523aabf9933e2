"""A model in a bundle and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from law import whole
from safetensors.numpy import load_file, save_file
from toy_models import LABELS, mixed_knobs, toy_bundle, toy_inputs, toy_model, toy_tokenizer

from offramp_common.bundle import GRAPHS, WEIGHTS, Bundle, write_manifest
from offramp_common.errors import BundleError
from offramp_common.spec import TaskSpec
from offramp_common.weights import LINEAR_LEVELS, TABLE_LEVELS
from offramp_model.backbones import backbone_from_config
from offramp_model.exits import HeadSpec
from offramp_model.methods import METHODS
from offramp_model.split_model import MultiExitModel, TorchLayers
from offramp_model.store import About, load_model, named_tensors, save_model, stored_kinds

WIDE = 128  # the smallest width at which matrices are stored as int8
LENGTHS = [5, 12, 1, 9, 30, 7]


def save(path: Path, model: MultiExitModel) -> Bundle:
    about = About("toy", 64, 1, operating_points={"fp32": mixed_knobs(model)})
    return save_model(path, model, toy_tokenizer(), about)


@pytest.mark.parametrize("width", [32, WIDE])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_saved_model_answers_as_the_stored_weights_say(
    tmp_path: Path, method: str, width: int
) -> None:
    model = toy_model(method, width=width)
    bundle = save(tmp_path, model)
    loaded = load_model(bundle)
    inputs, knobs = toy_inputs(bundle, LENGTHS), bundle.knobs("fp32")
    assert knobs == mixed_knobs(model)
    if width < WIDE:  # nothing was quantised
        expected = whole(TorchLayers(model), inputs, knobs)
        assert whole(TorchLayers(loaded), inputs, knobs).same_as(expected)
    again = load_model(Bundle.read(tmp_path))
    assert whole(TorchLayers(again), inputs, knobs).same_as(
        whole(TorchLayers(loaded), inputs, knobs)
    )


def test_a_stored_matrix_is_within_half_a_step_of_the_trained_one(tmp_path: Path) -> None:
    model = toy_model(width=WIDE)
    loaded, kinds = named_tensors(load_model(save(tmp_path, model))), stored_kinds(model)
    assert kinds["layers.0.attention.self.query.weight"] == "linear"
    assert kinds["exits.1.pooler.weight"] == "linear"
    assert "exits.1.classifier.weight" not in kinds, "small matrices are not worth it"
    for name, tensor in named_tensors(model).items():
        levels = {"linear": LINEAR_LEVELS, "table": TABLE_LEVELS}.get(kinds.get(name, ""))
        if levels is None:
            assert torch.equal(loaded[name], tensor), name
            continue
        # torch keeps outputs, and embeddings rows, in the first axis: each has its own scale.
        half_step = tensor.abs().amax(dim=1, keepdim=True) / levels / 2
        assert ((loaded[name] - tensor).abs() <= half_step * (1 + 1e-5)).all(), name


def test_the_manifest_says_what_crosses_at_each_depth(tmp_path: Path) -> None:
    model = toy_model(
        "pabee", n_layers=4, exits=[2, 4], task=TaskSpec("classification", LABELS, True)
    )
    bundle = save(tmp_path, model)
    assert bundle.cuts == {depth: model.cut(depth) for depth in range(4)}
    assert [sorted(bundle.cuts[depth].state) for depth in range(4)] == [
        [],
        [],
        ["count", "previous"],
        ["count", "previous"],
    ]
    assert bundle.cuts[0].width == 2, "pairs send segment ids"
    assert bundle.manifest.task == model.spec.task
    assert load_model(bundle).spec == model.spec


def test_weights_that_are_shared_are_stored_once_and_loaded_shared(tmp_path: Path) -> None:
    config = {
        "model_type": "albert", "vocab_size": 100, "embedding_size": 16, "hidden_size": 32,
        "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64,
        "max_position_embeddings": 64, "initializer_range": 0.4,
    }  # fmt: skip
    torch.manual_seed(0)
    spec = HeadSpec(TaskSpec("classification", LABELS), 32, 3, (1, 2, 3), {"pooling": "first"})
    model = MultiExitModel(backbone_from_config(config), METHODS["pabee"], spec).eval()
    bundle = save(tmp_path, model)
    stored = load_file(tmp_path / WEIGHTS)
    assert not [name for name in stored if name.startswith(("layers.1.", "layers.2."))]
    assert "exits.1.pooler.weight" in stored
    assert bundle.manifest.aliases["exits.3.pooler.weight"] == "exits.1.pooler.weight"
    loaded = load_model(bundle)
    assert loaded.backbone.layers[0] is loaded.backbone.layers[2]
    inputs, knobs = toy_inputs(bundle, LENGTHS), bundle.knobs("fp32")
    expected = whole(TorchLayers(model), inputs, knobs)
    assert whole(TorchLayers(loaded), inputs, knobs).same_as(expected)


def digests(bundle: Bundle) -> list[bytes]:
    return [bundle.digest(depth) for depth in range(bundle.n_layers)]


@pytest.mark.parametrize(
    ("changed", "differ"),
    [
        ("embeddings.word_embeddings.weight", [True, False, False]),
        ("layers.0.output.dense.bias", [True, False, False]),
        ("layers.1.output.dense.bias", [True, True, False]),
        ("layers.2.output.dense.bias", [True, True, True]),
        ("exits.1.classifier.bias", [True, False, False]),
        ("exits.2.classifier.bias", [True, True, False]),
        ("exits.3.classifier.bias", [True, True, True]),
    ],
)
def test_a_changed_tensor_changes_the_digests_of_the_ranges_that_run_it(
    tmp_path: Path, changed: str, differ: list[bool]
) -> None:
    before = digests(save(tmp_path / "before", toy_model()))
    model = toy_model()
    with torch.no_grad():
        named_tensors(model)[changed].view(-1)[0] += 1
    after = digests(save(tmp_path / "after", model))
    assert [a != b for a, b in zip(after, before, strict=True)] == differ


def test_a_shared_pooler_counts_for_every_range(tmp_path: Path) -> None:
    before = digests(save(tmp_path / "before", toy_model("pabee")))
    model = toy_model("pabee")
    with torch.no_grad():
        named_tensors(model)["exits.1.pooler.bias"][0] += 1
    after = digests(save(tmp_path / "after", model))
    assert all(a != b for a, b in zip(after, before, strict=True)), "the last exit reads it too"


def test_the_operating_point_and_the_first_split_leave_the_digests_alone(tmp_path: Path) -> None:
    first = toy_bundle(tmp_path / "a", split=1)
    manifest = replace(
        first.manifest, split=2, operating_points={"int8": {"threshold": (0.1,) * 3}}
    )
    toy_bundle(tmp_path / "b", split=1)
    write_manifest(tmp_path / "b", manifest)
    assert digests(Bundle.read(tmp_path / "b")) == digests(first)


def test_saving_over_a_bundle_takes_the_graphs_of_the_old_weights_away(tmp_path: Path) -> None:
    save(tmp_path, toy_model(seed=0))
    (tmp_path / GRAPHS / "fp32").mkdir(parents=True)
    (tmp_path / GRAPHS / "fp32" / "layer_00.onnx").write_bytes(b"of seed 0")
    bundle = save(tmp_path, toy_model(seed=1))
    assert not (tmp_path / GRAPHS).exists()
    assert not [name for name in bundle.manifest.files if name.startswith(GRAPHS)]
    bundle.verify()


@pytest.fixture
def damaged(tmp_path: Path) -> Callable[..., Bundle]:
    """A toy bundle whose tensors, backbone.json or manifest were changed, files listed anew."""
    toy_bundle(tmp_path)

    def damage(
        drop: str = "",
        add: dict[str, np.ndarray] | None = None,
        backbone: str = "",
        **manifest: object,
    ) -> Bundle:
        tensors = load_file(tmp_path / WEIGHTS)
        tensors.pop(drop, None)
        save_file({**tensors, **(add or {})}, tmp_path / WEIGHTS)
        if backbone:
            (tmp_path / "backbone.json").write_text(backbone)
        write_manifest(tmp_path, replace(Bundle.read(tmp_path).manifest, **manifest))  # type: ignore[arg-type]
        return Bundle.read(tmp_path)

    return damage


def test_a_missing_tensor_is_named(damaged: Callable[..., Bundle]) -> None:
    with pytest.raises(BundleError, match=r"layers\.1\.output\.dense\.bias is missing"):
        load_model(damaged(drop="layers.1.output.dense.bias"))


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(
    damaged: Callable[..., Bundle],
) -> None:
    wrong = {"layers.1.output.dense.bias": np.zeros(7, np.float32)}
    with pytest.raises(BundleError, match=r"is of shape \(7,\), must be \(32,\)"):
        load_model(damaged(add=wrong))


def test_a_tensor_too_many_is_named(damaged: Callable[..., Bundle]) -> None:
    with pytest.raises(BundleError, match=r"tensor layers\.9\.bias belongs to no part"):
        load_model(damaged(add={"layers.9.bias": np.zeros(3, np.float32)}))


@pytest.mark.parametrize(
    ("backbone", "says"),
    [
        ("{", "do not fit each other"),
        ("[]", "do not fit each other"),
        (json.dumps({"model_type": "bert", "hidden_size": "wide"}), "do not fit each other"),
        (json.dumps({"model_type": "gpt2"}), "'gpt2' is not supported"),
        (json.dumps({}), "'None' is not supported"),
    ],
)
def test_a_damaged_backbone_is_refused(
    damaged: Callable[..., Bundle], backbone: str, says: str
) -> None:
    with pytest.raises(BundleError, match=says):
        load_model(damaged(backbone=backbone))


@pytest.mark.parametrize("exits", [(), (1, 2), (0, 3), (3, 4)])
def test_exits_that_do_not_fit_the_layers_are_refused(
    damaged: Callable[..., Bundle], exits: tuple[int, ...]
) -> None:
    with pytest.raises(BundleError, match="depths from 1 to 3, the last of them included"):
        load_model(damaged(exits=exits))


def test_an_unknown_method_is_refused_and_the_known_ones_named(
    damaged: Callable[..., Bundle],
) -> None:
    with pytest.raises(
        BundleError, match=r"'later2027' is unknown to this version; known: deebert"
    ):
        load_model(damaged(method="later2027"))
