"""The device's graphs compute what torch computes, and hold no weights of their own."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from law import Outcome, whole
from torch import Tensor, nn
from toy_models import (
    LABELS,
    mixed_knobs,
    toy_bundle,
    toy_inputs,
    toy_layers,
    toy_model,
    toy_tokenizer,
)

from offramp_common.activations import Activations, NumpyArray
from offramp_common.bundle import GRAPHS, WEIGHTS, Bundle
from offramp_common.runner import Knobs, run
from offramp_common.spec import KnobSpec, StateField, TaskSpec, never_exit
from offramp_common.text import TextEncoder
from offramp_edge.runtime import OnnxLayers
from offramp_model.backbones import backbone_from_config, backbone_from_pretrained
from offramp_model.exits import Branch, Decision, HeadSpec, Policy, State
from offramp_model.export import add_graphs, capture
from offramp_model.methods import METHODS
from offramp_model.methods.deebert import entropy
from offramp_model.onnx_weights import Weights
from offramp_model.split_model import MultiExitModel, TorchLayers, to_torch
from offramp_model.store import About, save_model

# Two float32 runtimes sum in different orders. Hidden states lie around 1 (LayerNorm), up to 10;
# differences of 1e-6 (toys) to 1e-5 (MiniLM) were seen.
TOLERANCE = 1e-4
_COMMON: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 128,  # the smallest width at which matrices are stored as int8
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "max_position_embeddings": 140,
    "initializer_range": 0.2,  # ten times the usual: attention that differs between tokens
}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": _COMMON,
    "roberta": {**_COMMON, "type_vocab_size": 1, "pad_token_id": 1},
    "distilbert": {
        "vocab_size": 160, "dim": 128, "n_layers": 2, "n_heads": 4, "hidden_dim": 192,
        "max_position_embeddings": 140, "initializer_range": 0.2,
    },
    "albert": {**_COMMON, "embedding_size": 128, "num_hidden_groups": 1, "inner_group_num": 2},
    "electra": {**_COMMON, "embedding_size": 64},
    "mpnet": {**_COMMON, "pad_token_id": 1},
}  # fmt: skip
LENGTHS = [5, 12, 1, 9, 30, 7]  # one token, and more than the seven that were traced


def assert_equal_to_torch(bundle: Bundle, inputs: Activations[NumpyArray], knobs: Knobs) -> None:
    """Every layer's hidden states and state at full depth, and what leaves where at `knobs`."""
    onnx_layers, torch_layers = OnnxLayers(bundle), toy_layers(bundle)
    never = never_exit(bundle.manifest.knobs, bundle.n_layers)
    ours, theirs = inputs, to_torch(inputs)
    for _ in range(bundle.n_layers):
        step, expected = onnx_layers.step(ours, never), torch_layers.step(theirs, never)
        ours, theirs = step.acts, expected.acts
        for row, length in enumerate(inputs.lengths_B):
            difference = ours.hidden_BTD[row, :length] - theirs.hidden_BTD[row, :length].numpy()
            assert np.abs(difference).max() < TOLERANCE
        if ours.depth < bundle.n_layers:
            assert sorted(ours.state) == sorted(theirs.state)
        for name, value in ours.state.items():
            expected_state = theirs.state[name].numpy()
            assert value.dtype == expected_state.dtype
            np.testing.assert_allclose(value, expected_state, atol=TOLERANCE)
        assert (step.look is None) == (expected.look is None)
        if step.look is not None and expected.look is not None:
            assert sorted(step.look.outputs) == sorted(expected.look.outputs)
    got = Outcome.of(run(onnx_layers, inputs, bundle.n_layers, knobs).left)
    want = whole(torch_layers, inputs, knobs)
    np.testing.assert_array_equal(got.depth_B, want.depth_B)
    np.testing.assert_array_equal(got.answers.argmax(axis=1), want.answers.argmax(axis=1))
    np.testing.assert_allclose(got.answers, want.answers, atol=10 * TOLERANCE)  # sharpened heads
    np.testing.assert_allclose(got.confidence_B, want.confidence_B, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("method", "task", "exits"),
    [
        ("deebert", TaskSpec("classification", LABELS), [1, 2]),
        ("deebert", TaskSpec("classification", LABELS, pair=True), [2]),
        ("pabee", TaskSpec("classification", LABELS), [1, 2]),
        ("pabee", TaskSpec("regression"), [1, 2]),
    ],
)
def test_graphs_leave_and_answer_as_torch_does(
    tmp_path: Path, method: str, task: TaskSpec, exits: list[int]
) -> None:
    toy = toy_bundle(tmp_path, method, n_layers=2, task=task, exits=exits)
    bundle = add_graphs(toy, ["fp32"])
    assert_equal_to_torch(bundle, toy_inputs(bundle, LENGTHS * 4), bundle.knobs("fp32"))


