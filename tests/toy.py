"""A small numpy model with exits, and one toy method for each kind of state that a method carries.

Hidden states are small whole numbers in float32, so that every sum is exact: a row gives the same
bits alone or in a batch, padded or not. Padding is filled with NaN (-1 in token ids) after every
step: whoever reads it is found out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from offramp_common.activations import Activations, NumpyArray, mask_of
from offramp_common.frames import Limits, decode_frame, encode_frame
from offramp_common.runner import Knobs, Leaving, Look, Step, run
from offramp_common.spec import CutSpec, StateField

VOCABULARY = (97, 2)
WIDTH = 4
CLASSES = 3
NEVER = 2.0
"""A threshold that no confidence reaches."""
_MODULUS = 31
_SPREAD = 16  # logits are whole numbers in [-8, 8]

State = dict[str, NumpyArray]


class ToyMethod(Protocol):
    """When rows leave, what it carries, and what it does to tokens and layers."""

    def fields(self, looks: int) -> dict[str, StateField]:
        """What is carried after so many exits (at least one) have been looked at."""
        ...

    def decide(
        self, logits_BC: NumpyArray, sure_B: NumpyArray, acts: Activations[NumpyArray], knob: float
    ) -> tuple[NDArray[np.bool_], State, State]:
        """Who leaves; the new state and token state. The state of `acts` is empty at first."""
        ...


@dataclass(frozen=True)
class Threshold:
    """Leaves when the margin between the two best classes reaches the knob; carries nothing."""

    def fields(self, looks: int) -> dict[str, StateField]:
        return {}

    def decide(
        self, logits_BC: NumpyArray, sure_B: NumpyArray, acts: Activations[NumpyArray], knob: float
    ) -> tuple[NDArray[np.bool_], State, State]:
        return sure_B >= knob, {}, {}


@dataclass(frozen=True)
class Patience:
    """Row state: leaves when so many exits in a row agreed with the one before (unless NEVER)."""

    patience: int = 1

    def fields(self, looks: int) -> dict[str, StateField]:
        return {"count": StateField("uint8"), "previous": StateField("int16")}

    def decide(
        self, logits_BC: NumpyArray, sure_B: NumpyArray, acts: Activations[NumpyArray], knob: float
    ) -> tuple[NDArray[np.bool_], State, State]:
        broken_B = np.isnan(logits_BC).any(axis=1)
        now_B = np.where(broken_B, -1, logits_BC.argmax(axis=1)).astype(np.int16)
        count_B = np.zeros(now_B.shape, np.uint8)
        if acts.state:
            same_B = (now_B == acts.state["previous"]) & ~broken_B
            count_B = np.where(same_B, acts.state["count"] + np.uint8(1), 0).astype(np.uint8)
        leave_B = (count_B >= self.patience) & (knob < NEVER)
        return leave_B, {"count": count_B, "previous": now_B}, {}


@dataclass(frozen=True)
class History:
    """State that grows with depth: every earlier exit's logits, as (looks, C) a row. Leaves when
    their sum is decided enough."""

    def fields(self, looks: int) -> dict[str, StateField]:
        return {"history": StateField("float32", (looks, CLASSES))}

    def decide(
        self, logits_BC: NumpyArray, sure_B: NumpyArray, acts: Activations[NumpyArray], knob: float
    ) -> tuple[NDArray[np.bool_], State, State]:
        history = logits_BC[:, None]
        if acts.state:
            history = np.concatenate([acts.state["history"], history], axis=1)
        return _margin(history.sum(axis=1)) >= knob * history.shape[1], {"history": history}, {}


@dataclass(frozen=True)
class HaltingTokens:
    """Token state: tokens halt one by one, keep their hidden state, and stay to be read by others.
    A row leaves when all its tokens have halted."""

    def fields(self, looks: int) -> dict[str, StateField]:
        return {
            "halted": StateField("bool", per_token=True),
            "score": StateField("float16", (2,), per_token=True),
        }

    def decide(
        self, logits_BC: NumpyArray, sure_B: NumpyArray, acts: Activations[NumpyArray], knob: float
    ) -> tuple[NDArray[np.bool_], State, State]:
        mask_BT = mask_of(acts.lengths_B)
        score_BT2: NumpyArray = (acts.hidden_BTD[..., :2] / 32).astype(np.float16)
        halted_BT: NDArray[np.bool_] = score_BT2[..., 0] >= knob
        if acts.token_state:
            halted_BT = halted_BT | (acts.token_state["halted"] & mask_BT)
            score_BT2 = score_BT2 / 2 + acts.token_state["score"] / 2
        leave_B: NDArray[np.bool_] = np.all(halted_BT | ~mask_BT, axis=1)
        return leave_B, {}, {"halted": halted_BT, "score": score_BT2}


@dataclass(frozen=True)
class DroppedTokens(Threshold):
    """Each step drops tokens (never a row's first): lengths change. The original indices of those
    that stay are carried."""

    def fields(self, looks: int) -> dict[str, StateField]:
        return {"index": StateField("int32", per_token=True)}

    def decide(
        self, logits_BC: NumpyArray, sure_B: NumpyArray, acts: Activations[NumpyArray], knob: float
    ) -> tuple[NDArray[np.bool_], State, State]:
        return sure_B >= knob, {}, dict(acts.token_state)


@dataclass(frozen=True)
class Cascade(Threshold):
    """Each "layer" is a whole model that reads the input: the hidden state stays token ids."""


METHODS: dict[str, ToyMethod] = {
    "threshold": Threshold(),
    "patience": Patience(),
    "history": History(),
    "halting tokens": HaltingTokens(),
    "dropped tokens": DroppedTokens(),
    "cascade": Cascade(),
}
"""One for each kind of state."""


@dataclass(frozen=True)
class ToyLayers:
    """`Layers` over numpy. `exits` are depths, the last is `n_layers`."""

    method: ToyMethod = field(default_factory=Threshold)
    n_layers: int = 6
    exits: tuple[int, ...] = (2, 3, 5, 6)
    seed: int = 0

    @cached_property
    def cuts(self) -> dict[int, CutSpec]:
        """What crosses at depth 0 .. n_layers - 1."""
        return {depth: self._cut(depth) for depth in range(self.n_layers)}

    def _cut(self, depth: int) -> CutSpec:
        looks = sum(exit_depth <= depth for exit_depth in self.exits)
        state = self.method.fields(looks) if looks else {}
        if isinstance(self.method, DroppedTokens) and depth:
            state = self.method.fields(looks)
        if depth == 0 or isinstance(self.method, Cascade):
            return CutSpec(depth, True, len(VOCABULARY), state, VOCABULARY)
        return CutSpec(depth, False, WIDTH, state)

    def knobs(self, value: float = 0.25) -> Knobs:
        """The operating point with the one knob at `value` everywhere: 0 lets all leave at the
        first exit (patience: when it may), NEVER lets none leave early."""
        return {"threshold": (value,) * self.n_layers}

    @cached_property
    def _weights(self) -> list[Mapping[str, NumpyArray]]:
        rng = np.random.default_rng(self.seed)
        shapes = {
            "own": (WIDTH, WIDTH),
            "others": (WIDTH, WIDTH),
            "head": (WIDTH, CLASSES),
            "ids": (len(VOCABULARY), WIDTH),
        }
        return [
            {n: rng.integers(0, 8, shape).astype(np.float32) for n, shape in shapes.items()}
            for _ in range(self.n_layers)
        ]

    def step(self, acts: Activations[NumpyArray], knobs: Knobs) -> Step[NumpyArray]:
        w = self._weights[acts.depth]
        mask_BT = mask_of(acts.lengths_B)
        hidden_BTD = acts.hidden_BTD
        if hidden_BTD.dtype.kind == "i":
            hidden_BTD = (hidden_BTD @ w["ids"].astype(np.int64) % _MODULUS).astype(np.float32)
        pooled_BD = np.where(mask_BT[..., None], hidden_BTD, 0).sum(axis=1)
        with np.errstate(invalid="ignore"):  # infinity modulo something
            new_BTD = hidden_BTD @ w["own"] + (pooled_BD @ w["others"] % _MODULUS)[:, None]
            new_BTD %= np.float32(_MODULUS)
            logits_BC = (pooled_BD @ w["head"]) % (_SPREAD + 1) - _SPREAD / 2
        if "halted" in acts.token_state:
            new_BTD = np.where(acts.token_state["halted"][..., None], hidden_BTD, new_BTD)
        if isinstance(self.method, Cascade):
            new_BTD = acts.hidden_BTD
        acts = replace(acts, hidden_BTD=new_BTD, depth=acts.depth + 1)
        if isinstance(self.method, DroppedTokens):
            acts = _drop(acts)
        look = None
        if acts.depth in self.exits:
            sure_B = _margin(logits_BC)
            knob = knobs["threshold"][acts.depth - 1]
            leave_B, state, token_state = self.method.decide(logits_BC, sure_B, acts, knob)
            acts = replace(acts, state=state, token_state=token_state)
            look = Look(leave_B, logits_BC.astype(np.float32), sure_B, {"logits": logits_BC})
        return Step(_spoil_padding(acts), look)


def _margin(logits_BC: NumpyArray) -> NDArray[np.float32]:
    """Best minus second best, in [0, 1]; NaN for a row that has one."""
    ordered_BC = np.sort(logits_BC, axis=1)
    margin_B: NDArray[np.float32] = (ordered_BC[:, -1] - ordered_BC[:, -2]).astype(np.float32)
    margin_B[np.isnan(logits_BC).any(axis=1)] = np.nan
    return margin_B / np.float32(_SPREAD)


def _drop(acts: Activations[NumpyArray]) -> Activations[NumpyArray]:
    """Without the tokens whose first channel is a multiple of three, but for each row's first."""
    mask_BT = mask_of(acts.lengths_B)
    keep_BT = mask_BT & (acts.hidden_BTD[..., 0] % 3 != 0)
    keep_BT[:, 0] = True
    index_BT = np.broadcast_to(np.arange(mask_BT.shape[1], dtype=np.int32), mask_BT.shape)
    index_BT = acts.token_state.get("index", index_BT)
    lengths_B = keep_BT.sum(axis=1).astype(np.int64)
    order_BT = np.argsort(~keep_BT, axis=1, kind="stable")[:, : int(lengths_B.max())]
    return replace(
        acts,
        hidden_BTD=np.take_along_axis(acts.hidden_BTD, order_BT[..., None], axis=1),
        lengths_B=lengths_B,
        token_state={"index": np.take_along_axis(index_BT, order_BT, axis=1)},
    )


def _spoil_padding(acts: Activations[NumpyArray]) -> Activations[NumpyArray]:
    padding_BT = ~mask_of(acts.lengths_B)
    hidden_BTD = acts.hidden_BTD.copy()
    hidden_BTD[padding_BT] = -1 if hidden_BTD.dtype.kind == "i" else np.nan
    return replace(acts, hidden_BTD=hidden_BTD)


def inputs(rows: Sequence[Sequence[int]]) -> Activations[NumpyArray]:
    """A batch at depth 0 from token ids below VOCABULARY[0], one sequence a row."""
    lengths_B = np.array([len(row) for row in rows], dtype=np.int64)
    ids_BT2 = np.full((len(rows), int(lengths_B.max(initial=0)), 2), -1, dtype=np.int64)
    for ids_T2, row in zip(ids_BT2, rows, strict=True):
        ids_T2[: len(row), 0] = row
        ids_T2[: len(row), 1] = np.arange(len(row)) % 2
    return Activations(ids_BT2, lengths_B, 0)


@dataclass
class Outcome:
    """What became of one row: where it left and with which bits."""

    depth: int
    answer: bytes
    confidence: bytes


def outcomes(left: Sequence[Leaving[NumpyArray]], rows: NDArray[np.int64]) -> dict[int, Outcome]:
    """By position: `rows` maps the positions in the run's batch to those wanted."""
    found: dict[int, Outcome] = {}
    for leaving in left:
        for i, row in enumerate(leaving.rows):
            position = int(rows[row])
            assert position not in found, "a row left twice"
            found[position] = Outcome(
                leaving.depth, leaving.answer[i].tobytes(), leaving.confidence_B[i].tobytes()
            )
    return found


def run_with_cuts(
    layers: ToyLayers,
    acts: Activations[NumpyArray],
    knobs: Knobs,
    cuts: Sequence[int],
    codec: str = "fp32",
) -> dict[int, Outcome]:
    """Runs all layers; what is still there at each of `cuts` (ascending) crosses as a frame."""
    found: dict[int, Outcome] = {}
    rows = np.arange(acts.batch_size)
    for stop in (*cuts, layers.n_layers):
        result = run(layers, acts, stop, knobs)
        found |= outcomes(result.left, rows)
        rows = rows[result.rest_rows]
        if result.rest is None:
            break
        acts = result.rest
        if stop < layers.n_layers:
            frame = encode_frame(acts, layers.cuts[stop], codec)
            acts = decode_frame(frame, layers.cuts, Limits())
    return found
