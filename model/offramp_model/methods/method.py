"""The record that describes one published exit method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from offramp_common.spec import KnobSpec
from offramp_model.exits import HeadSpec, Policy


@dataclass(frozen=True, slots=True)
class Paper:
    """Where a method was published."""

    title: str
    authors: str
    venue: str
    link: str


@dataclass(frozen=True, slots=True)
class Method:
    """One published exit method.

    rule       when a sample leaves, in two sentences
    tasks      the task kinds it can decide on
    policy     builds the exit policy
    branches   builds the branch of each exit, keyed by str(depth), final head included
    knobs      what calibration may move, for a task
    recipe     name of the training recipe of the paper (offramp_train.recipes)
    use, avoid   when to take it, and when not to: for the method's page
    reported   what the paper reports of quality and speed; "not verified" where nobody has read it there
    settings   structural settings with their defaults; a bundle stores them
    learned    the branch outputs that training must teach, for given settings; a recipe that teaches fewer
               is refused
    every_layer  branches stand after every layer, wherever exits are: the others only add to the state
    guarantee  the guaranteed calibration it offers (offramp_train.calibrate), or ""
    online     the device chooses a sample's exit before it runs, and learns from what the exits said
    """

    name: str
    paper: Paper
    rule: str
    tasks: tuple[str, ...]
    policy: Callable[[HeadSpec], Policy]
    branches: Callable[[HeadSpec], nn.ModuleDict]
    knobs: Callable[[HeadSpec], tuple[KnobSpec, ...]]
    recipe: str
    use: str
    avoid: str
    reported: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    learned: Callable[[Mapping[str, Any]], tuple[str, ...]] = lambda settings: ("logits",)
    every_layer: bool = False
    guarantee: str = ""
    online: bool = False


_POOLING = "what an exit reads: first (the first token) or mean (the mean of all real tokens)"
_MEANINGS: dict[tuple[str, str], str] = {
    ("fastbert", "width"): "channels of each exit's own attention; at most the model's",
    ("fastbert", "heads"): "heads of each exit's own attention",
    (
        "berxit",
        "rule",
    ): "lte (a learned chance of being wrong) or entropy (DeeBERT's rule, on these exits)",
    (
        "ensemble_ic",
        "lambda",
    ): "exponent of the number of exits that votes are divided by; 0: none, below 1",
    (
        "ensemble_ic",
        "votes",
    ): "hard (a vote an exit, the paper's) or soft (its probabilities are added up)",
    (
        "elbert",
        "window",
    ): "what the last exits must agree on: same-side, monotone or flat (see the rule)",
    ("elbert", "window_size"): "N: so many exits are the window",
    (
        "elbert",
        "margin",
    ): "m: the first class must lead the second by more than 2 m to count; below 0.5",
    ("elbert", "flat_range"): "r: how far the window's probabilities may lie apart, for flat alone",
    ("cats", "meta"): "meta classifiers: each (one an exit) or shared (the same for all)",
    ("cats", "tolerance"): "regression: a value so near the full model's agrees with it",
    ("dact_bert", "bound"): "plain (the paper's) or tight (as safe, and leaves earlier)",
    (
        "elasticbert",
        "rule",
    ): "entropy, patience, or auto: entropy for classes and patience for values",
    (
        "pcee_bert",
        "answer",
    ): "last (the exit's own), run (mean of the confident run) or all (of all exits)",
}


def setting_meaning(method: str, setting: str) -> str:
    """What one of a method's settings does, and what it may be."""
    return _POOLING if setting == "pooling" else _MEANINGS[method, setting]
