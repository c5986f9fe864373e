"""The chain as the neurons see it: one synchronous, thread-safe facade over bittensor v11's client.

``network="local"`` with ``chain_endpoint="sqlite:///abs/path/chain.db"`` is the embedded chain; ``finney``,
``test`` or a ``ws://`` endpoint is a real one. Both run the same SDK calls. Nothing is cached but the connection:
on a public endpoint, poll sparingly.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import threading
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import bittensor as bt
import stamina

from hivetrain.errors import ChainError, ConfigError, HivetrainError
from template.chain.commitments import ChainCommitment, decode_fields, encode_fields
from template.chain.local import LocalSubstrate

logger = logging.getLogger(__name__)

T = TypeVar("T")

LOCAL_SCHEME = "sqlite://"
_READ_ATTEMPTS = 3
_WRITE_TIMEOUT_FACTOR = 4
"""A write waits for inclusion: one or two blocks of 12 s, more on a busy chain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NeuronInfo:
    """One neuron of the metagraph. Scores in [0, 1]; stake and emission in tokens; ``ip`` is empty when unserved."""

    uid: int
    hotkey: str
    coldkey: str
    stake: float
    validator_permit: bool
    ip: str
    port: int
    incentive: float
    dividends: float
    emission: float
    last_update: int
    registered_at: int
    active: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Metagraph:
    """A subnet's neurons at one block, by uid."""

    netuid: int
    block: int
    neurons: tuple[NeuronInfo, ...]
    _index: dict[str, NeuronInfo] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_index", {neuron.hotkey: neuron for neuron in self.neurons})

    def by_hotkey(self, hotkey: str) -> NeuronInfo | None:
        """The neuron of ``hotkey``, or None."""
        return self._index.get(hotkey)

    def registered_by(self, block: int) -> tuple[NeuronInfo, ...]:
        """Neurons registered at or before ``block``, by uid."""
        return tuple(neuron for neuron in self.neurons if neuron.registered_at <= block)


