"""The device's session with the cloud: handshake, sending, and coming back after a failure.

Whatever network and cloud do leaves this file as NotAnswered, with a reason.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from offramp_common import __version__
from offramp_common.activations import Activations, NumpyArray
from offramp_common.bundle import Bundle
from offramp_common.clock import Clock
from offramp_common.errors import (
    BundleMismatch,
    CloudBusy,
    CloudUnavailable,
    ConfigError,
    DeadlineExceeded,
    RequestError,
    UnknownCodec,
    WireError,
)
from offramp_common.frames import encode_frame
from offramp_common.messages import completion_to_pb, offload_to_pb
from offramp_common.retry import Backoff
from offramp_common.runner import Knobs
from offramp_common.transport import Completion, Hello, Offload, Transport
from offramp_edge.breaker import CONNECTING, UP, Breaker
from offramp_edge.handshake import Agreed, agree, check_completion
from offramp_edge.link import Link
from offramp_edge.settings import EdgeSettings, Plan

log = logging.getLogger("offramp.edge")

# The first that fits names the reason: the tree's leaves stand before their bases.
_REASONS: tuple[tuple[type[Exception], str], ...] = (
    (BundleMismatch, "mismatch"),
    (UnknownCodec, "codec"),
    (WireError, "malformed"),
    (RequestError, "refused"),
    (CloudBusy, "busy"),
    (CloudUnavailable, "unavailable"),
    (DeadlineExceeded, "timeout"),
    (TimeoutError, "timeout"),
    (ConfigError, "setup"),
)
_DOUBT_S = 1.0
"""Doubts are settled by a handshake at most this often."""
_SOONEST_DOUBT_S = 0.25
_UNUSUAL = 4.0  # times the usual time of an answer
_NEW = 0.2  # weight of the latest answer in the usual time
_FEWEST_PROBE_MS = 500.0
_PROBE_ROUND_TRIPS = 5  # connecting takes up to three with TLS, the handshake one


class NotAnswered(Exception):
    """The cloud did not answer; `reason` is a key of answers.REASONS, `bytes_up` what was spent."""

    def __init__(self, reason: str, message: str = "") -> None:
        super().__init__(message or reason)
        self.reason = reason
        self.bytes_up = 0


@dataclass(frozen=True, slots=True, eq=False)
class Finished:
    """What the cloud made of one sample, and what it cost. Bytes are those of the messages."""

    completion: Completion
    encode_ms: float
    network_ms: float
    bytes_up: int
    bytes_down: int


@runtime_checkable
class TellsOfLoss(Protocol):
    """A transport that notices, with nothing in flight, that its connection is gone."""

    on_lost: Callable[[], None]


class CloudSession:
    """One device's session for one bundle cut at one depth."""

    def __init__(
        self,
        transport: Transport,
        bundle: Bundle,
        plan: Plan,
        settings: EdgeSettings,
        clock: Clock,
        rng: random.Random,
    ) -> None:
        self._transport, self._clock, self._settings = transport, clock, settings
        self._manifest, self._plan = bundle.manifest, plan
        self._cut, self._digest = bundle.cuts[plan.split], bundle.digest(plan.split)
        backoff = Backoff(settings.backoff_ms / 1000, settings.backoff_max_ms / 1000)
        self.breaker = Breaker(backoff, rng, self._give_up_waiting)
        if isinstance(transport, TellsOfLoss):
            # The next cloud behind the address may be another one: greet before it is sent work.
            transport.on_lost = self.breaker.ask.set
        self.link = Link(clock)
        self._agreed: Agreed | None = None
        self._waits: set[asyncio.Timeout] = set()
        self._usual_s: float | None = None  # what an answer takes, a moving average
        self._requests = 0
        self._name = f"{rng.getrandbits(48):012x}"  # request ids of two devices must differ

    async def keep(self) -> None:
        """Greet the cloud whenever a greeting is wanted, until cancelled."""
        breaker = self.breaker
        while True:
            breaker.ask.clear()
            await self._greet()
            if breaker.state == UP:
                greeted_s = self._clock.now()
                await breaker.ask.wait()
                if breaker.state == UP:  # a doubt, soon after a good handshake, can wait
                    await asyncio.sleep(greeted_s + _DOUBT_S - self._clock.now())
            await asyncio.sleep(breaker.wait_s())

    async def close(self) -> None:
        await self._transport.close()

    def worth_asking(self) -> bool:
        return self.breaker.state in (CONNECTING, UP)

    def link_is_good(self) -> bool:
        """False while a fresh estimate says that the link is worse than the settings ask for."""
        wanted = self._settings.min_uplink_mbps
        if not wanted:
            return True
        estimate = self.link.estimate()
        if estimate.uplink_mbps is None or estimate.age_s is None:
            return True
        expired = 1000 * estimate.age_s > self._settings.link_expires_ms
        return expired or estimate.uplink_mbps >= wanted

    async def finish(
        self,
        acts: Activations[NumpyArray],
        timeout_s: float,
        traceparent: str = "",
        knobs: Knobs | None = None,
    ) -> Finished:
        """Let the cloud run the rest of one row, at an operating point of its own if it has one.
        Raises NotAnswered, in time."""
        until_s = self._clock.now() + timeout_s
        waited_ms = await self._wait_for_welcome(timeout_s)
        began_s = self._clock.now()
        welcomes = self.breaker.welcomes
        work = self._work(acts, traceparent, knobs)
        sent_s = self._clock.now()
        left_s = until_s - sent_s
        work = replace(work, deadline_ms=max(1000 * left_s, 1.0))
        bytes_up = offload_to_pb(work).ByteSize()
        try:
            done = await self._sent(work, left_s)
            check_completion(work, done, self._cut.depth, self._manifest)
        except Exception as error:  # no sample is lost, whatever a transport does
            why = self._not_answered(error, welcomes)
            why.bytes_up = 0 if why.reason == "unavailable" else bytes_up
            raise why from error
        self.breaker.answered()
        cloud_ms = done.queue_ms + done.compute_ms
        network_ms = max(0.0, 1000 * (self._clock.now() - sent_s) - cloud_ms)
        self.link.transferred(bytes_up, network_ms)
        return Finished(
            done,
            encode_ms=1000 * (sent_s - began_s),
            network_ms=network_ms + waited_ms,
            bytes_up=bytes_up,
            bytes_down=completion_to_pb(done).ByteSize(),
        )

    async def _sent(self, work: Offload, timeout_s: float) -> Completion:
        """Raises TimeoutError when time is up, or the cloud is put aside meanwhile. A reply that is
        unusually late is a reason to ask whether the cloud is there at all."""
        loop = asyncio.get_running_loop()
        began_s, doubt = loop.time(), None
        if self._usual_s is not None:
            doubt_s = max(_SOONEST_DOUBT_S, _UNUSUAL * self._usual_s)
            doubt = loop.call_later(doubt_s, self.breaker.ask.set)
        async with asyncio.timeout(timeout_s) as wait:
            self._waits.add(wait)
            try:
                done = await self._transport.complete(work, timeout_s=timeout_s)
            finally:
                self._waits.discard(wait)
                if doubt is not None:
                    doubt.cancel()
        took_s = loop.time() - began_s
        usual_s = took_s if self._usual_s is None else self._usual_s
        self._usual_s = usual_s + _NEW * (took_s - usual_s)
        return done

    async def _wait_for_welcome(self, timeout_s: float) -> float:
        """Milliseconds waited for the first handshake to end."""
        began_s = self._clock.now()
        if not self.breaker.settled.is_set():
            try:
                async with asyncio.timeout(timeout_s):
                    await self.breaker.settled.wait()
            except TimeoutError:
                raise NotAnswered("timeout", "the first handshake has not ended") from None
        if self.breaker.state != UP:
            raise NotAnswered(self.breaker.reason)
        return 1000 * (self._clock.now() - began_s)

    def _work(
        self, acts: Activations[NumpyArray], traceparent: str, knobs: Knobs | None
    ) -> Offload:
        """Raises NotAnswered for a sample beyond what the cloud accepts."""
        assert self._agreed is not None, "sent before the handshake"
        limits = self._agreed.limits
        if acts.n_tokens > limits.max_tokens:
            self._too_large(f"{acts.n_tokens} tokens, the cloud takes {limits.max_tokens}")
        frame = encode_frame(acts, self._cut, self._agreed.codec)
        if len(frame) > limits.max_frame_bytes:
            self._too_large(f"a frame of {len(frame)} bytes, at most {limits.max_frame_bytes}")
        self._requests += 1
        return Offload(
            request_id=f"{self._name}-{self._requests:x}",
            bundle=self._manifest.name,
            digest=self._digest,
            frame=frame,
            knobs=self._agreed.knobs if knobs is None else knobs,
            traceparent=traceparent,
        )

    def _too_large(self, message: str) -> None:
        self.breaker.tell("limits", message)
        raise NotAnswered("limits", message)

    def _not_answered(self, error: Exception, welcomes: int) -> NotAnswered:
        given_up = welcomes == self.breaker.welcomes and self.breaker.state != UP
        if given_up and isinstance(error, TimeoutError):
            self.link.failed()
            return NotAnswered(self.breaker.reason)
        reason = reason_of(error)
        if reason in ("timeout", "unavailable"):
            self.link.failed()
        if reason == "internal":
            log.error("a bug, please report it", exc_info=error)
        message = str(error) or "no answer in time"
        self.breaker.failed(reason, message, welcomes)
        return NotAnswered(reason, message)

    def _give_up_waiting(self) -> None:
        now_s = asyncio.get_running_loop().time()
        for wait in self._waits:
            if not wait.expired():
                wait.reschedule(now_s)

    async def _greet(self) -> None:
        hello = Hello(
            self._manifest.name,
            {self._cut.depth: self._digest},
            ("tokens",) if self._cut.integer else self._plan.codecs,
            software=f"offramp {__version__}",
        )
        timeout_s = self._probe_timeout_s()
        try:
            async with asyncio.timeout(timeout_s):
                welcome = await self._transport.hello(hello, timeout_s=timeout_s)
            self._agreed = agree(welcome, hello.codecs, self._plan.knobs, self._cut.depth)
        except Exception as error:  # the next handshake may go better
            reason = reason_of(error)
            if reason == "internal":
                log.error("a bug, please report it", exc_info=error)
            elif reason == "timeout":
                error = TimeoutError(f"no answer to the handshake within {timeout_s:.1f} s")
            self.breaker.failed(reason, str(error))
        else:
            self.breaker.welcomed()

    def _probe_timeout_s(self) -> float:
        """Long for a link that is not known, a few round trips for one that is."""
        longest_ms = self._settings.probe_timeout_ms
        rtt_ms = self.link.estimate().rtt_ms
        if rtt_ms is None:
            return longest_ms / 1000
        return min(longest_ms, max(_FEWEST_PROBE_MS, _PROBE_ROUND_TRIPS * rtt_ms)) / 1000


def reason_of(error: Exception) -> str:
    """The key of answers.REASONS for what a transport raised."""
    return next((reason for kind, reason in _REASONS if isinstance(error, kind)), "internal")
