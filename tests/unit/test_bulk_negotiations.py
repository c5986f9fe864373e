"""Which streams a swarm takes at all: who is in the round, and not too many at once."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import pytest

from hivetrain.averaging import swarm
from hivetrain.averaging.swarm import Swarm
from hivetrain.averaging.transport import LinkLost, Stream


async def ignore(stream: Stream) -> None:
    raise AssertionError("no stream gets so far here")


def under_way(wanted: Collection[str] | None, *peer_ids: str) -> tuple[list[str], list[str], int]:
    """Peers whose streams are negotiated, peers whose are refused, and what is left under way when all have ended."""
    taken: list[str] = []
    refused: list[str] = []

    async def main() -> int:
        node = Swarm([], ["/ip4/127.0.0.1/tcp/0"])
        if wanted is None or wanted:
            node.set_acceptor(ignore, wanted)
        everything_came = asyncio.Event()

        async def take_over(info: Any, *_: object) -> Any:
            taken.append(info.peer_id.to_base58())
            await everything_came.wait()
            raise LinkLost("it ended as it began")

        node._take_over = take_over  # type: ignore[method-assign,assignment]
        knocks = []
        for peer_id in peer_ids:
            info = SimpleNamespace(peer_id=SimpleNamespace(to_base58=lambda peer_id=peer_id: peer_id))
            writer = SimpleNamespace(transport=SimpleNamespace(abort=lambda peer_id=peer_id: refused.append(peer_id)))
            knocks.append(asyncio.create_task(node._on_stream(info, None, writer)))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        everything_came.set()
        await asyncio.gather(*knocks)
        return node._negotiating.total()

    return taken, refused, asyncio.run(main())


def test_streams_of_who_is_not_in_the_round_are_not_read() -> None:
    assert under_way({"a", "b"}, "a", "x", "b") == (["a", "b"], ["x"], 0)
    assert under_way(None, "a", "x") == (["a", "x"], [], 0)


def test_without_a_round_nobody_is_answered() -> None:
    assert under_way(set(), "a") == ([], ["a"], 0)


def test_one_peer_and_all_together_have_so_many_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swarm, "MAX_NEGOTIATIONS", 2)
    monkeypatch.setattr(swarm, "MAX_ALL_NEGOTIATIONS", 4)
    assert under_way(None, "a", "a", "a", "b", "c", "d") == (["a", "a", "b", "c"], ["a", "d"], 0)