class Chain:
    """One subnet of one chain, and optionally the wallet that acts on it."""

    def __init__(
        self,
        *,
        network: str,
        netuid: int,
        wallet: bt.Wallet | None = None,
        chain_endpoint: str | None = None,
        timeout_s: float = 30,
    ) -> None:
        """Args:
        network: ``local``, ``finney``, ``test`` or a ``ws://`` endpoint.
        netuid: the subnet.
        wallet: who registers, serves, commits and sets weights; None to read only.
        chain_endpoint: ``sqlite:///abs/path`` for the embedded chain, or a ``ws://`` endpoint that
            overrides the network's own.
        timeout_s: longest wait for one read, retries included; a write may take four times as long.
        """
        self.network = network
        self.netuid = netuid
        self.endpoint = chain_endpoint or network
        self.timeout_s = timeout_s
        self._wallet = wallet
        self._lock = threading.Lock()  # one write at a time: two would race for a nonce
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._client: Any = None

    # Lifecycle.

    def start(self) -> None:
        """Connect.

        Raises:
            ConfigError: an unknown network or an endpoint that does not fit it.
            ChainError: the chain does not answer within ``timeout_s``, or has no such subnet.
        """
        with self._lock:
            if self._client is not None:
                return
            client = self._build_client()
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="chain", daemon=True)
            self._thread.start()
            try:
                self._run(client.connect, self.timeout_s)
                self._client = client
                if self._run(self._has_subnet, self.timeout_s) is not True:
                    raise ConfigError(f"{self.endpoint} has no subnet {self.netuid}; check --netuid")
            except BaseException:
                self._client = None
                self._shut_down(client)
                raise

    def close(self) -> None:
        """Disconnect. Idempotent."""
        with self._lock:
            client, self._client = self._client, None
            if client is not None:
                self._shut_down(client)

    def __enter__(self) -> Chain:
        self.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def _build_client(self) -> Any:
        if self.endpoint.startswith(LOCAL_SCHEME):
            if self.network != "local":
                raise ConfigError(
                    f"--subtensor.chain_endpoint {self.endpoint} needs --subtensor.network local, got {self.network}"
                )
            path = Path(self.endpoint.removeprefix(LOCAL_SCHEME))
            if not path.is_absolute():
                raise ConfigError(f"--subtensor.chain_endpoint must be sqlite:///ABSOLUTE/PATH, got {self.endpoint}")
            return bt.Client("local", substrate=LocalSubstrate(path, timeout_s=self.timeout_s))
        try:
            return bt.Client(self.endpoint)
        except ValueError as exc:
            raise ConfigError(f"--subtensor.network: {exc}") from exc

    async def _has_subnet(self) -> bool:
        return bool(await self._client.query(("SubtensorModule", "NetworksAdded"), [self.netuid]))

    def _shut_down(self, client: Any) -> None:
        loop, thread = self._loop, self._thread
        self._loop = self._thread = None
        if loop is None or thread is None:
            return
        try:
            asyncio.run_coroutine_threadsafe(_finish(client), loop).result(5)
        except Exception as exc:  # the connection is given up either way
            logger.debug("closing the connection to %s: %s", self.endpoint, exc)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)
        if not thread.is_alive():
            loop.close()

    # Reads.

    def block(self) -> int:
        """Number of the newest block."""
        return int(self._read(lambda client: client.block()))

    def block_hash(self, block: int) -> str:
        """``0x`` and 64 hex digits.

        Raises:
            ChainError: the block does not exist yet, or the chain does not answer.
        """
        # Through System.BlockHash only the last 4096 hashes are kept; the node's own index knows them all.
        found = self._read(lambda client: client._substrate.block_hash(block))
        if not isinstance(found, str) or len(found) != 66:
            raise ChainError(f"{self.endpoint} knows no block {block}")
        return found

    def metagraph(self) -> Metagraph:
        """Every neuron of the subnet."""
        graph = self._read(lambda client: client.subnets.metagraph(netuid=self.netuid, commitments=False))
        if graph is None:
            raise ConfigError(f"{self.endpoint} has no subnet {self.netuid}; check --netuid")
        return Metagraph(netuid=self.netuid, block=graph.block, neurons=tuple(_neuron(n) for n in graph.neurons))

    def commitments(self) -> dict[str, ChainCommitment]:
        """Every readable commitment by hotkey, those of hotkeys that left the subnet included."""
        rows = self._read(lambda client: client.query_map(("Commitments", "CommitmentOf"), [self.netuid]))
        found = {}
        for hotkey, record in rows:
            data = decode_fields(record)
            if data is not None:
                found[str(hotkey)] = ChainCommitment(block=int(record["block"]), data=data)
        return found

    def weights(self) -> dict[int, dict[int, float]]:
        """Validator uid to ``{uid: share}``; each row sums to 1."""
        rows = self._read(lambda client: client.weights.weights(netuid=self.netuid))
        return {int(uid): {int(target): float(share) for target, share in row.items()} for uid, row in rows.items()}

    def tempo(self) -> int:
        """Blocks from one epoch to the next."""
        return int(self._read(lambda client: client.query(("SubtensorModule", "Tempo"), [self.netuid])))

    def weights_rate_limit(self) -> int:
        """Blocks that a validator must let pass between two settings of weights."""
        return int(self._read(lambda client: client.hyperparameters.weights_rate_limit(netuid=self.netuid)))

    def blocks_since_last_update(self, uid: int) -> int:
        """Blocks since ``uid`` registered or last set or committed weights.

        Raises:
            ChainError: no such uid, or the chain does not answer.
        """
        since = self._read(lambda client: client.epochs.blocks_since_last_update(netuid=self.netuid, uid=uid))
        if since is None:
            raise ChainError(f"subnet {self.netuid} has no uid {uid}")
        return max(0, int(since))  # an update in the pending block lies ahead of the head

    # Writes.

    def register(self) -> int:
        """Register the wallet's hotkey, unless it is registered; its uid either way.

        Raises:
            ConfigError: no wallet, or a coldkey that cannot pay.
            ChainError: refused or unreachable.
        """
        hotkey = self._hotkey()
        found = self._uid(hotkey)
        if found is not None:
            return found

        async def submit(client: Any) -> Any:
            if await client.query(("MevShield", "NextKey")):
                return await client.execute(bt.BurnedRegister(netuid=self.netuid, hotkey_ss58=hotkey), self._wallet)
            # The intent insists on the MEV shield, which a chain without its pallet cannot offer.
            call = bt.calls.SubtensorModule.burned_register(netuid=self.netuid, hotkey=hotkey)
            return await client.submit_call(call, self._wallet, wait_for_finalization=False)

        self._write("register", submit)
        found = self._uid(hotkey)
        if found is None:
            raise ChainError(f"{hotkey} is not on subnet {self.netuid} after its registration")
        logger.info("registered %s as uid %d on subnet %d", hotkey, found, self.netuid)
        return found

    def serve(self, ip: str, port: int) -> None:
        """Announce where the axon listens. Does nothing when that is announced already.

        A real chain refuses 127.0.0.1 and accepts 127.0.0.2; the embedded chain accepts both.

        Raises:
            ConfigError: not an address or port, or not registered.
            ChainError: refused or unreachable.
        """
        try:
            address = ipaddress.ip_address(ip)
        except ValueError as exc:
            raise ConfigError(f"--axon.external_ip must be an IP address, got {ip!r}") from exc
        if not 0 < port <= 65535:
            raise ConfigError(f"--axon.external_port must be in 1..65535, got {port}")
        hotkey = self._hotkey()
        served = self._read(lambda client: client.query(("SubtensorModule", "Axons"), [self.netuid, hotkey]))
        if isinstance(served, dict) and (int(served["ip"]), int(served["port"])) == (int(address), port):
            return
        intent = bt.ServeAxon(netuid=self.netuid, ip=ip, port=port)
        self._write("serve_axon", lambda client: self._execute(client, intent))

    def commit(self, data: bytes) -> None:
        """Replace the wallet's commitment.

        Args:
            data: at most 512 bytes.

        Raises:
            ValueError: too long, or bytes that would not read back as they are.
            ConfigError: not registered.
            ChainError: refused or unreachable.
        """
        call = bt.calls.Commitments.set_commitment(netuid=self.netuid, info={"fields": encode_fields(data)})

        async def submit(client: Any) -> Any:
            return await client.submit_call(call, self._wallet, signer="hotkey", wait_for_finalization=False)

        self._write("set_commitment", submit)

    def set_weights(self, weights: Mapping[int, float], version_key: int) -> None:
        """Set weights; only their proportions count. Commits them timelocked where the subnet asks for it.

        Args:
            weights: uid to a finite weight >= 0.
            version_key: our `SPEC_VERSION`; the SDK's default of 0 is refused by subnets that ask for a version.

        Raises:
            ValueError: not finite, negative, or all zero.
            ConfigError: not registered, or the subnet asks for a newer version.
            ChainError: too early, no permit, refused or unreachable.
        """
        for uid, weight in weights.items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"the weight of uid {uid} must be finite and >= 0, got {weight}")
        if not any(weights.values()):
            raise ValueError("all weights are zero; nothing to set")
        values = {int(uid): float(weight) for uid, weight in weights.items()}
        intent = bt.SetWeights(netuid=self.netuid, weights=values, version_key=version_key)
        self._write("set_weights", lambda client: self._execute(client, intent))

    async def _execute(self, client: Any, intent: Any) -> Any:
        return await client.execute(intent, self._wallet, wait_for_finalization=False, retries=1)

    # Machinery.

    def _hotkey(self) -> str:
        if self._wallet is None:
            raise ConfigError("this needs a wallet; give --wallet.name and --wallet.hotkey")
        return str(self._wallet.hotkey.ss58_address)

    def _uid(self, hotkey: str) -> int | None:
        uid = self._read(lambda client: client.neurons.uid(hotkey_ss58=hotkey, netuid=self.netuid))
        return None if uid is None else int(uid)

    def _read(self, op: Callable[[Any], Awaitable[Any]]) -> Any:
        """Run a read, again after a lost connection, for at most ``timeout_s`` in all."""
        client = self._started()
        attempts = stamina.retry_context(
            on=_retriable, attempts=_READ_ATTEMPTS, timeout=self.timeout_s, wait_initial=0.1, wait_max=2.0
        )
        for attempt in attempts:
            with attempt:
                return self._run(lambda: op(client), self.timeout_s / _READ_ATTEMPTS)
        raise AssertionError("stamina returns or raises")

    def _write(self, what: str, op: Callable[[Any], Awaitable[Any]]) -> None:
        """Run a write once: whether a lost one took effect is for the caller to read."""
        client = self._started()
        hotkey = self._hotkey()
        with self._lock:
            result = self._run(lambda: op(client), self.timeout_s * _WRITE_TIMEOUT_FACTOR)
        if not result.success:
            raise self._translated(result.error or bt.ChainError(result.message), f"{what} by {hotkey}")

    def _started(self) -> Any:
        if self._client is None:
            raise ChainError(f"not connected to {self.endpoint}: start() first")
        return self._client

    def _run(self, make: Callable[[], Awaitable[T]], timeout_s: float) -> T:
        """Await ``make()`` on the connection's loop, with the SDK's errors as ours."""
        loop = self._loop
        if loop is None:
            raise ChainError(f"not connected to {self.endpoint}: start() first")

        async def bounded() -> T:
            return await asyncio.wait_for(make(), timeout_s)

        try:
            return asyncio.run_coroutine_threadsafe(bounded(), loop).result()
        except HivetrainError:
            raise
        except TimeoutError as exc:
            raise _Unreachable(f"{self.endpoint} did not answer within {timeout_s:g} s") from exc
        except (bt.BittensorError, OSError) as exc:
            raise self._translated(exc, self.endpoint) from exc

    def _translated(self, error: BaseException, what: str) -> HivetrainError:
        """Our error for one of the SDK's: ConfigError where the user can mend it, else ChainError."""
        text = " ".join(str(error).split()) or type(error).__name__
        name, code = getattr(error, "name", None), getattr(error, "code", None)
        if code is bt.ErrorCode.NOT_REGISTERED or name == "AccountNotAllowedCommit":
            return ConfigError(
                f"{what}: {text}; register the hotkey first: btcli subnet register --netuid {self.netuid}"
            )
        if code is bt.ErrorCode.SUBNET_NOT_EXISTS:
            return ConfigError(f"{what}: {text}; check --netuid and --subtensor.network")
        if name == "IncorrectWeightVersionKey":
            return ConfigError(f"{what}: {text}; this version is too old for the subnet: update it")
        if code is bt.ErrorCode.INSUFFICIENT_BALANCE and name != "NotEnoughStakeToSetWeights":
            return ConfigError(f"{what}: {text}; fund the coldkey")
        if isinstance(error, bt.RpcConnectionError | bt.ConnectionNotReady | OSError):
            return _Unreachable(f"the chain at {self.endpoint} cannot be reached: {text}")
        return ChainError(f"{what}: {text}")


class _Unreachable(ChainError):
    """A read may be tried again; a refusal may not."""


def _retriable(error: Exception) -> bool:
    return isinstance(error, _Unreachable)


async def _finish(client: Any) -> None:
    """Close the client and whatever it left running on its loop."""
    try:
        await client.close()
    finally:
        rest = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)


def _neuron(neuron: Any) -> NeuronInfo:
    host, _, port = (neuron.axon or ":0").rpartition(":")
    return NeuronInfo(
        uid=int(neuron.uid),
        hotkey=str(neuron.hotkey),
        coldkey=str(neuron.coldkey),
        stake=float(neuron.total_stake.rao) / 1e9,
        validator_permit=bool(neuron.validator_permit),
        ip=host.strip("[]"),
        port=int(port),
        incentive=float(neuron.incentive),
        dividends=float(neuron.dividends),
        emission=float(neuron.emission.rao) / 1e9,
        last_update=int(neuron.last_update),
        registered_at=int(neuron.block_at_registration),
        active=bool(neuron.active),
    )
