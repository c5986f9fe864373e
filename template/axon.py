"""The server side of the wire. What a stranger sends is checked in this order, each step cheaper than the next:

    route and method              404, 405
    declared length               411, 413      nothing of the body is read
    shape of the signed headers   401           nothing is proven yet
    claimed hotkey, access        403           from the cached metagraph
    rate, places to read          429           per host and claimed hotkey
    body                          408           bounded, with a deadline
    signature, nonce              401           from here on the hotkey is proven
    access, rate, places to work  403, 429      per proven hotkey, by stake, for each route apart
    parse                         422
    handler                       500, 504

The first four look at a *claimed* hotkey: anybody can claim a validator's, so those bounds are per host as well,
and no stranger can use up the places of the hotkey that it names. Refusals are small unsigned JSON.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar, cast

from bittensor import http_auth
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from hivetrain.errors import PeerFault
from template import wire
from template.access import AccessPolicy, Busy, PriorityGate, RateLimiter
from template.listener import ConnectionLimits, Listener
from template.protocol import Message, Synapse

logger = logging.getLogger(__name__)

S = TypeVar("S", bound=Synapse[Message])


@dataclass(frozen=True, slots=True, kw_only=True)
class AxonSettings:
    """Bounds on what callers may use. Times in seconds, rates in bytes or requests per second."""

    max_reading: int = 128  # bodies read at once
    reading_per_caller: int = 8  # of one host under one claimed hotkey
    max_waiting: int = 256  # requests that wait for a place, at each gate
    wait_s: float = 5.0  # longest wait for a place
    body_timeout_s: float = 10.0
    min_body_rate: float = 32 << 10  # a body gets 1 s, and its length over this rate
    reply_grace_s: float = 10.0
    min_reply_rate: float = 32 << 10  # a reply gets the grace, and its length over this rate, to be read
    rate_per_s: float = 50.0  # requests per second and hotkey
    burst: int = 200
    close_grace_s: float = 2.0  # what `close` gives requests in progress
    in_flight_per_hotkey: int = 4  # for each route apart
    connections: ConnectionLimits = field(default_factory=ConnectionLimits)

    def __post_init__(self) -> None:
        longest = wire.MAX_AGE_S + wire.MAX_SKEW_S + self.body_timeout_s + self.wait_s
        if longest > wire.NONCE_RETENTION_S:
            raise ValueError(
                f"a request may take {longest:g} s from its nonce to its check, but nonces are remembered for "
                f"{wire.NONCE_RETENTION_S:g} s: lower axon.body_timeout_s ({self.body_timeout_s:g}) or axon.wait_s"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who sent a verified request. ``uid`` is None for a hotkey that is not registered."""

    hotkey: str
    host: str
    uid: int | None
    stake: float
    validator_permit: bool


