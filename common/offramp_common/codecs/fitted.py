"""Codecs with parameters that were fitted to one bundle, for one depth.

    hidden states --keep or pool--> fewer tokens --narrow--> fewer channels --inner--> bytes

Each step may be missing. `inner` is one of the codecs without parameters; its stated error holds for what it
is given, the error of the steps before it is measured on data (measured.py).

    bits      which tokens were kept (kept.py), a whole number of bytes a row; nothing where all are, or
              where tokens are pooled
    values    what `inner` made of the tokens that are left, all rows one after another

The cloud decodes to the tokens that are left: its layers run on fewer, and know their original places.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp_common.codecs.base import Codec
from offramp_common.codecs.kept import Keep
from offramp_common.codecs.narrow import Narrow
from offramp_common.codecs.pooled import Pool
from offramp_common.errors import WireError

_DIGEST_BYTES = 4


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Decoded rows, packed: hidden_MD, tokens left of each row, and their original places (None where all
    tokens are there)."""

    hidden_MD: NDArray[np.float32]
    lengths_B: NDArray[np.int64]
    positions_M: NDArray[np.int64] | None


@dataclass(frozen=True, eq=False)
class Fitted:
    """label: what people say, one for each bundle and depth;  width: D of the hidden states."""

    label: str
    depth: int
    width: int
    inner: Codec
    reduce: Keep | Pool | None = None
    narrow: Narrow | None = None
    lossless: bool = False
    integer: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for parts that do not fit each other."""
        if self.inner.integer:
            raise ValueError(f"codec {self.label}: {self.inner.name} cannot carry hidden states")
        if not all(np.isfinite(value).all() for value in self.tensors().values()):
            raise ValueError(f"codec {self.label}: a parameter that is not finite")
        widths = {self.width}
        widths |= set() if self.reduce is None else {len(self.reduce.weight_D)}
        widths |= set() if self.narrow is None else {len(self.narrow.mean_D)}
        if len(widths) != 1:
            raise ValueError(f"codec {self.label}: parameters for widths {sorted(widths)}")

    @cached_property
    def name(self) -> str:
        """label@depth.digest of settings and parameters."""
        digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        digest.update(json.dumps(self.to_json(), sort_keys=True).encode())
        for name, value in sorted(self.tensors().items()):
            digest.update(name.encode() + value.astype("<f4").tobytes())
        return f"{self.label}@{self.depth}.{digest.hexdigest()}"

    @property
    def fixed_size(self) -> bool:
        return self.inner.fixed_size

    @property
    def channels(self) -> int:
        """What `inner` is given for each token."""
        return self.width if self.narrow is None else self.narrow.channels

    @property
    def carries_tokens(self) -> bool:
        """Whether what is left are tokens of the sample, so that a state for each of them can travel."""
        return not isinstance(self.reduce, Pool)

    def tokens_left(self, n_tokens: int) -> int:
        return n_tokens if self.reduce is None else self.reduce.tokens_left(n_tokens)

    def nbytes(self, n_tokens: int, width: int) -> int:
        """Of one sample; as for every codec at most that, and exactly where `fixed_size`."""
        return self._bits(n_tokens) + self.inner.nbytes(self.tokens_left(n_tokens), self.channels)

    def expected_nbytes(self, n_tokens: int, width: int) -> int:
        left = self.tokens_left(n_tokens)
        return self._bits(n_tokens) + self.inner.expected_nbytes(left, self.channels)

    def encode(self, hidden_ND: NDArray[Any]) -> bytes:
        """Of one sample."""
        return self.encode_rows(hidden_ND, np.array([len(hidden_ND)]))[0]

    def encode_rows(
        self, hidden_ND: NDArray[Any], lengths_B: NDArray[np.int64]
    ) -> tuple[bytes, NDArray[np.bool_] | None]:
        """The bytes of packed rows, and kept_N where some tokens were left out."""
        hidden_ND = np.asarray(hidden_ND, dtype=np.float32)
        bits, kept_N = b"", None
        if isinstance(self.reduce, Keep):
            kept_N = self.reduce.chosen(hidden_ND, lengths_B)
            bits, hidden_ND = self.reduce.bits(kept_N, lengths_B), hidden_ND[kept_N]
        elif self.reduce is not None:
            hidden_ND = self.reduce.pooled(hidden_ND, lengths_B)
        if self.narrow is not None:
            hidden_ND = self.narrow.down(hidden_ND)
        return bits + self.inner.encode(hidden_ND), kept_N

    def decode(self, data: bytes | memoryview, n_tokens: int, width: int) -> NDArray[Any]:
        """Of one sample: float32, (tokens_left(n_tokens), width)."""
        return self.decode_rows(data, np.array([n_tokens])).hidden_MD

    def decode_rows(self, data: bytes | memoryview, lengths_B: NDArray[np.int64]) -> Rows:
        """`lengths_B`: of the rows as they were. Raises WireError for what `encode_rows` does not write."""
        left_B = self.left(lengths_B)
        whole, at, positions_M = memoryview(data), 0, None
        if isinstance(self.reduce, Keep):
            kept_N, at = self.reduce.read(whole, lengths_B)
            if not kept_N.all():
                positions_M = places(lengths_B)[kept_N]
        elif self.reduce is not None and (left_B < lengths_B).any():
            positions_M = self.reduce.positions(lengths_B)
        hidden_MD = self.inner.decode(whole[at:], int(left_B.sum()), self.channels)
        if self.narrow is not None:
            hidden_MD = self.narrow.up(hidden_MD)
            if not np.isfinite(hidden_MD).all():
                raise WireError(f"codec {self.name}: values overflow; send finite ones")
        return Rows(hidden_MD, left_B, positions_M)

    def left(self, lengths_B: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens that are left of each row."""
        return np.array([self.tokens_left(n) for n in lengths_B.tolist()], np.int64)

    def tensors(self) -> dict[str, NDArray[np.float32]]:
        """The parameters, by the name they have in the bundle's file behind the codec's own."""
        out = {} if self.reduce is None else {"weight": self.reduce.weight_D}
        if self.narrow is not None:
            maps = self.narrow
            out |= {"mean": maps.mean_D, "down": maps.down_DR}
            out |= {"up": maps.up_RD, "bias": maps.bias_D}
        return out

    def to_json(self) -> dict[str, Any]:
        """All but the parameters."""
        out: dict[str, Any] = {
            "label": self.label,
            "depth": self.depth,
            "width": self.width,
            "inner": self.inner.name,
        }
        if isinstance(self.reduce, Keep):
            kept = self.reduce
            out["keep"] = {"most": kept.most, "share": kept.share, "least": kept.least}
        elif self.reduce is not None:
            out["pool"] = {"most": self.reduce.most}
        if self.narrow is not None:
            out["channels"] = self.narrow.channels
        return out

    @classmethod
    def from_json(
        cls, value: Mapping[str, Any], inner: Codec, tensors: Mapping[str, NDArray[np.float32]]
    ) -> Fitted:
        """Raises KeyError, TypeError or ValueError for what `to_json` and `tensors` do not give."""
        reduce: Keep | Pool | None = None
        if "keep" in value:
            reduce = Keep(tensors["weight"], **value["keep"])
        elif "pool" in value:
            reduce = Pool(tensors["weight"], **value["pool"])
        narrow = None
        if "channels" in value:
            narrow = Narrow(*(tensors[name] for name in ("mean", "down", "up", "bias")))
        label, depth, width = str(value["label"]), int(value["depth"]), int(value["width"])
        return cls(label, depth, width, inner, reduce, narrow)

    def _bits(self, n_tokens: int) -> int:
        return self.reduce.nbytes(n_tokens) if isinstance(self.reduce, Keep) else 0


def places(lengths_B: NDArray[np.int64]) -> NDArray[np.int64]:
    """0, 1, 2, ... for the tokens of each row, packed."""
    firsts_B = np.cumsum(lengths_B) - lengths_B
    return np.arange(int(lengths_B.sum())) - np.repeat(firsts_B, lengths_B)
