"""The multi-exit model in torch: a backbone, an exit head after some layers, and the reference runner."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from offramp_common.activations import Activations, NumpyArray, Rows, mask_of
from offramp_common.runner import Knobs, Look, Step
from offramp_common.spec import CutSpec, KnobSpec
from offramp_model.backbones import Backbone
from offramp_model.exits import ExitHead, HeadSpec, Policy
from offramp_model.methods import METHODS, Method

Between = Callable[[int, Tensor], tuple[Tensor, Tensor]]


class MultiExitModel(nn.Module):
    """A backbone with an exit method's heads on it."""

    def __init__(self, backbone: Backbone, method: Method, spec: HeadSpec) -> None:
        """Raises ValueError when the method cannot decide on the task, or exits do not fit."""
        super().__init__()
        if spec.task.kind not in method.tasks:
            able = ", ".join(m.name for m in METHODS.values() if spec.task.kind in m.tasks)
            raise ValueError(
                f"{method.name} has no rule for {spec.task.kind}; methods that have: {able}"
            )
        depths = sorted(set(spec.exits))
        if (
            not depths
            or depths[0] < 1
            or depths[-1] != spec.n_layers
            or spec.n_layers != backbone.n_layers
        ):
            raise ValueError(
                f"exits {spec.exits}: depths from 1 to {backbone.n_layers}, the last of them included"
            )
        self.method, self.spec = method, replace(spec, exits=tuple(depths))
        self.backbone = backbone
        self.policy: Policy = method.policy(self.spec)
        self.exits = method.branches(self.spec)
        self.looks = tuple(range(1, spec.n_layers + 1)) if method.every_layer else tuple(depths)
        self._heads = {
            depth: ExitHead(
                depth,
                depth == self.looks[0],
                self.exits[str(depth)],  # type: ignore[arg-type]
                self.policy,
                depth in depths,
            )
            for depth in self.looks
        }

    @property
    def n_layers(self) -> int:
        return self.backbone.n_layers

    @property
    def channels(self) -> int:
        """Input channels: segment ids travel only where pairs need them."""
        return 2 if self.spec.task.pair and self.backbone.segments else 1

    @property
    def knobs(self) -> tuple[KnobSpec, ...]:
        return self.method.knobs(self.spec)

    def head(self, depth: int) -> ExitHead | None:
        """What looks at the hidden state after `depth` layers, if anything does."""
        return self._heads.get(depth)

    def cut(self, depth: int) -> CutSpec:
        """What crosses when the model is cut after `depth` layers."""
        if depth == 0:
            vocabulary = (self.backbone.vocabulary, self.backbone.segments)[: self.channels]
            return CutSpec(0, True, self.channels, {}, vocabulary)
        passed = [look for look in self.looks if look <= depth]
        state = self.policy.state_fields(passed[-1]) if passed else {}
        return CutSpec(depth, False, self.backbone.width, state)

    def forward(
        self, inputs_BTF: Tensor, mask_BT: Tensor, between: Between | None = None
    ) -> dict[int, dict[str, Tensor]]:
        """All exits' outputs, by depth: what training needs. No row leaves.

        between   (depth, hidden_BTD) -> (what the exit head reads, what the next layer reads): where a
                  recipe scales or stops gradients. Values must not change.
        """
        hidden_BTD = self.backbone.embed(inputs_BTF)
        # Branches that read earlier exits do so from state; training passes it along like the runner.
        state: Mapping[str, Tensor] = {}
        out: dict[int, dict[str, Tensor]] = {}
        zero = torch.zeros((), device=hidden_BTD.device)
        knobs = {knob.name: zero + knob.never for knob in self.knobs}
        for depth in range(1, self.n_layers + 1):
            hidden_BTD = self.backbone.run_layers(hidden_BTD, mask_BT, depth - 1, depth)
            read_BTD = hidden_BTD
            if between is not None:
                read_BTD, hidden_BTD = between(depth, hidden_BTD)
            head = self.head(depth)
            if head is not None:
                decision, out[depth] = head(read_BTD, mask_BT, state, knobs)
                state = decision.state
        return out


