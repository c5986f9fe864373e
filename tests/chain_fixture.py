"""An embedded chain in a temporary folder, with development wallets and facades to close."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bittensor.keyfiles import Keypair

from template.chain.client import Chain
from template.chain.ledger import LocalLedger, create_local_chain

NETUID = 7


class DevWallet:
    """What the SDK needs of a wallet, from development keys in memory: files would cost 80 ms a wallet."""

    def __init__(self, name: str) -> None:
        self.coldkey = self.coldkeypub = Keypair.create_from_uri(f"//{name}//cold")
        self.hotkey = self.hotkeypub = Keypair.create_from_uri(f"//{name}//hot")


@functools.cache
def dev_wallet(name: str) -> DevWallet:
    """The same keys for the same name."""
    return DevWallet(name)


@dataclasses.dataclass
class LocalChain:
    """The chain's file and ledger; `wallet` and `client` make what a test acts with."""

    folder: Path
    ledger: LocalLedger
    clients: list[Chain]

    @property
    def endpoint(self) -> str:
        return f"sqlite://{self.ledger.path}"

    def wallet(self, name: str) -> DevWallet:
        return dev_wallet(name)

    def hotkey(self, name: str) -> str:
        return str(self.wallet(name).hotkey.ss58_address)

    def register(self, name: str, stake: float = 0.0) -> int:
        """Register at genesis or later, with stake; the uid."""
        if stake:
            self.ledger.fund(self.hotkey(name), stake)
        return self.ledger.register(self.hotkey(name), str(self.wallet(name).coldkeypub.ss58_address))

    def client(self, name: str | None = None, **options: Any) -> Chain:
        """A started facade for the wallet ``name``."""
        wallet = None if name is None else self.wallet(name)
        chain = Chain(network="local", netuid=NETUID, wallet=wallet, chain_endpoint=self.endpoint, **options)
        chain.start()
        self.clients.append(chain)
        return chain

    def produce(self, num_blocks: int = 1) -> int:
        """Produce blocks and return the head."""
        for _ in range(num_blocks):
            self.ledger.produce_block()
        return self.ledger.head()


@contextmanager
def local_chain(folder: Path, **rules: Any) -> Iterator[LocalChain]:
    """A fresh chain; everything made from it is closed at the end."""
    ledger = create_local_chain(folder / "chain.db", netuid=NETUID, **{"tempo": 10, **rules})
    net = LocalChain(folder=folder, ledger=ledger, clients=[])
    try:
        yield net
    finally:
        for client in net.clients:
            client.close()
        ledger.close()
