"""A Ray of our own or somebody else's: starting, joining and leaving it, and what all of it share.

Replicas register in Ray's key-value store, under the names of their actors. Ray strikes dead actors
off its list of names by itself, so that the two together say who lives, with or without Serve's
controller. The cluster's secret (cluster_keys.py) lies in the same store: who may join the Ray may
talk to its replicas.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
import secrets
import shutil
import tempfile
from dataclasses import dataclass, field

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when ray is imported

import ray
from ray import serve
from ray.exceptions import RayError
from ray.experimental import internal_kv as kv

from offramp_cloud.cluster_keys import SECRET_BYTES
from offramp_cloud.placement import secure_own_ray
from offramp_cloud.replica_link import Endpoint
from offramp_common.errors import CloudUnavailable, ConfigError

for _name in ("ray", "ray.serve"):
    logging.getLogger(_name).setLevel(logging.ERROR)  # progress is ours to report

_OBJECT_STORE_BYTES = 80 * 2**20  # nothing of ours goes through it; about the least that Ray takes
_SPACE = b"offramp"  # of the key-value store
_REPLICA, _SECRET = b"replica:", b"secret"
_GCS_S = 5.0


@dataclass
class Owned:
    """What was started here, and has to be stopped.

    apps       Serve applications of ours
    temp_dir   of a Ray that was started here; None in a cluster that was joined
    """

    apps: list[str] = field(default_factory=list)
    temp_dir: str | None = None

    async def close(self) -> None:
        # Ray reports its own end as failures, in its log and with `print`.
        logging.getLogger("ray").setLevel(logging.CRITICAL)
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                if ray.is_initialized() and self.temp_dir is not None:
                    await serve.shutdown_async()  # type: ignore[no-untyped-call]
                elif ray.is_initialized():
                    for app in self.apps:
                        await asyncio.to_thread(serve.delete, app)
            finally:
                await asyncio.to_thread(ray.shutdown)
                if self.temp_dir is not None:
                    shutil.rmtree(self.temp_dir, ignore_errors=True)


def start_ray(owned: Owned, num_cpus: int) -> None:
    """A Ray for this process alone; it ends with it, however that ends. Raises ConfigError."""
    secure_own_ray()  # again: a caller that forgot hears of it here
    # Ray's sockets lie deep below it, and their paths may have 107 bytes.
    base = tempfile.gettempdir()
    owned.temp_dir = tempfile.mkdtemp(prefix="offramp-", dir=base if len(base) < 32 else "/tmp")
    try:
        ray.init(
            num_cpus=num_cpus,
            num_gpus=0,
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            _temp_dir=owned.temp_dir,
            _node_ip_address="127.0.0.1",
        )
    except Exception as error:  # Ray raises a plain one when its processes do not come up in time
        raise ConfigError(
            f"Ray does not start here ({error}); `ray start --head --block` shows more, and --local "
            "does without it"
        ) from error


def join_ray(address: str) -> None:
    """Raises ConfigError when there is no such Ray, or it refuses us."""
    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    except (ConnectionError, ValueError, RuntimeError, RayError) as error:
        raise ConfigError(
            f"--address {address}: cannot join ({error}); set RAY_AUTH_TOKEN to that cluster's, and use "
            "the same versions of ray and Python"
        ) from error


def secret() -> bytes:
    """The cluster's: made by whoever asks first."""
    # True where the key was there before us.
    kv._internal_kv_put(_SECRET, secrets.token_bytes(SECRET_BYTES), False, namespace=_SPACE)
    return bytes(kv._internal_kv_get(_SECRET, namespace=_SPACE))


def node_address() -> str:
    """Of the node that this process runs on, as other nodes reach it."""
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def own_name() -> str:
    """Of the actor that this process is."""
    return str(ray.get_runtime_context().get_actor_name())


def register(endpoint: Endpoint) -> None:
    kv._internal_kv_put(_REPLICA + endpoint.name.encode(), endpoint.packed(), namespace=_SPACE)


def strike_off(name: str) -> None:
    kv._internal_kv_del(_REPLICA + name.encode(), namespace=_SPACE)


class RayDirectory:
    """A `routes.Directory`. What a dead actor has registered is removed on the way."""

    def __init__(self) -> None:
        self._known: dict[str, Endpoint] = {}

    async def endpoints(self) -> dict[str, Endpoint]:
        try:
            async with asyncio.timeout(_GCS_S):
                return await asyncio.to_thread(self._look)
        except (RayError, RuntimeError, TimeoutError, OSError) as error:
            raise CloudUnavailable(f"Ray does not answer: {error or 'in time'}") from error

    def _look(self) -> dict[str, Endpoint]:
        # Keys first: who registers in between is alive.
        keys = kv._internal_kv_list(_REPLICA, namespace=_SPACE)
        registered = {bytes(key).removeprefix(_REPLICA).decode() for key in keys}
        alive = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
        for name in registered - alive:
            strike_off(name)
        for name in registered & alive - self._known.keys():
            packed = kv._internal_kv_get(_REPLICA + name.encode(), namespace=_SPACE)
            if packed is not None:
                self._known[name] = Endpoint.unpacked(bytes(packed))
        there = registered & alive
        self._known = {name: each for name, each in self._known.items() if name in there}
        return dict(self._known)
