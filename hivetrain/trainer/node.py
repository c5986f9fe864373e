"""The adapter to hivemind's DHT: one node in a process of its own, and the signed records that we keep there.

Like `engine`, it imports hivemind, and is itself imported when a Trainer joins a swarm, not before.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import hivemind
from hivemind.dht.crypto import RSASignatureValidator
from hivemind.p2p import P2PDaemonError
from hivemind.utils import get_dht_time
from hivemind.utils.multiaddr import Multiaddr

from hivetrain.errors import ConfigError, ServiceError
from hivetrain.trainer.config import MADDR_OPTIONS, SwarmConfig

DHT_TIMEOUT_S = 20.0
PR_SET_PDEATHSIG = 1


class Node:
    """A DHT node in a process of its own, and the signed records that we keep there."""

    def __init__(self, config: SwarmConfig) -> None:
        self._config = config
        self.dht: Any = None

    def start(self) -> None:
        """Join the DHT, or begin one.

        Raises:
            ConfigError: an address or the identity file cannot work.
            ServiceError: none of the initial peers answered; names them.
        """
        if not self._config.opt.get("verbose"):
            _shorten_logs()
        logging.getLogger("asyncio").addFilter(_not_left_by_hivemind)
        for name in MADDR_OPTIONS:
            for maddr in cast(Sequence[str], self._config.dht.get(name) or ()):
                _require_maddr(name, maddr)
        peers = self._config.initial_peers
        self._validator = RSASignatureValidator()
        try:
            self.dht = _Dht(start=True, record_validators=[self._validator], **self._config.dht)
        except (FileNotFoundError, PermissionError) as exc:
            raise ConfigError(f"identity_path {self._config.dht.get('identity_path')} cannot be used: {exc}") from exc
        except (P2PDaemonError, RuntimeError, OSError, ValueError, TypeError, AssertionError, TimeoutError) as exc:
            where = f" through {', '.join(peers)}" if peers else ""
            raise ServiceError(
                f"cannot join the swarm{where}: {exc}. Is one of these peers running and reachable from here, and are "
                "the addresses of host_maddrs free to listen on?"
            ) from exc

    @property
    def peer_id(self) -> str:
        return str(self.dht.peer_id.to_base58())

    def visible_maddrs(self) -> list[str]:
        """Where others reach us, with ``/p2p/ID``."""
        return [str(maddr) for maddr in self.dht.get_visible_maddrs()]

    def now(self) -> float:
        """The swarm's clock, in seconds."""
        return float(get_dht_time())

    def publish(self, key: str, value: object | None, expires_in_s: float) -> None:
        """Store our record under ``key``, signed; None takes it back.

        Raises:
            ServiceError: no node took it.
        """
        future = self.dht.store(
            key, value, get_dht_time() + expires_in_s, subkey=self._validator.local_public_key, return_future=True
        )
        if not self._wait(future, key):
            raise ServiceError(f"the DHT did not store {key!r}")

    def read(self, key: str) -> dict[Hashable, object]:
        """Everyone's unexpired records under ``key``, as they wrote them, by the key that signed them.

        Raises:
            ServiceError: the DHT did not answer.
        """
        found = self._wait(self.dht.get(key, latest=True, return_future=True), key)
        if found is None or not isinstance(found.value, dict):
            return {}
        entries = {owner: getattr(entry, "value", None) for owner, entry in found.value.items()}
        return {owner: value for owner, value in entries.items() if value is not None}

    def close(self) -> None:
        if self.dht is not None:
            self.dht.shutdown()

    def children(self) -> list[int]:
        """Process ids to end if closing fails."""
        return [self.dht.ident] if self.dht is not None and self.dht.is_alive() else []

    @staticmethod
    def _wait(future: Any, key: str) -> Any:
        try:
            return future.result(DHT_TIMEOUT_S)
        except Exception as exc:  # hivemind documents none of what its DHT raises
            raise ServiceError(f"the DHT did not answer for {key!r}: {exc!r}") from exc


class _Dht(hivemind.DHT):  # type: ignore[misc]  # hivemind has no types
    def run(self) -> None:
        # A group of its own: Ctrl-C in a terminal must not end the libp2p daemon while we still say goodbye.
        os.setpgid(0, 0)
        die_with(os.getppid())
        quieten_asyncio()
        super().run()


def _shorten_logs() -> None:
    """One line for each of hivemind's errors: a round that fails needs no traceback in a friend's terminal."""
    for handler in logging.getLogger("hivemind").handlers:
        handler.addFilter(_without_traceback)


def quieten_asyncio() -> None:
    """In a process of hivemind's: what its loop left pending is no news when it ends."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def _not_left_by_hivemind(record: logging.LogRecord) -> bool:
    """What the loop of its progress tracker leaves pending is told when the process ends, and is no news."""
    text = record.getMessage()
    return not (text.startswith("Task was destroyed but it is pending") and "wait_for()" in text)


def _without_traceback(record: logging.LogRecord) -> bool:
    record.exc_info = record.exc_text = None
    return True


def die_with(parent: int) -> None:
    """End this process when its parent ends, however that was: `kill -9` leaves no orphan that others wait for."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


@contextmanager
def kept_interrupt() -> Iterator[None]:
    """hivemind makes this process ignore Ctrl-C when it starts an averager."""
    try:
        handler = signal.getsignal(signal.SIGINT)
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _require_maddr(option: str, maddr: str) -> None:
    try:
        Multiaddr(maddr)
    except Exception as exc:  # of several unrelated types
        raise ConfigError(f"{option}: {maddr!r} is not a multiaddress such as /ip4/127.0.0.1/tcp/4001: {exc}") from exc
