"""The check that every decoder makes before it allocates anything."""

from __future__ import annotations

from offramp_common.errors import WireError


def check_size(
    codec: str, data: bytes | memoryview, expected: int, n_tokens: int, width: int
) -> None:
    """Raises WireError unless `data` has exactly the size that its declared shape needs."""
    if len(data) != expected:
        raise WireError(
            f"codec {codec}: {len(data)} bytes of hidden states; {n_tokens} tokens of width "
            f"{width} need {expected}"
        )
