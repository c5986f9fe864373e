"""Who may present which ticket."""

from __future__ import annotations

from hivetrain.averaging import tickets
from hivetrain.averaging.sealing import SessionKeys
from hivetrain.averaging.tickets import TicketBook

HERE, THERE = ("127.0.0.1", 4001), ("127.0.0.1", 4002)
KEYS = SessionKeys.derive(b"a" * 32, b"b" * 32, "opener", "acceptor", num_tickets=3)


def test_each_is_taken_once_and_the_oldest_first() -> None:
    book = TicketBook()
    assert book.take("a") is None
    book.put("a", HERE, KEYS[:2])
    book.put("a", THERE, KEYS[2:3])
    book.put("b", HERE, KEYS[3:])
    assert [book.take("a") for _ in range(4)] == [(HERE, KEYS[0]), (HERE, KEYS[1]), (THERE, KEYS[2]), None]
    assert book.take("b") == (HERE, KEYS[3])


def test_a_peer_that_does_not_answer_has_none_left() -> None:
    book = TicketBook()
    book.put("a", HERE, KEYS)
    book.drop("a")
    book.drop("a")
    assert book.take("a") is None


def test_neither_peers_nor_tickets_pile_up(monkeypatch) -> None:
    monkeypatch.setattr(tickets, "MAX_PEERS", 2)
    monkeypatch.setattr(tickets, "MAX_PER_PEER", 3)
    book = TicketBook()
    for peer in ("a", "b", "c"):
        book.put(peer, HERE, KEYS)
    assert book.take("a") is None
    assert [book.take("c") for _ in range(4)] == [(HERE, KEYS[1]), (HERE, KEYS[2]), (HERE, KEYS[3]), None]
