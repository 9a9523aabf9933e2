"""What a codec is: encode, decode, and the size without encoding (for planner and simulator)."""

from __future__ import annotations

from typing import Any, Protocol

from numpy.typing import NDArray


class Codec(Protocol):
    """Bytes for packed hidden states (N tokens, D wide)."""

    @property
    def name(self) -> str:
        """What travels."""
        ...

    @property
    def lossless(self) -> bool:
        """True where decode(encode(x)) equals x bit for bit."""
        ...

    @property
    def integer(self) -> bool:
        """True for codecs of token ids, False for those of floating point hidden states."""
        ...

    def encode(self, hidden_ND: NDArray[Any]) -> bytes:
        """`hidden_ND` is float32 or float16 (any integer type for integer codecs) and only read."""
        ...

    def decode(self, data: bytes | memoryview, n_tokens: int, width: int) -> NDArray[Any]:
        """Float32 (int64 for integer codecs) of shape (n_tokens, width), in memory of its own.

        Raises WireError when `data` is not exactly what `encode` makes for that shape, before it
        allocates the result."""
        ...

    def nbytes(self, n_tokens: int, width: int) -> int:
        """Size of `encode`'s result for that shape: exact, but see TokenIds for ids above 65535."""
        ...
