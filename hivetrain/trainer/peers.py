"""Where initial peers come from besides the dict, and the lines that let the next friend join.

`PEERS` in the environment and a file, because a training script is shared as it is: who starts it says where the swarm
is. Both hold multiaddresses that end in ``/p2p/`` and the peer's id.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from hivetrain.errors import ConfigError

PEERS_VARIABLE = "PEERS"
MAX_FILE_BYTES = 1 << 20


def peers_of(environ: Mapping[str, str], peers_file: str | None) -> list[str]:
    """Initial peers from the environment and the file, in that order, each once.

    Raises:
        ConfigError: the file cannot be read, or an entry is no multiaddress.
    """
    found = [(PEERS_VARIABLE, peer) for peer in environ.get(PEERS_VARIABLE, "").replace(",", " ").split()]
    if peers_file:
        found += [(peers_file, peer) for peer in _read(peers_file)]
    for source, peer in found:
        if not peer.startswith("/") or "/p2p/" not in peer:
            raise ConfigError(
                f"{source} holds {peer!r}, which is no peer's address such as /ip4/192.0.2.1/tcp/4001/p2p/12D3KooW..."
            )
    return list(dict.fromkeys(peer for _, peer in found))


def _read(peers_file: str) -> list[str]:
    path = Path(peers_file).expanduser()
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(
                f"peers_file {peers_file} has {path.stat().st_size} bytes; one address a line is expected"
            )
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"peers_file {peers_file} cannot be read: {exc}") from exc
    return [entry for line in lines for entry in line.split("#")[0].replace(",", " ").split()]


def join_lines(maddrs: Sequence[str], argv: Sequence[str]) -> list[str]:
    """What a peer prints for those who want to join: a line for their script, and a command.

    Args:
        maddrs: our addresses, with ``/p2p/ID``.
        argv: the interpreter's arguments, with which this script was started.
    """
    lines = [
        f"To join the training, use initial_peers = {list(maddrs)}",
        f"or start the same script with: {PEERS_VARIABLE}={shlex.quote(','.join(maddrs))} {shlex.join(argv)}",
    ]
    if maddrs and all("/ip4/127." in maddr or "/ip6/::1/" in maddr for maddr in maddrs):
        lines.append(
            "(these addresses reach this machine only; for others, start with"
            ' "dht": {"host_maddrs": ["/ip4/0.0.0.0/tcp/0"]} in hivemind_config)'
        )
    return lines
