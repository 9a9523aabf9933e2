"""Codecs: hidden states of real tokens to bytes and back.

A codec works on packed rows (N tokens, D): padding never travels. `CODECS` is the table; the name
is what travels. Integer activations (token ids) always go through `tokens`, floating point ones
through the codec that the device chose.
"""

from __future__ import annotations

from offramp_common.codecs.base import Codec, Progressive
from offramp_common.codecs.int4 import Int4PerGroup
from offramp_common.codecs.int8 import Int8PerToken
from offramp_common.codecs.raw import BFloat16, Float16, Float32
from offramp_common.codecs.stepped import Stepped
from offramp_common.codecs.tokens import TokenIds
from offramp_common.errors import UnknownCodec

_LISTED: tuple[Codec, ...] = (
    Float32(),
    Float16(),
    BFloat16(),
    Int8PerToken(),
    Int4PerGroup(),
    Stepped("int8+z", relative=0.045, bits=3.49, planes=3),
    Stepped("int4+z", relative=0.53, bits=2.94),
    TokenIds(),
)
CODECS: dict[str, Codec] = {codec.name: codec for codec in _LISTED}
if len(CODECS) != len(_LISTED):
    raise RuntimeError("two codecs share a name")


def get_codec(name: str) -> Codec:
    """The codec called `name`; raises UnknownCodec, naming those there are."""
    try:
        return CODECS[name]
    except KeyError:
        raise UnknownCodec(
            f"codec {name!r:.80} is unknown here; use one of {', '.join(CODECS)}"
        ) from None


__all__ = ["CODECS", "Codec", "Progressive", "get_codec"]
