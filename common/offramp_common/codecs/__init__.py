"""Codecs: hidden states of real tokens to bytes and back.

A codec works on packed rows (N tokens, D): padding never travels. `CODECS` is the table of those without
parameters; the name is what travels. Integer activations (token ids) always go through `tokens`, floating
point ones through the codec that the device chose.

`Fitted` codecs (fitted.py) have parameters that belong to one bundle and one depth: fewer tokens (kept.py,
pooled.py), fewer channels (narrow.py), and one of the table's codecs for what is left. Their `name` ends in
a digest of the parameters, so that two sides with other parameters do not take them for the same;
their `label` ("pruned-int4") is what people and planners say. What a planner needs, of any codec:

    bundle.codecs(depth)              label -> codec: all that hidden states cut at `depth` may travel by
    codec.nbytes(n_tokens, width)     the most bytes for one sample of n_tokens; exactly that where
                                      `codec.fixed_size`, else codec.expected_nbytes(...) is the estimate
    tokens_left(codec, n_tokens)      tokens that the cloud's layers run on
    bundle.codec_cost(label, depth)   points of quality (hundredths) below the uncoded model: the most that
                                      was measured on any data; None where nothing was
    encode_frame(acts, cut, name, bundle.fitted)   frames.py; `name` is codec.name
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


def tokens_left(codec: Codec, n_tokens: int) -> int:
    """Tokens of a sample of `n_tokens` that remain after decoding: all, but for fitted codecs."""
    left = getattr(codec, "tokens_left", None)
    return n_tokens if left is None else int(left(n_tokens))


__all__ = ["CODECS", "Codec", "Progressive", "get_codec", "tokens_left"]