def family_bundle(path: Path, family: str) -> Bundle:
    """A random model whose matrices are large enough to be stored as int8."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = backbone_from_config({**FAMILIES[family], "model_type": family})
        record = METHODS["pabee"]
        pair = backbone.segments > 0
        task = TaskSpec("classification", LABELS, pair)
        spec = HeadSpec(task, backbone.width, 2, (1, 2), record.settings)
        model = MultiExitModel(backbone, record, spec).eval()
    points = {"fp32": mixed_knobs(model)}
    return save_model(path, model, toy_tokenizer(), About(family, 30, 1, operating_points=points))


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_graphs_of_every_family_equal_torch(tmp_path: Path, family: str) -> None:
    bundle = add_graphs(family_bundle(tmp_path, family))
    assert len(bundle.manifest.stored) > 10, "else nothing here is quantised"
    inputs = toy_inputs(bundle, LENGTHS)
    assert_equal_to_torch(bundle, inputs, bundle.knobs("fp32"))
    never = never_exit(bundle.manifest.knobs, 2)
    fp32, int8 = (
        Outcome.of(run(OnnxLayers(bundle, precision), inputs, 2, never).left).answers
        for precision in ("fp32", "int8")
    )
    # Seen: 0.03 to 0.06. A wrong scale or zero point gives 1 and more.
    assert np.linalg.norm(int8 - fp32) < 0.2 * np.linalg.norm(fp32)


class AwkwardBranch(Branch):
    """Two names for one tensor, and an output that depends on nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.map = nn.Linear(width, 3)

    def forward(self, hidden_BTD: Tensor, mask_BT: Tensor, state: State) -> dict[str, Tensor]:
        logits_BTC = self.map(hidden_BTD)
        return {"logits": logits_BTC, "again": logits_BTC, "fixed": torch.ones(len(mask_BT), 2)}


@dataclass(frozen=True)
class AwkwardPolicy:
    """Per-token answers and state, a state that is handed on as it is, another handed on twice."""

    def state_fields(self, depth: int) -> dict[str, StateField]:
        above = StateField("int16", per_token=True)
        return {
            "above": above,
            "length": StateField("int64", (2,)),
            "kept": StateField("int64", (2,)),
        }

    def start(self, mask_BT: Tensor) -> dict[str, Tensor]:
        length_B2 = mask_BT.sum(dim=1).unsqueeze(1).expand(-1, 2) + torch.arange(2)
        above_BT = torch.zeros_like(mask_BT, dtype=torch.int16)
        return {"above": above_BT, "length": length_B2, "kept": length_B2}

    def decide(
        self, outputs: State, state: State, knobs: Mapping[str, Tensor], depth: int
    ) -> Decision:
        first_BT = outputs["logits"][..., 0]
        above_BT = (first_BT > first_BT.mean(dim=1, keepdim=True)).to(torch.int16)
        stable_B = (above_BT.to(torch.int32) == state["above"].to(torch.int32)).float().mean(dim=1)
        new = {"above": above_BT, "length": state["length"], "kept": state["length"]}
        return Decision(stable_B >= knobs["share"], outputs["again"], stable_B, new)


