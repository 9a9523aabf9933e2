"""Where and how often engines run."""

from __future__ import annotations

import argparse
import os
import secrets
import socket
import sys
from dataclasses import dataclass, field

from offramp_cloud.waiting import Load
from offramp_common.errors import ConfigError
from offramp_common.frames import Limits

_CONNECT_S = 5.0


@dataclass(frozen=True, slots=True)
class Placement:
    """What Serve is asked for, for each bundle.

    replicas       engines; with max_replicas above it, the fewest of as many as the work needs
    threads        torch's, per replica;  cpus   that it asks Ray for, 0 for as many
    drain_s        how long a replica that is to go finishes what it has
    scale_down_s   how long fewer would have been enough before one is taken away
    trace          where replicas' spans go, as for tracing.tracer_to
    device         torch's name of where layers run, such as "cuda";  precision  "fp32" or "bf16"
    """

    replicas: int = 1
    threads: int = 1
    drain_s: float = 20.0
    max_replicas: int = 0
    cpus: float = 0.0
    scale_down_s: float = 30.0
    limits: Limits = field(default_factory=Limits)
    load: Load = field(default_factory=Load)
    trace: str = ""
    device: str = "cpu"
    precision: str = "fp32"

    @property
    def num_cpus(self) -> float:
        """Of one replica."""
        return self.cpus or float(self.threads)


def placement_of(args: argparse.Namespace) -> Placement:
    """From the arguments that `cloud serve` and `cloud deploy` share."""
    return Placement(
        replicas=args.replicas,
        max_replicas=args.max_replicas,
        threads=args.threads,
        cpus=args.cpus,
        drain_s=args.drain_s,
        scale_down_s=args.scale_down_s,
        limits=limits_of(args),
        load=load_of(args),
        trace=args.trace or "",
        device=args.device,
        precision=args.precision,
    )


def limits_of(args: argparse.Namespace) -> Limits:
    """Of a frame."""
    return Limits(max_frame_bytes=args.max_frame_bytes, max_rows=args.max_rows)


def load_of(args: argparse.Namespace) -> Load:
    """Of an engine."""
    return Load(max_batch=args.max_batch, max_waiting_rows=args.max_waiting)


def secure_own_ray() -> None:
    """Set the environment for a Ray of our own; to be called before ray is imported.

    Ray's ports listen on all interfaces and unpickle what they take: never without a token. It
    reads these variables once, when it is imported. Raises ConfigError when it has been already.
    """
    if os.environ.get("RAY_AUTH_MODE") != "token":
        if "ray" in sys.modules:
            raise ConfigError(
                "ray was imported without token authentication: set RAY_AUTH_MODE=token, and "
                "RAY_AUTH_TOKEN to a secret, before Python starts"
            )
        os.environ["RAY_AUTH_MODE"] = "token"
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def check_address(address: str) -> None:
    """Raises ConfigError for the address of a Ray where nothing answers: Ray would try for a minute."""
    if address.startswith("ray://"):
        raise ConfigError(
            f"--address {address}: give the head's HOST:PORT (its port is 6379), not a Ray client's"
        )
    host, colon, port = address.rpartition(":")
    if not colon:
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--address {address}: nothing answers there ({error}); start a Ray with "
            "`ray start --head`, or leave --address out"
        ) from error
