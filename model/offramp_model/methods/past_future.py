"""A Global Past-Future Early Exit Method for Accelerating Inference of Pre-trained Language Models.

Liao, Zhang, Ren, Su, Sun, He. NAACL 2021. https://aclanthology.org/2021.naacl-main.162

The rule: a sample leaves at the first exit whose entropy (in nats) is below a threshold S, strictly. The
logits at layer i are z_i = 2 g * past + (2 - 2 g) * future: the evidence of layers 1..i, and that of layers
i+1..L as maps imitate them from layer i; the gate g is computed from the past. Carried: the sums of the past.

Differs from the paper:
1. In training the dropout of a layer's pooled state is drawn once for its own exit and once for all later
   ones; the official code draws it anew at every exit.
2. Exits may stand after some layers only; the other layers give evidence, and imitate nothing.
3. The maps and the gate start as torch's linear layers do; the official code's from N(0, 0.02).
4. Rows of a batch leave one by one; the official code goes on until all of a batch may leave. A threshold
   may be given for each exit.
5. Entropy is computed by log_softmax; the official code's is NaN for saturated logits.
6. Setting `pooling = "mean"` reads the mean of all real tokens; the paper reads the first ("first").

Not verified: the table of results; that gains are largest at 2x to 3x; fusions other than the gate. That two
sums and the depth are all that must cross is our own derivation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from offramp_common.spec import KnobSpec, StateField
from offramp_model.exits import Branch, Decision, HeadSpec, State, nobody_leaves, pool
from offramp_model.methods.deebert import EntropyPolicy
from offramp_model.methods.method import Method, Paper


class PastFuture(Branch):
    """Evidence of the past, and of a future imitated from this layer.

    E = 2C: what a layer's `classifier` (U_j) gives, C for the logits and C for the gate.
    J: the later layers; `maps` (W_j) imitate their pooled states, `later` are their classifiers.

    In training "pooled" (B, D) is what the maps of earlier layers should give, "imitated" (B, J, D) what this
    layer's give.
    """

    def __init__(
        self,
        spec: HeadSpec,
        depth: int,
        classifiers: Sequence[nn.Linear],
        maps: Sequence[nn.Linear],
        gate: nn.Linear,
    ) -> None:
        super().__init__()
        self.pooling = str(spec.settings.get("pooling", "first"))
        self.depth, self.exit = depth, depth in spec.exits
        self.pooler = nn.Linear(spec.width, spec.width)
        self.dropout = nn.Dropout(spec.dropout)
        self.classifier = classifiers[depth - 1]
        if self.exit:
            self.gate = gate
            self.maps, self.later = nn.ModuleList(maps[depth:]), nn.ModuleList(classifiers[depth:])

    def forward(self, hidden_BTD: Tensor, mask_BT: Tensor, state: State) -> dict[str, Tensor]:
        pooled_BD = torch.tanh(self.pooler(pool(hidden_BTD, mask_BT, self.pooling)))
        past_BE = state["sums"] + self.classifier(self.dropout(pooled_BD))
        outputs = {"sums": past_BE}
        if self.training:
            # Later exits teach this layer's classifier, and not what it reads.
            again_BE = self.classifier(self.dropout(pooled_BD.detach()))
            outputs = {"sums": state["sums"] + again_BE, "pooled": pooled_BD}
        if not self.exit:
            return outputs
        past_BC, gate_BC = past_BE.chunk(2, dim=-1)
        gate_BC = torch.sigmoid(self.gate(torch.tanh(gate_BC / self.depth)))
        outputs["logits"] = 2.0 * gate_BC * past_BC
        if len(self.maps):
            imitated_BF = torch.tanh(torch.cat([a_map(pooled_BD) for a_map in self.maps], dim=-1))
            future_BC = self._evidence(self.dropout(imitated_BF))
            outputs["logits"] = outputs["logits"] + (2.0 - 2.0 * gate_BC) * future_BC
            if self.training:
                outputs["imitated"] = imitated_BF.reshape(-1, len(self.maps), pooled_BD.shape[1])
        return outputs

    def _evidence(self, imitated_BF: Tensor) -> Tensor:
        """(B, C) from the J pooled states end to end: one product for the sum over all later layers."""
        n_classes = self.gate.in_features
        weights = [c.get_parameter("weight")[:n_classes] for c in self.later]
        biases = [c.get_parameter("bias")[:n_classes] for c in self.later]
        bias_C = torch.stack(biases).sum(dim=0)
        return imitated_BF @ torch.cat(weights, dim=1).T + bias_C


@dataclass(frozen=True)
class PastFuturePolicy:
    """Leave where the entropy is below the knob `threshold`.

    State: sums (float32, 2C) of the classifiers of all layers so far, the logits' part and the gate's.
    """

    n_classes: int

    def state_fields(self, depth: int) -> dict[str, StateField]:
        return {"sums": StateField("float32", (2 * self.n_classes,))}

    def start(self, mask_BT: Tensor) -> dict[str, Tensor]:
        shape = (mask_BT.shape[0], 2 * self.n_classes)
        return {"sums": torch.zeros(shape, device=mask_BT.device)}

    def decide(
        self, outputs: State, state: State, knobs: Mapping[str, Tensor], depth: int
    ) -> Decision:
        new = {"sums": outputs["sums"]}
        if "logits" not in outputs:
            return nobody_leaves(self.n_classes, new)
        return replace(EntropyPolicy(self.n_classes).decide(outputs, {}, knobs, depth), state=new)


def _branches(spec: HeadSpec) -> nn.ModuleDict:
    width, n_classes, depths = spec.width, spec.task.answer_width, range(1, spec.n_layers + 1)
    classifiers = [nn.Linear(width, 2 * n_classes) for _ in depths]
    maps = [nn.Linear(width, width) for _ in depths]
    gate = nn.Linear(n_classes, n_classes)
    return nn.ModuleDict(
        {str(depth): PastFuture(spec, depth, classifiers, maps, gate) for depth in depths}
    )


def _knobs(spec: HeadSpec) -> tuple[KnobSpec, ...]:
    high = math.log(len(spec.task.labels))
    meaning = "S: leave where the entropy in nats is below it"
    # A little above ln C, so that even uniform logits can be told to leave.
    return (KnobSpec("threshold", 0.0, high * 1.01, never=0.0, meaning=meaning),)


METHOD = Method(
    name="past_future",
    paper=Paper(
        "A Global Past-Future Early Exit Method for Accelerating Inference of Pre-trained Language Models",
        "Liao, Zhang, Ren, Su, Sun, He",
        "NAACL 2021",
        "https://aclanthology.org/2021.naacl-main.162",
    ),
    rule=(
        "Leave at the first exit whose softmax entropy is below a threshold, its logits made of all layers: "
        "those run, and the others as imitated from here. Carried: two sums of C numbers."
    ),
    tasks=("classification",),
    policy=lambda spec: PastFuturePolicy(len(spec.task.labels)),
    branches=_branches,
    knobs=_knobs,
    recipe="past_future",
    use=(
        "Where early exits should know what all layers before them saw: only two numbers a class cross "
        "the split."
    ),
    avoid=(
        "On short texts and deep models: an exit at layer i evaluates L - i maps of the model's width for "
        "the layers it imitates, a cost that the number of tokens does not spread."
    ),
    reported=(
        "Better than earlier exit methods by a large margin on six GLUE tasks (abstract); the numbers are "
        "not verified."
    ),
    settings={"pooling": "first"},
    learned=lambda settings: ("logits", "imitated"),
    every_layer=True,
)
