"""Wallets on disk, and signatures of strangers."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from bittensor.keyfiles import Keypair

from hivetrain.errors import ConfigError
from template.chain.keys import WalletIdentity, load_wallet, verify


def test_a_created_wallet_is_found_again(tmp_path: Path) -> None:
    made = load_wallet("alice", "h1", tmp_path, create=True)
    found = load_wallet("alice", "h1", tmp_path)
    assert found.hotkey.ss58_address == made.hotkey.ss58_address
    assert found.coldkeypub.ss58_address == made.coldkeypub.ss58_address


def test_creating_keeps_what_is_there(tmp_path: Path) -> None:
    first = load_wallet("alice", "h1", tmp_path, create=True)
    second = load_wallet("alice", "h2", tmp_path, create=True)
    again = load_wallet("alice", "h1", tmp_path, create=True)
    assert first.coldkeypub.ss58_address == second.coldkeypub.ss58_address
    assert first.hotkey.ss58_address == again.hotkey.ss58_address != second.hotkey.ss58_address


def advised_command(folder: Path, hotkey: str) -> list[str]:
    """The command that the refusal names, with this environment's btcli."""
    with pytest.raises(ConfigError, match="or make one: btcli") as refused:
        load_wallet("alice", hotkey, folder)
    words = shlex.split(str(refused.value).partition("or make one: ")[2])
    return [str(Path(sys.executable).with_name(words[0])), *words[1:]]


def test_a_missing_key_names_the_very_command_that_makes_it(tmp_path: Path) -> None:
    for kind, extra in (("coldkey", ["--no-password"]), ("hotkey", [])):
        command = advised_command(tmp_path, "h2")
        assert f"new-{kind}" in command
        subprocess.run([*command, *extra], check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=60)
    assert load_wallet("alice", "h2", tmp_path).hotkey.ss58_address


def test_a_refusal_makes_no_keys(tmp_path: Path) -> None:
    advised_command(tmp_path, "h1")
    assert not list(tmp_path.iterdir())


def test_a_garbled_hotkey_is_a_config_error(tmp_path: Path) -> None:
    wallet = load_wallet("alice", "h1", tmp_path, create=True)
    Path(wallet.hotkey_file.path).write_bytes(b"\x00garbage")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_wallet("alice", "h1", tmp_path)


@pytest.mark.parametrize("name", ["", "..", "a/b"])
def test_a_name_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="plain file name"):
        load_wallet(name, "h1", tmp_path, create=True)


def test_a_signature_verifies_for_its_signer_and_message_only(tmp_path: Path) -> None:
    alice = WalletIdentity(load_wallet("alice", "h", tmp_path, create=True))
    bob = WalletIdentity(load_wallet("bob", "h", tmp_path, create=True))
    signature = alice.sign(b"round 1")
    assert verify(alice.hotkey, b"round 1", signature)
    assert not verify(alice.hotkey, b"round 2", signature)
    assert not verify(bob.hotkey, b"round 1", signature)
    assert not verify(alice.hotkey, b"round 1", signature[:-1] + bytes([signature[-1] ^ 1]))


@pytest.mark.parametrize("hotkey", ["", "not an address", "5" * 48, "0x" + "00" * 32])
def test_a_hotkey_that_does_not_parse_signed_nothing(hotkey: str) -> None:
    assert not verify(hotkey, b"m", b"\x00" * 64)


@pytest.mark.parametrize("signature", [b"", b"\x00", b"\x00" * 63, b"\xff" * 64, b"\x00" * 1000])
def test_a_signature_that_does_not_parse_is_none(signature: bytes) -> None:
    assert not verify(Keypair.create_from_uri("//Alice").ss58_address, b"m", signature)
