"""What `offramp top` shows: two readings of a gateway's /metrics, and what happened between them."""

from __future__ import annotations

import math
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from offramp_common.errors import CloudUnavailable, ConfigError

_PATIENCE_S = 5.0
_OK = "OK"
_SIGN = "offramp_cloud_requests"
"""A family that every gateway has, busy or not."""

Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Reading:
    """One scrape: (sample's name, labels) -> value, and when, in seconds on any clock."""

    at_s: float
    values: Mapping[tuple[str, Labels], float]

    @classmethod
    def of(cls, text: str, at_s: float, source: str = "the metrics") -> Reading:
        """Raises ConfigError for text that is not a gateway's metrics."""
        from prometheus_client.parser import text_string_to_metric_families

        values: dict[tuple[str, Labels], float] = {}
        families = set()
        try:
            for family in text_string_to_metric_families(text):
                families.add(family.name)
                for sample in family.samples:
                    values[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
        except ValueError as error:
            raise ConfigError(f"{source} are not Prometheus' text ({error})") from error
        if _SIGN not in families:
            raise ConfigError(
                f"{source} are not a gateway's: no {_SIGN} among them; give what "
                "`offramp cloud serve --metrics HOST:PORT` listens on"
            )
        return cls(at_s, values)

    def by(self, name: str, *labels: str) -> dict[tuple[str, ...], float]:
        """The samples of a name, summed over all other labels."""
        found: defaultdict[tuple[str, ...], float] = defaultdict(float)
        for (sample, pairs), value in self.values.items():
            if sample == name:
                given = dict(pairs)
                found[tuple(given.get(label, "") for label in labels)] += value
        return dict(found)


def scrape(address: str, clock: Callable[[], float]) -> Reading:
    """Read http://HOST:PORT/metrics. CloudUnavailable where nobody answers, ConfigError where it is
    not a gateway."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"{address!r}: must be HOST:PORT, such as 127.0.0.1:9464")
    url = f"http://{address}/metrics"
    try:
        with urllib.request.urlopen(url, timeout=_PATIENCE_S) as reply:
            text = reply.read().decode()
    except urllib.error.HTTPError as error:
        raise ConfigError(f"{url} answers {error.code}: that is not a gateway's metrics") from error
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", error)
        raise CloudUnavailable(
            f"nothing answers at {url} ({why}); start the gateway with --metrics HOST:PORT"
        ) from error
    return Reading.of(text, clock(), url)


@dataclass(frozen=True)
class BundleView:
    """A bundle since the reading before. Rates are a second; times are milliseconds, None without
    requests; `depths` is the share of answers that left at each depth."""

    name: str
    replicas: int
    requests: float
    rows: float
    refused: Mapping[str, float]
    p50_ms: float | None
    p95_ms: float | None
    queue_p50_ms: float | None
    compute_p50_ms: float | None
    depths: Mapping[int, float]


@dataclass(frozen=True)
class ReplicaView:
    """A replica: `work_left` in layers x tokens, `batch` its mean rows run together, `layer_rows` a
    second."""

    bundle: str
    name: str
    work_left: float
    batch: float | None
    layer_rows: float


@dataclass(frozen=True)
class View:
    """What the screen shows. `devices` were heard of within the last minute; `seconds` between the
    readings; bytes are a second; `certificate_days` until the first of them ends, None without."""

    seconds: float
    devices: int
    at_work: int
    bytes_in: float
    bytes_out: float
    certificate_days: float | None
    bundles: list[BundleView] = field(default_factory=list)
    replicas: list[ReplicaView] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def between(before: Reading, after: Reading, now_epoch_s: float) -> View:
    """What happened from one reading to the next of the same gateway."""
    change = _Change(before, after)
    ends_s = after.by("offramp_certificate_expiry_timestamp_seconds", "file").values()
    served = {labels[0] for labels in after.by("offramp_cloud_replicas", "bundle")}
    served |= {labels[0] for labels in after.by("offramp_cloud_rows_total", "bundle")}
    return View(
        seconds=change.seconds,
        devices=int(sum(after.by("offramp_cloud_devices").values())),
        at_work=int(sum(after.by("offramp_cloud_at_work").values())),
        bytes_in=sum(change.rates("offramp_cloud_request_bytes_total").values()),
        bytes_out=sum(change.rates("offramp_cloud_reply_bytes_total").values()),
        certificate_days=(min(ends_s) - now_epoch_s) / 86400 if ends_s else None,
        bundles=[_bundle(change, name) for name in sorted(served - {""})],
        replicas=_replicas(change),
    )


class _Change:
    def __init__(self, before: Reading, after: Reading) -> None:
        self.before, self.after = before, after
        self.seconds = max(1e-3, after.at_s - before.at_s)

    def counts(self, name: str, *labels: str) -> dict[tuple[str, ...], float]:
        """By how much counters grew; one that shrank began anew, with its process."""
        old = self.before.by(name, *labels)
        grown = {
            key: (value, value - old.get(key, 0.0))
            for key, value in self.after.by(name, *labels).items()
        }
        return {key: more if more >= 0 else value for key, (value, more) in grown.items()}

    def rates(self, name: str, *labels: str) -> dict[tuple[str, ...], float]:
        return {key: n / self.seconds for key, n in self.counts(name, *labels).items()}

    def quantile_ms(self, name: str, bundle: str, share: float) -> float | None:
        counts = self.counts(f"{name}_bucket", "bundle", "le")
        buckets = [(float(le), n) for (of, le), n in counts.items() if of == bundle]
        value = quantile(buckets, share)
        return None if value is None else 1000 * value


def quantile(buckets: list[tuple[float, float]], share: float) -> float | None:
    """The value below which `share` of a histogram's observations lie, from (upper bound, how many
    lie at or below it); within a bucket they are taken to be spread evenly. None without any."""
    ordered = sorted(buckets)
    if not ordered or not ordered[-1][1]:
        return None
    wanted = share * ordered[-1][1]
    low, below = 0.0, 0.0
    for high, at_most in ordered:
        if at_most >= wanted:
            if math.isinf(high):
                return low  # beyond the last bound: no more is known
            inside = at_most - below
            return low + (high - low) * ((wanted - below) / inside if inside else 1.0)
        low, below = high, at_most
    return low


def _bundle(change: _Change, name: str) -> BundleView:
    statuses = {
        status: rate
        for (of, status), rate in change.rates(
            "offramp_cloud_requests_total", "bundle", "status"
        ).items()
        if of == name
    }
    depths = {
        int(depth): n
        for (of, depth), n in change.counts("offramp_cloud_exits_total", "bundle", "depth").items()
        if of == name
    }
    total = sum(depths.values())
    return BundleView(
        name=name,
        replicas=int(change.after.by("offramp_cloud_replicas", "bundle").get((name,), 0)),
        requests=sum(statuses.values()),
        rows=change.rates("offramp_cloud_rows_total", "bundle").get((name,), 0.0),
        refused={status: rate for status, rate in statuses.items() if rate and status != _OK},
        p50_ms=change.quantile_ms("offramp_cloud_request_seconds", name, 0.5),
        p95_ms=change.quantile_ms("offramp_cloud_request_seconds", name, 0.95),
        queue_p50_ms=change.quantile_ms("offramp_cloud_queue_seconds", name, 0.5),
        compute_p50_ms=change.quantile_ms("offramp_cloud_compute_seconds", name, 0.5),
        depths={depth: n / total for depth, n in sorted(depths.items()) if n},
    )


def _replicas(change: _Change) -> list[ReplicaView]:
    where = ("bundle", "replica")
    rows = change.counts("offramp_engine_batch_rows_sum", *where)
    batches = change.counts("offramp_engine_batch_rows_count", *where)
    layer_rows = change.rates("offramp_engine_layer_rows_total", *where)
    work_left = change.after.by("offramp_engine_work_left", *where)
    return [
        ReplicaView(
            bundle=key[0],
            name=key[1],
            work_left=work_left.get(key, 0.0),
            batch=rows[key] / batches[key] if batches.get(key) else None,
            layer_rows=layer_rows.get(key, 0.0),
        )
        for key in sorted(rows)
    ]
