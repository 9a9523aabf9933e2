"""The device's session with the cloud: handshake, sending, and coming back after a failure.

Whatever network and cloud do leaves this file as NotAnswered, with a reason (not_answered.py).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from offramp_common.activations import Activations, NumpyArray
from offramp_common.bundle import Bundle
from offramp_common.clock import Clock
from offramp_common.errors import CloudBusy
from offramp_common.retry import Backoff
from offramp_common.runner import Knobs
from offramp_common.transport import Completion, Offload, Transport
from offramp_edge.breaker import UP, Breaker
from offramp_edge.cloud_times import CloudTimes
from offramp_edge.greetings import DOUBTS_APART_S, Greetings, doubt_s, patience_ms, usual_after
from offramp_edge.handshake import Agreed, agree, check_completion
from offramp_edge.link import Link, Transfer
from offramp_edge.not_answered import NotAnswered, reason_of
from offramp_edge.requests import (
    PROBE_TOKENS,
    BeyondLimits,
    Requests,
    blank,
    nbytes_of,
    probe_depth,
    used,
)
from offramp_edge.settings import EdgeSettings, Plan

log = logging.getLogger("offramp.edge")


@dataclass(frozen=True, slots=True, eq=False)
class Finished:
    """What the cloud made of one sample, and what it cost. Bytes are those of the messages; `codec` is of
    hidden states, empty for token ids."""

    completion: Completion
    encode_ms: float
    network_ms: float
    bytes_up: int
    bytes_down: int
    codec: str


@runtime_checkable
class TellsOfLoss(Protocol):
    """A transport that notices, with nothing in flight, that its connection is gone."""

    on_lost: Callable[[], None]


class CloudSession:
    """One device's session for one bundle, cut at any of its plan's depths."""

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
        self._requests = Requests(bundle, plan, rng)
        backoff = Backoff(settings.backoff_ms / 1000, settings.backoff_max_ms / 1000)
        self.breaker = Breaker(
            backoff, rng, clock, self._give_up_waiting, settings.return_ms / 1000
        )
        if isinstance(transport, TellsOfLoss):
            # The next cloud behind the address may be another one: greet before it is sent work.
            transport.on_lost = self.breaker.ask.set
        self.link = Link(clock)
        self._greetings = Greetings(transport, clock, settings.probe_timeout_ms / 1000)
        self.cloud_times = CloudTimes(clock)
        self._agreed: Agreed | None = None
        self._waits: set[asyncio.Timeout] = set()
        self._usual_s: float | None = None  # what an answer takes
        self._probing: asyncio.Task[None] | None = None
        self._probes = itertools.cycle(PROBE_TOKENS)

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
                    await asyncio.sleep(greeted_s + DOUBTS_APART_S - self._clock.now())
            await breaker.pause()

    async def close(self) -> None:
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.gather(self._probing, return_exceptions=True)
        await self._greetings.close()
        await self._transport.close()

    def worth_asking(self) -> bool:
        return not self.breaker.refusal()

    def codecs(self) -> tuple[str, ...]:
        """Those that both sides have, best first; before the handshake the device's own."""
        return self._plan.codecs if self._agreed is None else self._agreed.codecs

    @property
    def late_replies(self) -> int:
        """Replies that came when nobody waited for them any more, where the transport counts them."""
        return int(getattr(self._transport, "late", 0))

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
        codec: str = "",
    ) -> Finished:
        """Let the cloud run the rest of one row, at an operating point of its own if it has one, sent
        by `codec` if one is named that the cloud has. Raises NotAnswered, in time."""
        until_s = self._clock.now() + timeout_s
        waited_ms = await self._wait_for_welcome(timeout_s)
        began_s = self._clock.now()
        assert self._agreed is not None, "sent before the handshake"
        try:
            work = self._requests.work(acts, self._agreed, codec, knobs, traceparent)
        except BeyondLimits as error:
            self.breaker.tell("limits", str(error))
            raise NotAnswered("limits", str(error)) from None
        encode_ms = 1000 * (self._clock.now() - began_s)
        done, network_ms = await self._exchanged(work, acts, until_s)
        return Finished(
            done,
            encode_ms=encode_ms,
            network_ms=network_ms + waited_ms,
            bytes_up=done.bytes_up or len(work.frame),
            bytes_down=done.bytes_down,
            codec=used(codec, self._agreed) if acts.depth else "",
        )

    def probe(self) -> None:
        """Send a sample without content, for what the transfer tells of the link; its answer is thrown
        away. Does nothing while another is in the air or the cloud is not up."""
        busy = self._probing is not None and not self._probing.done()
        if not busy and self.breaker.state == UP:
            self._probing = asyncio.create_task(self._probe())

    async def _probe(self) -> None:
        assert self._agreed is not None
        cut = self._requests.cuts[probe_depth(self._requests.cuts)]
        acts = blank(cut, min(next(self._probes), self._agreed.limits.max_tokens))
        timeout_s = self._settings.offload_timeout_ms / 1000
        try:
            work = self._requests.work(acts, self._agreed)
            await self._exchanged(work, acts, self._clock.now() + timeout_s)
        except (BeyondLimits, NotAnswered) as error:
            log.debug("a probe was not answered: %s", error)

    async def _exchanged(
        self, work: Offload, acts: Activations[NumpyArray], until_s: float
    ) -> tuple[Completion, float]:
        """(the cloud's answer, milliseconds on the network). Raises NotAnswered, in time."""
        left_s = until_s - self._clock.now()
        work = replace(work, deadline_ms=max(1000 * left_s, 1.0))
        welcomes = self.breaker.welcomes
        transfer = self.link.sent(nbytes_of(work), self._expected_cloud_ms(acts))
        try:
            done = await self._sent(work, left_s)
            check_completion(work, done, acts.depth, self._manifest)
        except Exception as error:  # no sample is lost, whatever a transport does
            why = self._not_answered(error, welcomes, transfer)
            why.bytes_up = 0 if why.reason == "unavailable" else len(work.frame)
            raise why from error
        except asyncio.CancelledError:
            self.link.dropped(transfer)
            raise
        self.breaker.answered()
        layers = int(done.exit_depth_B[0]) - acts.depth
        self.cloud_times.ran(layers, acts.n_tokens, done.queue_ms, done.compute_ms)
        return done, self.link.answered(transfer, done.queue_ms + done.compute_ms)

    def _expected_cloud_ms(self, acts: Activations[NumpyArray]) -> float:
        layers = self._manifest.n_layers - acts.depth
        return self.cloud_times.queue_ms + layers * self.cloud_times.layer_ms(acts.n_tokens)

    async def _sent(self, work: Offload, timeout_s: float) -> Completion:
        """Raises TimeoutError when time is up, or the cloud is put aside meanwhile. A reply that is
        unusually late is a reason to ask whether the cloud is there at all."""
        loop = asyncio.get_running_loop()
        began_s, doubt = loop.time(), None
        if self._usual_s is not None:
            doubt = loop.call_later(doubt_s(self._usual_s), self.breaker.ask.set)
        async with asyncio.timeout(timeout_s) as wait:
            self._waits.add(wait)
            try:
                done = await self._transport.complete(work, timeout_s=timeout_s)
            finally:
                self._waits.discard(wait)
                if doubt is not None:
                    doubt.cancel()
        took_s = loop.time() - began_s
        self._usual_s = usual_after(self._usual_s, took_s)
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

    def _not_answered(self, error: Exception, welcomes: int, transfer: Transfer) -> NotAnswered:
        given_up = welcomes == self.breaker.welcomes and self.breaker.state != UP
        if given_up and isinstance(error, TimeoutError):
            self.link.failed(transfer)
            return NotAnswered(self.breaker.reason)
        reason = reason_of(error)
        if reason in ("timeout", "unavailable"):
            self.link.failed(transfer)
        else:
            self.link.dropped(transfer)
        if reason == "internal":
            log.error("a bug, please report it", exc_info=error)
        message = str(error) or "no answer in time"
        if isinstance(error, CloudBusy) and error.retry_after_ms > 0:
            self.breaker.busy_for(error.retry_after_ms / 1000, message)
        else:
            self.breaker.failed(reason, message, welcomes)
        return NotAnswered(reason, message)

    def _give_up_waiting(self) -> None:
        now_s = asyncio.get_running_loop().time()
        for wait in self._waits:
            if not wait.expired():
                wait.reschedule(now_s)

    async def _greet(self) -> None:
        hello = self._requests.hello()
        try:
            welcome, took_ms = await self._greetings.greet(hello, self._patience_s())
            self._agreed = agree(welcome, hello.codecs, self._plan.knobs)
        except Exception as error:  # the next handshake may go better
            reason = reason_of(error)
            if reason == "internal":
                log.error("a bug, please report it", exc_info=error)
            self.breaker.failed(reason, str(error))
        else:
            self.link.connected(took_ms)
            self.breaker.welcomed()

    def _patience_s(self) -> float:
        """Before the cloud is put aside, or asked once more: long where no handshake has gone well yet, a few
        round trips on a link that is known, and short where the cloud is aside already."""
        longest_ms, rtt_ms = self._settings.probe_timeout_ms, self.link.estimate().rtt_ms
        if self.breaker.welcomes == 0:
            return longest_ms / 1000
        up = self.breaker.state == UP
        return patience_ms(longest_ms, (rtt_ms or longest_ms) if up else 0.0) / 1000