class TorchLayers:
    """A MultiExitModel as the runner's Layers: the reference that every other runtime is compared with."""

    def __init__(self, model: MultiExitModel, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self.model = model.eval().to(self.device)

    @property
    def n_layers(self) -> int:
        return self.model.n_layers

    @torch.inference_mode()
    def step(self, acts: Activations[Tensor], knobs: Knobs) -> Step[Tensor]:
        model, depth = self.model, acts.depth + 1
        hidden_BTD = acts.hidden_BTD if acts.depth else model.backbone.embed(acts.hidden_BTD)
        longest = hidden_BTD.shape[1]
        padded = bool((acts.lengths_B < longest).any())
        mask_BT = self._mask(acts) if padded else None
        hidden_BTD = model.backbone.run_layers(
            hidden_BTD, mask_BT, depth - 1, depth, acts.positions_BT
        )
        return self.look(replace(acts, hidden_BTD=hidden_BTD, depth=depth), knobs)

    @torch.inference_mode()
    def look(self, acts: Activations[Tensor], knobs: Knobs) -> Step[Tensor]:
        """What the exit head at `acts.depth`, if there is one, makes of rows whose layer has run."""
        model, depth = self.model, acts.depth
        head = model.head(depth)
        if head is None:
            return Step(acts, None)
        mask_BT = self._mask(acts)
        here = {
            name: torch.tensor(values[depth - 1], dtype=torch.float32, device=self.device)
            for name, values in knobs.items()
        }
        decision, outputs = head(acts.hidden_BTD, mask_BT, {**acts.state, **acts.token_state}, here)
        look: Look[Tensor] | None = Look(
            decision.leave_B.cpu().numpy(),
            decision.answer,
            decision.confidence_B.cpu().numpy(),
            outputs,
        )
        if not head.exit:
            look = None
        fields = model.policy.state_fields(depth)
        state = {name: decision.state[name] for name, f in fields.items() if not f.per_token}
        token_state = {name: decision.state[name] for name, f in fields.items() if f.per_token}
        return Step(replace(acts, state=state, token_state=token_state), look)

    def _mask(self, acts: Activations[Tensor]) -> Tensor:
        mask_BT = mask_of(acts.lengths_B, acts.hidden_BTD.shape[1])
        return torch.from_numpy(mask_BT).to(self.device)


def to_torch(
    acts: Activations[NumpyArray], device: str | torch.device = "cpu"
) -> Activations[Tensor]:
    """The same activations as torch tensors; on the CPU they share memory."""

    def convert(array: Any) -> Tensor:
        return torch.from_numpy(array).to(device)

    return _converted(acts, convert)


def to_numpy(acts: Activations[Tensor]) -> Activations[NumpyArray]:
    """The same activations as numpy arrays; on the CPU they share memory."""

    def convert(tensor: Any) -> NumpyArray:
        array: NumpyArray = np.asarray(tensor.detach().cpu().numpy())
        return array

    return _converted(acts, convert)


def join_rows(given: Rows[Tensor], hidden_BTD: Tensor | None = None) -> Activations[Tensor]:
    """In one batch; they fit each other: of one depth, with equally named state.

    hidden_BTD   what takes the place of theirs
    """
    first, at = given.pieces[0]
    if len(given.pieces) == 1 and at.size == first.batch_size:
        return first if hidden_BTD is None else replace(first, hidden_BTD=hidden_BTD)
    lengths_B = given.lengths_B
    longest = int(lengths_B.max())

    def picked(name: str) -> Tensor:
        return torch.cat([acts.state[name][at] for acts, at in given.pieces])

    def tokens(of: Callable[[Activations[Tensor]], Tensor]) -> Tensor:
        return _tokens_joined([of(acts)[:, :longest][at] for acts, at in given.pieces])

    def token_state(name: str) -> Tensor:
        return tokens(lambda acts: acts.token_state[name])

    placed = any(acts.positions_BT is not None for acts, _ in given.pieces)
    return Activations(
        tokens(lambda acts: acts.hidden_BTD) if hidden_BTD is None else hidden_BTD,
        lengths_B,
        first.depth,
        {name: picked(name) for name in first.state},
        {name: token_state(name) for name in first.token_state},
        tokens(_positions) if placed else None,
    )


def _tokens_joined(arrays: Sequence[Tensor]) -> Tensor:
    """(B, T, ...) from parts of other lengths; what is beyond a part's own becomes zeros."""
    longest = max(array.shape[1] for array in arrays)
    if all(array.shape[1] == longest for array in arrays):
        return torch.cat(list(arrays))
    rows = sum(array.shape[0] for array in arrays)
    out = arrays[0].new_zeros(rows, longest, *arrays[0].shape[2:])
    start = 0
    for array in arrays:
        out[start : start + array.shape[0], : array.shape[1]] = array
        start += array.shape[0]
    return out


def _positions(acts: Activations[Tensor]) -> Tensor:
    if acts.positions_BT is not None:
        return acts.positions_BT
    rows, longest = acts.hidden_BTD.shape[:2]
    return torch.arange(longest, device=acts.hidden_BTD.device).expand(rows, longest)


def _converted(acts: Activations[Any], convert: Any) -> Activations[Any]:
    return Activations(
        convert(acts.hidden_BTD),
        acts.lengths_B,
        acts.depth,
        {name: convert(value) for name, value in acts.state.items()},
        {name: convert(value) for name, value in acts.token_state.items()},
        None if acts.positions_BT is None else convert(acts.positions_BT),
    )
