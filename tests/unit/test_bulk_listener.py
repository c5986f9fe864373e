"""Who gets past the port on which bulk connections arrive, and what the others cost."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import pytest

from hivetrain.averaging import bulk_listener
from hivetrain.averaging.bulk_listener import MAGIC, BulkListener, dial
from hivetrain.averaging.sealing import SessionKeys
from tests.async_kit import run

KEYS = SessionKeys.derive(b"a" * 32, b"b" * 32, "opener", "acceptor")[0]
OTHER = SessionKeys.derive(b"c" * 32, b"d" * 32, "opener", "acceptor")[0]


@contextlib.asynccontextmanager
async def listener() -> AsyncIterator[BulkListener]:
    listening = BulkListener([("127.0.0.1", 0)])
    listening.start()
    try:
        yield listening
    finally:
        await listening.close()
        await listening.close()


async def say(listening: BulkListener, greeting: bytes) -> socket.socket:
    sock = socket.create_connection(listening.bound[0])
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_sendall(sock, greeting)
    return sock


async def is_cut_off(sock: socket.socket) -> bool:
    """Whether the other end closes without a word."""
    with sock, contextlib.suppress(ConnectionError):
        return not await asyncio.get_running_loop().sock_recv(sock, 100)
    return True


def test_whoever_presents_the_token_is_let_in_and_hears_that_it_reached_the_right_one() -> None:
    async def main() -> None:
        async with listener() as listening:
            with listening.expect(KEYS) as arrival:
                assert arrival is not None
                assert arrival.take() is None
                with await dial(listening.bound[0], KEYS) as near:
                    far = arrival.take()
                    assert far is not None
                    with far:
                        await asyncio.get_running_loop().sock_sendall(near, b"hello")
                        assert await asyncio.get_running_loop().sock_recv(far, 10) == b"hello"
            assert listening.num_pending == 0

    run(main)


@pytest.mark.parametrize(
    "greeting",
    [
        pytest.param(MAGIC + OTHER.token, id="another token"),
        pytest.param(MAGIC + KEYS.token[:16] + OTHER.token[16:], id="half of the token"),
        pytest.param(b"GET / HT" + KEYS.token, id="another protocol"),
        pytest.param(MAGIC + bytes(32), id="zeros"),
    ],
)
def test_stranger_without_the_token_is_cut_off_and_the_token_stays_good(greeting: bytes) -> None:
    async def main() -> None:
        async with listener() as listening:
            with listening.expect(KEYS) as arrival:
                assert await is_cut_off(await say(listening, greeting))
                (await dial(listening.bound[0], KEYS)).close()
                assert arrival is not None
                far = arrival.take()
                assert far is not None
                far.close()

    run(main)


def test_token_is_good_once() -> None:
    async def main() -> None:
        async with listener() as listening:
            with listening.expect(KEYS), listening.expect(OTHER), await dial(listening.bound[0], KEYS):
                assert await is_cut_off(await say(listening, MAGIC + KEYS.token))

    run(main)


def test_token_ends_with_the_negotiation_that_waited_for_it() -> None:
    async def main() -> None:
        async with listener() as listening:
            with listening.expect(OTHER):
                with listening.expect(KEYS):
                    untaken = await dial(listening.bound[0], KEYS)
                assert await is_cut_off(untaken)
                assert await is_cut_off(await say(listening, MAGIC + KEYS.token))

    run(main)


def test_stranger_is_cut_off_at_once_where_nobody_is_expected() -> None:
    async def main() -> None:
        async with listener() as listening:
            assert await is_cut_off(await say(listening, b""))
            assert listening.num_strangers == 0

    run(main)


def test_slow_stranger_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk_listener, "TOKEN_TIMEOUT_S", 0.1)

    async def main() -> None:
        async with listener() as listening:
            with listening.expect(KEYS):
                assert await is_cut_off(await say(listening, MAGIC + KEYS.token[:-1]))
                assert listening.num_strangers == 0

    run(main)


def test_flood_of_strangers_is_bounded_and_keeps_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk_listener, "MAX_STRANGERS", 8)

    async def main() -> None:
        async with listener() as listening:
            with listening.expect(KEYS):
                flood = []
                for _ in range(50):
                    flood.append(await say(listening, b"HT"))
                    await asyncio.sleep(0)
                    assert listening.num_strangers <= 8
                (await dial(listening.bound[0], KEYS)).close()
                assert listening.num_strangers <= 8
                cut_off = await asyncio.gather(*(is_cut_off(sock) for sock in flood[:40]))
                assert all(cut_off)
                for sock in flood[40:]:
                    sock.close()

    run(main)


def test_so_many_tokens_at_once_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk_listener, "MAX_PENDING", 1)

    async def main() -> None:
        async with listener() as listening:
            with listening.expect(KEYS) as first, listening.expect(OTHER) as second:
                assert first is not None
                assert second is None
                assert listening.num_pending == 1

    run(main)


def test_ticket_is_good_once_and_the_oldest_of_too_many_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk_listener, "MAX_STANDING", 2)
    tickets = SessionKeys.derive(b"a" * 32, b"b" * 32, "opener", "acceptor", num_tickets=3)[1:]

    async def main() -> None:
        async with listener() as listening:
            came: list[tuple[socket.socket, SessionKeys]] = []
            listening.stand_by(tickets, lambda sock, keys: came.append((sock, keys)))
            with pytest.raises(ConnectionError):
                await dial(listening.bound[0], tickets[0])
            with await dial(listening.bound[0], tickets[2]):
                assert [keys for _, keys in came] == [tickets[2]]
            with pytest.raises(ConnectionError):
                await dial(listening.bound[0], tickets[2])
            assert len(came) == 1
            came[0][0].close()

    run(main)


def test_port_that_is_taken_is_replaced_by_another(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with listener() as first:
            second = BulkListener(first.bound)
            second.start()
            assert second.bound[0][0] == "127.0.0.1"
            assert second.bound[0][1] != first.bound[0][1]
            assert "cannot listen" in caplog.text
            await second.close()

    run(main)


def test_address_that_is_not_ours_leaves_nobody_to_expect() -> None:
    async def main() -> None:
        listening = BulkListener([("192.0.2.1", 0)])
        listening.start()
        assert listening.bound == []
        with listening.expect(KEYS) as arrival:
            assert arrival is None
        await listening.close()

    run(main)


def test_dialling_a_dead_end_or_an_impostor_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk_listener, "READY_TIMEOUT_S", 0.2)

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as impostor:
            place = impostor.getsockname()
            dialling = asyncio.create_task(dial(place, KEYS))
            await asyncio.sleep(0)
            sock, _ = await asyncio.to_thread(impostor.accept)
            with sock:
                sock.sendall(OTHER.ready)
                with pytest.raises(ConnectionError, match="does not hold the keys"):
                    await dialling
            with pytest.raises(TimeoutError):  # the kernel accepts, and nobody answers
                await dial(place, KEYS)
        with pytest.raises(ConnectionRefusedError):
            await dial(place, KEYS)

    run(main)


def test_closing_cuts_off_strangers_in_mid_sentence() -> None:
    async def main() -> None:
        async with listener() as listening:
            with listening.expect(KEYS):
                sock = await say(listening, MAGIC)
                while not listening.num_strangers:  # noqa: ASYNC110 (the accept loop has no event to wait for)
                    await asyncio.sleep(0)
                await listening.close()
                assert await is_cut_off(sock)
                assert listening.num_strangers == listening.num_pending == 0

    run(main)
