"""BE3R: BERT based Early-Exit Using Expert Routing.

Mangrulkar, Ankith M. S., Sembium. KDD 2022. https://doi.org/10.1145/3534678.3539132

The rule: at a few layers stands an expert head, and beside each but the last a router, a small network that
reads what the expert's classifier reads and gives the chance r that the sample should be finished here. A
sample leaves at the first router with r >= 0.5. Nothing is carried.

Differs from the paper: the paper was not available; from its abstract this is a reconstruction that can be
built, not a transcription.
1. Its own: the router's shape (D -> 128, GELU, -> 1, on the tanh of the expert's pooler), one routing step at
   each exit rather than one for all, and the losses.
2. The threshold is a knob, and may be given for each exit; it is met at equality.
3. Exits may stand after every layer, as for other methods; the paper's gain is from few (use `exits`).
4. Regression: the rule reads the router alone, so it serves for values too; the paper has classes only.
5. A row with a number that is not finite in an exit's outputs never leaves early.
6. Setting `pooling = "mean"` reads the mean of all real tokens; the paper reads the first ("first").
7. Confidence is r, at the last exit 1, for the planner; the paper has none.
Not verified: all of the architecture, and which of the paper's several losses did best.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offramp_common.spec import KnobSpec
from offramp_model.exits import Decision, HeadSpec, Memoryless, PooledClassifier, State
from offramp_model.methods.method import Method, Paper

_ROUTER_WIDTH = 128


class RoutedExpert(PooledClassifier):
    """An expert's logits (B, C), and route (B,): the logit of r."""

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__(spec)
        self.router = nn.Sequential(
            nn.Linear(spec.width, _ROUTER_WIDTH), nn.GELU(), nn.Linear(_ROUTER_WIDTH, 1)
        )

    def forward(self, hidden_BTD: Tensor, mask_BT: Tensor, state: State) -> dict[str, Tensor]:
        pooled_BD = self.dropout(self.pooled(hidden_BTD, mask_BT))
        return {"logits": self.classifier(pooled_BD), "route": self.router(pooled_BD)[:, 0]}


@dataclass(frozen=True)
class RouterPolicy(Memoryless):
    """Leave where the router's chance reaches the knob `threshold`. The last exit has no router."""

    def decide(
        self, outputs: State, state: State, knobs: Mapping[str, Tensor], depth: int
    ) -> Decision:
        logits_BC = outputs["logits"]
        sound_B = torch.isfinite(logits_BC).all(dim=-1)
        r_B = torch.ones_like(logits_BC[:, 0])
        if "route" in outputs:
            sound_B = sound_B & torch.isfinite(outputs["route"])
            r_B = torch.sigmoid(outputs["route"])
        # The threshold may be 0, so a broken row must compare below it.
        r_B = torch.where(sound_B, r_B, -1.0)
        return Decision(r_B >= knobs["threshold"], logits_BC, r_B.clamp(min=0.0), {})


def _branches(spec: HeadSpec) -> nn.ModuleDict:
    *early, last = spec.exits
    heads: dict[str, nn.Module] = {str(depth): RoutedExpert(spec) for depth in early}
    return nn.ModuleDict({**heads, str(last): PooledClassifier(spec)})


def _knobs(spec: HeadSpec) -> tuple[KnobSpec, ...]:
    meaning = "leave where the router's chance that the sample is done reaches it (the paper: 0.5)"
    # A sure router says exactly 1 in float32, so "never" lies above.
    return (KnobSpec("threshold", 0.0, 1.0, never=2.0, meaning=meaning),)


METHOD = Method(
    name="be3r",
    paper=Paper(
        "BE3R: BERT based Early-Exit Using Expert Routing",
        "Mangrulkar, Ankith M. S., Sembium",
        "KDD 2022",
        "https://doi.org/10.1145/3534678.3539132",
    ),
    rule=(
        "Leave at the first router whose learned chance that the sample is done reaches a threshold. "
        "Nothing is carried."
    ),
    tasks=("classification", "regression"),
    policy=lambda spec: RouterPolicy(),
    branches=_branches,
    knobs=_knobs,
    recipe="be3r",
    use=(
        "For throughput, with few exits (such as 2, 4 and 6 of six layers, set by `exits`) and the split at "
        "one of them: the batch is sorted once at each, and what stays runs on densely."
    ),
    avoid=(
        "With an exit after every layer, where routing costs what it saves; or without a look at the depths "
        "that calibration reports: routers can send all to one expert, and the others then hardly learn "
        "(loss.load holds against it)."
    ),
    reported=(
        "Batch throughput +46.5 % over BERT-base and +35.89 % over DistilBERT on 50 million search results "
        "at no loss; GLUE +23 % on average at comparable quality (abstract)."
    ),
    settings={"pooling": "first"},
    learned=lambda settings: ("logits", "route"),
)
