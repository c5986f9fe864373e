"""The embedded chain behind the SDK: bittensor's public `Substrate` protocol over `LocalLedger`.

``bt.Client("local", substrate=LocalSubstrate(path))`` then runs the SDK's own intents and reads unchanged. The
ledger's calls take well under a millisecond, so they run on the caller's event loop; only a write that finds
another writer busy waits there.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bittensor as bt
from bittensor.keyfiles import KeyfileError, Keypair, WrongPasswordError

from hivetrain.errors import ChainError
from template.chain import runtime
from template.chain.calls import LocalCall, compose, dispatch
from template.chain.faults import DispatchError
from template.chain.ledger import LocalLedger
from template.chain.state import State

logger = logging.getLogger(__name__)

SPEC_VERSION = 461
"""The runtime version whose calls, names and shapes the embedded chain follows."""

_MAX_NONCE_RACES = 100


class LocalSubstrate:
    """Chain access for `bt.Client`. Raises the SDK's errors: `RpcConnectionError` for the file, else `ChainError`."""

    def __init__(self, path: str | Path, *, timeout_s: float = 30.0) -> None:
        """Args:
        path: the chain's database; opened by `connect`.
        timeout_s: how long a write waits for other writers.
        """
        self.token_symbols: dict[int, str] = {}
        self._path = Path(path)
        self._timeout_s = timeout_s
        self._ledger: LocalLedger | None = None

    def balance(self, rao: int, netuid: int = 0) -> Any:
        """An amount of a subnet's token."""
        return bt.Balance(int(rao), netuid, self.token_symbols.get(netuid) if netuid else None)

    # Lifecycle.

    async def connect(self) -> None:
        """Open the database. Idempotent."""
        if self._ledger is None:
            try:
                self._ledger = LocalLedger(self._path, timeout_s=self._timeout_s)
            except ChainError as exc:
                raise bt.RpcConnectionError(str(exc)) from exc

    async def close(self) -> None:
        """Close the database. Idempotent."""
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = None

    @contextmanager
    def _access(self, *, write: bool = False) -> Iterator[State]:
        if self._ledger is None:
            raise bt.ConnectionNotReady("connect() first")
        try:
            with self._ledger.write() if write else self._ledger.read() as state:
                yield state
        except ChainError as exc:
            raise bt.RpcConnectionError(str(exc)) from exc
        except LookupError as exc:
            raise bt.ChainError(str(exc.args[0] if exc.args else exc)) from exc

    # Blocks.

    async def block_hash(self, block: int | None = None) -> str:
        """Hash of a block, by default the head."""
        with self._access() as state:
            number = state.head() if block is None else block
            found = state.scalar("SELECT hash FROM blocks WHERE number = ?", (number,))
            if found is None:
                raise bt.ChainError(f"block {number} does not exist; the head is {state.head()}")
            return str(found)

    async def block_number(self) -> int:
        """Number of the head."""
        with self._access() as state:
            return state.head()

    async def finalized_block_number(self) -> int:
        """The head: one file has no forks."""
        return await self.block_number()

    async def block_time(self) -> float:
        """Seconds per block, as set at genesis."""
        with self._access() as state:
            return float(state.setting("block_time_s"))

    async def spec_version(self) -> int:
        """The runtime version that the embedded chain follows."""
        return SPEC_VERSION

    async def get_block(self, block_number: int | None = None, block_hash: str | None = None) -> dict[str, Any] | None:
        """A block's header and extrinsics, by default of the head."""
        with self._access() as state:
            if block_hash is not None:
                block_number = _number_of(state, block_hash)
            number = state.head() if block_number is None else block_number
            header = _header(state, number)
            if header is None:
                return None
            rows = state.execute(
                "SELECT signer, module, function, params FROM extrinsics WHERE block = ? ORDER BY idx", (number,)
            )
            extrinsics = [
                {
                    "address": signer,
                    "call": {
                        "call_module": module,
                        "call_function": function,
                        "call_args": [{"name": name, "value": value} for name, value in json.loads(params).items()],
                    },
                }
                for signer, module, function, params in rows
            ]
            return {"header": header, "extrinsics": extrinsics}

    async def blocks(self, *, finalized: bool = False) -> AsyncIterator[dict[str, Any]]:
        """Headers from the head onwards, as they are produced."""
        del finalized
        pause_s = min(0.2, await self.block_time() / 4)
        following: int | None = None
        while True:
            with self._access() as state:
                head = state.head()
                headers = [
                    _header(state, number) for number in range(head if following is None else following, head + 1)
                ]
            for header in headers:
                yield {"header": header}
            following = head + 1
            await asyncio.sleep(pause_s)

    # State. A past block's state is not kept: a known block hash answers from the newest state.

    async def query(
        self, module: str, storage_function: str, params: list[Any] | None = None, block_hash: str | None = None
    ) -> Any:
        """One storage value."""
        with self._access() as state:
            block = state.head() if block_hash is None else _number_of(state, block_hash)
            return runtime.query(state, module, storage_function, params or [], block)

    async def query_map(
        self, module: str, storage_function: str, params: list[Any] | None = None, block_hash: str | None = None
    ) -> list[tuple[Any, Any]]:
        """A storage map's pairs."""
        with self._access() as state:
            block = state.head() if block_hash is None else _number_of(state, block_hash)
            return runtime.query_map(state, module, storage_function, params or [], block)

    async def map_has_entries(
        self, module: str, storage_function: str, params: list[Any], block_hash: str | None = None
    ) -> bool:
        """Whether a storage map holds anything."""
        return bool(await self.query_map(module, storage_function, params, block_hash))

    async def query_batch(
        self, module: str, storage_function: str, param_sets: list[list[Any]], block_hash: str | None = None
    ) -> list[Any]:
        """One storage item for many keys, from one view of the state."""
        with self._access() as state:
            block = state.head() if block_hash is None else _number_of(state, block_hash)
            return [runtime.query(state, module, storage_function, params, block) for params in param_sets]

    async def runtime_call(self, api: str, method: str, params: list[Any], block_hash: str | None = None) -> Any:
        """A runtime API's answer."""
        with self._access() as state:
            if block_hash is not None:
                _number_of(state, block_hash)
            return runtime.runtime_call(state, api, method, params)

    async def constant(self, module: str, name: str) -> Any:
        """A pallet constant."""
        if (module, name) == ("Aura", "SlotDuration"):
            return round(await self.block_time() * 1000)
        raise bt.ChainError(f"the embedded chain holds no constant {module}.{name}")

    async def decode_scale(self, type_string: str, data: Any) -> Any:
        """Not offered: nothing here is SCALE."""
        raise bt.ChainError(f"the embedded chain has no SCALE type {type_string}")

    async def events(self, block_hash: str | None = None) -> list[dict[str, Any]]:
        """No events: a call's outcome is in its receipt."""
        return []

    # Calls.

    async def compose(self, call: Any) -> LocalCall:
        """Check and encode a generated ``(module, function, params)`` call."""
        module, function, params = call
        try:
            return compose(module, function, params)
        except (LookupError, TypeError) as exc:
            raise bt.ChainError(str(exc.args[0])) from exc

    async def estimate_fee(self, call: Any, keypair: Any) -> Any:
        """Nothing: the embedded chain charges no fees."""
        return bt.Balance.from_rao(0)

    async def estimate_weight(self, call: Any, keypair: Any) -> dict[str, int]:
        """Nothing: the embedded chain meters no weight."""
        return {"ref_time": 0, "proof_size": 0}

    async def account_next_index(self, address: str) -> int:
        """An account's next nonce."""
        with self._access() as state:
            return _next_nonce(state, address)

    async def mev_next_key(self) -> bytes | None:
        """None: no mempool, nothing to shield."""
        return None

    async def submit(
        self,
        call: LocalCall,
        keypair: Any,
        *,
        nonce: int | None = None,
        period: int | None = None,
        wait_for_inclusion: bool = True,
        wait_for_finalization: bool = True,
    ) -> Any:
        """Sign a call and apply it at once, in the pending block."""
        del period, wait_for_inclusion, wait_for_finalization
        signer = str(keypair.ss58_address)
        genesis = await self.block_hash(0)
        for _ in range(_MAX_NONCE_RACES):
            number = await self.account_next_index(signer) if nonce is None else nonce
            payload = _payload(genesis, signer, number, call)
            try:
                signature = bytes(keypair.sign(payload))
            # What the SDK's signers raise: no private key, a key file that cannot be read, or a password that is wrong.
            except (ValueError, OSError, KeyfileError, WrongPasswordError) as exc:
                raise bt.ChainError(f"{signer} cannot sign: {exc}") from exc
            if not Keypair(ss58_address=signer).verify(payload, signature):
                return _refused("BadProof", "Invalid Transaction: the signature does not verify")
            with self._access(write=True) as state:
                if _next_nonce(state, signer) == number:
                    return _apply(state, signer, number, call, payload)
            if nonce is not None:
                return _refused("Stale", f"Transaction is outdated: nonce {nonce} is not {signer}'s next one")
        return _refused("Stale", f"Transaction is outdated: {signer} lost {_MAX_NONCE_RACES} nonce races")

    async def find_extrinsic(self, extrinsic_hash: str, block_hash: str) -> Any:
        """The outcome of an included extrinsic, or None."""
        with self._access() as state:
            row = state.execute(
                "SELECT idx, error, message FROM extrinsics WHERE hash = ? AND block = ?",
                (extrinsic_hash, _number_of(state, block_hash)),
            ).fetchone()
            return None if row is None else _receipt(_number_of(state, block_hash), *row)

    # Signing elsewhere, shielding and multisigs need a real node.

    async def sign_extrinsic(self, call: Any, keypair: Any, *, nonce: int, period: int) -> tuple[bytes, str]:
        """Not offered."""
        raise bt.ChainError("the embedded chain has no signed extrinsics outside submit()")

    async def prepare(self, call: Any, **options: Any) -> Any:
        """Not offered."""
        raise bt.ChainError("the embedded chain has no out-of-process signing")

    async def submit_signature(self, unsigned: Any, signature: bytes | str, **options: Any) -> Any:
        """Not offered."""
        raise bt.ChainError("the embedded chain has no out-of-process signing")

    async def submit_signed(self, extrinsic: Any, keypair: Any, **options: Any) -> Any:
        """Not offered."""
        raise bt.ChainError("the embedded chain has no signed extrinsics outside submit()")

    def multisig_account(self, signatories: list[str], threshold: int) -> Any:
        """Not offered."""
        raise bt.ChainError("the embedded chain has no multisig accounts")

    async def submit_multisig(self, call: Any, keypair: Any, multisig_account: Any, **options: Any) -> Any:
        """Not offered."""
        raise bt.ChainError("the embedded chain has no multisig accounts")


