"""Wallets and the hotkey's signature: who we are on chain.

A Bittensor wallet is a folder: one coldkey (owns and pays) and named hotkeys (sign what a neuron does). Files
are made only where the caller asks for it, so a mistyped name never mints a new identity.
"""

from __future__ import annotations

import logging
from pathlib import Path

import bittensor as bt
from bittensor.keyfiles import Keypair

from hivetrain.errors import ConfigError

logger = logging.getLogger(__name__)


def load_wallet(name: str, hotkey: str, path: str | Path, *, create: bool = False) -> bt.Wallet:
    """The wallet ``name`` under the folder ``path``, its hotkey read and ready to sign.

    Args:
        name: the wallet's folder.
        hotkey: the hotkey's file name.
        path: the folder of wallets; ``~`` is expanded.
        create: write a missing coldkey and hotkey, unencrypted. For local chains and tests only.

    Raises:
        ConfigError: a key is missing, encrypted with an unknown password, or unreadable.
    """
    folder = Path(path).expanduser()
    for flag, value in (("--wallet.name", name), ("--wallet.hotkey", hotkey)):
        if not value or value in (".", "..") or "/" in value:
            raise ConfigError(f"{flag} must be a plain file name, got {value!r}")
    wallet = bt.Wallet(name=name, hotkey=hotkey, path=str(folder))
    try:
        if create:
            _create_missing(wallet)
        _require(wallet.coldkeypub_file.path, "coldkey", name, hotkey, folder)
        _require(wallet.hotkey_file.path, "hotkey", name, hotkey, folder)
        _ = wallet.coldkeypub.ss58_address, wallet.hotkey.ss58_address
    except ConfigError:
        raise
    except Exception as exc:  # the SDK's key files raise five unrelated types
        raise ConfigError(f"wallet {name}/{hotkey} in {folder} cannot be read: {exc}") from exc
    return wallet


def _create_missing(wallet: bt.Wallet) -> None:
    if not Path(wallet.coldkeypub_file.path).exists():
        wallet.create_new_coldkey(use_password=False, suppress=True)
        logger.info("created coldkey %s at %s", wallet.coldkeypub.ss58_address, wallet.coldkey_file.path)
    if not Path(wallet.hotkey_file.path).exists():
        wallet.create_new_hotkey(use_password=False, suppress=True)
        logger.info("created hotkey %s at %s", wallet.hotkey.ss58_address, wallet.hotkey_file.path)


def _require(file: str, kind: str, name: str, hotkey: str, folder: Path) -> None:
    if Path(file).exists():
        return
    command = f"btcli wallet new-{kind} --wallet {name}"  # btcli's own names for --wallet.name and its like
    if kind == "hotkey":
        command += f" --wallet-hotkey {hotkey}"
    raise ConfigError(f"no {kind} at {file}; check --wallet.path, or make one: {command} --wallet-path {folder}")


class WalletIdentity:
    """Signs with a wallet's hotkey. Implements `hivetrain.identity.Identity`.

    The keypair is read once: signing with a fresh wallet costs 4 ms of file reading, with a keypair 0.03 ms.
    """

    def __init__(self, wallet: bt.Wallet) -> None:
        self._keypair = wallet.hotkey
        self._hotkey = str(self._keypair.ss58_address)

    @property
    def hotkey(self) -> str:
        """The ss58 address."""
        return self._hotkey

    def sign(self, message: bytes) -> bytes:
        """A 64-byte sr25519 signature over ``message``."""
        return bytes(self._keypair.sign(message))


def verify(hotkey: str, message: bytes, signature: bytes) -> bool:
    """Whether the ss58 address ``hotkey`` signed ``message``. Never raises: what does not parse is not signed."""
    try:
        return bool(Keypair(ss58_address=hotkey).verify(message, signature))
    except Exception:  # a stranger's bytes: the binding raises ValueError, TypeError and its own
        return False
