"""The cloud tier in Ray Serve: one application a bundle, whose replicas hold one engine each.

The only module that imports ray. Serve places, replaces and counts replicas; the gateway calls them
through handles, from its own event loop. docs/decisions/0003-cloud-data-path.md has the measurements.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Read when ray.serve is imported, here and in replicas: handles send bytes over gRPC rather than
# through the object store, in this event loop rather than another thread's. Direct ingress, which
# the first switch turns on too, would open ports for HTTP that nobody uses.
_SWITCHES = {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0"}
for _name, _value in (*_SWITCHES.items(), ("RAY_USAGE_STATS_ENABLED", "0")):
    os.environ.setdefault(_name, _value)

import ray  # noqa: E402
from ray import serve  # noqa: E402
from ray.exceptions import RayError  # noqa: E402
from ray.serve.exceptions import BackPressureError, RayServeException  # noqa: E402
from ray.serve.handle import DeploymentHandle  # noqa: E402
from ray.serve.schema import ApplicationStatus  # noqa: E402

from offramp_cloud.backends import Replicas, ReplicatedBackend  # noqa: E402
from offramp_cloud.engine import load_engine  # noqa: E402
from offramp_cloud.host import Host  # noqa: E402
from offramp_cloud.placement import Placement, secure_own_ray  # noqa: E402
from offramp_cloud.statuses import Outcome  # noqa: E402
from offramp_common.bundle import Bundle  # noqa: E402
from offramp_common.errors import CloudBusy, CloudUnavailable, ConfigError  # noqa: E402

for _name in ("ray", "ray.serve"):
    logging.getLogger(_name).setLevel(logging.ERROR)  # progress is ours to report

_OBJECT_STORE_BYTES = 80 * 2**20  # nothing of ours goes through it; about the least that Ray takes
_ATTACH_S = 30.0  # how long a deployed application may take to say what it serves
_UP_S = 120.0  # how long replicas may take to start
_POLL_S = 0.1
_MAX_ONGOING = 4096  # per replica: the engine refuses for load, before Serve would hold back


class Tail:
    """A replica: the engine of one bundle. Errors are returned, so that what a call raises can only
    mean that the replica is gone."""

    def __init__(self, bundle: str, placement: Placement) -> None:
        engine = load_engine(
            bundle, threads=placement.threads, limits=placement.limits, load=placement.load
        )
        self._host = Host([engine])

    async def complete(self, request: bytes, budget_ms: float) -> Outcome:
        return await self._host.complete(request, budget_ms)

    async def hello(self, request: bytes) -> Outcome:
        return self._host.hello(request)

    async def bundles(self) -> tuple[str, ...]:
        return self._host.bundles

    async def probe(self) -> tuple[int, dict[str, dict[str, Any]]]:
        """(process id, bundle -> counters)."""
        return os.getpid(), self._host.counters()


def build(args: Mapping[str, Any]) -> serve.Application:
    """The application of one bundle, for `serve run` and `serve deploy` (deploy/serve.yaml).

    args: `bundle` (a directory that every node can read); `replicas`, `threads`, `drain_s`.
    """
    known = {"bundle", "replicas", "threads", "drain_s"}
    if "bundle" not in args or not set(args) <= known:
        raise ConfigError(
            f"arguments {sorted(args)}: `bundle` is needed, known are {sorted(known)}"
        )
    placement = Placement(
        replicas=int(args.get("replicas", 1)),
        threads=int(args.get("threads", 1)),
        drain_s=float(args.get("drain_s", 20.0)),
    )
    # A cluster of somebody else's: replicas need the switches, too.
    return _application(str(args["bundle"]), placement, {"env_vars": _SWITCHES})


def _application(
    bundle: str, placement: Placement, runtime_env: Mapping[str, Any]
) -> serve.Application:
    deployment: serve.Deployment = serve.deployment(
        num_replicas=placement.replicas,
        max_ongoing_requests=_MAX_ONGOING,
        graceful_shutdown_timeout_s=placement.drain_s,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=2.0,
        ray_actor_options={"num_cpus": placement.threads, "runtime_env": dict(runtime_env)},
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )(Tail)
    return deployment.bind(bundle, placement)


def start(
    bundles: Sequence[Path],
    placement: Placement,
    *,
    address: str | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> ReplicatedBackend:
    """Place the bundles in a Ray of our own (call secure_own_ray before importing this module), or in
    the one at `address`; blocks until replicas are up.

    Raises ConfigError when there is no such Ray, it refuses us, or replicas cannot start there; and
    CloudUnavailable between two steps once `stopped` says so. What was started is then stopped.
    """
    names = {Bundle.read(path).manifest.name: path for path in bundles}
    owned = Owned()
    try:
        if address is None:
            _start_ray(owned, num_cpus=len(names) * placement.replicas * placement.threads)
        else:
            _join_ray(address)
        _go_on(stopped)
        serve.start(proxy_location="Disabled")
        _go_on(stopped)
        handles = _deploy(names, placement, owned)
        _await_replicas(owned, stopped)
        return ReplicatedBackend(handles, placement.replicas, owned.close)
    except BaseException:
        asyncio.run(owned.close())
        raise


async def attach(apps: Sequence[str], address: str) -> ReplicatedBackend:
    """A further gateway's backend: applications that are deployed already, by name.

    Raises ConfigError for an unknown Ray or application, CloudUnavailable when no replica answers.
    """
    await asyncio.to_thread(_join_ray, address)
    handles: dict[str, Replicas] = {}
    running = 1
    for app in apps:
        try:
            handle = Handle(await asyncio.to_thread(serve.get_app_handle, app))
            status = await asyncio.to_thread(serve.status)
        except RayServeException as error:
            raise ConfigError(f"no application {app!r} in the Ray at {address}: {error}") from error
        for deployment in status.applications[app].deployments.values():
            running = max(running, sum(deployment.replica_states.values()))
        async with asyncio.timeout(_ATTACH_S):
            (bundle,) = await handle.call("bundles")
        handles[bundle] = handle
    return ReplicatedBackend(handles, running, Owned().close)


def _go_on(stopped: Callable[[], bool]) -> None:
    if stopped():
        raise CloudUnavailable("told to stop while starting")


def _start_ray(owned: Owned, num_cpus: int) -> None:
    """A Ray for this process alone; it ends with it, however that ends."""
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


def _join_ray(address: str) -> None:
    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    except (ConnectionError, ValueError, RuntimeError, RayError) as error:
        raise ConfigError(
            f"--address {address}: cannot join ({error}); set RAY_AUTH_TOKEN to that cluster's, and use "
            "the same versions of ray and Python"
        ) from error


def _deploy(bundles: Mapping[str, Path], placement: Placement, owned: Owned) -> dict[str, Handle]:
    """Ask for an application per bundle; returns their handles by the bundle's name."""
    there = serve.status().applications
    runtime_env = {} if owned.temp_dir else {"env_vars": _SWITCHES}
    targets = []
    for name, path in bundles.items():
        app = f"offramp-{name}"
        if app in there:
            raise ConfigError(
                f"{app} is deployed in this Ray already; `--attach {app}` puts another gateway "
                "before it"
            )
        application = _application(str(path.resolve()), placement, runtime_env)
        targets.append(serve.RunTarget(application, app, route_prefix=None))
    owned.apps += [target.name for target in targets]
    handles = serve.run_many(targets, wait_for_applications_running=False)
    return {name: Handle(handle) for name, handle in zip(bundles, handles, strict=True)}


