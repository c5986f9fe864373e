"""The chain as the neurons see it: one synchronous, thread-safe facade over bittensor v11's client.

``network="local"`` with ``chain_endpoint="sqlite:///abs/path/chain.db"`` is the embedded chain; ``finney``,
``test`` or a ``ws://`` endpoint is a real one. Both run the same SDK calls. Nothing is cached but the connection:
a public endpoint allows about one request a second.
"""

from __future__ import annotations

import ipaddress
import logging
import math
from collections.abc import Mapping
from typing import Any

import bittensor as bt

from hivetrain.errors import ChainError, ConfigError, HivetrainError
from template.chain.commitments import ChainCommitment, decode_fields, encode_fields
from template.chain.connection import Connection
from template.chain.metagraph import Metagraph, NeuronInfo, from_sdk

__all__ = ["Chain", "ChainCommitment", "Metagraph", "NeuronInfo"]

logger = logging.getLogger(__name__)


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
        self.netuid = netuid
        self._wallet = wallet
        self._connection = Connection(network, chain_endpoint, timeout_s)

    def start(self) -> None:
        """Connect. Idempotent.

        Raises:
            ConfigError: an unknown network, an endpoint that does not fit it, or no such subnet.
            ChainError: the chain does not answer within ``timeout_s``.
        """
        self._connection.start()
        try:
            if not self._query("SubtensorModule", "NetworksAdded"):
                raise ConfigError(f"{self._connection.endpoint} has no subnet {self.netuid}; check --netuid")
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        """Disconnect. Idempotent."""
        self._connection.close()

    def __enter__(self) -> Chain:
        self.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    # Reads. Each raises ChainError when the chain does not answer.

    def block(self) -> int:
        """Number of the newest block."""
        return int(self._connection.read(lambda client: client.block()))

    def block_hash(self, block: int) -> str:
        """``0x`` and 64 hex digits.

        Raises:
            ChainError: the block does not exist yet, or the chain does not answer.
        """
        # Not through System.BlockHash, which holds the last 4096 only.
        found = self._connection.read(lambda client: self._connection.substrate.block_hash(block))
        if not isinstance(found, str) or len(found) != 66:
            raise ChainError(f"{self._connection.endpoint} knows no block {block}")
        return found

    def metagraph(self) -> Metagraph:
        """Every neuron of the subnet."""
        graph = self._connection.read(lambda client: client.subnets.metagraph(netuid=self.netuid, commitments=False))
        if graph is None:
            raise ChainError(f"{self._connection.endpoint} has no metagraph of subnet {self.netuid}")
        return from_sdk(graph)

    def commitments(self) -> dict[str, ChainCommitment]:
        """Every readable commitment by hotkey, those of hotkeys that left the subnet included."""
        rows = self._connection.read(lambda client: client.query_map(("Commitments", "CommitmentOf"), [self.netuid]))
        found = {}
        for hotkey, record in rows:
            data = decode_fields(record)
            if data is not None:
                found[str(hotkey)] = ChainCommitment(block=int(record["block"]), data=data)
        return found

    def weights(self) -> dict[int, dict[int, float]]:
        """Validator uid to ``{uid: share}``; each row sums to 1."""
        rows = self._connection.read(lambda client: client.weights.weights(netuid=self.netuid))
        return {int(uid): {int(target): float(share) for target, share in row.items()} for uid, row in rows.items()}

    def tempo(self) -> int:
        """Blocks from one epoch to the next."""
        return int(self._query("SubtensorModule", "Tempo"))

    def weights_rate_limit(self) -> int:
        """Blocks that a validator must let pass between two settings of weights."""
        return int(self._query("SubtensorModule", "WeightsSetRateLimit"))

    def blocks_since_last_update(self, uid: int) -> int:
        """Blocks since ``uid`` registered, or last set or committed weights.

        Raises:
            ChainError: no such uid, or the chain does not answer.
        """
        since = self._connection.read(
            lambda client: client.epochs.blocks_since_last_update(netuid=self.netuid, uid=uid)
        )
        if since is None:
            raise ChainError(f"subnet {self.netuid} has no uid {uid}")
        return max(0, int(since))  # an update in the embedded chain's pending block lies ahead of the head

    # Writes. Each raises ConfigError without a wallet, and ChainError when refused or unreachable.

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

        refused: HivetrainError | None = None
        try:
            self._connection.write(f"registering {hotkey}", submit)
        except (ChainError, ConfigError) as exc:
            refused = exc
        # Read either way: another process of ours may have been first, or an answer have been lost.
        found = self._uid(hotkey)
        if found is None:
            raise refused or ChainError(f"{hotkey} is not on subnet {self.netuid} after its registration")
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
        served = self._query("SubtensorModule", "Axons", hotkey)
        if isinstance(served, dict) and (int(served["ip"]), int(served["port"])) == (int(address), port):
            return
        intent = bt.ServeAxon(netuid=self.netuid, ip=ip, port=port)
        self._connection.write(f"serving {ip}:{port}", lambda client: self._execute(client, intent))

    def commit(self, data: bytes) -> None:
        """Replace the wallet's commitment.

        Args:
            data: at most 512 bytes.

        Raises:
            ValueError: too long, or bytes that would not read back as they are.
            ConfigError: not registered.
            ChainError: refused or unreachable.
        """
        self._hotkey()
        call = bt.calls.Commitments.set_commitment(netuid=self.netuid, info={"fields": encode_fields(data)})

        async def submit(client: Any) -> Any:
            return await client.submit_call(call, self._wallet, signer="hotkey", wait_for_finalization=False)

        self._connection.write("committing", submit)

    def set_weights(self, weights: Mapping[int, float], version_key: int) -> None:
        """Set weights; only their proportions count. They go timelocked where the subnet asks for it.

        Args:
            weights: uid to a finite weight >= 0.
            version_key: the software's own; the SDK's default of 0 is refused by subnets that ask for a version.

        Raises:
            ValueError: not finite, negative, or all zero.
            ConfigError: not registered, or the subnet asks for a newer version.
            ChainError: too early, no permit, refused or unreachable.
        """
        self._hotkey()
        values = {int(uid): float(weight) for uid, weight in weights.items()}
        for uid, weight in values.items():
            if not math.isfinite(weight) or weight < 0:
                raise ValueError(f"the weight of uid {uid} must be finite and >= 0, got {weight}")
        if not any(values.values()):
            raise ValueError("all weights are zero; nothing to set")
        intent = bt.SetWeights(netuid=self.netuid, weights=values, version_key=version_key)
        self._connection.write("setting weights", lambda client: self._execute(client, intent))

    async def _execute(self, client: Any, intent: Any) -> Any:
        return await client.execute(intent, self._wallet, wait_for_finalization=False, retries=1)

    def _hotkey(self) -> str:
        if self._wallet is None:
            raise ConfigError("this needs a wallet; give --wallet.name and --wallet.hotkey")
        return str(self._wallet.hotkey.ss58_address)

    def _uid(self, hotkey: str) -> int | None:
        uid = self._query("SubtensorModule", "Uids", hotkey)
        return None if uid is None else int(uid)

    def _query(self, module: str, item: str, *keys: object) -> Any:
        """One storage value below our netuid."""
        return self._connection.read(lambda client: client.query((module, item), [self.netuid, *keys]))