AWKWARD = replace(
    METHODS["pabee"],
    name="awkward",
    rule="Leave when enough tokens stay above, or below, the mean.",
    tasks=("classification",),
    policy=lambda spec: AwkwardPolicy(),
    branches=lambda spec: nn.ModuleDict({str(d): AwkwardBranch(spec.width) for d in spec.exits}),
    knobs=lambda spec: (KnobSpec("share", 0.0, 1.0, never=2.0, meaning="of tokens that agree"),),
)


def awkward_model(policy: Policy | None = None) -> MultiExitModel:
    """Three layers, no exit head behind the second."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = toy_model(n_layers=3).backbone
        spec = HeadSpec(TaskSpec("classification", ("a", "b", "c")), backbone.width, 3, (1, 3))
        method = AWKWARD if policy is None else replace(AWKWARD, policy=lambda spec: policy)
        return MultiExitModel(backbone, method, spec).eval()


def test_any_policy_of_tensors_exports_without_a_special_case(tmp_path: Path) -> None:
    model = awkward_model()
    bundle = save_model(tmp_path, model, toy_tokenizer(), About("awkward", 30, 1))
    folder = tmp_path / GRAPHS / "fp32"
    folder.mkdir(parents=True)
    for index in range(3):
        graph = capture(model, index).graph(Weights.of(bundle), "fp32")
        (folder / f"layer_{index:02d}.onnx").write_bytes(graph.SerializeToString())
    inputs, layers = toy_inputs(bundle, [8] * 24), OnnxLayers(bundle)
    never = {"share": (2.0,) * 3}
    first = layers.step(inputs, never).look
    assert first is not None
    knobs = {"share": (float(first.confidence_B.max()),) * 3}  # only the surest leave there
    acts, expected = inputs, to_torch(inputs)
    for _ in range(2):
        acts = layers.step(acts, never).acts
        expected = TorchLayers(model).step(expected, never).acts
        for name, value in {**expected.state, **expected.token_state}.items():
            found = {**acts.state, **acts.token_state}[name]
            np.testing.assert_array_equal(found, value.numpy())
        assert sorted(acts.token_state) == ["above"]
    got = Outcome.of(run(layers, inputs, 3, knobs).left)
    want = whole(TorchLayers(model), inputs, knobs)
    np.testing.assert_array_equal(got.depth_B, want.depth_B)
    assert len(set(got.depth_B)) > 1
    np.testing.assert_allclose(got.answers, want.answers, atol=TOLERANCE)
    look = layers.step(acts, never).look
    assert look is not None
    np.testing.assert_array_equal(look.outputs["again"], look.answer)
    np.testing.assert_array_equal(look.outputs["fixed"], np.ones((24, 2)))


def test_a_state_of_another_dtype_than_declared_is_refused() -> None:
    @dataclass(frozen=True)
    class Wrong(AwkwardPolicy):
        def state_fields(self, depth: int) -> dict[str, StateField]:
            return {**super().state_fields(depth), "kept": StateField("int32", (2,))}

    with pytest.raises(ValueError, match=r"state kept at depth 1 is torch\.int64, not int32"):
        capture(awkward_model(Wrong()), 0)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Both precisions, matrices stored as int8."""
    path = tmp_path_factory.mktemp("wide")
    return add_graphs(toy_bundle(path, "pabee", width=128, n_layers=2))


def test_weights_are_bytes_of_the_bundles_own_file_and_nowhere_else(wide: Bundle) -> None:
    data = (wide.path / WEIGHTS).read_bytes()
    for precision in ("fp32", "int8"):
        seen = set()
        for file in (wide.path / GRAPHS / precision).iterdir():
            for tensor in onnx.load(file, load_external_data=False).graph.initializer:
                place = {entry.key: entry.value for entry in tensor.external_data}
                if not place:
                    assert tensor.ByteSize() < 2048, f"{file.name} holds {tensor.name} itself"
                    continue
                assert place["location"] == WEIGHTS
                first, stored = int(place["offset"]), wide.tensors[tensor.name]
                assert data[first : first + int(place["length"])] == stored.tobytes()
                assert tuple(tensor.dims) == stored.shape
                seen.add(stored.tobytes())  # by content: the exporter joins tensors that are equal
        assert seen == {tensor.tobytes() for tensor in wide.tensors.values()}
    n_bytes = sum(file.stat().st_size for file in (wide.path / GRAPHS).rglob("*.onnx"))
    assert n_bytes < 4 * 20_000  # as is for a MiniLM: a graph's size does not grow with its weights


