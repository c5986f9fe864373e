"""Which TCP endpoints stand beside libp2p's multiaddresses: pure functions over their text form."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence

from hivetrain.averaging.bulk_listener import Endpoint
from hivetrain.errors import ConfigError

BULK_PORT_OFFSET = 1000  # from a fixed libp2p port to the bulk port beside it
MAX_PORT = (1 << 16) - 1


def tcp_endpoint(maddr: str) -> Endpoint | None:
    """IP address and TCP port of a multiaddress; None where it is relayed, under a name, or not TCP."""
    fields = maddr.split("/")
    if len(fields) < 5 or fields[1] not in ("ip4", "ip6") or fields[3] != "tcp" or "p2p-circuit" in fields:
        return None
    try:
        return str(ipaddress.ip_address(fields[2])), int(fields[4])
    except ValueError:
        return None


def ip_hosts(maddrs: Iterable[str]) -> list[str]:
    """IP addresses of the multiaddresses that are dialled directly, each once, in order."""
    return list(dict.fromkeys(endpoint[0] for maddr in maddrs if (endpoint := tcp_endpoint(maddr))))


def bulk_port_beside(port: int) -> int:
    """The bulk port of a libp2p port: any beside any, else `BULK_PORT_OFFSET` past it (before it, at the end)."""
    if not port:
        return 0
    return port + BULK_PORT_OFFSET if port + BULK_PORT_OFFSET <= MAX_PORT else port - BULK_PORT_OFFSET


def listen_endpoints(host_maddrs: Iterable[str], bulk_port: int | None) -> list[Endpoint]:
    """Where to listen beside libp2p: once per address, on ``bulk_port`` or, where it is None, on the port beside."""
    found: dict[str, int] = {}
    for host, port in filter(None, map(tcp_endpoint, host_maddrs)):
        found.setdefault(host, bulk_port_beside(port) if bulk_port is None else bulk_port)
    return list(found.items())


def announced_endpoints(
    visible_maddrs: Iterable[str], wanted: Sequence[Endpoint], bound: Sequence[Endpoint], forwarded: bool
) -> list[Endpoint]:
    """Where others can dial us.

    Args:
        visible_maddrs: where libp2p can be dialled.
        wanted, bound: where we meant to listen, and do.
        forwarded: ``visible_maddrs`` is what the operator announces, and may be other addresses and ports than ours.
    """
    ports = dict(bound)
    found: dict[Endpoint, None] = {}
    for host, port in filter(None, map(tcp_endpoint, visible_maddrs)):
        wildcard = "::" if ":" in host else "0.0.0.0"
        ours = ports.get(host, ports.get(wildcard))
        if forwarded and any(wanted_port and (h, wanted_port) in bound for h, wanted_port in wanted):
            ours = bulk_port_beside(port)
        elif forwarded and ours is None and bound:
            ours = bound[0][1]
        if ours is not None:
            found[host, ours] = None
    return list(found)


def dial_source(host_maddrs: Iterable[str]) -> str | None:
    """The one address that this node is bound to; None where it is bound to all."""
    hosts = ip_hosts(host_maddrs)
    return hosts[0] if len(hosts) == 1 and not ipaddress.ip_address(hosts[0]).is_unspecified else None


def parse_endpoint(text: str) -> Endpoint:
    """``host:port`` with an IP address.

    Raises:
        ConfigError: it is none.
    """
    host, _, port = text.rpartition(":")
    try:
        address = str(ipaddress.ip_address(host.strip("[]")))
        number = int(port)
    except ValueError as exc:
        raise ConfigError(f"expected an address and port such as 203.0.113.5:32337, got {text!r}: {exc}") from exc
    if not 0 < number <= MAX_PORT:
        raise ConfigError(f"the port of {text!r} must be in 1..{MAX_PORT}")
    return address, number
