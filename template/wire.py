"""What axon and dendrite share: who signs what, and the one place that checks it.

A request is signed as ``btauth/1`` (`bittensor.http_auth`): method, path and query as sent, sha256 of the body,
nonce, sender, receiver. That protocol does not sign replies; ours are signed here over status, route, the request's
nonce, both hotkeys and the sha256 of the body, so that a reply can neither be altered on the way nor be used for
another request. Refusals are unsigned: a man in the middle can refuse, as he can cut the line.

Only sr25519, the scheme of Bittensor hotkeys, in both directions: a signature under another scheme is refused
rather than tried.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, cast

from bittensor import http_auth
from bittensor.wallets import CRYPTO_SR25519, Keypair

REPLY_PROTOCOL = "hivetrain-reply/1"
CONTENT_TYPE = "application/msgpack"

HEADER_REPLY_NONCE = "X-Hivetrain-Nonce"
HEADER_REPLY_HOTKEY = "X-Hivetrain-Hotkey"
HEADER_REPLY_SIGNATURE = "X-Hivetrain-Signature"

MAX_AGE_S = 10.0
"""A request may be this old when its headers arrive: clocks of home machines are off by a second or two."""
MAX_SKEW_S = 2.0
NONCE_RETENTION_S = 180.0
"""Past the window plus the longest that a request can wait and be read; see `AxonSettings.__post_init__`."""

OFFLOAD_BYTES = 1 << 20
"""Above this, encoding and hashing leave the event loop: 16 MB hold it for about 40 ms."""

T = TypeVar("T")


class Signer(Protocol):
    """A hotkey that can sign: a Bittensor keypair has this shape."""

    @property
    def ss58_address(self) -> str: ...

    @property
    def crypto_type(self) -> int: ...

    def sign(self, payload: bytes) -> bytes: ...


def hotkey_signer(key: object) -> Signer:
    """The signing hotkey of a wallet, of an identity that carries a ``keypair``, or the keypair itself.

    Unlocks a wallet's hotkey once: signing with the keypair takes 0.15 ms, with the wallet 4 ms.

    Raises:
        TypeError: ``key`` holds no hotkey that can sign.
        ValueError: the hotkey is not sr25519.
    """
    for candidate in (key, getattr(key, "keypair", None), getattr(key, "hotkey", None)):
        if hasattr(candidate, "ss58_address") and hasattr(candidate, "sign"):
            signer = cast(Signer, candidate)
            if signer.crypto_type != CRYPTO_SR25519:
                raise ValueError(f"the wire takes sr25519 hotkeys, {signer.ss58_address} has type {signer.crypto_type}")
            return signer
    raise TypeError(f"expected a keypair or a wallet with a hotkey, got {type(key).__name__}")


class AuthFailure(Exception):
    """A request that nobody can be held to. The message may be shown to the caller."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What a request's headers claim, before anything is proven."""

    hotkey: str
    nonce: int


_AUTH_HEADERS = {
    http_auth.HEADER_VERSION: re.compile(r"1"),
    http_auth.HEADER_HOTKEY: re.compile(r"[1-9A-HJ-NP-Za-km-z]{46,50}"),
    http_auth.HEADER_RECEIVER: re.compile(r"[1-9A-HJ-NP-Za-km-z]{46,50}"),
    http_auth.HEADER_NONCE: re.compile(r"[1-9][0-9]{0,19}"),
    http_auth.HEADER_SIGNATURE: re.compile(r"0x[0-9a-f]{128}"),
}


def read_claim(headers: Sequence[tuple[str, str]], *, receiver: str) -> Claim:
    """Check the shape of the authentication headers: each exactly once, each well formed, for this receiver.

    Raises:
        AuthFailure: unsigned, malformed, or for somebody else.
    """
    found: dict[str, str] = {}
    names = {name.lower(): name for name in (*_AUTH_HEADERS, http_auth.HEADER_CRYPTO)}
    for raw_name, value in headers:
        name = names.get(raw_name.lower())
        if name is None:
            continue
        if name in found:
            raise AuthFailure(f"{name} is given twice")
        found[name] = value
    for name, shape in _AUTH_HEADERS.items():
        if name not in found:
            raise AuthFailure(f"missing {name}: requests are signed, see docs/protocol.md")
        if not shape.fullmatch(found[name]):
            raise AuthFailure(f"malformed {name}")
    if found.get(http_auth.HEADER_CRYPTO, "sr25519") != "sr25519":
        raise AuthFailure(f"{http_auth.HEADER_CRYPTO} must be sr25519")
    if found[http_auth.HEADER_RECEIVER] != receiver:
        raise AuthFailure("the request was signed for another receiving hotkey")
    return Claim(hotkey=found[http_auth.HEADER_HOTKEY], nonce=int(found[http_auth.HEADER_NONCE]))


