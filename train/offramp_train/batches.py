"""Rows as token ids, an epoch's rows with augmentation, and batches of like length.

All randomness comes from a generator given by the caller, so an epoch can be made again after a stop.
Axes: B samples, T tokens, F input channels.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from offramp_common.errors import ConfigError
from offramp_common.spec import TaskSpec
from offramp_train.config import Augment
from offramp_train.data import targets_of
from offramp_train.tables import Rows

_POOL = 50  # batches whose rows are sorted by length together


@dataclass(frozen=True, slots=True)
class Example:
    """ids and segments of each token; `head` and `tail` special tokens stand at the ends."""

    ids: tuple[int, ...]
    segments: tuple[int, ...]
    target: int | float
    weight: float = 1.0
    head: int = 1
    tail: int = 1


def tokenizer_json(backbone: str) -> str:
    """The fast tokenizer of a checkpoint, as the tokenizers library writes it. Raises ConfigError."""
    path = Path(backbone) / "tokenizer.json"
    if path.is_file():
        return path.read_text()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(backbone, use_fast=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"backbone {backbone!r}: its tokenizer cannot be loaded ({error})"
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            f"backbone {backbone!r}: no fast tokenizer (tokenizer.json), which devices need"
        )
    text: str = tokenizer.backend_tokenizer.to_str()
    return text


def encode(rows: Rows, task: TaskSpec, tokenizer: str, max_tokens: int) -> list[Example]:
    """Tokenized as the bundle's TextEncoder will do it."""
    encoder = Tokenizer.from_str(tokenizer)
    encoder.no_padding()
    encoder.enable_truncation(max_tokens)
    texts = [text if isinstance(text, str) else tuple(text) for text in rows.texts]
    out = []
    for encoding, target in zip(encoder.encode_batch(texts), targets_of(rows, task), strict=True):
        special = encoding.special_tokens_mask
        head = next((i for i, s in enumerate(special) if not s), 0)
        tail = next((i for i, s in enumerate(reversed(special)) if not s), 0)
        out.append(
            Example(
                tuple(encoding.ids), tuple(encoding.type_ids), target.item(), head=head, tail=tail
            )
        )
    return out


def unknown_token(tokenizer: str) -> int:
    """Id of the word piece that stands for anything. Raises ConfigError where there is none."""
    encoder = Tokenizer.from_str(tokenizer)
    named = json.loads(tokenizer)["model"].get("unk_token")
    for token in (named, "[UNK]", "<unk>", "[MASK]", "<mask>"):
        found = encoder.token_to_id(token) if isinstance(token, str) else None
        if found is not None:
            return int(found)
    raise ConfigError("augment.word_dropout: this tokenizer has no unknown and no mask token")


@dataclass(frozen=True, slots=True)
class Epochs:
    """Makes each epoch's examples from the training rows."""

    examples: tuple[Example, ...]
    task: TaskSpec
    augment: Augment
    unknown: int = 0

    def __post_init__(self) -> None:
        a = self.augment
        wanted = [*a.repeat, *a.weights, *([a.mix_label] if a.mix_label else [])]
        for label in wanted:
            if label not in self.task.labels:
                raise ConfigError(f"augment: label {label!r} is not in the data")
        if a.mix_label and self.task.pair:
            raise ConfigError("augment.mix_label: sentence pairs cannot be mixed")
        if a.mix_label and len(self.task.labels) < 3:
            raise ConfigError("augment.mix_label: two labels beside it are needed to mix")

    def size(self, altered: bool) -> int:
        """Rows of an epoch; `altered`: with mixed rows and dropped words."""
        a, labels = self.augment, self.task.labels
        if not labels:
            return len(self.examples)
        rows = sum(int(a.repeat.get(labels[int(e.target)], 1)) for e in self.examples)
        return rows + (self._n_mixes if altered else 0)

    @property
    def _n_mixes(self) -> int:
        if not self.augment.mix_label:
            return 0
        mix = self.task.labels.index(self.augment.mix_label)
        return int(self.augment.mix_share * sum(e.target != mix for e in self.examples))

    def altered(self, epoch: int, epochs: int) -> bool:
        """Whether an epoch of so many is one with mixed rows and dropped words."""
        return not self.augment.last_epochs or epoch >= epochs - self.augment.last_epochs

    def make(self, rng: random.Random, altered: bool = True) -> list[Example]:
        """The rows of one epoch, `size(altered)` of them."""
        a, labels = self.augment, self.task.labels
        out = []
        for example in self.examples:
            label = labels[int(example.target)] if labels else ""
            weighted = replace(example, weight=float(a.weights.get(label, 1.0)))
            out += [weighted] * int(a.repeat.get(label, 1))
        if altered and self._n_mixes:
            out += self._mixes(rng)
        if altered and a.word_dropout:
            out = [self._with_dropout(example, rng) for example in out]
        return out

    def _mixes(self, rng: random.Random) -> list[Example]:
        mix = self.task.labels.index(self.augment.mix_label)
        others = [example for example in self.examples if example.target != mix]
        out: list[Example] = []
        wanted = self._n_mixes
        while len(out) < wanted:
            first, second = rng.choice(others), rng.choice(others)
            if first.target != second.target:
                out.append(_mixed(first, second, mix, self.augment.mix_weight))
        return out

    def _with_dropout(self, example: Example, rng: random.Random) -> Example:
        last = len(example.ids) - example.tail
        ids = tuple(
            self.unknown
            if example.head <= i < last and rng.random() < self.augment.word_dropout
            else token
            for i, token in enumerate(example.ids)
        )
        return replace(example, ids=ids)


