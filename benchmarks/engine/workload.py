"""Requests for the engine's benchmark: real sentences, cut where a real bundle has not let them leave.

Each request is one row that enters at one of four depths, in equal shares. A row is a candidate for a
depth if it has not left before, at the operating point; from there on it leaves where it does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from offramp_cloud.waiting import KnobKey, knob_key
from offramp_common.activations import Activations, NumpyArray
from offramp_common.bundle import Bundle
from offramp_common.runner import Knobs, run
from offramp_common.spec import TaskSpec, never_exit
from offramp_common.text import TextEncoder
from offramp_model.backbones import backbone_from_config
from offramp_model.exits import HeadSpec
from offramp_model.methods import METHODS
from offramp_model.split_model import MultiExitModel, TorchLayers, to_numpy, to_torch
from offramp_model.store import load_model
from offramp_train.tables import read_rows

_STEP = 32  # rows run together while requests are made
_MPNET = {"model_type": "mpnet", "vocab_size": 30527}  # the rest is base size by default


@dataclass(frozen=True)
class Item:
    """One request: its row at the depth where it enters, and where it leaves when it runs alone."""

    acts: Activations[NumpyArray]
    exit_depth: int


@dataclass(frozen=True)
class Workload:
    """A model, its operating point, and requests for it, grouped by the depth where they enter."""

    model: MultiExitModel
    knobs: KnobKey
    items: dict[int, list[Item]]

    def stream(self, seed: int) -> Iterator[Item]:
        """Requests without end: a depth at random, then one of its rows."""
        rng = np.random.default_rng(seed)
        depths = sorted(self.items)
        while True:
            pool = self.items[depths[int(rng.integers(len(depths)))]]
            yield pool[int(rng.integers(len(pool)))]

    def described(self) -> dict[str, object]:
        every = [item for pool in self.items.values() for item in pool]
        tokens = [int(item.acts.lengths_B[0]) for item in every]
        left = [item.exit_depth - item.acts.depth for item in every]
        spread = np.percentile(tokens, [10, 50, 90]).round().astype(int).tolist()
        exits, counts = np.unique([item.exit_depth for item in every], return_counts=True)
        shares = (counts / len(every)).round(3).tolist()
        return {
            "entry_depths": sorted(self.items),
            "tokens_p10_p50_p90": spread,
            "tokens_mean": round(float(np.mean(tokens)), 1),
            "layers_to_run_mean": round(float(np.mean(left)), 2),
            "exit_shares": dict(zip(exits.tolist(), shares, strict=True)),
        }


def sentences(bundle: Bundle, file: Path, rows: int, seed: int = 0) -> Activations[NumpyArray]:
    """Random rows of a file, tokenized, at depth 0."""
    texts = read_rows(file).texts
    picked = np.random.default_rng(seed).permutation(len(texts))[:rows]
    return TextEncoder(bundle)([texts[i] for i in picked])


def of_bundle(bundle: Bundle, file: Path, rows: int) -> Workload:
    """The bundle's own model at its own operating point."""
    model = load_model(bundle)
    inputs = sentences(bundle, file, rows)
    entries = tuple(range(1, 5))
    return _made(model, bundle.knobs("fp32"), inputs, entries)


def of_mpnet(bundle: Bundle, file: Path, rows: int) -> Workload:
    """MPNet-base with random weights: DeeBERT's heads after every second layer, with thresholds that let go
    the shares of rows that leave the bundle's model after every layer."""
    small = load_model(bundle)
    inputs = sentences(bundle, file, rows)
    depth_B = _run_all(small, bundle.knobs("fp32"), inputs)
    torch.manual_seed(0)
    backbone = backbone_from_config(_MPNET)
    method = METHODS["deebert"]
    exits = tuple(range(2, 13, 2))
    task = TaskSpec("classification", tuple(f"label {i}" for i in range(150)))
    spec = HeadSpec(task, backbone.width, 12, exits, dict(method.settings))
    model = MultiExitModel(backbone, method, spec).eval()
    _sharpen(model)
    shares = {2 * depth: float((depth_B == depth).mean()) for depth in range(1, 7)}
    return _made(model, _thresholds(model, inputs, shares), inputs, (2, 4, 6, 8))


@torch.no_grad()
def _sharpen(model: MultiExitModel) -> None:
    """Random heads say nearly the same of all rows: last bits would decide who leaves."""
    for parameter in model.exits.parameters():
        parameter.mul_(20.0)


def _thresholds(
    model: MultiExitModel, inputs: Activations[NumpyArray], shares: dict[int, float]
) -> Knobs:
    """Entropies below which such shares of the rows leave at each depth (DeeBERT's one knob)."""
    (knob,) = model.knobs
    never = never_exit(model.knobs, model.n_layers)
    sure: dict[int, list[NDArray[np.float32]]] = {depth: [] for depth in shares}
    for acts in _pieces(inputs):
        run(
            TorchLayers(model), to_torch(acts), model.n_layers, never,
            lambda depth, _, look: sure[depth].append(_entropy(look.outputs["logits"])),
        )  # fmt: skip
    values = [knob.never] * model.n_layers
    there_B = np.ones(inputs.batch_size, bool)
    for depth, share in list(shares.items())[:-1]:
        entropy_B = np.concatenate(sure[depth])
        wanted = min(1.0, share * inputs.batch_size / max(1, there_B.sum()))
        values[depth - 1] = float(np.quantile(entropy_B[there_B], wanted))
        there_B &= entropy_B >= values[depth - 1]
    return {knob.name: tuple(values)}


def _entropy(logits_BC: torch.Tensor) -> NDArray[np.float32]:
    log_BC = torch.log_softmax(logits_BC, dim=1)
    entropy: NDArray[np.float32] = -(log_BC.exp() * log_BC).sum(dim=1).numpy()
    return entropy


def _made(
    model: MultiExitModel,
    knobs: Knobs,
    inputs: Activations[NumpyArray],
    entries: tuple[int, ...],
) -> Workload:
    items: dict[int, list[Item]] = {depth: [] for depth in entries}
    layers = TorchLayers(model)
    order = np.argsort(inputs.lengths_B, kind="stable")
    exit_B = _run_all(model, knobs, inputs)
    never = never_exit(model.knobs, model.n_layers)
    for acts, exits in zip(_pieces(inputs), _split(exit_B[order]), strict=True):
        state = to_torch(acts)
        for depth in entries:
            rest = run(layers, state, depth, never).rest
            assert rest is not None
            state, here = rest, to_numpy(rest)
            for row in np.flatnonzero(exits > depth):
                items[depth].append(Item(here.take(np.array([row])), int(exits[row])))
    return Workload(model, knob_key(knobs), items)


def _run_all(
    model: MultiExitModel, knobs: Knobs, inputs: Activations[NumpyArray]
) -> NDArray[np.int64]:
    """Where each row leaves."""
    order = np.argsort(inputs.lengths_B, kind="stable")
    found = np.zeros(inputs.batch_size, np.int64)
    for acts, rows in zip(_pieces(inputs), _split(order), strict=True):
        for left in run(TorchLayers(model), to_torch(acts), model.n_layers, knobs).left:
            found[rows[left.rows]] = left.depth
    return found


def _pieces(inputs: Activations[NumpyArray]) -> Iterator[Activations[NumpyArray]]:
    """Shortest first, `_STEP` rows at a time."""
    for rows in _split(np.argsort(inputs.lengths_B, kind="stable")):
        yield inputs.take(rows)


def _split(rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    return np.split(rows, range(_STEP, rows.size, _STEP))
