"""Which tokens the layers beyond a cut can do without: a score, linear in a token's hidden state.

A number b_t is added to every score of attention to token t, in all layers beyond the cut: 0, for every t.
The gradient by b of the logarithm of the probability of the uncut model's own answer says, to first order,
what the answer loses with the token. The logarithm of its magnitude, less the row's mean, is what a ridge
regression from the hidden states, less their row's mean, is fitted to: only the order within a row counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offramp_common.activations import Activations, NumpyArray, mask_of, pack
from offramp_common.codecs.fitted import places
from offramp_model.split_model import to_torch
from offramp_train.codec_fits.cut_rows import CutBatch
from offramp_train.codec_fits.tail import Tail
from offramp_train.progress import Report

_LEAST = 1e-8  # gradients below it are all alike: of tokens that no layer reads
_RIDGE = 0.1  # of the mean square of a centred channel, times the tokens


def fit_scores(
    tail: Tail, batches: Sequence[CutBatch], depth: int, report: Report
) -> tuple[NDArray[np.float32], float]:
    """weight_D of kept.Keep, and the correlation of scores and what they are fitted to, within rows."""
    width = batches[0].acts[depth].hidden_BTD.shape[2]
    moment_DD, product_D = np.zeros((width, width)), np.zeros(width)
    squares, seen = np.zeros(2), 0
    with report.bar("gradients", len(batches)) as bar:
        for batch in batches:
            x_ND, y_N = _centred(tail, batch.acts[depth])
            moment_DD += x_ND.T @ x_ND
            product_D += x_ND.T @ y_N
            squares[0] += float(y_N @ y_N)
            seen += len(y_N)
            bar.step()
    ridge = _RIDGE * np.trace(moment_DD) / width
    weight_D = np.linalg.solve(moment_DD + ridge * np.eye(width), product_D)
    squares[1] = float(weight_D @ moment_DD @ weight_D)
    correlation = float(weight_D @ product_D) / max(float(np.sqrt(squares.prod())), 1e-30)
    return weight_D.astype(np.float32), correlation


def _centred(tail: Tail, acts: Activations[NumpyArray]) -> tuple[NumpyArray, NumpyArray]:
    """Packed hidden states and log saliencies, both less their row's mean; first tokens, which always stay,
    left out."""
    saliency_BT = token_saliency(tail, to_torch(acts)).numpy()
    x_ND = pack(acts.hidden_BTD, acts.lengths_B).astype(np.float64)
    y_N = np.log(pack(saliency_BT, acts.lengths_B).astype(np.float64) + _LEAST)
    rest_N = places(acts.lengths_B) > 0
    row_N = np.repeat(np.arange(acts.batch_size), acts.lengths_B)[rest_N]
    counts_B = np.maximum(np.bincount(row_N, minlength=acts.batch_size), 1)

    def less_mean(values: NumpyArray) -> NumpyArray:
        sums = np.zeros((acts.batch_size, *values.shape[1:]))
        np.add.at(sums, row_N, values)
        return values - (sums / counts_B.reshape(-1, *[1] * (values.ndim - 1)))[row_N]

    return less_mean(x_ND[rest_N]), less_mean(y_N[rest_N])


def token_saliency(tail: Tail, acts: Activations[Tensor]) -> Tensor:
    """(B, T): how fast the answer's probability changes with the attention that a token gets."""
    mask_BT = torch.from_numpy(mask_of(acts.lengths_B, acts.hidden_BTD.shape[1]))
    lowest = torch.finfo(torch.float32).min
    closed_BT = torch.zeros(mask_BT.shape).masked_fill(~mask_BT, lowest)
    open_BT = torch.zeros(mask_BT.shape, requires_grad=True)
    with torch.enable_grad():
        answer_BC = tail.answer(acts, (closed_BT + open_BT)[:, None, None, :])
        if answer_BC.shape[1] > 1:
            answer_BC = answer_BC.log_softmax(dim=-1)
        sum_ = answer_BC.max(dim=-1).values.sum()
        (gradient_BT,) = torch.autograd.grad(sum_, open_BT)
    return gradient_BT.abs()
