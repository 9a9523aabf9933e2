"""A learned bottleneck: few pooled tokens of few channels, trained so that the layers beyond the cut, which
stay as they are, give the uncut model's answer.

Device: the first token and weighted means of stretches of the others (codecs/pooled.py), then a linear map
down. Cloud: a linear map up. The maps start as the principal components of pooled hidden states, the weights
of the means all alike, and all are trained by distillation: the Kullback-Leibler divergence of the uncut
model's probabilities from those behind the bottleneck (for a regression the squared difference). What `inner`
loses is there in training: values are encoded and decoded on the way, and gradients pass straight through.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from offramp_common.activations import Activations, NumpyArray, pack, unpack
from offramp_common.codecs import Codec
from offramp_common.codecs.fitted import Fitted
from offramp_common.codecs.narrow import Narrow
from offramp_common.codecs.pooled import Pool, packed_starts
from offramp_model.split_model import to_torch
from offramp_train.checkpoint import Checkpoints, Stopped, StopSignal
from offramp_train.codec_fits.cut_rows import CutBatch
from offramp_train.codec_fits.tail import Tail
from offramp_train.optimiser import schedule
from offramp_train.progress import Report

_HELD_OUT = 0.1  # of the batches: they choose the epoch
_WARMUP = 0.05


@dataclass(frozen=True, slots=True)
class Shape:
    """tokens (at least 2) of `channels` each, as `inner` encodes them, at `depth` of a model `width` wide."""

    depth: int
    width: int
    tokens: int
    channels: int
    inner: Codec


@dataclass(frozen=True, slots=True)
class Learning:
    """epochs over the rows; lr: peak rate of Adam, falling linearly to 0; seed: of the batches' order."""

    epochs: int = 5
    lr: float = 1e-4
    seed: int = 0


class Bottleneck(nn.Module):
    """The bottleneck on packed rows, with gradients; `codec` is the same in numpy."""

    def __init__(self, shape: Shape, mean_D: NumpyArray, down_DR: NumpyArray) -> None:
        super().__init__()
        self.shape = shape
        self.weight_D = nn.Parameter(torch.zeros(shape.width))
        self.down_DR = nn.Parameter(torch.from_numpy(down_DR).float())
        self.up_RD = nn.Parameter(torch.from_numpy(down_DR.T.copy()).float())
        self.bias_D = nn.Parameter(torch.from_numpy(mean_D).float())
        self.register_buffer("mean_D", torch.from_numpy(mean_D).float())

    def forward(self, acts: Activations[NumpyArray]) -> Activations[Tensor]:
        """What the cloud decodes."""
        pool, mean_D = self._pool(), self.get_buffer("mean_D")
        hidden_ND = torch.from_numpy(pack(acts.hidden_BTD, acts.lengths_B))
        pooled_MD = self._pooled(hidden_ND, packed_starts(acts.lengths_B, self.shape.tokens))
        narrow_MR = (pooled_MD - mean_D) @ self.down_DR
        narrow_MR = narrow_MR + (self._sent(narrow_MR) - narrow_MR).detach()
        left_B = np.minimum(acts.lengths_B, self.shape.tokens)
        out = replace(to_torch(acts), lengths_B=left_B)
        positions = torch.from_numpy(unpack(pool.positions(acts.lengths_B), left_B))
        hidden_BTD = _unpacked(narrow_MR @ self.up_RD + self.bias_D, left_B)
        return replace(out, hidden_BTD=hidden_BTD, positions_BT=positions)

    def codec(self, label: str) -> Fitted:
        shape = self.shape
        mean, down, up, bias = (
            value.detach().numpy().copy()
            for value in (self.get_buffer("mean_D"), self.down_DR, self.up_RD, self.bias_D)
        )
        maps = Narrow(mean, down, up, bias)
        return Fitted(label, shape.depth, shape.width, shape.inner, self._pool(), maps)

    def _pool(self) -> Pool:
        return Pool(self.weight_D.detach().numpy().copy(), self.shape.tokens)

    def _pooled(self, hidden_ND: Tensor, starts_M: NumpyArray) -> Tensor:
        counts_M = torch.from_numpy(np.diff(starts_M, append=len(hidden_ND)))
        stretch_N = torch.repeat_interleave(torch.arange(len(starts_M)), counts_M)
        score_N = hidden_ND @ self.weight_D
        highest_M = torch.full((len(starts_M),), -torch.inf).scatter_reduce(
            0, stretch_N, score_N.detach(), "amax"
        )
        share_N = (score_N - highest_M[stretch_N]).exp()
        total_M = torch.zeros(len(starts_M)).index_add(0, stretch_N, share_N)
        share_N = share_N / total_M[stretch_N]
        pooled_MD = torch.zeros((len(starts_M), hidden_ND.shape[1]))
        return pooled_MD.index_add(0, stretch_N, hidden_ND * share_N[:, None])

    def _sent(self, narrow_MR: Tensor) -> Tensor:
        inner, values = self.shape.inner, narrow_MR.detach().numpy()
        return torch.from_numpy(inner.decode(inner.encode(values), *values.shape))


