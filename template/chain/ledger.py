"""The embedded chain's ledger: one SQLite file that every local process opens.

WAL mode gives many readers beside one writer, and a transaction that a killed process left half done never
happened. Blocks come from `produce_block` alone (`template.chain.producer` calls it by the clock); an extrinsic
applies at once and belongs to the pending block, the one after the head, so its block number was fixed before
that block's hash existed. Until block 1 everything belongs to genesis, block 0. Reads answer from the newest
state: a past block's state is not kept.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sqlite3
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hivetrain.errors import ChainError
from template.chain import epoch
from template.chain.faults import DispatchError
from template.chain.registration import register_neuron
from template.chain.state import RAO_PER_TOKEN, SCHEMA, Hyperparameters, State

_APPLICATION_ID = 0x48495645  # "HIVE"
_VERSION = 1


def create_local_chain(
    path: str | Path, *, netuid: int, tempo: int = 20, block_time_s: float = 1.0, **rules: Any
) -> LocalLedger:
    """Make a chain with one subnet and its genesis block, and open it.

    Args:
        path: the database; must not exist.
        netuid: the subnet's number, in 1..65535.
        tempo: blocks from one epoch to the next.
        block_time_s: what the producer and the SDK take as the block time.
        rules: further fields of `Hyperparameters`.

    Raises:
        ChainError: the file exists or cannot be written.
        ValueError: an impossible rule.
    """
    if not 0 < netuid <= 0xFFFF:
        raise ValueError(f"netuid must be in 1..65535, got {netuid}")
    if not block_time_s > 0:
        raise ValueError(f"block_time_s must be > 0, got {block_time_s}")
    parameters = Hyperparameters(tempo=tempo, **rules)
    target = Path(path).absolute()
    if target.exists():
        raise ChainError(f"a file is already at {target}; open it with LocalLedger, or delete it to start anew")
    # Built aside and renamed, so that nobody ever opens half a chain.
    draft = target.with_name(f".{target.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(draft, isolation_level=None)
        try:
            connection.execute("PRAGMA synchronous = OFF")  # nobody else sees the draft
            connection.executescript(f"BEGIN; {SCHEMA} COMMIT;")
            connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {_VERSION}")
            state = State(connection)
            state.set_setting("block_time_s", repr(float(block_time_s)))
            genesis = "0x" + hashlib.sha256(b"hivetrain-chain/1" + os.urandom(32)).hexdigest()
            state.execute("INSERT INTO blocks VALUES (0, ?, ?)", (genesis, _now_ms()))
            state.execute(
                "INSERT INTO subnets (netuid, owner_hotkey, owner_coldkey, registered_at, hyperparameters) "
                "VALUES (?, ?, ?, 0, ?)",
                (netuid, _NOBODY, _NOBODY, json.dumps(dataclasses.asdict(parameters))),
            )
        finally:
            connection.close()
        os.link(draft, target)  # unlike rename, fails when somebody else was first
    except FileExistsError as exc:
        raise ChainError(f"another process made {target} at the same time; open it with LocalLedger") from exc
    except (OSError, sqlite3.Error) as exc:
        raise ChainError(f"cannot create a chain at {target}: {exc}") from exc
    finally:
        draft.unlink(missing_ok=True)
    return LocalLedger(target)


# The ss58 address of the all-zero public key, which nobody can sign for.
_NOBODY = "5C4hrfjw9DjXZTzV3MwzrrAr9P1MJhSrvWGWqi1eSuyUpnhM"


class LocalLedger:
    """One process's handle on the chain's file. Threads may share it."""

    def __init__(self, path: str | Path, *, timeout_s: float = 30.0) -> None:
        """Open an existing chain.

        Args:
            path: the database.
            timeout_s: how long a write waits for other writers.

        Raises:
            ChainError: no such file, or not a chain.
        """
        self.path = Path(path).absolute()
        self._lock = threading.RLock()
        self._db: sqlite3.Connection | None = None
        if not self.path.is_file():
            raise ChainError(f"no chain at {self.path}; make one with `hivetrain up` or create_local_chain()")
        uri = f"file:{urllib.parse.quote(str(self.path))}?mode=rw"
        connection: sqlite3.Connection | None = None
        try:
            connection = sqlite3.connect(
                uri, uri=True, isolation_level=None, check_same_thread=False, timeout=timeout_s
            )
            found = connection.execute("PRAGMA application_id").fetchone()[0]
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if (found, version) != (_APPLICATION_ID, _VERSION):
                raise sqlite3.DatabaseError(f"application id {found:#x} version {version}")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
        except sqlite3.Error as exc:
            if connection is not None:
                connection.close()
            raise ChainError(f"{self.path} is not a local chain ({exc}); delete it and make a new one") from exc
        self._db = connection

    def close(self) -> None:
        """Close the file. Idempotent."""
        with self._lock:
            if self._db is not None:
                self._db.close()
                self._db = None

    def __enter__(self) -> LocalLedger:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    @contextmanager
    def read(self) -> Iterator[State]:
        """One consistent view of the state."""
        with self._transaction("BEGIN") as state:
            yield state

    @contextmanager
    def write(self) -> Iterator[State]:
        """A transaction: all of it happens, or none. Waits for other writers."""
        with self._transaction("BEGIN IMMEDIATE") as state:
            yield state

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[State]:
        with self._lock:
            if self._db is None:
                raise ChainError(f"the chain at {self.path} is closed")
            try:
                self._db.execute(begin)
                try:
                    yield State(self._db)
                except BaseException:
                    self._db.rollback()
                    raise
                self._db.commit()
            except sqlite3.Error as exc:
                raise ChainError(f"the chain at {self.path} cannot be used: {exc}") from exc

    # Blocks.

    def head(self) -> int:
        """Number of the newest block."""
        with self.read() as state:
            return state.head()

    def block_hash(self, block: int) -> str | None:
        """``0x`` and 64 hex digits, or None for a block that does not exist yet."""
        with self.read() as state:
            found = state.scalar("SELECT hash FROM blocks WHERE number = ?", (block,))
            return None if found is None else str(found)

    def block_time_s(self) -> float:
        """Seconds per block, as set at genesis."""
        with self.read() as state:
            return float(state.setting("block_time_s"))

    def produce_block(self) -> int:
        """Close the pending block and run the epochs that end with it, in one transaction.

        The hash is drawn from the parent, the number and fresh randomness: nobody knows it before.

        Returns:
            The new head's number.
        """
        with self.write() as state:
            parent, number = state.execute("SELECT hash, number FROM blocks ORDER BY number DESC LIMIT 1").fetchone()
            number = int(number) + 1
            seed = f"hivetrain-block/1\n{parent}\n{number}\n".encode() + os.urandom(32)
            digest = "0x" + hashlib.sha256(seed).hexdigest()
            state.execute("INSERT INTO blocks VALUES (?, ?, ?)", (number, digest, _now_ms()))
            for netuid in state.netuids():
                epoch.run_if_due(state, netuid, number)
            return number

    # Genesis: what a local chain's maker may do without a signature.

    def fund(self, hotkey: str, stake: float, *, netuid: int | None = None) -> None:
        """Add ``stake`` tokens to a hotkey, registered or not. In block 0 permits follow at once, later at the epoch.

        Raises:
            ValueError: not a finite stake > 0, or several subnets and no ``netuid``.
        """
        if not 0 < stake < float("inf"):
            raise ValueError(f"stake must be finite and > 0, got {stake}")
        with self.write() as state:
            number = _only_netuid(state) if netuid is None else netuid
            state.execute(
                "INSERT INTO stakes VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET rao = rao + excluded.rao",
                (number, hotkey, round(stake * RAO_PER_TOKEN)),
            )
            epoch.grant_genesis_permits(state, number)

    def register(self, hotkey: str, coldkey: str, *, netuid: int | None = None) -> int:
        """Register a hotkey as its coldkey's `burned_register` would, and return its uid. Idempotent.

        Raises:
            ChainError: everybody is immune, or the hotkey is another coldkey's.
        """
        with self.write() as state:
            number = _only_netuid(state) if netuid is None else netuid
            found = state.neuron(number, hotkey)
            if found is not None:
                return found.uid
            try:
                return register_neuron(state, number, hotkey, coldkey)
            except DispatchError as exc:
                raise ChainError(f"cannot register {hotkey}: {exc.message}") from exc

    def set_rules(self, *, netuid: int | None = None, **changes: Any) -> Hyperparameters:
        """Change hyperparameters, as a subnet's owner may.

        Raises:
            ValueError: an impossible rule.
            TypeError: an unknown one.
        """
        with self.write() as state:
            number = _only_netuid(state) if netuid is None else netuid
            subnet = state.subnet(number)
            if subnet is None:
                raise ValueError(f"no subnet {number}")
            rules = dataclasses.replace(subnet.rules, **changes)
            text = json.dumps(dataclasses.asdict(rules))
            state.execute("UPDATE subnets SET hyperparameters = ? WHERE netuid = ?", (text, number))
            return rules

    def incentive_paid(self, *, netuid: int | None = None) -> dict[str, float]:
        """Incentive summed over all epochs, by hotkey: what "pay" means in the benchmarks."""
        with self.read() as state:
            number = _only_netuid(state) if netuid is None else netuid
            rows = state.execute(
                "SELECT hotkey, SUM(incentive) FROM payouts WHERE netuid = ? GROUP BY hotkey", (number,)
            )
            return {str(hotkey): float(total) for hotkey, total in rows}


def _only_netuid(state: State) -> int:
    netuids = state.netuids()
    if len(netuids) != 1:
        raise ValueError(f"say which netuid of {netuids}")
    return netuids[0]


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
