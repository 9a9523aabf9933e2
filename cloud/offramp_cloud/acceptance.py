"""What an engine accepts: which devices, which cuts, which operating points."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from offramp_cloud.statuses import ProtocolMismatch
from offramp_cloud.waiting import KnobKey, knob_key
from offramp_common import __version__
from offramp_common.bundle import Bundle
from offramp_common.codecs import CODECS
from offramp_common.errors import BundleMismatch, UnknownCodec, WireError
from offramp_common.frames import Limits
from offramp_common.runner import Knobs
from offramp_common.spec import KnobSpec
from offramp_common.transport import PROTOCOL_VERSION, Hello, Offload, Welcome
from offramp_model.exits import check_knobs


class Acceptance:
    """One bundle's terms."""

    def __init__(self, bundle: Bundle, limits: Limits, precision: str) -> None:
        """Raises BundleError where the bundle has no operating point at all.

        `precision` is that of the layers here; a bundle without a point for it lends that of fp32.
        """
        self._bundle, self._limits = bundle, limits
        self._name = bundle.manifest.name
        self._cuts = bundle.cuts
        self._depths = {bundle.digest(depth): depth for depth in self._cuts}
        self._knob_specs = tuple(_as_float32(spec) for spec in bundle.manifest.knobs)
        point = precision if precision in bundle.manifest.operating_points else "fp32"
        self.own_knobs = self._checked(bundle.knobs(point))

    def welcome(self, hello: Hello) -> Welcome:
        """What this side accepts; raises ProtocolMismatch, BundleMismatch or UnknownCodec."""
        if hello.protocol != PROTOCOL_VERSION:
            older = "device" if hello.protocol < PROTOCOL_VERSION else "cloud"
            raise ProtocolMismatch(
                f"the device speaks protocol {hello.protocol}, this cloud {PROTOCOL_VERSION}; "
                f"update offramp on the {older}"
            )
        if hello.bundle != self._name:
            raise BundleMismatch(f"bundle {hello.bundle!r:.80}: this engine holds {self._name!r}")
        for depth, digest in sorted(hello.digests.items()):
            self._compare(depth, digest)
        codecs = (*CODECS, *self._bundle.fitted)
        if hello.codecs and not any(codec in codecs for codec in hello.codecs):
            raise UnknownCodec(
                f"none of the device's codecs {list(hello.codecs)!r:.200} is known here; this cloud "
                f"decodes {', '.join(codecs)}; choose one of them or update offramp on the cloud"
            )
        software = f"offramp {__version__}"
        return Welcome(codecs, self._limits, dict(self.own_knobs), software=software)

    def depth_of(self, work: Offload) -> int:
        """Where its frame was cut. Raises BundleMismatch."""
        depth = self._depths.get(work.digest)
        if depth is None:
            raise BundleMismatch(
                f"digest {work.digest.hex()[:32] or '(empty)'} is of no part of {self._name!r} here: "
                "the device holds another model, or the cloud's was replaced since the device said "
                "Hello; say Hello again (`offramp bundle digest` shows both sides)"
            )
        return depth

    def knobs_of(self, work: Offload) -> KnobKey:
        """Its operating point, or our own. Raises WireError."""
        return self._checked(work.knobs) if work.knobs else self.own_knobs

    def _compare(self, depth: int, digest: bytes) -> None:
        if depth not in self._cuts:
            raise BundleMismatch(
                f"depth {depth}: {self._name!r} can be cut here at depths {sorted(self._cuts)}; the "
                "device holds another model (`offramp bundle digest` shows both)"
            )
        if digest != self._bundle.digest(depth):
            raise BundleMismatch(
                f"{self._name!r} differs from depth {depth} on: the device's digest is "
                f"{digest.hex()[:32]}, the cloud's {self._bundle.digest(depth).hex()}; copy the newer "
                "bundle to the older side (`offramp bundle digest` shows both)"
            )

    def _checked(self, knobs: Knobs) -> KnobKey:
        rounded = {n: tuple(float(np.float32(v)) for v in values) for n, values in knobs.items()}
        try:
            check_knobs(rounded, self._knob_specs, self._bundle.n_layers)
        except ValueError as error:
            raise WireError(f"{error}") from None
        return knob_key(rounded)


def _as_float32(spec: KnobSpec) -> KnobSpec:
    """Knobs travel as float32; rounding a bound as well keeps a value on it within it."""
    low, high, never = (float(np.float32(v)) for v in (spec.low, spec.high, spec.never))
    return replace(spec, low=low, high=high, never=never)
