"""Keys and sealed records of a direct connection between two peers: no sockets, no clock.

Who is at the other end was proved by libp2p: the secrets from which the keys derive have only ever been on that peer's
authenticated, encrypted stream (`upgrade`). A frame of L bytes travels as L (4 bytes, big-endian) and records of up to
`framing.RECORD_BYTES` of it, each as AES-128-GCM ciphertext and 16-byte tag. L is every record's associated data, the
nonce counts the records of its direction, and each direction has a key: a record that is altered, dropped, repeated,
moved or sent back does not open.

Sources: AES-GCM as in NIST SP 800-38D; HKDF as in RFC 5869.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

import msgpack
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from hivetrain.averaging.codecs import Bytes
from hivetrain.averaging.framing import NotSealed

TAG_BYTES = 16
SECRET_BYTES = 32
TOKEN_BYTES = 32
READY_BYTES = 32
_KEY_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionKeys:
    """What both ends of one stream derive, and neither chooses.

    Attributes:
        token: what the end that dials presents.
        ready: what the other one answers, so that the first knows whom it reached.
        opener_key, acceptor_key: what each seals its frames with.
    """

    token: bytes
    ready: bytes
    opener_key: bytes
    acceptor_key: bytes

    @classmethod
    def derive(
        cls,
        opener_secret: bytes,
        acceptor_secret: bytes,
        opener_peer_id: str,
        acceptor_peer_id: str,
        num_tickets: int = 0,
    ) -> tuple[SessionKeys, ...]:
        """Keys from both ends' randomness, bound to both peer ids: the stream's, then so many tickets' (`tickets`)."""
        info = msgpack.packb(["hivetrain-bulk/1", opener_peer_id, acceptor_peer_id])
        sizes = (TOKEN_BYTES, READY_BYTES, _KEY_BYTES, _KEY_BYTES)
        hkdf = HKDF(algorithm=SHA256(), length=(1 + num_tickets) * sum(sizes), salt=None, info=info)
        derived = memoryview(hkdf.derive(opener_secret + acceptor_secret))
        keys = []
        for first in range(0, len(derived), sum(sizes)):
            ends = list(accumulate(sizes, initial=first))
            token, ready, opener_key, acceptor_key = (bytes(derived[a:b]) for a, b in pairwise(ends))
            keys.append(cls(token=token, ready=ready, opener_key=opener_key, acceptor_key=acceptor_key))
        return tuple(keys)


class Sealer:
    """A `framing.Wrapping`: one direction's key and record counter. Each end of the direction has one."""

    overhead = TAG_BYTES

    def __init__(self, key: bytes) -> None:
        self._aead = AESGCM(key)
        self._count = 0

    def wrap(self, record: Bytes, header: bytes, out: memoryview) -> None:
        self._aead.encrypt_into(self._nonce(), record, header, out)

    def unwrap(self, wrapped: memoryview, header: bytes, out: memoryview) -> None:
        try:
            self._aead.decrypt_into(self._nonce(), wrapped, header, out)
        except InvalidTag:
            raise NotSealed from None

    def _nonce(self) -> bytes:
        nonce = self._count.to_bytes(12, "big")
        self._count += 1
        return nonce
