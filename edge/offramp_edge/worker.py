"""EdgeWorker: the device's agent for plain code, for asyncio, and for notebooks.

It runs an event loop of its own in a thread, so one worker serves a script, several event loops, or
Jupyter, whose loop is always running. Both ways of asking are thin: the agent (agent.py) does the
work.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
)
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from offramp_common.activations import NumpyArray
from offramp_common.bundle import Bundle
from offramp_common.runner import Layers
from offramp_common.text import Text, TextEncoder
from offramp_common.transport import Transport
from offramp_edge.answers import Answer, Failed, Sample
from offramp_edge.assembly import MakePlanner, Parts, started
from offramp_edge.chooser import chooser_for
from offramp_edge.connect import connector
from offramp_edge.own_loop import OwnLoop
from offramp_edge.settings import EdgeSettings, plan_for
from offramp_edge.sources import Given, samples
from offramp_edge.stream import Result, Stream

T = TypeVar("T")
OnAnswer = Callable[[Answer], None]


def load_bundle(path: str | Path) -> Bundle:
    """The bundle in a directory. Raises BundleError, which says what is missing and what to do."""
    return Bundle.read(path)


class EdgeWorker:
    """Answers texts with a bundle's shallow layers here and its deep ones in the cloud.

        with EdgeWorker("bundles/assistant-intents", "cloud.example:8443", ca="ca.pem") as worker:
            print(worker.answer("wake me at seven").label)

    Whatever happens to link and cloud, every text is answered; `Answer.where` says from where.
    """

    def __init__(
        self,
        bundle: Bundle | str | Path,
        cloud: str | None = None,
        *,
        settings: EdgeSettings | None = None,
        ca: str | Path | None = None,
        cert: str | Path | None = None,
        key: str | Path | None = None,
        insecure: bool = False,
        transport: Transport | None = None,
        layers: Layers[NumpyArray] | None = None,
        planner: MakePlanner | None = None,
        on_final: OnAnswer | None = None,
        **overrides: Any,
    ) -> None:
        """`cloud` is HOST:PORT; without it all layers run here. `ca`, `cert` and `key` are PEM
        files for TLS; plaintext to another machine needs `insecure`. `overrides` are fields of
        `settings`. `transport` and `layers` take the place of gRPC and ONNX Runtime, `planner` makes
        what takes the place of the settings' own planner. `on_final` is called, from the worker's
        thread, with the final answer of each sample that waited in the settings' `spool`.

        Raises ConfigError (BundleError) for a set-up that cannot work. A cloud that is not there
        is no error: the worker looks for it as long as it lives."""
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.read(bundle)
        self.settings = (settings or EdgeSettings()).changed(overrides)
        plan = plan_for(self.bundle, self.settings)
        alone = cloud is None and transport is None
        split = self.bundle.n_layers if alone else plan.split
        self.chooser = chooser_for(self.bundle, self.settings, split)
        connect = (
            connector(cloud, ca, cert, key, insecure) if transport is None else lambda: transport
        )
        layers = layers or _graphs(self.bundle, plan.precision, self.settings.threads)
        encode, executor = TextEncoder(self.bundle), ThreadPoolExecutor(1, "offramp-layers")
        about = (self.bundle, self.settings, plan, layers, encode, connect, executor)
        self._run(Parts(*about, self.chooser, planner, on_final))

    def _run(self, parts: Parts) -> None:
        """An event loop in a thread of its own, and the agent in it."""
        self._compute = parts.executor
        self._loop = OwnLoop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="offramp-edge", daemon=True
        )
        self._thread.start()
        self._closed = False
        try:
            self.agent = self._do(started(parts))
        except BaseException:
            self._stop()
            raise

    def answer(
        self,
        text: Text | Sample,
        *,
        id: str = "",
        deadline_ms: float | None = None,
        on_provisional: OnAnswer | None = None,
    ) -> Answer:
        """One text's answer. RequestError when the text is not what the model takes.

        `on_provisional` is called, from the worker's thread, with the deepest exit's answer when
        the cloud is asked for a better one."""
        sample = _sample(text, id, deadline_ms)
        return self._do(self.agent.answer(sample, on_provisional))

    def answer_many(
        self, texts: Iterable[Given], *, ordered: bool = True, provisional: bool = False
    ) -> Iterator[Result]:
        """An `Answer` for each text (`Failed` for one that is no input), in order or as they
        finish. Texts are read as there is room for them, in a thread of their own.

        With `provisional` a text that is sent to the cloud has two: the device's at once, marked
        `provisional`, and the final one; all come as they are ready, whatever `ordered` says."""
        stream = self._stream(samples(texts, None), ordered, provisional)
        try:
            while (result := self._do(stream.following())) is not None:
                yield result
        finally:
            if not self._closed:
                self._do(stream.close())

    async def answer_async(
        self,
        text: Text | Sample,
        *,
        id: str = "",
        deadline_ms: float | None = None,
        on_provisional: OnAnswer | None = None,
    ) -> Answer:
        """`answer` for event loops; `on_provisional` is called in the caller's loop."""
        loop, tell = asyncio.get_running_loop(), on_provisional
        if tell is not None:

            def on_provisional(answer: Answer, tell: OnAnswer = tell) -> None:
                loop.call_soon_threadsafe(tell, answer)
                # The caller's thread has it before this one goes on to encode, and not when Python next
                # takes the lock from it, up to 5 ms later (docs/decisions/0008).
                time.sleep(0)

        sample = _sample(text, id, deadline_ms)
        return await asyncio.wrap_future(self._begin(self.agent.answer(sample, on_provisional)))

    async def answer_many_async(
        self,
        texts: Iterable[Given] | AsyncIterable[Given],
        *,
        ordered: bool = True,
        provisional: bool = False,
    ) -> AsyncIterator[Result]:
        """`answer_many` for event loops; an async iterable is read in the caller's loop."""
        loop = asyncio.get_running_loop()
        stream = self._stream(samples(texts, loop), ordered, provisional)
        try:
            while True:
                result = await asyncio.wrap_future(self._begin(stream.following()))
                if result is None:
                    return
                yield result
        finally:
            if not self._closed:
                await asyncio.wrap_future(self._begin(stream.close()))

    def wait_for_spool(self, timeout_s: float) -> bool:
        """Wait until every sample in the spool has its final answer; False when that takes longer."""
        resender = self.agent.resender
        return resender is None or self._do(resender.emptied(timeout_s))

    def close(self) -> None:
        """End it; whoever still waits for an answer gets a CancelledError."""
        if self._closed:
            return
        self._closed = True
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._stop()
        if self.chooser is not None:
            self.chooser.save()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await asyncio.to_thread(self.close)

    def _stream(
        self, source: AsyncGenerator[Sample | Failed, None], ordered: bool, provisional: bool
    ) -> Stream:
        in_flight = self.settings.max_in_flight
        return Stream(self.agent, source, ordered, in_flight, provisional)

    def _begin(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        if self._closed:
            work.close()
            raise RuntimeError("this EdgeWorker is closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        future = self._begin(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # interrupted while waiting
            raise

    async def _end(self) -> None:
        await self.agent.close()
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
        await self._loop.shutdown_asyncgens()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._compute.shutdown()


def _graphs(bundle: Bundle, precision: str, threads: int) -> Layers[NumpyArray]:
    # Loaded late: who brings layers of another runtime needs no ONNX Runtime.
    from offramp_edge.runtime import OnnxLayers

    return OnnxLayers(bundle, precision, threads)


def _sample(text: Text | Sample, id: str, deadline_ms: float | None) -> Sample:
    sample = text if isinstance(text, Sample) else Sample(text)
    return replace(
        sample,
        id=id or sample.id,
        deadline_ms=sample.deadline_ms if deadline_ms is None else deadline_ms,
    )