def _number_of(state: State, block_hash: str) -> int:
    found = state.scalar("SELECT number FROM blocks WHERE hash = ?", (block_hash,))
    if found is None:
        raise LookupError(f"no block has the hash {block_hash}")
    return int(found)


def _header(state: State, number: int) -> dict[str, Any] | None:
    row = state.execute("SELECT hash FROM blocks WHERE number = ?", (number,)).fetchone()
    if row is None:
        return None
    parent = state.scalar("SELECT hash FROM blocks WHERE number = ?", (number - 1,))
    return {"number": number, "hash": row[0], "parentHash": parent or "0x" + "00" * 32}


def _next_nonce(state: State, signer: str) -> int:
    return int(state.scalar("SELECT COALESCE(MAX(nonce) + 1, 0) FROM extrinsics WHERE signer = ?", (signer,)))


def _payload(genesis: str, signer: str, nonce: int, call: LocalCall) -> bytes:
    return f"hivetrain-extrinsic/1\n{genesis}\n{signer}\n{nonce}\n".encode() + call.data


def _apply(state: State, signer: str, nonce: int, call: LocalCall, payload: bytes) -> Any:
    """Apply a call and record it; a refused one changes nothing but uses up its nonce, as on chain."""
    error, message = "", "Success"
    state.execute("SAVEPOINT call")
    try:
        dispatch(state, signer, call)
    except DispatchError as exc:
        state.execute("ROLLBACK TO call")
        error, message = exc.name, exc.message
    state.execute("RELEASE call")
    block = state.pending()
    index = int(state.scalar("SELECT COUNT(*) FROM extrinsics WHERE block = ?", (block,)))
    digest = "0x" + hashlib.sha256(payload).hexdigest()
    state.execute(
        "INSERT INTO extrinsics (block, idx, hash, signer, nonce, module, function, params, error, message) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (block, index, digest, signer, nonce, call.module, call.function, json.dumps(call.params), error, message),
    )
    logger.debug("block %d: %s.%s by %s: %s", block, call.module, call.function, signer, message)
    return _receipt(block, index, error, message)


def _receipt(block: int, index: int, error: str, message: str) -> Any:
    return bt.ExtrinsicResult(
        success=not error,
        message=message,
        extrinsic_id=f"{block}-{index:04d}",
        fee=bt.Balance.from_rao(0),
        error=bt.ChainError(message, error) if error else None,
    )


def _refused(name: str, message: str) -> Any:
    return bt.ExtrinsicResult(success=False, message=message, error=bt.ChainError(message, name))