def verify_request(
    headers: Mapping[str, str],
    body: bytes,
    *,
    method: str,
    target: str,
    receiver: str,
    nonces: http_auth.NonceStore,
    started_ns: int,
    arrived_ns: int,
) -> str:
    """The sender's proven hotkey. The only call of `http_auth.verify` in the project.

    Args:
        target: path and query, percent-encoded as sent.
        started_ns: when this process began to listen. Older nonces are refused: what an earlier process
            accepted is no longer remembered.
        arrived_ns: when the headers arrived. The freshness of a request does not depend on how long its body took.

    Raises:
        AuthFailure: the request is unsigned, altered, replayed, for another receiver, too old or from the future.
    """
    try:
        caller = http_auth.verify(
            headers,
            body,
            method=method,
            path=target,
            self_hotkey_ss58=receiver,
            max_age=MAX_AGE_S,
            allowed_skew=MAX_SKEW_S,
            nonce_store=_NotBefore(started_ns, nonces),
            now_ns=arrived_ns,
        )
    except http_auth.AuthError as exc:
        raise AuthFailure(str(exc)) from exc
    return cast(str, caller.hotkey_ss58)


@dataclass(frozen=True, slots=True)
class _NotBefore:
    """A nonce store that has "seen" every nonce of before the process began."""

    started_ns: int
    store: http_auth.NonceStore

    @property
    def retention(self) -> float:
        return cast(float, self.store.retention)

    def check_and_store(self, hotkey_ss58: str, nonce_ns: int) -> bool:
        return nonce_ns >= self.started_ns and bool(self.store.check_and_store(hotkey_ss58, nonce_ns))


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplySeal:
    """What a reply's signature binds.

    Attributes:
        status: the HTTP status.
        route: the synapse's path.
        nonce: of the request that it answers.
        sender: hotkey that answers.
        receiver: hotkey that asked.
        body_sha256: lowercase hex.
    """

    status: int
    route: str
    nonce: int
    sender: str
    receiver: str
    body_sha256: str

    def payload(self) -> bytes:
        """The exact bytes that are signed: newline-joined UTF-8, in the order of the attributes."""
        lines = (
            REPLY_PROTOCOL,
            str(self.status),
            self.route,
            str(self.nonce),
            self.sender,
            self.receiver,
            self.body_sha256,
        )
        return "\n".join(lines).encode()

    def headers(self, signer: Signer) -> dict[str, str]:
        """Sign as ``signer``, whose hotkey is the sender."""
        return {
            HEADER_REPLY_NONCE: str(self.nonce),
            HEADER_REPLY_HOTKEY: self.sender,
            HEADER_REPLY_SIGNATURE: "0x" + bytes(signer.sign(self.payload())).hex(),
        }

    def is_signed_by_sender(self, signature: str) -> bool:
        """Whether ``signature`` (``0x`` and 128 hex digits) is the sender's over this seal."""
        if not _AUTH_HEADERS[http_auth.HEADER_SIGNATURE].fullmatch(signature):
            return False
        try:
            return bool(Keypair(ss58_address=self.sender).verify(self.payload(), bytes.fromhex(signature[2:])))
        except ValueError:
            return False  # an address that does not decode


async def off_loop(size_bytes: int, work: Callable[[], T]) -> T:
    """Run ``work`` over ``size_bytes`` of data: here when that is little, in a thread when it would hold the loop."""
    return work() if size_bytes <= OFFLOAD_BYTES else await asyncio.to_thread(work)


def sha256_hex(body: bytes) -> str:
    """Lowercase hex sha256 of ``body``."""
    return hashlib.sha256(body).hexdigest()
