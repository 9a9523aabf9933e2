"""PCEE-BERT: Accelerating BERT Inference via Patient and Confident Early Exiting.

Zhang, Zhu, Zhang, Wang, Jin, Chung. Findings of NAACL 2022.
https://aclanthology.org/2022.findings-naacl.25

The rule: count how many exits in a row were confident, their entropy as a share of ln C below a threshold S;
one that is not sets the count to 0, whatever the classes. A sample leaves when the count reaches the
patience t, so at exit t at the earliest; with t = 1 that is leaving by entropy.

Differs from the paper:
1. Counts are kept per row, and stop at 255. Patience and S may be given for each exit; where exits stand
   after some layers only, it is exits that are counted.
2. `answer` is "last" (the exit's own, the paper's default), "run" (mean probabilities of the confident run)
   or "all" (of all exits so far). The code's run begins with the last exit that was not confident (our
   reading); ours has confident ones alone, and where there is none the exit's own answer is given.
   Means are given as logarithms, so that softmax gives them back.
3. Values have no entropy: an exit is confident where its value is less than delta from the one before,
   which is PABEE's rule (our own derivation); their answer is the last.
4. It is trained by recipe `pabee`, whose loss it shares; the paper's 15 epochs, batch of 16 and
   200 updates of warm-up are to be set.
5. Setting `pooling = "mean"` reads the mean of all real tokens; the paper reads the first ("first").
6. Confidence is one less the entropy's share, for the planner (no exit depends on it).
Not verified: its tables of results.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp_common.spec import KnobSpec, StateField
from offramp_model.exits import Decision, HeadSpec, Policy, State
from offramp_model.methods import pabee
from offramp_model.methods.fastbert import normalised_entropy
from offramp_model.methods.method import Method, Paper

_MAX_COUNT = 255
_LEAST_P = 1e-30


@dataclass(frozen=True)
class ConfidentRunPolicy:
    """Leave when `patience` exits in a row had a normalised entropy below the knob `threshold`.

    State: count (uint8), the length of the confident run; unless the answer is the last exit's, also sum
    (float32, C), the probabilities of the run's exits, or of all exits, added up.

    exits    depths with one: how many there were follows from the depth
    answer   "last", "run" or "all"
    """

    exits: tuple[int, ...]
    n_classes: int
    answer: str = "last"

    def state_fields(self, depth: int) -> dict[str, StateField]:
        count = {"count": StateField("uint8")}
        if self.answer == "last":
            return count
        return {**count, "sum": StateField("float32", (self.n_classes,))}

    def start(self, mask_BT: Tensor) -> dict[str, Tensor]:
        zero_BC = torch.zeros((mask_BT.shape[0], self.n_classes), device=mask_BT.device)
        count = {"count": torch.zeros_like(zero_BC[:, 0], dtype=torch.uint8)}
        return count if self.answer == "last" else {**count, "sum": zero_BC}

    def decide(
        self, outputs: State, state: State, knobs: Mapping[str, Tensor], depth: int
    ) -> Decision:
        logits_BC = outputs["logits"]
        unsure_B = normalised_entropy(logits_BC)
        confident_B = unsure_B < knobs["threshold"]  # a NaN is not
        more_B = (state["count"].to(torch.int32) + 1).clamp(max=_MAX_COUNT)
        count_B = torch.where(confident_B, more_B, 0)
        leave_B = count_B.to(torch.float32) >= knobs["patience"]
        confidence_B = torch.where(unsure_B.isnan(), 0.0, 1.0 - unsure_B)
        after = {"count": count_B.to(torch.uint8)}
        if self.answer == "last":
            return Decision(leave_B, logits_BC, confidence_B, after)
        p_BC = logits_BC.softmax(dim=-1)
        sum_BC = state["sum"] + p_BC
        if self.answer == "all":
            mean_BC = sum_BC / sum(d <= depth for d in self.exits)
        else:
            sum_BC = torch.where(confident_B.unsqueeze(-1), sum_BC, 0.0)
            length_B1 = count_B.to(torch.float32).clamp(min=1.0).unsqueeze(-1)
            mean_BC = torch.where(confident_B.unsqueeze(-1), sum_BC / length_B1, p_BC)
        # A class of no probability has a logarithm too: below the bound it is 0 for all that read it.
        answer_BC = torch.where(mean_BC < _LEAST_P, _LEAST_P, mean_BC).log()
        # An earlier exit's NaN is in the mean of all: such a row runs on, its last exit sure or not.
        leave_B = leave_B & ~answer_BC.isnan().any(dim=-1)
        return Decision(leave_B, answer_BC, confidence_B, {**after, "sum": sum_BC})


def _policy(spec: HeadSpec) -> Policy:
    answer = str(spec.settings["answer"])
    if answer not in ("last", "run", "all"):
        raise ValueError(f"answer {answer!r}: must be last, run or all")
    if spec.task.kind == "classification":
        return ConfidentRunPolicy(spec.exits, len(spec.task.labels), answer)
    if answer != "last":
        raise ValueError(f"answer {answer!r}: means are of probabilities; a value's is 'last'")
    return pabee.METHOD.policy(spec)


def _knobs(spec: HeadSpec) -> tuple[KnobSpec, ...]:
    if spec.task.kind == "regression":
        return pabee.METHOD.knobs(spec)
    n = spec.n_layers
    meaning = "t: leave when so many exits in a row were confident"
    patience = KnobSpec("patience", 1, n, never=n, meaning=meaning, integer=True)
    meaning = "S: an exit is confident where entropy / ln C is below it"
    # A little above 1, so that even uniform logits can be told to count.
    return (patience, KnobSpec("threshold", 0.0, 1.01, never=0.0, meaning=meaning))


METHOD = Method(
    name="pcee_bert",
    paper=Paper(
        "PCEE-BERT: Accelerating BERT Inference via Patient and Confident Early Exiting",
        "Zhang, Zhu, Zhang, Wang, Jin, Chung",
        "Findings of NAACL 2022",
        "https://aclanthology.org/2022.findings-naacl.25",
    ),
    rule=(
        "Leave when so many exits in a row had a normalised entropy below a threshold. Carried: the "
        "count, and probabilities added up where the answer is a mean."
    ),
    tasks=("classification", "regression"),
    policy=_policy,
    branches=pabee.METHOD.branches,  # one pooler for all exits, as the paper's code has it
    knobs=_knobs,
    recipe="pabee",
    use=(
        "Where one confident exit is not to be trusted, and speed is to be set finely: t = 2 to 4 with S "
        "for the fine part."
    ),
    avoid=(
        "In shallow models: patience costs as many layers. In regression it is PABEE and nothing more."
    ),
    reported=(
        "Better than earlier exit methods on GLUE at equal speed, also with ALBERT and TinyBERT "
        "(abstract; its tables are not verified)."
    ),
    settings={"pooling": "first", "answer": "last"},
)
