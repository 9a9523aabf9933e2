"""The cloud tier in Ray Serve: an application a bundle and version, whose replicas hold one engine each.

Serve places, scales, health-checks and replaces replicas. Requests do not pass it: they go to a port of
the replica's own (replica_server.py). docs/decisions/0012-data-plane.md has the measurements.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
import warnings
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.schema import ApplicationStatus

from offramp_cloud import cluster, cluster_keys
from offramp_cloud.backends import ReplicatedBackend, depths_of
from offramp_cloud.placement import Placement
from offramp_cloud.rates import Rates
from offramp_cloud.replica_link import Endpoint
from offramp_cloud.replica_server import ReplicaServer
from offramp_cloud.scaling import WorkLeft
from offramp_common.bundle import Bundle
from offramp_common.errors import CloudUnavailable, ConfigError
from offramp_common.tracing import tracer_to

_CONNECT_S = 30.0  # how long the replicas of a Ray that was joined may take to answer
_UP_S = 120.0  # how long replicas may take to start
_POLL_S = 0.1
_START_TRIES = 3  # a bundle that cannot be loaded will not be by trying on
_LOOK_BACK_S = 2.0  # the autoscaler sees the mean of so long,
_TOLD_S = 0.5  # and hears of it so often: Serve's own 10 s would be most of a burst
_KILLED_S = 5.0  # a replica that should be gone is killed so long after its own patience


class Tail:
    """A replica: the engine of one bundle behind a port of its own."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, bundle: str, placement: Placement, order: float
    ) -> None:
        """Registers last: a bundle that cannot be loaded, or answers nonsense, takes no request."""
        # Here, because they bring torch: gateways import this module, too.
        from offramp_cloud.engine import load_engine
        from offramp_cloud.host import Host
        from offramp_cloud.trial import try_out

        engine = load_engine(
            bundle,
            threads=placement.threads,
            limits=placement.limits,
            load=placement.load,
            device=placement.device,
            precision=placement.precision,
        )
        await try_out(engine)
        self._noting = ExitStack()
        engine.tracer = self._noting.enter_context(
            tracer_to(placement.trace, f"offramp-replica-{os.getpid()}")
        )
        self._drain_s = placement.drain_s
        self._rates = Rates(engine)
        self._server = ReplicaServer(
            Host([engine]),
            cluster_keys.server_credentials(cluster.secret()),
            self._rates.now,
        )
        self._endpoint = Endpoint(
            name=cluster.own_name(),
            address=await self._server.start(cluster.node_address()),
            app=serve.get_replica_context().app_name,
            bundle=engine.name,
            order=order,
            depths={digest.hex(): depth for digest, depth in depths_of(engine.bundle).items()},
        )
        cluster.register(self._endpoint)

    async def __del__(self) -> None:
        """Serve awaits it when it takes the replica away."""
        cluster.strike_off(self._endpoint.name)
        await self._server.close(self._drain_s)
        self._noting.close()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve's autoscaler asks for (scaling.WorkLeft reads it)."""
        return asdict(self._rates.now())


def build(args: Mapping[str, Any]) -> serve.Application:
    """The application of one bundle, for `serve run` and `serve deploy` (deploy/serve.yaml).

    args: `bundle` (a directory that every node can read); `replicas`, `max_replicas`, `threads`,
    `cpus`, `drain_s`, `device`, `precision`; `order`, a number that is higher for newer versions of
    the bundle.
    """
    known = {"bundle", "replicas", "max_replicas", "threads", "cpus", "drain_s", "order"}
    known |= {"device", "precision"}
    if "bundle" not in args or not set(args) <= known:
        raise ConfigError(
            f"arguments {sorted(args)}: `bundle` is needed, known are {sorted(known)}"
        )
    placement = Placement(
        replicas=int(args.get("replicas", 1)),
        max_replicas=int(args.get("max_replicas", 0)),
        threads=int(args.get("threads", 1)),
        cpus=float(args.get("cpus", 0)),
        drain_s=float(args.get("drain_s", 20.0)),
        device=str(args.get("device", "cpu")),
        precision=str(args.get("precision", "fp32")),
    )
    return application(str(args["bundle"]), placement, float(args.get("order", 0)))


def application(bundle: str, placement: Placement, order: float) -> serve.Application:
    """See `build`."""
    scaling: dict[str, Any] = {"num_replicas": placement.replicas}
    if placement.max_replicas > placement.replicas:
        scaling = {"autoscaling_config": _autoscaling(placement)}
    deployment: serve.Deployment = serve.deployment(
        **scaling,
        graceful_shutdown_timeout_s=placement.drain_s + _KILLED_S,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=2.0,
        max_constructor_retry_count=_START_TRIES,
        ray_actor_options={"num_cpus": placement.num_cpus},
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )(Tail)
    return deployment.bind(bundle, placement, order)