Handler = Callable[[S, Caller], Awaitable[Message]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Route:
    synapse: type[Synapse[Message]]
    handler: Handler[Synapse[Message]]
    timeout_s: float
    gate: PriorityGate
    limiter: RateLimiter


class _Refusal(Exception):
    """Ends a request with a status and a reason that the caller may read."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class _Gone(Exception):
    """The caller hung up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """A request whose headers passed."""

    route: _Route
    claim: wire.Claim
    headers: Headers
    target: str
    length: int
    host: str
    arrived_ns: int


class Axon:
    """Answers synapses for one hotkey.

    Args:
        key: the hotkey's keypair, or a wallet.
        access: who may call what.
        host: address to listen on.
        port: 0 takes a free one.
        settings: bounds.
    """

    def __init__(
        self,
        key: object,
        access: AccessPolicy,
        *,
        host: str = "0.0.0.0",
        port: int = 8091,
        settings: AxonSettings | None = None,
    ) -> None:
        if not 0 <= port <= 65535:
            raise ValueError(f"axon.port must be in 0..65535, got {port}")
        self._signer = wire.hotkey_signer(key)
        self._access = access
        self._settings = settings or AxonSettings()
        self._routes: dict[str, _Route] = {}
        self._reading = PriorityGate(max_inside=self._settings.max_reading, max_waiting=self._settings.max_waiting)
        self._readers = self._limiter(self._settings.reading_per_caller)
        self._nonces = http_auth.InMemoryNonceStore(retention=wire.NONCE_RETENTION_S)
        self._started_ns = 0
        self._listener = Listener(
            self._serve,
            host=host,
            port=port,
            limits=self._settings.connections,
            close_grace_s=self._settings.close_grace_s,
        )

    def _limiter(self, max_in_flight: int) -> RateLimiter:
        return RateLimiter(
            rate_per_s=self._settings.rate_per_s, burst=self._settings.burst, max_in_flight=max_in_flight
        )

    @property
    def hotkey(self) -> str:
        """Who answers here."""
        return self._signer.ss58_address

    @property
    def port(self) -> int:
        """The port; the real one once started."""
        return self._listener.port

    def attach(
        self, synapse: type[S], handler: Handler[S], *, timeout_s: float = 30.0, max_in_flight: int = 16
    ) -> None:
        """Answer ``synapse`` with what ``handler(request, caller)`` returns.

        Args:
            timeout_s: longest time that the handler may take; past it, it is cancelled and the caller gets a 504.
            max_in_flight: handlers of this synapse that may run at once. Each synapse has places of its own, so
                that a long all-reduce never keeps a neuron from saying that it is alive.

        Raises:
            ValueError: the route has a handler.
        """
        if synapse.route in self._routes:
            raise ValueError(f"{synapse.route} has a handler")
        self._routes[synapse.route] = _Route(
            synapse=synapse,
            handler=cast(Handler[Synapse[Message]], handler),
            timeout_s=timeout_s,
            gate=PriorityGate(max_inside=max_in_flight, max_waiting=self._settings.max_waiting),
            limiter=self._limiter(self._settings.in_flight_per_hotkey),
        )

    async def start(self) -> None:
        """Listen; returns when the socket accepts connections.

        Raises:
            ConfigError: the port is in use, or cannot be listened on.
        """
        self._started_ns = time.time_ns()
        await self._listener.start()
        logger.info("axon of %s listens on port %d", self.hotkey, self.port)

    async def close(self) -> None:
        """Stop answering; requests in progress get `AxonSettings.close_grace_s`."""
        await self._listener.close()

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI request, from its headers to the last byte of its reply."""
        arrived_ns = time.time_ns()
        try:
            request = self._admit(scope, arrived_ns)
            body = await self._receive(request, receive)
        except _Refusal as refusal:
            await self._refuse(scope, receive, send, refusal, unread=True)
            return
        except _Gone:
            return
        try:
            caller = self._authenticate(request, body)
            # Held until the reply is sent: replies that are not read are memory, and this bounds their number.
            with request.route.limiter.admit(caller.hotkey):
                reply = await self._handle(request.route, caller, body)
                await self._reply(scope, send, request, reply)
        except Busy as exc:
            await self._refuse(scope, receive, send, _Refusal(429, str(exc)), unread=False)
        except _Refusal as refusal:
            await self._refuse(scope, receive, send, refusal, unread=False)

    def _admit(self, scope: Scope, arrived_ns: int) -> _Request:
        """Everything that can be said without reading a byte of the body."""
        path, query = cast(bytes, scope["raw_path"]), cast(bytes, scope["query_string"])
        route = self._routes.get(path.decode("latin-1"))
        if route is None:
            raise _Refusal(404, "no such synapse here")
        if scope["method"] != "POST":
            raise _Refusal(405, "synapses travel by POST")
        headers = Headers(scope=scope)
        length = _declared_length(headers, route.synapse.max_request_bytes)
        try:
            claim = wire.read_claim(headers.items(), receiver=self.hotkey)
        except wire.AuthFailure as exc:
            raise _Refusal(401, str(exc)) from exc
        self._check_access(claim.hotkey, route)
        target = path + (b"?" + query if query else b"")
        return _Request(
            route=route,
            claim=claim,
            headers=headers,
            target=target.decode("latin-1"),
            length=length,
            host=str((scope.get("client") or ("unknown",))[0]),
            arrived_ns=arrived_ns,
        )

    def _check_access(self, hotkey: str, route: _Route) -> None:
        decision = self._access.check(hotkey, route.synapse.route)
        if not decision.allowed:
            raise _Refusal(decision.status, decision.reason)

    async def _receive(self, request: _Request, receive: Receive) -> bytes:
        settings = self._settings
        try:
            with self._readers.admit(f"{request.host} {request.claim.hotkey}"):
                async with self._reading.admit(self._access.priority(request.claim.hotkey), settings.wait_s):
                    return await self._read(request, receive)
        except Busy as exc:
            raise _Refusal(429, str(exc)) from exc

    async def _read(self, request: _Request, receive: Receive) -> bytes:
        """Exactly the declared bytes, before the deadline that their number sets."""
        settings = self._settings
        deadline_s = min(settings.body_timeout_s, 1.0 + request.length / settings.min_body_rate)
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(deadline_s):
                while more:
                    event = await receive()
                    if event["type"] == "http.disconnect":
                        raise _Gone
                    body += event.get("body", b"")
                    more = event.get("more_body", False)
                    if len(body) > request.length:
                        raise _Refusal(413, f"more than the {request.length} bytes that were declared")
        except TimeoutError as exc:
            reason = f"{len(body)} of {request.length} bytes within {deadline_s:.1f} s"
            raise _Refusal(408, reason) from exc
        return bytes(body)

    def _authenticate(self, request: _Request, body: bytes) -> Caller:
        try:
            hotkey = wire.verify_request(
                request.headers,
                body,
                method="POST",
                target=request.target,
                receiver=self.hotkey,
                nonces=self._nonces,
                started_ns=self._started_ns,
                arrived_ns=request.arrived_ns,
            )
        except wire.AuthFailure as exc:
            raise _Refusal(401, str(exc)) from exc
        self._check_access(hotkey, request.route)  # the metagraph may have changed while the body came
        facts = self._access.facts(hotkey)
        return Caller(
            hotkey=hotkey,
            host=request.host,
            uid=facts.uid if facts else None,
            stake=facts.stake if facts else 0.0,
            validator_permit=facts.validator_permit if facts else False,
        )

    async def _handle(self, route: _Route, caller: Caller, body: bytes) -> bytes:
        async with route.gate.admit(caller.stake, self._settings.wait_s):
            return await _run(route, _parse(route, body), caller)

    async def _reply(self, scope: Scope, send: Send, request: _Request, reply: bytes) -> None:
        seal = wire.ReplySeal(
            status=200,
            route=request.route.synapse.route,
            nonce=request.claim.nonce,
            sender=self.hotkey,
            receiver=request.claim.hotkey,
            body_sha256=await wire.off_loop(len(reply), lambda: wire.sha256_hex(reply)),
        )
        headers = {"Content-Type": wire.CONTENT_TYPE, **seal.headers(self._signer)}
        await self._listener.send(scope, send, 200, headers, reply, self._deadline_s(len(reply)))

    def _deadline_s(self, size_bytes: int) -> float:
        return self._settings.reply_grace_s + size_bytes / self._settings.min_reply_rate

    async def _refuse(self, scope: Scope, receive: Receive, send: Send, refusal: _Refusal, *, unread: bool) -> None:
        """Answer with a few bytes of JSON. With ``unread`` body, drop the connection after them."""
        logger.debug("%s refused with %d: %s", scope.get("client"), refusal.status, refusal.reason)
        body = json.dumps({"error": refusal.reason}).encode()
        headers = {"Content-Type": "application/json"}
        if refusal.status == 405:
            headers["Allow"] = "POST"
        if unread:
            headers["Connection"] = "close"
        # Closing with bytes unread resets the connection, and the reset can overtake the answer: linger.
        linger_s = 1.0 if unread else 0.0
        deadline_s = self._deadline_s(len(body))
        await self._listener.send(scope, send, refusal.status, headers, body, deadline_s, receive, linger_s)


def _declared_length(headers: Headers, limit: int) -> int:
    declared = headers.getlist("content-length")
    if len(declared) != 1 or "transfer-encoding" in headers or not declared[0].isascii() or not declared[0].isdigit():
        raise _Refusal(411, "declare the body's length with Content-Length")
    # A string of digits can be as long as a header: compare lengths before int().
    if len(declared[0]) > 12 or int(declared[0]) > limit:
        raise _Refusal(413, f"the body may have {limit} bytes")
    return int(declared[0])


def _parse(route: _Route, body: bytes) -> Synapse[Message]:
    try:
        return route.synapse.from_bytes(body, route.synapse.max_request_bytes)
    except PeerFault as exc:
        raise _Refusal(422, exc.detail) from exc


async def _run(route: _Route, synapse: Synapse[Message], caller: Caller) -> bytes:
    """The handler's reply, encoded. Whatever the handler does, the axon goes on."""
    name = type(synapse).__name__
    timer = asyncio.timeout(route.timeout_s)
    try:
        async with timer:
            reply = await route.handler(synapse, caller)
        if not isinstance(reply, synapse.reply_type):
            raise TypeError(f"the handler of {name} returned {type(reply).__name__}")
        size_bytes = sum(len(opening.payload) for opening in getattr(reply, "openings", ()))
        return await wire.off_loop(size_bytes, reply.to_bytes)
    except Exception as exc:  # the boundary between a handler's bug and everybody else's requests
        if isinstance(exc, TimeoutError) and timer.expired():
            logger.warning("%s from %s took more than %g s: cancelled", name, caller.hotkey, route.timeout_s)
            raise _Refusal(504, f"no answer within {route.timeout_s:g} s") from exc
        logger.exception("%s from %s failed", name, caller.hotkey)
        raise _Refusal(500, "this neuron failed to answer; its log says why") from exc


__all__ = ["Axon", "AxonSettings", "Caller", "Handler"]
