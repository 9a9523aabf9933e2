"""What a codec is: encode, decode, and the size without encoding (for planner and simulator)."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

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

    @property
    def fixed_size(self) -> bool:
        """True where the shape alone says how many bytes there are."""
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
        """The most that `encode` makes for that shape, and exactly that where `fixed_size`; but see
        TokenIds for ids above 65535."""
        ...

    def expected_nbytes(self, n_tokens: int, width: int) -> int:
        """What to plan with: `nbytes` where `fixed_size`, else an estimate for real hidden states,
        whose error the codec states."""
        ...


@runtime_checkable
class Progressive(Protocol):
    """A codec whose bytes, cut short, still decode: to the same tokens, coarser."""

    def cuts(self, data: bytes | memoryview, n_tokens: int, width: int) -> tuple[int, ...]:
        """The sizes at which `data` may be cut, rising; the last is all of it. `data` is complete,
        or at least so long as to hold the first part; raises WireError otherwise."""
        ...

    def decode_prefix(self, data: bytes | memoryview, n_tokens: int, width: int) -> NDArray[Any]:
        """As `decode`, of data cut anywhere: what stands before the last cut is used. Raises
        WireError where nothing can be decoded yet."""
        ...
