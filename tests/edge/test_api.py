"""The Python API: its names, and a worker that is used, interrupted and closed from anywhere."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from edge_cloud import Link, TorchAsNumpy, cloud_of

import offramp_edge
from offramp_common.activations import Activations, NumpyArray
from offramp_common.bundle import Bundle
from offramp_common.errors import BundleError, ConfigError
from offramp_common.runner import Knobs, Step
from offramp_edge import Answer, EdgeSettings, EdgeWorker, Failed, load_bundle
from offramp_edge.connect import connector, is_loopback, split_address


def test_the_package_exports_what_it_says() -> None:
    for name in offramp_edge.__all__:
        assert getattr(offramp_edge, name).__name__ == name
    with pytest.raises(AttributeError, match="nonsense"):
        _ = offramp_edge.nonsense


def test_importing_the_package_or_its_command_loads_nothing_heavy() -> None:
    program = (
        "import sys, offramp_edge, offramp_edge.cli\n"
        "heavy = 'numpy grpc onnxruntime tokenizers aiohttp rich torch'.split()\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_bundle_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no bundle there"):
        load_bundle(tmp_path)
    with pytest.raises(BundleError, match="no bundle there"):
        EdgeWorker(tmp_path)


def test_overrides_are_settings(bundle: Bundle, layers: TorchAsNumpy) -> None:
    settings = EdgeSettings(deadline_ms=500, split=1)
    with EdgeWorker(bundle, settings=settings, layers=layers, split=3) as worker:
        assert (worker.settings.deadline_ms, worker.settings.split) == (500, 3)
    with pytest.raises(ConfigError, match="unknown setting 'splitt'"):
        EdgeWorker(bundle, layers=layers, splitt=3)


async def test_the_plain_call_works_inside_a_running_loop(
    bundle: Bundle, layers: TorchAsNumpy
) -> None:
    """As in a notebook's cell."""
    with EdgeWorker(bundle, layers=layers) as worker:
        assert worker.answer("w1 w2").where == "device"
        assert len(list(worker.answer_many(["w1", "w2"]))) == 2


def test_many_threads_may_ask_one_worker(bundle: Bundle, layers: TorchAsNumpy) -> None:
    texts = [f"w{i} w{i + 1}" for i in range(64)]
    with EdgeWorker(bundle, layers=layers) as worker, ThreadPoolExecutor(8) as pool:
        alone = [worker.answer(text) for text in texts]
        together = list(pool.map(worker.answer, texts))
    assert [a.label for a in together] == [a.label for a in alone]
    assert [a.text for a in together] == texts


async def test_closing_ends_whoever_still_waits(bundle: Bundle, layers: TorchAsNumpy) -> None:
    async with cloud_of(bundle) as cloud, Link(cloud.address) as link:
        worker = EdgeWorker(
            bundle,
            link.address,
            layers=layers,
            exits=False,
            plan="fixed",
            offload_timeout_ms=60_000.0,
            max_in_flight=1,
        )
        assert (await worker.answer_async("w1")).where == "cloud"
        link.swallow()
        waiting = asyncio.create_task(worker.answer_async("w1"))
        assert worker.agent.offloads is not None
        async with asyncio.timeout(10):
            while not worker.agent.offloads.full():  # noqa: ASYNC110 - there is no event for it
                await asyncio.sleep(0.01)
        await asyncio.to_thread(worker.close)
        with pytest.raises((asyncio.CancelledError, CancelledError)):
            await waiting


@dataclass
class Breaking:
    """Layers that fail for one length of text, or always."""

    inner: TorchAsNumpy
    at_length: int | None = None

    @property
    def n_layers(self) -> int:
        return self.inner.n_layers

    def step(self, acts: Activations[NumpyArray], knobs: Knobs) -> Step[NumpyArray]:
        if self.at_length is None:
            raise BundleError("layer_00.onnx: damaged")
        if acts.n_tokens == self.at_length:
            raise RuntimeError("the runtime broke")
        return self.inner.step(acts, knobs)


def test_layers_that_cannot_be_loaded_are_an_error_at_once(
    bundle: Bundle, layers: TorchAsNumpy
) -> None:
    before = threading.active_count()
    with pytest.raises(BundleError, match="damaged"):
        EdgeWorker(bundle, "127.0.0.1:1", layers=Breaking(layers))
    assert threading.active_count() == before


def test_a_bug_in_one_sample_is_that_samples_alone(bundle: Bundle, layers: TorchAsNumpy) -> None:
    with EdgeWorker(bundle, layers=Breaking(layers, at_length=5)) as worker:
        results = list(worker.answer_many(["w1", "w1 w2 w3", "w2"]))
        assert [type(result) for result in results] == [Answer, Failed, Answer]
        assert isinstance(results[1], Failed)
        assert "the runtime broke" in results[1].error
        with pytest.raises(RuntimeError, match="the runtime broke"):
            worker.answer("w1 w2 w3")
        assert worker.answer("w1").where == "device"


def test_a_source_that_blocks_does_not_hold_answers_back(
    bundle: Bundle, layers: TorchAsNumpy
) -> None:
    answered = threading.Event()

    def source() -> Iterator[str]:
        yield "w1"
        assert answered.wait(30), "the first answer was held back"
        yield "w2"

    with EdgeWorker(bundle, layers=layers) as worker:
        stream = worker.answer_many(source())
        next(stream)
        answered.set()
        assert len(list(stream)) == 1


def test_a_source_that_never_comes_back_does_not_stop_the_end(
    bundle: Bundle, layers: TorchAsNumpy
) -> None:
    never = threading.Event()

    def source() -> Iterator[str]:
        yield "w1"
        never.wait(60)

    began = time.monotonic()
    with EdgeWorker(bundle, layers=layers) as worker:
        stream = worker.answer_many(source())
        next(stream)
        stream.close()
    assert time.monotonic() - began < 30
    never.set()


@pytest.mark.parametrize(
    ("address", "parts"),
    [("cloud.example:443", ("cloud.example", 443)), ("[::1]:0", ("::1", 0))],
)
def test_an_address_is_host_and_port(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address) == parts


@pytest.mark.parametrize("address", ["", "host", "host:", ":80", "host:http", "host:70000"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        split_address(address)


def test_plaintext_beyond_this_machine_must_be_meant() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "10.0.0.1", "x")] == [
        True, True, True, False, False,
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="--ca FILE"):
        connector("10.0.0.1:443", None, None, None, insecure=False)
    connector("10.0.0.1:443", None, None, None, insecure=True)
    connector("127.0.0.1:443", None, None, None, insecure=False)
