"""What the worker gives back: an answer for every sample, or why its text cannot be answered."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from offramp_common.text import Text

DEVICE, CLOUD, FALLBACK = "device", "cloud", "fallback"

REASONS: Mapping[str, str] = {
    "deadline": "the deadline came before the cloud's answer",
    "timeout": "the cloud did not answer within offload_timeout_ms",
    "unavailable": "the cloud cannot be reached or has no replica",
    "busy": "the cloud refused for load",
    "mismatch": "the cloud holds another model, or speaks another protocol",
    "codec": "the two sides have no codec in common",
    "limits": "the sample is beyond the cloud's limits",
    "refused": "the cloud refused the request as malformed",
    "malformed": "the cloud's reply makes no sense",
    "setup": "the cloud does not accept this device: certificate or permission",
    "internal": "a bug in offramp, see the log",
    "provisional": "a first answer; the final one follows",
}
"""Why an answer is a fallback, as `Answer.reason`."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One input for the worker.

    id           comes back with the answer; empty: the worker numbers it
    deadline_ms  from when the worker takes it; None: the settings' own
    traceparent  W3C trace context, sent along
    ref          plain data by which the spool's final answer names it, where that is not `id`
    """

    text: Text
    id: str = ""
    deadline_ms: float | None = None
    traceparent: str = ""
    ref: Any = None


@dataclass(frozen=True, slots=True)
class Stages:
    """Milliseconds by stage; `network` is the round trip without the cloud's own time."""

    queue: float = 0.0  # waiting for the device's compute
    device: float = 0.0  # tokenizing and running layers
    encode: float = 0.0
    network: float = 0.0
    cloud: float = 0.0  # queueing and computing there


@dataclass(frozen=True, slots=True)
class Answer:
    """One sample's answer.

    label        the class's name; a number for regression
    probability  of the label by softmax; None for regression
    exit_depth   layers that decided it
    where        "device": the sample left there as it should; "cloud": it was finished there;
                 "fallback": the device answered because the cloud did not
    reason       why it is a fallback (a key of REASONS), else empty
    split        the depth at which it was sent to the cloud; the model's where it was not
    codec        of its hidden states, where the cloud answered and these were sent
    complete     what the whole model says: False for a provisional answer, and for a fallback that had no
                 time for all layers (or was not to run them)
    hedge        who was first where both had it, the device running on while the cloud was late: "cloud" or
                 "device"; empty where the device did not
    confidence   the exit method's, in [0, 1]
    ms           from when the worker took the sample until it was answered
    bytes_up     the request as serialized, frame and envelope (HTTP/2 and TLS come on top); also
                 where it was sent in vain
    spooled      kept on disk: its final answer follows when the cloud is back
    exit_classes   what the exits it passed predicted, shallowest first, -1 for none (logits that were
                 not numbers); empty unless its exit was chosen before it ran
    """

    id: str
    text: Text
    label: str | float
    probability: float | None
    exit_depth: int
    where: str
    reason: str
    split: int
    complete: bool
    confidence: float
    ms: float
    stages_ms: Stages = field(default_factory=Stages)
    bytes_up: int = 0
    bytes_down: int = 0
    logits: tuple[float, ...] | None = None
    exit_classes: tuple[int, ...] = ()
    hedge: str = ""
    spooled: bool = False
    codec: str = ""

    @property
    def provisional(self) -> bool:
        """Another answer follows at once or by the deadline."""
        return self.reason == "provisional"

    def to_json(self) -> dict[str, Any]:
        """Plain data; `logits` only where they were asked for. JSON has no NaN and no infinity:
        they become None."""
        value = asdict(self)
        for name in ("exit_classes", "hedge", "spooled", "codec"):
            if not value[name]:
                del value[name]
        if self.provisional:
            value["provisional"] = True
        value["ms"] = round(self.ms, 3)
        value["stages_ms"] = {name: round(ms, 3) for name, ms in value["stages_ms"].items()}
        value["confidence"] = _finite(self.confidence)
        if isinstance(self.label, float):
            value["label"] = _finite(self.label)
        if self.logits is None:
            del value["logits"]
        else:
            value["logits"] = [_finite(logit) for logit in self.logits]
        return value


@dataclass(frozen=True, slots=True)
class Failed:
    """A sample that cannot be answered because of what it is, such as a pair for a model of single
    sentences. `line` is its line in the input file, where it has one."""

    id: str
    error: str
    line: int | None = None

    def to_json(self) -> dict[str, Any]:
        value: dict[str, Any] = {"id": self.id, "error": self.error}
        if self.line is not None:
            value["line"] = self.line
        return value


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