def _await_replicas(owned: Owned, stopped: Callable[[], bool]) -> None:
    until_s = time.monotonic() + _UP_S
    while True:
        _go_on(stopped)
        there = serve.status().applications
        apps = {name: there[name] for name in owned.apps}
        if all(app.status == ApplicationStatus.RUNNING for app in apps.values()):
            return
        for name, app in apps.items():
            failed = app.status == ApplicationStatus.DEPLOY_FAILED
            if failed or time.monotonic() > until_s:
                said = [app.message, *(each.message for each in app.deployments.values())]
                # Each ends with the reason; before it stands a replica's whole traceback.
                why = "; ".join(text.strip().splitlines()[-1] for text in said if text.strip())
                raise ConfigError(
                    f"{name} {'cannot start' if failed else f'is not up after {_UP_S:g} s'}: {why} "
                    "(in a cluster: is the bundle on every node, and has it as many CPUs as replicas "
                    "x threads?)"
                )
        time.sleep(_POLL_S)


class Handle:
    """A Serve handle as the backend's Replicas. Used from one event loop."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def call(self, method: str, *args: Any) -> Any:
        response = getattr(self._handle, method).remote(*args)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()  # the replica would go on otherwise
            raise
        except BackPressureError as error:
            raise CloudBusy(f"{error}; retry later") from error
        except (RayError, RayServeException) as error:
            kind = type(error).__name__
            raise CloudUnavailable(f"no replica could answer ({kind}); retry later") from error


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
