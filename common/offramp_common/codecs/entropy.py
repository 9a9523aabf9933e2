"""Entropy coding by zstd: Huffman codes, its search for repeats all but switched off.

Quantised hidden states hardly repeat, and what a search finds costs more than it saves: at the
default level these bytes were 8 to 16 % more and took five times as long. With a small table for
repeats of at least seven bytes they come within about 2 % of the entropy of their values
(docs/decisions/0006-codecs.md).

A byte holds eight values at most: values that shrink further (all zeros, say) are filled up with
zero bytes. Real ones never get there, and a stranger cannot buy much memory with few bytes.
"""

from __future__ import annotations

import sys

from offramp_common.errors import WireError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_Parameter = zstd.CompressionParameter
_HUFFMAN: dict[int, int] = {
    _Parameter.compression_level: 1,
    _Parameter.min_match: 7,
    _Parameter.hash_log: 6,
    _Parameter.checksum_flag: 0,
    _Parameter.content_size_flag: 1,
}
_MIN_WINDOW_LOG = 10


def compress(values: bytes) -> bytes:
    """One zstd frame, filled up to `least` bytes; no bytes at all for no values."""
    return (
        zstd.compress(values, options=_HUFFMAN).ljust(least(len(values)), b"\0") if values else b""
    )


def least(size: int) -> int:
    """The fewest bytes that `size` values are sent in."""
    return size // 8


def most(size: int) -> int:
    """The most that `compress` makes of `size` bytes: zstd's own bound (ZSTD_compressBound)."""
    return size + size // 256 + (max(0, (1 << 17) - size) >> 11) if size else 0


def decompress(codec: str, data: bytes | memoryview, size: int) -> tuple[bytes, int]:
    """The `size` values that `data` begins with, and how many bytes of it they took.

    Raises WireError, before anything is decompressed, when the frame does not say that it holds
    exactly `size` bytes; memory is bounded by `size` whatever the frame says.
    """
    if not size:
        return b"", 0
    if len(data) < least(size):
        raise WireError(
            f"codec {codec}: {len(data)} bytes for {size} values, at least {least(size)}"
        )
    try:
        claimed = zstd.get_frame_info(data).decompressed_size
        if claimed != size:
            raise WireError(f"codec {codec}: a zstd frame of {claimed} values, must be {size}")
        # A window larger than the values is refused: it would be allocated for nothing.
        window = max(_MIN_WINDOW_LOG, (size - 1).bit_length())
        reader = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: window})
        values = reader.decompress(data, size)
        if (
            len(values) == size and not reader.eof
        ):  # all values are there, the frame's end is not read
            values += reader.decompress(b"", 1)
    except (zstd.ZstdError, EOFError) as error:
        raise WireError(f"codec {codec}: not a zstd frame ({error!s:.80})") from None
    if not reader.eof or len(values) != size:
        raise WireError(
            f"codec {codec}: a zstd frame that ends early, after {len(values)} of {size}"
        )
    used = len(data) - len(reader.unused_data)
    filled = max(used, least(size))
    if any(data[used:filled]):
        raise WireError(
            f"codec {codec}: bytes between the zstd frame and the {filled} that are due"
        )
    return values, filled