def _unpacked(hidden_MD: Tensor, lengths_B: NumpyArray) -> Tensor:
    out_BTD = torch.zeros((len(lengths_B), int(lengths_B.max()), hidden_MD.shape[1]))
    row_M = torch.from_numpy(np.repeat(np.arange(len(lengths_B)), lengths_B))
    place_M = torch.from_numpy(np.concatenate([np.arange(length) for length in lengths_B]))
    return out_BTD.index_put((row_M, place_M), hidden_MD)


def start(shape: Shape, batches: Sequence[CutBatch]) -> Bottleneck:
    """Principal components of the pooled hidden states; the lowest channels hold most of the variance."""
    pool = Pool(np.zeros(shape.width, np.float32), shape.tokens)
    acts = [batch.acts[shape.depth] for batch in batches]
    pooled = [pool.pooled(pack(a.hidden_BTD, a.lengths_B), a.lengths_B) for a in acts]
    pooled_MD = np.concatenate(pooled).astype(np.float64)
    mean_D = pooled_MD.mean(axis=0)
    centred_MD = pooled_MD - mean_D
    _, vectors_DD = np.linalg.eigh(centred_MD.T @ centred_MD)
    return Bottleneck(shape, mean_D, np.ascontiguousarray(vectors_DD[:, ::-1][:, : shape.channels]))


@dataclass
class _Run:
    """One training run of a bottleneck."""

    bottleneck: Bottleneck
    tail: Tail
    learning: Learning
    train: Sequence[CutBatch]
    held: Sequence[CutBatch]
    best: float = float("inf")
    epoch: int = 0

    def loss(self, batch: CutBatch) -> Tensor:
        acts = batch.acts[self.bottleneck.shape.depth]
        answer_BC = self.tail.answer(self.bottleneck(acts))
        wanted_BC = torch.from_numpy(batch.answer_BC)
        if wanted_BC.shape[1] == 1:
            return functional.mse_loss(answer_BC, wanted_BC)
        ours, theirs = answer_BC.log_softmax(-1), wanted_BC.log_softmax(-1)
        return functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)

    @torch.no_grad()
    def held_out(self) -> float:
        sums = [float(self.loss(batch)) * len(batch.rows) for batch in self.held]
        return sum(sums) / sum(len(batch.rows) for batch in self.held)


def fit_bottleneck(
    bottleneck: Bottleneck,
    tail: Tail,
    batches: Sequence[CutBatch],
    learning: Learning,
    checkpoints: Checkpoints,
    stop: StopSignal,
    report: Report,
) -> dict[str, float]:
    """Train to the end, from a checkpoint where there is one; `bottleneck` then holds the epoch that was best
    on the tenth of the batches held out. Returns that tenth's loss before and after.

    Raises Stopped after saving a checkpoint when asked to stop."""
    shuffled = random.Random(learning.seed).sample(list(batches), len(batches))
    n_held = max(1, round(_HELD_OUT * len(shuffled)))
    run = _Run(bottleneck, tail, learning, shuffled[n_held:], shuffled[:n_held])
    optimiser = torch.optim.Adam(bottleneck.parameters(), lr=learning.lr)
    before = run.held_out()
    saved = checkpoints.load()
    if saved is None:
        run.best = before
        checkpoints.save_best(bottleneck.state_dict())
    else:
        bottleneck.load_state_dict(saved["bottleneck"])
        optimiser.load_state_dict(saved["optimiser"])
        run.best, run.epoch = saved["best"], saved["epoch"]
        report.say(f"continuing at epoch {run.epoch + 1}")
    while run.epoch < learning.epochs:
        _epoch(run, optimiser, checkpoints, stop, report)
    bottleneck.load_state_dict(checkpoints.load_best())
    return {"before": before, "after": run.best}


def _epoch(
    run: _Run,
    optimiser: torch.optim.Optimizer,
    checkpoints: Checkpoints,
    stop: StopSignal,
    report: Report,
) -> None:
    """An epoch that is stopped begins anew: they are short."""
    learning = run.learning
    order = random.Random(f"{learning.seed}/{run.epoch}").sample(list(run.train), len(run.train))
    total, seen = learning.epochs * len(order), run.epoch * len(order)
    with report.bar(f"epoch {run.epoch + 1} of {learning.epochs}", len(order)) as bar:
        for index, batch in enumerate(order):
            rate = learning.lr * schedule(seen + index, total, _WARMUP)
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.zero_grad(set_to_none=True)
            loss = run.loss(batch)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(run.bottleneck.parameters(), 1.0)
            optimiser.step()
            bar.step(1, f"loss {float(loss.detach()):.4f}")
            if stop.wanted:
                raise Stopped
    held, run.epoch = run.held_out(), run.epoch + 1
    report.say(f"epoch {run.epoch} of {learning.epochs}: divergence {held:.5f} on rows held out")
    if held < run.best:
        run.best = held
        checkpoints.save_best(run.bottleneck.state_dict())
    checkpoints.save(
        {
            "bottleneck": run.bottleneck.state_dict(),
            "optimiser": optimiser.state_dict(),
            "best": run.best,
            "epoch": run.epoch,
        }
    )
