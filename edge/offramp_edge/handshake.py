"""What device and cloud agree on before the first work, and what a reply must be to be believed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from offramp_common.errors import BundleMismatch, UnknownCodec, WireError
from offramp_common.frames import Limits
from offramp_common.manifest import Manifest
from offramp_common.runner import Knobs
from offramp_common.transport import PROTOCOL_VERSION, Completion, Offload, Welcome

log = logging.getLogger("offramp.edge")

TOKENS = "tokens"
"""The codec of token ids."""


@dataclass(frozen=True, slots=True)
class Agreed:
    """codecs   those of the device's that the cloud has, best first
    knobs    the device's operating point;  theirs: the cloud's own
    limits   the cloud's
    """

    codecs: tuple[str, ...]
    knobs: Knobs
    theirs: Knobs
    limits: Limits

    @property
    def codec(self) -> str:
        """The best; only for what is not cut where the hidden states are integers."""
        return self.codecs[0]

    def knobs_at(self, depth: int) -> Knobs:
        """What a request cut at `depth` carries: nothing where the cloud's own operating point is the
        same from there on."""
        return {} if _deeper(self.knobs, depth) == _deeper(self.theirs, depth) else self.knobs


def agree(welcome: Welcome, codecs: Sequence[str], knobs: Knobs) -> Agreed:
    """`codecs` and `knobs` are the device's. Raises RequestError when the two sides do not fit."""
    if welcome.protocol != PROTOCOL_VERSION:
        raise BundleMismatch(
            f"the cloud speaks protocol {welcome.protocol}, this device {PROTOCOL_VERSION}: "
            "update the older side"
        )
    shared = tuple(codec for codec in codecs if codec in welcome.codecs)
    hidden = [codec for codec in codecs if codec != TOKENS]
    if not shared or (hidden and shared == (TOKENS,)):
        raise UnknownCodec(
            f"the device has {', '.join(codecs)}, the cloud {', '.join(welcome.codecs)}: "
            "update the older side"
        )
    if shared[0] != codecs[0]:
        log.warning("the cloud lacks codec %s: using %s", codecs[0], shared[0])
    return Agreed(shared, knobs, welcome.knobs, welcome.limits)


def check_completion(work: Offload, done: Completion, depth: int, manifest: Manifest) -> None:
    """Raises WireError unless `done` can be the answer to the one row of `work`, cut at `depth`."""
    n, width = manifest.n_layers, manifest.task.answer_width
    fits = (
        done.request_id == work.request_id
        and done.answers.shape == (1, width)
        and done.exit_depth_B.shape == done.confidence_B.shape == (1,)
        and depth < int(done.exit_depth_B[0]) <= n
        and done.queue_ms >= 0
        and done.compute_ms >= 0
        and done.queue_ms + done.compute_ms < float("inf")
    )
    if not fits:
        raise WireError(
            f"reply {done.request_id!r:.80} to {work.request_id!r}: answers {done.answers.shape} at "
            f"depths {done.exit_depth_B[:4]}; must be one row of {width}, at a depth from "
            f"{depth + 1} to {n}: update the older side"
        )
    if manifest.online:
        deeper = sum(exit_depth > depth for exit_depth in manifest.exits)
        classes_BE = done.exit_classes_BE
        if classes_BE is None or classes_BE.shape != (1, deeper) or classes_BE.max() >= width:
            raise WireError(
                f"reply {done.request_id!r:.80}: must say which of {width} classes each of {deeper} exits "
                "predicted: update the cloud"
            )


def _deeper(knobs: Knobs, depth: int) -> dict[str, bytes]:
    """The values that decide beyond `depth`, as they travel: in single precision."""
    return {name: np.array(values[depth:], np.float32).tobytes() for name, values in knobs.items()}
