"""Which version of a bundle a request is for: its digest says so.

A device names the digest of the layers that it wants run, so versions side by side need no names of
their own, and a device keeps getting answers of the model that it holds while another is rolled out.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Protocol

from offramp_cloud.balance import Pool
from offramp_cloud.replica_link import Endpoint, ReplicaLink

_REMEMBERED_S = 60.0
"""So long a version without any replica is waited for: its devices are told to come back, where they
would otherwise be told that their model is unknown, and give up."""


class Directory(Protocol):
    """Where replicas register, and are struck off by whoever places them."""

    async def endpoints(self) -> dict[str, Endpoint]:
        """Those that live, by name. Raises CloudUnavailable when nobody can tell at the moment."""
        ...


class Routes:
    """Versions and their replicas, kept up to date by `update`. One event loop."""

    def __init__(self) -> None:
        self._pools: dict[tuple[str, str], Pool] = {}  # by bundle and version

    @property
    def bundles(self) -> tuple[str, ...]:
        return tuple(sorted({bundle for bundle, _ in self._pools}))

    @property
    def links(self) -> dict[str, ReplicaLink]:
        return {name: link for pool in self._pools.values() for name, link in pool.links.items()}

    def pools(self, bundle: str) -> list[Pool]:
        """Newest first."""
        pools = [pool for (name, _), pool in self._pools.items() if name == bundle]
        return sorted(pools, key=lambda pool: pool.order, reverse=True)

    def find(self, bundle: str, digests: Iterable[bytes]) -> Pool:
        """The newest version that has all the digests, one with a replica first; else the newest,
        which will tell the device what differs. The bundle must be one of `bundles`."""
        pools, wanted = self.pools(bundle), set(digests)
        having = [pool for pool in pools if wanted <= pool.depths.keys()]
        if not wanted or not having:
            having = pools
        return next((pool for pool in having if pool.usable), having[0])

    def depth_of(self, bundle: str, digest: bytes) -> int | None:
        """The layers that ran on the device before what the digest names; None where unknown."""
        for pool in self.pools(bundle):
            if digest in pool.depths:
                return pool.depths[digest]
        return None

    def pool_for(self, endpoint: Endpoint) -> Pool:
        """The pool that the replica belongs to, made where it is the first of its version."""
        pool = self._pools.setdefault((endpoint.bundle, endpoint.version), Pool(endpoint))
        pool.order = max(pool.order, endpoint.order)
        return pool

    def drop(self, name: str) -> ReplicaLink | None:
        """Forget a replica; its link, to be closed."""
        for pool in self._pools.values():
            if (link := pool.links.pop(name, None)) is not None:
                pool.changed()
                return link
        return None

    def forget_empty(self) -> None:
        """Forget versions that have had no replica for long, unless nothing else of the bundle is
        left: that there is such a bundle stays known."""
        now_s = time.monotonic()
        for key, pool in list(self._pools.items()):
            old = not pool.links and now_s - pool.empty_since_s > _REMEMBERED_S
            if old and len(self.pools(pool.bundle)) > 1:
                del self._pools[key]
