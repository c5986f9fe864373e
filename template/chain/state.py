"""The embedded chain's state as typed rows, inside one SQLite transaction.

`State` is the only place that holds SQL for subnets, neurons, stake, weights and commitments; calls, epochs and
reads are written against it. Amounts are rao (1e-9 of a token), as on chain.
"""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

RAO_PER_TOKEN = 10**9

SCHEMA = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE blocks (number INTEGER PRIMARY KEY, hash TEXT NOT NULL UNIQUE, time_ms INTEGER NOT NULL);
CREATE TABLE subnets (
    netuid INTEGER PRIMARY KEY, owner_hotkey TEXT NOT NULL, owner_coldkey TEXT NOT NULL,
    registered_at INTEGER NOT NULL, hyperparameters TEXT NOT NULL,
    last_epoch_block INTEGER NOT NULL DEFAULT 0, epoch_index INTEGER NOT NULL DEFAULT 0);
CREATE TABLE neurons (
    netuid INTEGER NOT NULL, uid INTEGER NOT NULL, hotkey TEXT NOT NULL, coldkey TEXT NOT NULL,
    registered_at INTEGER NOT NULL, last_update INTEGER NOT NULL, validator_permit INTEGER NOT NULL DEFAULT 0,
    rank REAL NOT NULL DEFAULT 0, trust REAL NOT NULL DEFAULT 0, consensus REAL NOT NULL DEFAULT 0,
    incentive REAL NOT NULL DEFAULT 0, dividends REAL NOT NULL DEFAULT 0,
    validator_trust REAL NOT NULL DEFAULT 0, emission INTEGER NOT NULL DEFAULT 0,
    ip TEXT NOT NULL DEFAULT '0', ip_type INTEGER NOT NULL DEFAULT 4, port INTEGER NOT NULL DEFAULT 0,
    protocol INTEGER NOT NULL DEFAULT 4, version INTEGER NOT NULL DEFAULT 0, served_at INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (netuid, uid), UNIQUE (netuid, hotkey)) WITHOUT ROWID;