def _mixed(first: Example, second: Example, target: int, weight: float) -> Example:
    """The first half of one sentence and the second half of another."""
    inner = len(first.ids) - first.head - first.tail
    cut = first.head + (inner + 1) // 2
    start = second.head + (len(second.ids) - second.head - second.tail) // 2
    return Example(
        first.ids[:cut] + second.ids[start:],
        first.segments[:cut] + second.segments[start:],
        target,
        weight,
        first.head,
        second.tail,
    )


def bucketed(lengths: Sequence[int], batch: int, rng: random.Random) -> list[list[int]]:
    """Row numbers in shuffled batches whose rows are of like length, so little is padded."""
    order = list(range(len(lengths)))
    rng.shuffle(order)
    out: list[list[int]] = []
    for start in range(0, len(order), _POOL * batch):
        pool = sorted(order[start : start + _POOL * batch], key=lambda i: lengths[i])
        out += [pool[i : i + batch] for i in range(0, len(pool), batch)]
    rng.shuffle(out)
    return out


def halved(
    lengths: Sequence[int], batch: int, rng: random.Random, halves: random.Random
) -> list[list[int]]:
    """As `bucketed`, each of two halves by itself; their batches take turns, an even number in all.

    The halves are `halves`'s choice alone, so they can be the same in every epoch. Rows are left out where
    the halves would not make as many batches.
    """
    order = list(range(len(lengths)))
    halves.shuffle(order)
    parts = []
    for rows in (order[::2], order[1::2]):
        of_half = bucketed([lengths[i] for i in rows], batch, rng)
        parts.append([[rows[i] for i in group] for group in of_half])
    return [group for pair in zip(*parts, strict=False) for group in pair]


@dataclass(frozen=True, slots=True)
class Batch:
    """inputs_BTF int64, padded at the end with 0; mask_BT; target_B (int64 or float32); weight_B."""

    inputs_BTF: Tensor
    mask_BT: Tensor
    target_B: Tensor
    weight_B: Tensor


def collate(examples: Sequence[Example], channels: int) -> Batch:
    """Padded to the longest."""
    longest = max(len(example.ids) for example in examples)
    inputs_BTF = np.zeros((len(examples), longest, channels), dtype=np.int64)
    mask_BT = np.zeros((len(examples), longest), dtype=bool)
    for row, example in enumerate(examples):
        n = len(example.ids)
        inputs_BTF[row, :n, 0] = example.ids
        if channels > 1:
            inputs_BTF[row, :n, 1] = example.segments
        mask_BT[row, :n] = True
    return Batch(
        torch.from_numpy(inputs_BTF),
        torch.from_numpy(mask_BT),
        torch.tensor([example.target for example in examples]),
        torch.tensor([example.weight for example in examples]),
    )
