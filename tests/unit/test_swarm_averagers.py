"""A step of an averager that is cancelled, timed out or begun anew: nothing is left open, and nothing half done."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import types
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from hivetrain.trainer import averagers

from hivetrain.errors import ServiceError
from hivetrain.trainer.config import Reach
from hivetrain.trainer.exchange import Averaged

GROUP = b"group"


class Meeting:
    """One that nobody breaks."""

    def __init__(self) -> None:
        self.broken, self.closed = asyncio.Event(), 0

    async def close(self) -> None:
        self.closed += 1


class Step:
    triggered = True


def averager(**fields: Any) -> Any:
    made = object.__new__(averagers.SwarmGradientAverager)
    made.__dict__.update(
        _opening=None, notes=averagers.Notes(), _meetings={}, _parent_pid=0, _popen=None, _closed=False,
        _running_groups={}, _codec="fp32", client_mode=False, _p2p=None, prefix="test",
        _reach=Reach(host_maddrs=(), announce_maddrs=None), **fields,
    )  # fmt: skip
    return made


@pytest.mark.parametrize("error", [None, asyncio.CancelledError])
def test_a_step_that_ends_between_finding_its_group_and_using_it_leaves_no_meeting_open(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException] | None
) -> None:
    async def main() -> None:
        bent, mine, other = averager(), Meeting(), Meeting()
        bent._open_lobby = opened
        bent._meetings[b"another step's"] = Step(), other
        bent._meet = lambda group: mine

        async def hiveminds(self: Any, *, step: Any) -> None:
            async def look(step: Any) -> Any:
                return types.SimpleNamespace(group_id=GROUP)

            await self._look_for_group(look, step)
            assert self._meetings[GROUP] == (step, mine)
            if error is not None:
                raise error

        monkeypatch.setattr(averagers.DecentralizedAverager, "_step", hiveminds)
        with contextlib.suppress(asyncio.CancelledError):
            await bent._step(step=Step())
        assert (mine.closed, other.closed) == (1, 0)
        assert list(bent._meetings) == [b"another step's"]

    asyncio.run(main())


async def opened() -> None: ...


class Matchmaking:
    def __init__(self) -> None:
        self.looked = 0

    async def look_for_group(self, step: Any) -> None:
        self.looked += 1


def test_a_lobby_that_did_not_open_is_opened_by_the_next_step_and_the_search_is_wrapped_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        tensors, matchmaking, tries = [torch.zeros(3)], Matchmaking(), []
        bent, step = averager(_averaged_tensors=tensors, _matchmaking=matchmaking, _lobby=None), Step()

        class Lobby:
            def __init__(self, guest: object) -> None: ...

            async def start(self) -> None:
                tries.append(len(tries))
                if len(tries) <= 2:
                    raise ServiceError("the port is taken")

        async def hiveminds(self: Any, *, step: Any) -> None:
            assert await self._matchmaking.look_for_group(step) is None

        bent_looks: list[object] = []

        async def look(bent_look: Any, step: object) -> Any:
            bent_looks.append(step)
            return await averagers.SwarmGradientAverager._look_for_group(bent, bent_look, step)

        bent._look_for_group = look
        monkeypatch.setattr(averagers, "Guest", lambda *args, **kwargs: types.SimpleNamespace(visible_maddrs=list))
        monkeypatch.setattr(averagers, "Lobby", Lobby)
        monkeypatch.setattr(averagers.DecentralizedAverager, "_step", hiveminds)
        await bent._step(step=Step())  # begins to open the lobby, and looks before it has begun
        await asyncio.gather(bent._opening, return_exceptions=True)
        with pytest.raises(ServiceError, match="the port is taken"):
            await bent._step(step=Step())
        assert (tries, matchmaking.looked, bent._lobby) == ([0, 1], 1, None)
        bent_looks.clear()
        await bent._step(step=step)
        assert (tries, matchmaking.looked, bent_looks) == ([0, 1, 2], 2, [step])
        await bent._step(step=step)  # it is open: nothing is opened again
        assert (tries, matchmaking.looked, bent_looks) == ([0, 1, 2], 3, [step, step])
        assert isinstance(bent._lobby, Lobby)

    asyncio.run(main())


class Peer:
    def to_bytes(self) -> bytes:
        return b"a"

    def to_base58(self) -> str:
        return "a"


class SlowVector:
    """A vector whose copying takes as long as the test says."""

    memory = bytearray()

    def __init__(self) -> None:
        self.begun, self.goes_on = threading.Event(), threading.Event()

    def encode(self, tensors: Any, seed: bytes) -> tuple[bytes, None]:
        return b"", None

    def copy_into(self, mean: torch.Tensor, tensors: Any) -> None:
        half = len(mean) // 2
        tensors[0][:half] = mean[:half]
        self.begun.set()
        assert self.goes_on.wait(20)
        tensors[0][half:] = mean[half:]


def test_a_time_out_while_the_mean_is_copied_leaves_all_of_it_there(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        tensors, vector, meeting, held = [torch.zeros(4)], SlowVector(), Meeting(), []

        @contextlib.contextmanager
        def get_tensors() -> Iterator[list[torch.Tensor]]:
            held.append(True)
            yield tensors
            held.clear()

        async def average(*args: Any) -> Averaged:
            return Averaged(mean=torch.ones(4), weights={"a": 1.0}, sent_bytes=3)

        peer = Peer()
        bent = averager(
            _vector=vector, get_tensors=get_tensors, _me=None, _state_updated=asyncio.Event(),
            serializer=types.SimpleNamespace(loads=lambda packed: packed),
        )  # fmt: skip
        monkeypatch.setattr(averagers.SwarmGradientAverager, "peer_id", peer)
        monkeypatch.setattr(averagers, "average", average)
        bent._meetings[GROUP] = Step(), meeting
        group = types.SimpleNamespace(group_id=GROUP, peer_ids=[peer], gathered=[(0, 0, "told")])
        running = asyncio.create_task(bent._aggregate_with_group(group, weight=1.0))
        await asyncio.get_running_loop().run_in_executor(None, vector.begun.wait, 20)
        running.cancel()
        await asyncio.sleep(0)
        assert not running.done()
        assert held, "nobody else may write into the gradients meanwhile"
        vector.goes_on.set()
        assert await running == {peer: "told"}
        assert tensors[0].tolist() == [1.0] * 4
        assert (bent.notes.members, meeting.closed) == (1, 1)

    asyncio.run(main())
