"""bittensor's async client behind blocking calls: one private event loop, time limits, and our errors.

The SDK's own synchronous client has no time limit, and a neuron must never hang on a node that accepts and then
stays silent; so the loop is ours.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import bittensor as bt
import stamina
from bittensor import settings

from hivetrain.errors import ChainError, ConfigError, HivetrainError
from template.chain.local import LocalSubstrate

logger = logging.getLogger(__name__)

T = TypeVar("T")
Operation = Callable[[Any], Awaitable[Any]]
"""What to await on a connected `bt.Client`."""

LOCAL_SCHEME = "sqlite://"
_READ_ATTEMPTS = 3
# A write waits for inclusion: one or two blocks of 12 s, more on a busy chain.
_WRITE_TIMEOUT_FACTOR = 4


class Connection:
    """One connection to one chain. Threads may share it: reads run side by side, writes one at a time."""

    def __init__(self, network: str, endpoint: str | None, timeout_s: float) -> None:
        """Args:
        network: ``local``, ``finney``, ``test`` or a ``ws://`` endpoint.
        endpoint: ``sqlite:///abs/path`` for the embedded chain, or a ``ws://`` one that overrides the network's.
        timeout_s: longest wait for one read, retries included.
        """
        self.endpoint = endpoint or network
        self.substrate: Any = None
        self._network = network
        self._timeout_s = timeout_s
        self._lifecycle = threading.Lock()
        self._writing = threading.Lock()  # two writes at once would race for a nonce
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._client: Any = None

    def start(self) -> None:
        """Connect. Idempotent.

        Raises:
            ConfigError: an unknown network, or an endpoint that does not fit it.
            ChainError: no answer within ``timeout_s``.
        """
        with self._lifecycle:
            if self._client is not None:
                return
            client = self._build()
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="chain", daemon=True)
            self._thread.start()
            try:
                self._run(client.connect, self._timeout_s)
            except BaseException:
                self._shut_down(client)
                raise
            self._client = client

    def close(self) -> None:
        """Disconnect; calls that still wait end with ChainError. Idempotent."""
        with self._lifecycle:
            client, self._client = self._client, None
            if client is not None:
                self._shut_down(client)

    def read(self, op: Operation) -> Any:
        """Run a read, again after a lost connection, for at most ``timeout_s`` in all.

        Raises:
            ChainError: unreachable, refused, or not started.
            ConfigError: the user's setting is at fault.
        """
        client = self._started()
        attempts = stamina.retry_context(
            on=ChainUnreachable, attempts=_READ_ATTEMPTS, timeout=self._timeout_s, wait_initial=0.1, wait_max=2.0
        )
        for attempt in attempts:
            with attempt:
                return self._run(lambda: op(client), self._timeout_s / _READ_ATTEMPTS)
        raise AssertionError("stamina returns or raises")

    def write(self, what: str, op: Operation) -> Any:
        """Run a write once and wait for its inclusion: whether a lost one took effect is for the caller to read.

        Raises:
            ChainError: unreachable, refused, or not started.
            ConfigError: the user's setting is at fault.
        """
        client = self._started()
        with self._writing:
            result = self._run(lambda: op(client), self._timeout_s * _WRITE_TIMEOUT_FACTOR, what)
        if not result.success:
            error = result.error or bt.ChainError(result.message)
            raise self._translated(error, what) from error
        return result

    def _build(self) -> Any:
        if self.endpoint.startswith(LOCAL_SCHEME):
            if self._network != "local":
                raise ConfigError(
                    f"--subtensor.chain_endpoint {self.endpoint} needs --subtensor.network local, got {self._network}"
                )
            path = Path(self.endpoint.removeprefix(LOCAL_SCHEME))
            if not path.is_absolute():
                raise ConfigError(f"--subtensor.chain_endpoint must be sqlite:///ABSOLUTE/PATH, got {self.endpoint}")
            self.substrate = LocalSubstrate(path, timeout_s=self._timeout_s)
            return bt.Client("local", substrate=self.substrate)
        try:
            label, url = settings.resolve_endpoint(self.endpoint)
        except ValueError as exc:
            raise ConfigError(f"--subtensor.network or .chain_endpoint: {exc}") from exc
        self.substrate = bt.RpcSubstrate(
            url,
            fallback_endpoints=settings.default_fallback_endpoints(label),
            archive_endpoints=settings.default_archive_endpoints(label),
        )
        return bt.Client(self.endpoint, substrate=self.substrate)

    def _started(self) -> Any:
        client = self._client
        if client is None:
            raise ChainError(f"not connected to {self.endpoint}: start() first")
        return client

    def _run(self, make: Callable[[], Awaitable[T]], timeout_s: float, what: str = "") -> T:
        """Await ``make()`` on our loop, with the SDK's errors as ours."""
        loop = self._loop
        if loop is None:
            raise ChainError(f"not connected to {self.endpoint}: start() first")

        async def bounded() -> T:
            return await asyncio.wait_for(make(), timeout_s)

        waiting = bounded()
        try:
            future = asyncio.run_coroutine_threadsafe(waiting, loop)
        except RuntimeError as exc:
            waiting.close()
            raise ChainError(f"the connection to {self.endpoint} was closed") from exc
        try:
            # The second limit is for a loop that was stopped under us.
            return future.result(timeout_s + 5)
        except TimeoutError as exc:
            raise ChainUnreachable(f"the chain at {self.endpoint} did not answer within {timeout_s:g} s") from exc
        except concurrent.futures.CancelledError as exc:
            raise ChainError(f"the connection to {self.endpoint} was closed") from exc
        except (bt.BittensorError, OSError) as exc:
            raise self._translated(exc, what or self.endpoint) from exc

    def _translated(self, error: BaseException, what: str) -> HivetrainError:
        """Our error for one of the SDK's: ConfigError where the user can mend it, else ChainError."""
        text = " ".join(str(error).split()) or type(error).__name__
        name, code = getattr(error, "name", None), getattr(error, "code", None)
        if code is bt.ErrorCode.NOT_REGISTERED or name == "AccountNotAllowedCommit":
            return ConfigError(f"{what}: {text}; register the hotkey first: btcli subnets register")
        if code is bt.ErrorCode.SUBNET_NOT_EXISTS:
            return ConfigError(f"{what}: {text}; check --netuid and --subtensor.network")
        if name == "IncorrectWeightVersionKey":
            return ConfigError(f"{what}: {text}; this version is too old for the subnet: update it")
        # A validator's stake may come back with the next epoch: no reason to exit.
        if code is bt.ErrorCode.INSUFFICIENT_BALANCE and name != "NotEnoughStakeToSetWeights":
            return ConfigError(f"{what}: {text}; fund the coldkey")
        if isinstance(error, bt.RpcConnectionError | bt.ConnectionNotReady | OSError):
            return ChainUnreachable(f"the chain at {self.endpoint} cannot be reached: {text}")
        return ChainError(f"{what}: {text}")

    def _shut_down(self, client: Any) -> None:
        loop, thread = self._loop, self._thread
        self._loop = self._thread = None
        if loop is None or thread is None:
            return
        try:
            asyncio.run_coroutine_threadsafe(_finish(client), loop).result(5)
        except Exception as exc:  # the connection is given up either way
            logger.debug("closing the connection to %s: %r", self.endpoint, exc)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)
        if not thread.is_alive():
            loop.close()


class ChainUnreachable(ChainError):
    """No answer: worth another try, unlike a refusal."""


async def _finish(client: Any) -> None:
    """Close the client and whatever it left running on its loop."""
    try:
        await client.close()
    finally:
        rest = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
