"""What stands beside our codecs in the table of codecs: other ways to send a sample, one function each."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from offramp_common.codecs import CODECS

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Encode = Callable[[], Any]


@dataclass(frozen=True)
class Peer:
    """nbytes; what is timed, and why it could not be run where it could not."""

    name: str
    nbytes: int = 0
    encode: Encode | None = None
    decode: Encode | None = None
    error: str = ""


def token_ids(ids_N: np.ndarray) -> Peer:
    codec, ids_N1 = CODECS["tokens"], ids_N[:, None]
    data = codec.encode(ids_N1)
    return Peer(
        "token ids",
        len(data),
        lambda: codec.encode(ids_N1),
        lambda: codec.decode(data, len(ids_N), 1),
    )


def zstd_text(text: str, level: int) -> Peer:
    """The words of those tokens; the cloud would have to tokenize them again (not timed)."""
    raw = text.encode()
    data = zstd.compress(raw, level)
    return Peer(
        f"text, zstd {level}",
        len(data),
        lambda: zstd.compress(raw, level),
        lambda: zstd.decompress(data),
    )


def torch_save(hidden_ND: np.ndarray) -> Peer:
    tensor = torch.from_numpy(hidden_ND)

    def encode() -> bytes:
        buffer = io.BytesIO()
        torch.save(tensor, buffer)
        return buffer.getvalue()

    data = encode()
    return Peer(
        "torch.save, fp32",
        len(data),
        encode,
        lambda: torch.load(io.BytesIO(data), weights_only=True),
    )


def hivemind(hidden_ND: np.ndarray) -> list[Peer]:
    """Each of hivemind's serializers; one that says why where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from hivemind.compression import deserialize_torch_tensor, serialize_torch_tensor
            from hivemind.proto.runtime_pb2 import CompressionType
    except ImportError as error:
        return [Peer("hivemind", error=f"not installed ({error!s:.60})")]
    tensor = torch.from_numpy(hidden_ND)
    out = []
    for kind in CompressionType.values():
        name = f"hivemind {CompressionType.Name(kind)}"

        def encode(kind: int = kind) -> Any:
            return serialize_torch_tensor(tensor, kind).SerializeToString()

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                message = serialize_torch_tensor(tensor, kind)
                deserialize_torch_tensor(message)
        except Exception as error:  # noqa: BLE001 - what it cannot do here is a row of the table
            out.append(Peer(name, error=f"{type(error).__name__}: {error!s:.70}".splitlines()[0]))
            continue

        def decode(message: Any = message) -> Any:
            return deserialize_torch_tensor(message)

        out.append(Peer(name, message.ByteSize(), encode, decode))
    return out
