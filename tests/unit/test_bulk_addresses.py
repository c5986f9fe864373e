"""Which TCP endpoints stand beside libp2p's multiaddresses."""

from __future__ import annotations

import pytest

from hivetrain.averaging.addresses import (
    announced_endpoints,
    bulk_port_beside,
    dial_source,
    ip_hosts,
    listen_endpoints,
    parse_endpoint,
    tcp_endpoint,
)
from hivetrain.errors import ConfigError

PEER = "/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"


@pytest.mark.parametrize(
    ("maddr", "endpoint"),
    [
        (f"/ip4/192.0.2.7/tcp/31337{PEER}", ("192.0.2.7", 31337)),
        ("/ip6/2001:db8::1/tcp/1", ("2001:db8::1", 1)),
        ("/ip4/192.0.2.7/udp/31337/quic", None),
        ("/dns4/example.org/tcp/1", None),
        (f"/ip4/192.0.2.7/tcp/1{PEER}/p2p-circuit{PEER}", None),
        ("/ip4/300.0.0.1/tcp/1", None),
        ("/ip4/192.0.2.7/tcp/x", None),
        ("/ip4/192.0.2.7", None),
        ("nonsense", None),
        ("", None),
    ],
)
def test_only_a_direct_tcp_address_has_an_endpoint(maddr: str, endpoint: tuple[str, int] | None) -> None:
    assert tcp_endpoint(maddr) == endpoint


def test_each_host_counts_once() -> None:
    maddrs = ["/ip4/10.0.0.1/tcp/1", "/ip4/10.0.0.2/tcp/1", "/ip4/10.0.0.1/tcp/2", "/dns4/x/tcp/1"]
    assert ip_hosts(maddrs) == ["10.0.0.1", "10.0.0.2"]


def test_port_beside_a_port_is_a_thousand_away_and_any_beside_any() -> None:
    assert bulk_port_beside(0) == 0
    assert bulk_port_beside(31337) == 32337
    assert bulk_port_beside(65000) == 64000


def test_one_port_is_listened_on_per_address() -> None:
    maddrs = ["/ip4/0.0.0.0/tcp/31337", "/ip4/0.0.0.0/tcp/31338", "/ip6/::/tcp/0", "/ip4/0.0.0.0/udp/1/quic"]
    assert listen_endpoints(maddrs, None) == [("0.0.0.0", 32337), ("::", 0)]
    assert listen_endpoints(maddrs, 5) == [("0.0.0.0", 5), ("::", 5)]


def test_others_are_told_the_bound_port_at_every_visible_address() -> None:
    visible = [f"/ip4/10.0.0.5/tcp/31337{PEER}", f"/ip4/127.0.0.1/tcp/31337{PEER}", f"/ip6/::1/tcp/31337{PEER}"]
    bound = [("0.0.0.0", 40123)]
    assert announced_endpoints(visible, [("0.0.0.0", 0)], bound, False) == [("10.0.0.5", 40123), ("127.0.0.1", 40123)]
    assert announced_endpoints(visible, [("127.0.0.1", 0)], [("127.0.0.1", 7)], False) == [("127.0.0.1", 7)]
    assert announced_endpoints(visible, [], [], False) == []


def test_behind_a_nat_the_port_beside_the_announced_one_is_told() -> None:
    visible = [f"/ip4/203.0.113.5/tcp/40000{PEER}"]
    assert announced_endpoints(visible, [("0.0.0.0", 32337)], [("0.0.0.0", 32337)], True) == [("203.0.113.5", 41000)]
    # A port that the kernel chose cannot have been forwarded by number: it is told as it is.
    assert announced_endpoints(visible, [("0.0.0.0", 0)], [("0.0.0.0", 5555)], True) == [("203.0.113.5", 5555)]
    assert announced_endpoints(visible, [("10.0.0.5", 0)], [("10.0.0.5", 5555)], True) == [("203.0.113.5", 5555)]


def test_node_bound_to_one_address_dials_from_it() -> None:
    assert dial_source(["/ip4/127.0.0.3/tcp/0"]) == "127.0.0.3"
    assert dial_source(["/ip4/0.0.0.0/tcp/0"]) is None
    assert dial_source(["/ip4/10.0.0.1/tcp/0", "/ip4/10.0.0.2/tcp/0"]) is None
    assert dial_source([]) is None


def test_endpoint_in_text_is_an_address_and_a_port() -> None:
    assert parse_endpoint("203.0.113.5:32337") == ("203.0.113.5", 32337)
    assert parse_endpoint("[2001:db8::1]:5") == ("2001:db8::1", 5)
    for text in ("203.0.113.5", "example.org:1", "203.0.113.5:0", "203.0.113.5:99999", ":1", ""):
        with pytest.raises(ConfigError):
            parse_endpoint(text)
