"""Where cells run: the bundle, the slowed device, its record of this day, and a cloud tier that stays."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from slowed import Slowed

from offramp_common import certs
from offramp_common.bundle import Bundle
from offramp_common.text import Text
from offramp_edge import EdgeWorker
from offramp_edge.runtime import OnnxLayers
from offramp_edge.settings import EdgeSettings
from offramp_simulate.processes import Child
from offramp_simulate.record import Record
from offramp_simulate.record_times import deviation_shares, layer_runs, overhead_ms
from validation.cells import LAYER_MS

DEVICE = "validated-device"
_START_S = 120.0


@dataclass(frozen=True)
class Place:
    """`texts` are the record's samples, in its order; `folder` holds the certificates."""

    bundle: Bundle
    record: Record
    layers: Slowed
    texts: list[Text]
    cloud: str = ""
    folder: Path = Path()

    def worker(self, cloud: str, settings: EdgeSettings) -> EdgeWorker:
        pair = certs.pair_of(self.folder, DEVICE)
        ca = certs.pair_of(self.folder, "ca").cert
        return EdgeWorker(
            self.bundle,
            layers=self.layers,
            ca=ca,
            cert=pair.cert,
            key=pair.key,
            cloud=cloud,
            settings=settings,
        )


@asynccontextmanager
async def cloud_of(place: Place, folder: Path) -> AsyncIterator[Place]:
    """`offramp cloud serve --local`, with TLS, in a process of its own."""
    certs.init(folder)
    certs.issue(folder, DEVICE)
    arguments = ("--listen", "127.0.0.1:0", "--local", "--tls-dir", str(folder))
    child = await Child.start(
        "cloud", "cloud", "serve", "--bundle", str(place.bundle.path), *arguments
    )
    try:
        ready = await child.read(_START_S)
        yield replace(place, cloud=ready["listening"], folder=folder)
    finally:
        await child.stop()


def of_slowed(record: Record, bundle: Bundle, layers: Slowed, texts: list[Text]) -> Record:
    """The record with the slowed device's times instead, by the wall clock: sleeping is no processor time."""
    runs = [
        layer_runs(bundle, layers, int(length), 4, time.perf_counter) for length in record.lengths_G
    ]
    layer_ms_LG = np.stack([np.median(run_RL, axis=0) for run_RL in runs], axis=1)
    totals = [run_RL.sum(axis=1) for run_RL in runs]
    deviations = np.concatenate([total / np.median(total) for total in totals])
    layer_ms_PLG = record.layer_ms_PLG.copy()
    layer_ms_PLG[record.precision(record.header.precision)] = layer_ms_LG
    all_ms_G, plain = layer_ms_LG.sum(axis=0), [text for text in texts if isinstance(text, str)]
    beside_ms = overhead_ms(bundle, plain, record.lengths_G, all_ms_G, True, layers)
    return replace(
        record,
        header=replace(record.header, overhead_ms=beside_ms),
        layer_ms_PLG=layer_ms_PLG,
        deviation_J=np.quantile(deviations, deviation_shares()),
    )


def slowed(bundle: Bundle) -> Slowed:
    return Slowed(OnnxLayers(bundle, bundle.manifest.precision), LAYER_MS)
