"""Ports for servers that start later."""

from __future__ import annotations

import pytest

from hivetrain.ports import LOWEST, bind, bind_free, free_port


def test_a_free_port_is_one_that_the_system_gives_to_nobody_by_itself() -> None:
    with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
        start = int(file.read().split()[0])
    assert all(LOWEST <= free_port() < start for _ in range(50))


def test_a_port_in_use_is_refused_and_never_drawn() -> None:
    with bind_free() as held:
        held.listen()
        port = held.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            bind(port)
    with bind(port):
        pass


def test_two_held_ports_differ() -> None:
    with bind_free() as one, bind_free() as other:
        assert one.getsockname() != other.getsockname()


def test_an_address_that_is_not_ours_is_an_error_and_no_endless_search() -> None:
    with pytest.raises(OSError, match="no free port"):
        bind_free("192.0.2.1")
