"""One more miner on the local network: keys, a uid on chain, and the command that runs it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from hivetrain.errors import ConfigError
from hivetrain.ports import free_port
from neurons.plan import UpOptions, neuron_flags
from neurons.report import Member, read_genesis

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def register_miner(name: str, *, dir: Path) -> tuple[int, str]:
    """Register ``name`` on the local network in ``dir``; running it again only prints the command again.

    Returns:
        Its uid, and the command line that runs it.

    Raises:
        ConfigError: not a name for a wallet, or no network in ``dir``.
        ChainError: the chain refuses.
    """
    from template.chain.client import Chain
    from template.chain.keys import WalletIdentity, load_wallet

    if not NAME.fullmatch(name):
        raise ConfigError(f"a miner's name is letters, digits, '.', '_' and '-', got {name!r}")
    if not (dir / "genesis.json").is_file():
        raise ConfigError(f"no network in {dir}; start one with `hivetrain up --dir {dir}`")
    genesis = read_genesis(dir)
    wallet = load_wallet(name, "default", dir / "wallets", create=True)
    with Chain(network="local", netuid=genesis.netuid, wallet=wallet, chain_endpoint=genesis.chain_endpoint) as chain:
        uid = chain.register()
    member = Member(name=name, hotkey_name="default", role="miner", ss58=WalletIdentity(wallet).hotkey)
    flags = neuron_flags(UpOptions(dir=dir), member, genesis, axon_port=free_port())
    script = Path(__file__).with_name("miner.py")
    flags += ["--logging.logging_dir", str(dir / "logs")]  # where `hivetrain logs` looks
    return uid, shlex.join(["python", _shown(script), *flags])


def _shown(script: Path) -> str:
    """Relative where the user stands in the checkout, as the README writes it."""
    here = Path.cwd()
    return str(script.relative_to(here)) if script.is_relative_to(here) else str(script)
