"""What this device asks the cloud: the greeting, and one sample's rest as a frame within the limits."""

from __future__ import annotations

import random
from collections.abc import Collection

import numpy as np

from offramp_common import __version__
from offramp_common.activations import Activations, NumpyArray
from offramp_common.bundle import Bundle
from offramp_common.frames import encode_frame
from offramp_common.runner import Knobs
from offramp_common.spec import CutSpec
from offramp_common.transport import Hello, Offload
from offramp_edge.handshake import Agreed
from offramp_edge.settings import Plan

PROBE_TOKENS = (16, 1)
"""Of the samples without content that probe a link, in turns: they tell rate and round trip apart."""
_FIELDS_NBYTES = 20  # of an Offload: tags, lengths and the deadline


class BeyondLimits(Exception):
    """The cloud does not take a sample as large as this one."""


class Requests:
    """Makes the messages of one device for one bundle."""

    def __init__(self, bundle: Bundle, plan: Plan, rng: random.Random) -> None:
        self.plan, self.cuts = plan, {depth: bundle.cuts[depth] for depth in plan.depths}
        self._manifest = bundle.manifest
        self._fitted = bundle.fitted
        self._digests = {depth: bundle.digest(depth) for depth in plan.depths}
        self._name = f"{rng.getrandbits(48):012x}"  # request ids of two devices must differ
        self._made = 0

    def hello(self) -> Hello:
        integer = {cut.integer for cut in self.cuts.values()}
        codecs = (
            *(self.plan.codecs if False in integer else ()),
            *(("tokens",) * (True in integer)),
        )
        return Hello(self._manifest.name, self._digests, codecs, software=f"offramp {__version__}")

    def work(
        self,
        acts: Activations[NumpyArray],
        agreed: Agreed,
        codec: str = "",
        knobs: Knobs | None = None,
        traceparent: str = "",
    ) -> Offload:
        """`codec` is used if the cloud has it, else the best that it has; `knobs` None: the plan's. Raises
        BeyondLimits."""
        limits, depth = agreed.limits, acts.depth
        if acts.n_tokens > limits.max_tokens:
            raise BeyondLimits(f"{acts.n_tokens} tokens, the cloud takes {limits.max_tokens}")
        frame = encode_frame(acts, self.cuts[depth], used(codec, agreed), self._fitted)
        if len(frame) > limits.max_frame_bytes:
            raise BeyondLimits(f"a frame of {len(frame)} bytes, at most {limits.max_frame_bytes}")
        self._made += 1
        return Offload(
            request_id=f"{self._name}-{self._made:x}",
            bundle=self._manifest.name,
            digest=self._digests[depth],
            frame=frame,
            knobs=agreed.knobs_at(depth) if knobs is None else knobs,
            traceparent=traceparent,
        )


def used(codec: str, agreed: Agreed) -> str:
    """The codec by which hidden states are sent where `codec` is wished for."""
    return codec if codec in agreed.codecs else agreed.codec


def probe_depth(depths: Collection[int]) -> int:
    """Where a probe is cut, of the depths at which samples may be: a hidden state, if one may be sent at all,
    for token ids are too few bytes to tell a rate by."""
    return min(depth for depth in depths if depth or len(depths) == 1)


def blank(cut: CutSpec, n_tokens: int) -> Activations[NumpyArray]:
    """A sample that says nothing, as it would be cut there: what a probe of the link sends."""
    shape = (1, n_tokens)
    hidden_BTD = np.zeros((*shape, cut.width), np.int64 if cut.integer else np.float32)
    row: dict[str, NumpyArray] = {}
    token: dict[str, NumpyArray] = {}
    for name, field in cut.state.items():
        axes = shape if field.per_token else shape[:1]
        (token if field.per_token else row)[name] = np.zeros((*axes, *field.shape), field.dtype)
    return Activations(hidden_BTD, np.array([n_tokens]), cut.depth, row, token)


def nbytes_of(work: Offload) -> int:
    """About what it takes serialized; a transport counts exactly."""
    knobs = sum(8 + len(name) + 4 * len(values) for name, values in work.knobs.items())
    texts = len(work.request_id) + len(work.bundle) + len(work.digest) + len(work.traceparent)
    return len(work.frame) + texts + knobs + _FIELDS_NBYTES
