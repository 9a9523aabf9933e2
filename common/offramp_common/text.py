"""Text in, label out: the two ends that every tier shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offramp_common.activations import Activations, NumpyArray, unpack
from offramp_common.bundle import TOKENIZER, Bundle
from offramp_common.errors import BundleError, ConfigError
from offramp_common.spec import TaskSpec

Text = str | tuple[str, str]
"""One sample: a sentence, or a pair of them."""


class TextEncoder:
    """Tokenizes with the bundle's own tokenizer; text longer than the model's limit is cut."""

    def __init__(self, bundle: Bundle) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(bundle.path / TOKENIZER))
        except Exception as error:
            raise BundleError(f"{bundle.path / TOKENIZER}: cannot be read ({error})") from error
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(bundle.manifest.max_tokens)
        self._pair = bundle.manifest.task.pair
        self._channels = bundle.manifest.cuts[0].width

    def __call__(self, texts: Sequence[Text]) -> Activations[NumpyArray]:
        """The samples at depth 0. Raises ConfigError where a pair is given to a single-sentence task, or the
        other way round."""
        for text in texts:
            if isinstance(text, str) == self._pair:
                wanted = "a pair of sentences" if self._pair else "one sentence"
                raise ConfigError(f"input {text!r:.80}: this bundle takes {wanted}")
        encodings = self._tokenizer.encode_batch(
            [t if isinstance(t, str) else tuple(t) for t in texts]
        )
        lengths_B = np.array([len(encoding.ids) for encoding in encodings], dtype=np.int64)
        channels = [np.concatenate([np.array(e.ids, dtype=np.int64) for e in encodings])]
        if self._channels > 1:
            channels.append(
                np.concatenate([np.array(e.type_ids, dtype=np.int64) for e in encodings])
            )
        return Activations(unpack(np.stack(channels, axis=1), lengths_B), lengths_B, depth=0)


@dataclass(frozen=True, slots=True)
class Label:
    """What an answer says: the label and its probability, or the value of a regression (no probability)."""

    label: str | float
    index: int | None
    probability: float | None


def label_of(task: TaskSpec, answer_C: NDArray[np.float32]) -> Label:
    """Reads one row's answer. Logits that are not numbers give probability 0 and the first label."""
    if task.kind == "regression":
        return Label(float(answer_C[0]), None, None)
    index = int(np.argmax(np.nan_to_num(answer_C, nan=-np.inf)))
    with np.errstate(invalid="ignore"):
        shifted = np.exp(answer_C - answer_C[index])
    probability = float(1.0 / shifted.sum())
    return Label(task.labels[index], index, probability if np.isfinite(probability) else 0.0)