def _autoscaling(placement: Placement) -> AutoscalingConfig:
    with warnings.catch_warnings():
        # Serve 2.60 says that this setting is to become a variable of the environment, but reads no such
        # variable yet.
        warnings.filterwarnings("ignore", ".*metrics_interval_s", DeprecationWarning)
        return AutoscalingConfig(
            min_replicas=placement.replicas,
            max_replicas=placement.max_replicas,
            policy=AutoscalingPolicy(policy_function=WorkLeft),  # type: ignore[no-untyped-call]
            look_back_period_s=_LOOK_BACK_S,
            metrics_interval_s=_TOLD_S,
            upscale_delay_s=0.0,
            downscale_delay_s=placement.scale_down_s,
        )


def app_name(bundle: Bundle) -> str:
    """offramp-NAME-VERSION: an application for each version of a bundle."""
    return f"offramp-{bundle.manifest.name}-{bundle.digest(min(bundle.cuts)).hex()[:8]}"


def start(
    bundles: Sequence[Path],
    placement: Placement,
    *,
    address: str | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> cluster.Owned:
    """Place the bundles in a Ray of our own (call secure_own_ray before importing this module), or in
    the one at `address`; blocks until replicas are up.

    Raises ConfigError when there is no such Ray, it refuses us, or replicas cannot start there; and
    CloudUnavailable between two steps once `stopped` says so. What was started is then stopped.
    """
    owned = cluster.Owned()
    try:
        if address is None:
            replicas = len(bundles) * max(placement.replicas, placement.max_replicas)
            cluster.start_ray(owned, num_cpus=math.ceil(replicas * placement.num_cpus))
        else:
            cluster.join_ray(address)
        _go_on(stopped)
        start_serve()
        _go_on(stopped)
        place([Bundle.read(path) for path in bundles], placement, owned)
        await_replicas(owned.apps, stopped)
        return owned
    except BaseException:
        asyncio.run(owned.close())
        raise


async def backend(
    on_close: Callable[[], Awaitable[None]], only: Sequence[str] = ()
) -> ReplicatedBackend:
    """A gateway's way to the replicas of the Ray that this process is in.

    Raises CloudUnavailable when none answers; `on_close` has then been called.
    """
    credentials = cluster_keys.channel_credentials(await asyncio.to_thread(cluster.secret))
    found = ReplicatedBackend(cluster.RayDirectory(), credentials, on_close, only=only)
    await found.start(_CONNECT_S)
    return found


def start_serve() -> None:
    """Without its proxies; does nothing where Serve runs already."""
    serve.start(proxy_location="Disabled")


def deployed() -> set[str]:
    """Names of the applications in this Ray."""
    return set(serve.status().applications)


def remove(name: str) -> None:
    """Take an application away; its replicas finish what they have."""
    serve.delete(name)


def _go_on(stopped: Callable[[], bool]) -> None:
    if stopped():
        raise CloudUnavailable("told to stop while starting")


def place(bundles: Sequence[Bundle], placement: Placement, owned: cluster.Owned) -> None:
    """Ask for an application a bundle; does not wait. Raises ConfigError for one that is there."""
    there = deployed()
    targets = []
    for bundle in bundles:
        name = app_name(bundle)
        if name in there:
            raise ConfigError(
                f"{name} is deployed in this Ray already; `--attach {bundle.manifest.name}` puts "
                "another gateway before it"
            )
        app = application(str(bundle.path.resolve()), placement, time.time())
        targets.append(serve.RunTarget(app, name, route_prefix=None))
    owned.apps += [target.name for target in targets]
    serve.run_many(targets, wait_for_applications_running=False)


def await_replicas(names: Sequence[str], stopped: Callable[[], bool], up_s: float = _UP_S) -> None:
    """Until all the applications run. Raises ConfigError where one cannot, or is late."""
    until_s = time.monotonic() + up_s
    while True:
        _go_on(stopped)
        there = serve.status().applications
        apps = {name: there[name] for name in names}
        if all(app.status == ApplicationStatus.RUNNING for app in apps.values()):
            return
        for name, app in apps.items():
            failed = app.status == ApplicationStatus.DEPLOY_FAILED
            if failed or time.monotonic() > until_s:
                said = [app.message, *(each.message for each in app.deployments.values())]
                # Each ends with the reason; before it stands a replica's whole traceback.
                why = "; ".join(text.strip().splitlines()[-1] for text in said if text.strip())
                raise ConfigError(
                    f"{name} {'cannot start' if failed else f'is not up after {up_s:g} s'}: {why} "
                    "(in a cluster: is the bundle on every node, and has it as many CPUs as replicas "
                    "x threads?)"
                )
        time.sleep(_POLL_S)