def test_exporting_again_writes_the_same_bytes(wide: Bundle) -> None:
    before = dict(wide.manifest.files)
    stale = wide.path / GRAPHS / "int8" / "layer_09.onnx"
    stale.write_bytes(b"of a deeper model")
    again = add_graphs(wide)
    assert again.manifest.files == before
    assert not stale.exists()
    again.verify()


def test_an_unknown_precision_is_named_and_nothing_is_touched(wide: Bundle) -> None:
    with pytest.raises(ValueError, match="precision 'int3': must be one of fp32, int8"):
        add_graphs(wide, ["int3"])
    wide.verify()


@pytest.fixture(
    scope="module", params=["deebert", "pabee", "pabee regression"], ids=lambda name: name
)
def minilm(
    request: pytest.FixtureRequest, minilm_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    """Real layers under random heads, an exit after every layer; both precisions."""
    name, _, regression = request.param.partition(" ")
    record, backbone = METHODS[name], backbone_from_pretrained(str(minilm_dir))
    labels = tuple(f"intent {i}" for i in range(151))
    task = TaskSpec("regression") if regression else TaskSpec("classification", labels)
    settings = {**record.settings, "pooling": "mean"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        spec = HeadSpec(task, backbone.width, 6, tuple(range(1, 7)), settings)
        model = MultiExitModel(backbone, record, spec)
    tokenizer = (minilm_dir / "tokenizer.json").read_text()
    path = tmp_path_factory.mktemp("minilm")
    return add_graphs(save_model(path, model, tokenizer, About("minilm", 128, 3)))


def widest_gap(value_B: NumpyArray) -> float:
    """Where the middle third of some values lies furthest apart: runtimes round; no row may hang on it."""
    middle = np.sort(value_B)[len(value_B) // 3 : 2 * len(value_B) // 3]
    below = int(np.diff(middle).argmax())
    return float(middle[below : below + 2].mean())


def spreading_knobs(bundle: Bundle, inputs: Activations[NumpyArray]) -> Knobs:
    """For DeeBERT a threshold in the middle of each exit's entropies."""
    if bundle.manifest.method == "pabee":
        return {"patience": (2.0,) * 6, "tolerance": (0.05,) * 6}
    layers, acts, thresholds = toy_layers(bundle), to_torch(inputs), []
    for _ in range(6):
        step = layers.step(acts, never_exit(bundle.manifest.knobs, 6))
        assert step.look is not None
        thresholds.append(widest_gap(entropy(step.look.answer).numpy()))
        acts = step.acts
    return {"threshold": tuple(thresholds)}


@pytest.mark.slow
@pytest.mark.weights
@pytest.mark.data
def test_graphs_of_a_minilm_equal_torch_and_int8_stays_close(
    minilm: Bundle, data_dir: Path
) -> None:
    with (data_dir / "clinc150" / "test.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    inputs = TextEncoder(minilm)([row["text"] for row in rows[:5120:80]])
    assert_equal_to_torch(minilm, inputs, spreading_knobs(minilm, inputs))
    exact, quantised = OnnxLayers(minilm), OnnxLayers(minilm, "int8")
    a, b, never = inputs, inputs, never_exit(minilm.manifest.knobs, 6)
    for _ in range(6):
        a, b = exact.step(a, never).acts, quantised.step(b, never).acts
        wrong = np.linalg.norm(a.hidden_BTD - b.hidden_BTD) / np.linalg.norm(a.hidden_BTD)
        # Seen: 0.014 after one layer to 0.065 after six; one scale for all tokens gives 0.07 to 0.13.
        assert wrong < 0.1
    n_bytes = sum(file.stat().st_size for file in minilm.path.rglob("*") if file.is_file())
    assert n_bytes < 28_000_000
