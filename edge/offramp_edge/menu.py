"""What a sample can be sent as, by depth and length: bytes and milliseconds of each codec, before any is
run.

Pure: a planner and a simulator read the same menu.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from offramp_common.bundle import Bundle
from offramp_common.codecs import Codec, tokens_left
from offramp_common.runner import Knobs
from offramp_common.spec import CutSpec

_FRAME_NBYTES = 14  # of a frame around codec name, lengths, hidden states and state
_ENVELOPE_NBYTES = 66  # of a request around the frame: id, digest, deadline; HTTP/2 comes on top
_WIRE_NBYTES = 40  # what HTTP/2 puts around a message, as measured for decision 0004
_ROUNDS_ONLY = ("fp16", "bf16")
_SAMPLES = (8, 64)  # tokens at which codecs are timed


@dataclass(frozen=True, slots=True)
class Option:
    """One way to send a sample.

    codec    the name that travels;  label: what people call it
    nbytes   expected, of the whole message with what carries it
    encode_ms   on the device
    tokens   that the cloud's layers will run on
    """

    codec: str
    label: str
    nbytes: int
    encode_ms: float
    tokens: int


@dataclass(frozen=True, slots=True)
class EncodeTimes:
    """Milliseconds to encode: for each codec's name (a start, so much a token)."""

    ms: Mapping[str, tuple[float, float]]

    def of(self, codec: str, n_tokens: int) -> float:
        start_ms, token_ms = self.ms.get(codec, (0.0, 0.0))
        return start_ms + token_ms * n_tokens


class Menu:
    """The options at each depth of a bundle, those of one length made when they are first asked for."""

    def __init__(
        self,
        bundle: Bundle,
        depths: Sequence[int],
        allowed: Callable[[str, int], bool],
        encode_times: EncodeTimes,
        knobs: Knobs,
    ) -> None:
        """`allowed` says of a codec's label and a depth whether it may be used; `knobs` travel along where
        they are not empty."""
        self.n_layers, self.depths = bundle.n_layers, tuple(depths)
        self._cuts = {depth: bundle.cuts[depth] for depth in depths}
        self._codecs = {
            depth: {
                label: c
                for label, c in bundle.codecs(depth).items()
                if c.integer or allowed(label, depth)
            }
            for depth in depths
        }
        self._times = encode_times
        around = len(bundle.manifest.name) + sum(8 + len(k) + 4 * len(v) for k, v in knobs.items())
        self._around = _FRAME_NBYTES + _ENVELOPE_NBYTES + _WIRE_NBYTES + around
        self._known: dict[int, tuple[tuple[Option, ...], ...]] = {}
        self._shared: frozenset[str] | None = None

    @property
    def codecs(self) -> Mapping[int, Mapping[str, Codec]]:
        """depth -> label -> codec: what may be chosen."""
        return self._codecs

    def share(self, names: Collection[str]) -> None:
        """From now on only these, by the names that travel: the cloud has no others."""
        shared = frozenset(names)
        if shared != self._shared:
            self._shared = shared
            self._known.clear()

    def at(self, n_tokens: int) -> tuple[tuple[Option, ...], ...]:
        """For each depth below n_layers the options worth having, fewest bytes first; none where the sample
        must not be sent."""
        known = self._known.get(n_tokens)
        if known is None:
            known = tuple(self._options(depth, n_tokens) for depth in range(self.n_layers))
            self._known[n_tokens] = known
        return known

    def all_at(self, depth: int, n_tokens: int) -> tuple[Option, ...]:
        """All options at a depth, fewest bytes first: also those that another beats in everything."""
        cut = self._cuts.get(depth)
        if cut is None:
            return ()
        options = [
            self._option(label, codec, cut, n_tokens)
            for label, codec in self._codecs[depth].items()
            if codec.integer or self._shared is None or codec.name in self._shared
        ]
        return tuple(sorted(options, key=lambda option: (option.nbytes, option.encode_ms)))

    def _options(self, depth: int, n_tokens: int) -> tuple[Option, ...]:
        kept: list[Option] = []
        for option in self.all_at(depth, n_tokens):
            if not any(o.encode_ms <= option.encode_ms and o.tokens <= option.tokens for o in kept):
                kept.append(option)
        return tuple(kept)

    def _option(self, label: str, codec: Codec, cut: CutSpec, n_tokens: int) -> Option:
        left = tokens_left(codec, n_tokens)
        state = sum(
            len(name) + 3 + field.nbytes * (left if field.per_token else 1)
            for name, field in cut.state.items()
        )
        nbytes = codec.expected_nbytes(n_tokens, cut.width) + state + len(codec.name) + self._around
        return Option(codec.name, label, nbytes, self._times.of(codec.name, n_tokens), left)


def within(bundle: Bundle, most: float, only: str | None) -> Callable[[str, int], bool]:
    """Whether a codec costs at most so many points of quality at a depth, as the bundle states it. What
    nobody has measured is used only if it rounds (fp16, bf16) or is the bundle's own choice. `only`: this
    one alone."""
    own = {bundle.manifest.codec, bundle.manifest.codec.removesuffix("+z")}

    def allowed(label: str, depth: int) -> bool:
        if only is not None:
            return label == only
        cost = bundle.codec_cost(label, depth)
        if cost is None:
            return label in own or label in _ROUNDS_ONLY
        return cost <= most

    return allowed


def time_codecs(
    codecs: Mapping[int, Mapping[str, Codec]], widths: Mapping[int, int], clock: Callable[[], float]
) -> EncodeTimes:
    """Encode made-up hidden states with each codec: what it costs on this machine. `clock` gives seconds."""
    rng = np.random.default_rng(0)
    found: dict[str, tuple[float, float]] = {}
    for depth, named in codecs.items():
        for codec in named.values():
            if codec.name in found:
                continue
            times = []
            for n_tokens in _SAMPLES:
                made_ND = rng.standard_normal((n_tokens, widths[depth])).astype(np.float32)
                hidden_ND = np.abs(made_ND).astype(np.int64) if codec.integer else made_ND
                times.append(min(_encode_ms(codec, hidden_ND, clock) for _ in range(3)))
            token_ms = max(0.0, times[1] - times[0]) / (_SAMPLES[1] - _SAMPLES[0])
            found[codec.name] = (max(0.0, times[0] - token_ms * _SAMPLES[0]), token_ms)
    return EncodeTimes(found)


def _encode_ms(codec: Codec, hidden_ND: np.ndarray, clock: Callable[[], float]) -> float:
    began_s = clock()
    codec.encode(hidden_ND)
    return 1000 * (clock() - began_s)