CREATE TABLE owners (hotkey TEXT PRIMARY KEY, coldkey TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE stakes (netuid INTEGER, hotkey TEXT, rao INTEGER NOT NULL, PRIMARY KEY (netuid, hotkey)) WITHOUT ROWID;
CREATE TABLE weights (netuid INTEGER, uid INTEGER, row TEXT NOT NULL, PRIMARY KEY (netuid, uid)) WITHOUT ROWID;
CREATE TABLE bonds (netuid INTEGER, uid INTEGER, row TEXT NOT NULL, PRIMARY KEY (netuid, uid)) WITHOUT ROWID;
CREATE TABLE commitments (
    netuid INTEGER, hotkey TEXT, block INTEGER NOT NULL, fields TEXT NOT NULL,
    usage_epoch INTEGER NOT NULL, used_bytes INTEGER NOT NULL, PRIMARY KEY (netuid, hotkey)) WITHOUT ROWID;
CREATE TABLE weight_commits (
    id INTEGER PRIMARY KEY, netuid INTEGER NOT NULL, epoch INTEGER NOT NULL, hotkey TEXT NOT NULL,
    block INTEGER NOT NULL, ciphertext BLOB NOT NULL, reveal_round INTEGER NOT NULL);
CREATE TABLE extrinsics (
    id INTEGER PRIMARY KEY, block INTEGER NOT NULL, idx INTEGER NOT NULL, hash TEXT NOT NULL UNIQUE,
    signer TEXT NOT NULL, nonce INTEGER NOT NULL, module TEXT NOT NULL, function TEXT NOT NULL,
    params TEXT NOT NULL, error TEXT NOT NULL, message TEXT NOT NULL, UNIQUE (signer, nonce), UNIQUE (block, idx));
CREATE TABLE payouts (
    netuid INTEGER, epoch INTEGER, block INTEGER NOT NULL, hotkey TEXT,
    incentive REAL NOT NULL, dividends REAL NOT NULL, emission INTEGER NOT NULL,
    PRIMARY KEY (netuid, epoch, hotkey)) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyperparameters:
    """A subnet's rules. Times in blocks; the defaults suit a chain of one machine, not mainnet."""

    tempo: int = 20  # blocks from one epoch to the next
    weights_rate_limit: int = 5  # between two settings of weights by one hotkey; mainnet: 100
    serving_rate_limit: int = 0  # between two axon announcements by one hotkey; mainnet: 50
    immunity_period: int = 100  # in which a new neuron cannot be replaced; mainnet: 4096
    activity_cutoff: int = 5000  # after which a validator that set no weights is inactive
    max_uids: int = 256
    max_validators: int = 64
    stake_threshold: float = 1000.0  # tokens a validator needs to hold a permit and to set weights
    min_allowed_weights: int = 1
    max_weight_limit: int = 65535  # largest share of one weight, of 65535
    weights_version: int = 0  # smallest accepted version_key; 0 accepts every one
    commit_reveal: bool = False
    reveal_period_epochs: int = 1
    kappa: float = 0.5
    bonds_alpha: float = 0.1
    emission_per_block: float = 1.0  # tokens
    owner_cut: float = 0.18

    def __post_init__(self) -> None:
        for name in ("tempo", "max_uids", "max_validators", "min_allowed_weights"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("weights_rate_limit", "serving_rate_limit", "immunity_period", "activity_cutoff"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if not 0 < self.kappa <= 1 or not 0 < self.bonds_alpha <= 1 or not 0 <= self.owner_cut < 1:
            raise ValueError("kappa and bonds_alpha must be in (0, 1], owner_cut in [0, 1)")
        if not 0 < self.max_weight_limit <= 65535:
            raise ValueError(f"max_weight_limit must be in 1..65535, got {self.max_weight_limit}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Subnet:
    """One subnet's row."""

    netuid: int
    owner_hotkey: str
    owner_coldkey: str
    registered_at: int
    last_epoch_block: int
    epoch_index: int
    rules: Hyperparameters


@dataclass(frozen=True, slots=True, kw_only=True)
class NeuronRow:
    """One neuron's row. Scores are in [0, 1], emission in rao of the last epoch, ip an integer in decimal."""

    netuid: int
    uid: int
    hotkey: str
    coldkey: str
    registered_at: int
    last_update: int
    validator_permit: int
    rank: float
    trust: float
    consensus: float
    incentive: float
    dividends: float
    validator_trust: float
    emission: int
    ip: str
    ip_type: int
    port: int
    protocol: int
    version: int
    served_at: int

    def active(self, block: int, rules: Hyperparameters) -> bool:
        """Whether it registered or set weights within the activity cutoff."""
        return self.last_update + rules.activity_cutoff >= block


_NEURON_COLUMNS = ", ".join(f.name for f in dataclasses.fields(NeuronRow))


class State:
    """Reads and writes inside the transaction that `LocalLedger.read` or `.write` opened."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._db = connection

    def execute(self, sql: str, params: Sequence[Any] = ()) -> sqlite3.Cursor:
        """Run one statement."""
        return self._db.execute(sql, params)

    def scalar(self, sql: str, params: Sequence[Any] = ()) -> Any:
        """The first column of the first row, or None."""
        row = self._db.execute(sql, params).fetchone()
        return None if row is None else row[0]

    # The clock.

    def head(self) -> int:
        """Number of the newest block."""
        return int(self.scalar("SELECT MAX(number) FROM blocks"))

    def pending(self) -> int:
        """Number of the block that extrinsics go into: the one after the head, or genesis until block 1 exists."""
        head = self.head()
        return head + 1 if head else 0

    def setting(self, name: str) -> str:
        """A setting's text, or an empty one."""
        return str(self.scalar("SELECT value FROM settings WHERE name = ?", (name,)) or "")

    def set_setting(self, name: str, value: str) -> None:
        """Write a setting."""
        self.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (name, value))

    # Subnets and neurons.

    def netuids(self) -> list[int]:
        """Every subnet's number, ascending."""
        return [row[0] for row in self.execute("SELECT netuid FROM subnets ORDER BY netuid")]

    def subnet(self, netuid: int) -> Subnet | None:
        """The subnet, or None."""
        row = self.execute(
            "SELECT owner_hotkey, owner_coldkey, registered_at, last_epoch_block, epoch_index, hyperparameters "
            "FROM subnets WHERE netuid = ?",
            (netuid,),
        ).fetchone()
        if row is None:
            return None
        return Subnet(
            netuid=netuid,
            owner_hotkey=row[0],
            owner_coldkey=row[1],
            registered_at=row[2],
            last_epoch_block=row[3],
            epoch_index=row[4],
            rules=Hyperparameters(**json.loads(row[5])),
        )

    def neurons(self, netuid: int) -> list[NeuronRow]:
        """Every neuron of the subnet, by uid: position i is uid i."""
        rows = self.execute(f"SELECT {_NEURON_COLUMNS} FROM neurons WHERE netuid = ? ORDER BY uid", (netuid,))
        return [self._neuron(row) for row in rows]

    def neuron(self, netuid: int, hotkey: str) -> NeuronRow | None:
        """The neuron of ``hotkey``, or None."""
        row = self.execute(
            f"SELECT {_NEURON_COLUMNS} FROM neurons WHERE netuid = ? AND hotkey = ?", (netuid, hotkey)
        ).fetchone()
        return None if row is None else self._neuron(row)

    @staticmethod
    def _neuron(row: sqlite3.Row | tuple[Any, ...]) -> NeuronRow:
        names = (f.name for f in dataclasses.fields(NeuronRow))
        return NeuronRow(**dict(zip(names, row, strict=True)))

    def update_neuron(self, netuid: int, uid: int, **columns: Any) -> None:
        """Write columns of one neuron."""
        assignments = ", ".join(f"{name} = ?" for name in columns)
        self.execute(f"UPDATE neurons SET {assignments} WHERE netuid = ? AND uid = ?", (*columns.values(), netuid, uid))

    def stakes(self, netuid: int) -> dict[str, int]:
        """Hotkey to stake in rao."""
        return dict(self.execute("SELECT hotkey, rao FROM stakes WHERE netuid = ?", (netuid,)).fetchall())

    def stake(self, netuid: int, hotkey: str) -> int:
        """Stake of one hotkey in rao."""
        return int(self.scalar("SELECT rao FROM stakes WHERE netuid = ? AND hotkey = ?", (netuid, hotkey)) or 0)

    # Weights and bonds: {validator uid: {miner uid: value}}.

    def matrix(self, table: str, netuid: int) -> dict[int, dict[int, float]]:
        """Rows of ``weights`` (u16 values) or ``bonds`` (floats in [0, 1])."""
        rows = self.execute(f"SELECT uid, row FROM {table} WHERE netuid = ? ORDER BY uid", (netuid,))
        return {uid: {int(target): value for target, value in json.loads(row)} for uid, row in rows}

    def set_row(self, table: str, netuid: int, uid: int, row: dict[int, float] | dict[int, int]) -> None:
        """Write one row of ``weights`` or ``bonds``."""
        text = json.dumps(sorted(row.items()))
        self.execute(f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?)", (netuid, uid, text))
