"""`offramp codecs fit`: a codec fitted to a bundle's hidden states at one depth, written into the bundle."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp_common.bundle import CODEC_WEIGHTS, Bundle, codec_prefix, write_manifest
from offramp_common.codecs import CODECS, Codec
from offramp_common.codecs.fitted import Fitted
from offramp_common.codecs.kept import Keep
from offramp_common.codecs.measured import Measured, merged
from offramp_common.codecs.pooled import Pool
from offramp_common.errors import ConfigError
from offramp_train.checkpoint import Checkpoints, StopSignal
from offramp_train.codec_fits.bottleneck import Learning, Shape, fit_bottleneck, start
from offramp_train.codec_fits.cost import data_name
from offramp_train.codec_fits.cut_rows import CutBatch, cut_batches, torch_layers
from offramp_train.codec_fits.saliency import fit_scores
from offramp_train.codec_fits.tail import Tail
from offramp_train.measure import Subject
from offramp_train.progress import Report

PRUNED, POOLED, BOTTLENECK = "pruned", "pooled", "bottleneck"
KINDS = {PRUNED: "int4", POOLED: "int8", BOTTLENECK: "int8"}
"""Kind -> what the values are encoded by unless told otherwise."""
_BATCH = 32


@dataclass(frozen=True, slots=True)
class Wanted:
    """kind    "pruned", "pooled" or "bottleneck";  inner: codec of what is left
    depth     layers before the cut
    nbytes    the most that hidden states of a sample may take;  tokens: of the longest sample it is meant for
    share     pruned: of a sample's tokens that are kept, at most;  least: tokens kept in any case
    slots     bottleneck: its tokens; channels follow from nbytes
    label     what people say; by default the kind and inner, of a bottleneck the kind
    rows      of text that it is fitted to;  bf16: run the layers beyond the cut in bfloat16 meanwhile
    """

    kind: str
    depth: int
    nbytes: int
    tokens: int
    inner: str = ""
    share: float = 1.0
    least: int = 2
    slots: int = 16
    label: str = ""
    rows: int = 2000
    bf16: bool = False
    learning: Learning = field(default_factory=Learning)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"codec {self.kind!r}: can be fitted: {', '.join(KINDS)}")
        if self.inner and (self.inner not in CODECS or CODECS[self.inner].integer):
            known = ", ".join(name for name, codec in CODECS.items() if not codec.integer)
            raise ConfigError(f"--inner {self.inner!r}: values can be encoded by {known}")
        if self.label in CODECS:
            raise ConfigError(
                f"--label {self.label}: is a codec without parameters; choose another"
            )
        if self.rows < 2 * _BATCH:
            raise ConfigError(f"--rows {self.rows}: must be at least {2 * _BATCH}")

    @property
    def coder(self) -> Codec:
        return CODECS[self.inner or KINDS[self.kind]]

    @property
    def named(self) -> str:
        if self.label:
            return self.label
        return self.kind if self.kind == BOTTLENECK else f"{self.kind}-{self.coder.name}"


def hidden_states(
    subject: Subject, depths: Sequence[int], rows: int, seed: int, report: Report
) -> list[CutBatch]:
    """What codecs are fitted to: so many rows, drawn, cut at these depths. Raises ConfigError for a depth at
    which no hidden states travel, or for state for each token."""
    cuts, last = subject.bundle.cuts, subject.bundle.n_layers - 1
    for depth in depths:
        if depth not in cuts or cuts[depth].integer:
            raise ConfigError(f"--split {depth}: hidden states travel after 1 to {last} layers")
        if any(field.per_token for field in cuts[depth].state.values()):
            raise ConfigError(
                f"{subject.bundle.manifest.method} carries a state for each token: codecs are fitted to "
                "methods that carry none"
            )
    rows = min(rows, len(subject.rows))
    chosen = random.Random(seed).sample(range(len(subject.rows)), rows)
    out = []
    with report.bar("hidden states", rows) as bar:
        for batch in cut_batches(subject, depths, _BATCH, chosen):
            out.append(batch)
            bar.step(len(batch.rows))
    return out


def fit_codec(
    subject: Subject,
    wanted: Wanted,
    batches: Sequence[CutBatch],
    work: Path,
    stop: StopSignal,
    report: Report,
) -> tuple[Fitted, dict[str, Any]]:
    """The codec and what is to be put on record. `batches` are `hidden_states`, cut at `wanted.depth` too;
    `work` holds a bottleneck's checkpoints until it is done.

    Raises ConfigError for what does not fit the bundle; Stopped, to be continued."""
    shape = sized(wanted, subject.bundle.cuts[wanted.depth].width)
    model = torch_layers(subject).model
    model.requires_grad_(False)
    tail = Tail(model, wanted.bf16)
    on_record = {"rows": sum(len(batch.rows) for batch in batches), "data": data_name(subject)}
    if wanted.kind == BOTTLENECK:
        settings = {"codec": wanted.named, **on_record, **asdict(wanted.learning)}
        settings |= {name: getattr(shape, name) for name in ("depth", "tokens", "channels")}
        bottleneck = start(shape, batches)
        checkpoints = Checkpoints(work, settings | {"inner": shape.inner.name})
        lost = fit_bottleneck(bottleneck, tail, batches, wanted.learning, checkpoints, stop, report)
        shutil.rmtree(work)
        return bottleneck.codec(wanted.named), on_record | {"divergence": lost}
    scores = on_record | {"seed": wanted.learning.seed}
    weight_D = _scores_of(subject.bundle, wanted.depth, scores)
    if weight_D is None:
        weight_D, correlation = fit_scores(tail, batches, wanted.depth, report)
        report.say(f"scores and saliencies correlate by {correlation:.3f} within rows")
    reduce: Keep | Pool = Pool(weight_D, shape.tokens)
    if wanted.kind == PRUNED:
        reduce = Keep(weight_D, shape.tokens, wanted.share, min(wanted.least, shape.tokens))
    return Fitted(wanted.named, wanted.depth, shape.width, wanted.coder, reduce), scores


def _scores_of(bundle: Bundle, depth: int, scores: dict[str, Any]) -> NDArray[np.float32] | None:
    """Those of a codec of the bundle that were fitted to the same rows at the same depth."""
    for codec in bundle.fitted.values():
        on_record = bundle.manifest.training.get("codecs", {}).get(codec.name)
        if codec.depth == depth and codec.reduce is not None and on_record == scores:
            return codec.reduce.weight_D
    return None


def sized(wanted: Wanted, width: int) -> Shape:
    """The most tokens, of a bottleneck the most channels, that `nbytes` allow. Raises ConfigError."""
    inner, tokens = wanted.coder, wanted.tokens
    if wanted.kind == BOTTLENECK:
        channels = _most(lambda r: inner.nbytes(wanted.slots, r), wanted.nbytes, width)
        if not channels or wanted.slots < 2:
            raise ConfigError(
                f"--bytes {wanted.nbytes}: {wanted.slots} tokens of one channel need "
                f"{inner.nbytes(wanted.slots, 1)}; there are at least 2 tokens (--slots)"
            )
        return Shape(wanted.depth, width, wanted.slots, channels, inner)
    bits = (tokens + 7) // 8 if wanted.kind == PRUNED else 0
    most = _most(lambda m: bits + inner.nbytes(m, width), wanted.nbytes, tokens)
    if most < 2:
        need = bits + inner.nbytes(2, width)
        raise ConfigError(
            f"--bytes {wanted.nbytes}: two tokens of a sample of {tokens} take {need}"
        )
    return Shape(wanted.depth, width, most, width, inner)


def _most(nbytes: Callable[[int], int], limit: int, most: int) -> int:
    """The largest number up to `most` that takes no more than `limit`; 0 where none does."""
    return max((n for n in range(1, most + 1) if nbytes(n) <= limit), default=0)


def put_codec(bundle: Bundle, codec: Fitted, on_record: dict[str, Any]) -> Bundle:
    """The bundle with the codec in it, in place of one of its label and depth, whose costs are forgotten."""
    from safetensors.numpy import save_file

    bundle = Bundle.read(bundle.path)  # a fit takes long: others may have written meanwhile
    key = (codec.label, codec.depth)
    others = [c for c in bundle.fitted.values() if (c.label, c.depth) != key]
    tensors = {}
    for one in (*others, codec):
        prefix = codec_prefix(one.label, one.depth)
        for name, value in one.tensors().items():
            tensors[prefix + name] = np.ascontiguousarray(value, np.float32)
    temporary = bundle.path / (CODEC_WEIGHTS + ".part")
    save_file(tensors, temporary)
    temporary.replace(bundle.path / CODEC_WEIGHTS)
    m = bundle.manifest
    fits = {name: how for name, how in m.training.get("codecs", {}).items() if name != codec.name}
    names = {one.name for one in others}
    fits = {name: how for name, how in fits.items() if name in names} | {codec.name: on_record}
    manifest = replace(
        m,
        fitted=tuple(one.to_json() for one in (*others, codec)),
        codec_costs=tuple(one for one in m.codec_costs if (one.codec, one.depth) != key),
        training={**m.training, "codecs": fits},
    )
    write_manifest(bundle.path, manifest)
    return Bundle.read(bundle.path)


def put_costs(bundle: Bundle, measured: Iterable[Measured]) -> Bundle:
    """The bundle with these measurements, in place of older ones of the same codecs, depths and data."""
    bundle = Bundle.read(bundle.path)
    costs = merged(bundle.manifest.codec_costs, measured)
    write_manifest(bundle.path, replace(bundle.manifest, codec_costs=costs))
    return Bundle.read(bundle.path)
