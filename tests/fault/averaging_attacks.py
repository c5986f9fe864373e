"""One bad member: every way in which it can fail or cheat, as a table.

The bad member runs the real code. A fault is a script on its links, other values in its vector, something that happens
to its process, or a patch of the real code that has effect where `averaging_world.RUNNING` says that it runs.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import msgpack
import pytest
import torch
from averaging_world import RUNNING, Key, World, verify

from bench.faults_peer import with_first_words as first_words
from hivetrain.averaging import opening, reduction, serving
from hivetrain.averaging.butterfly import AllReduceOutcome, all_reduce
from hivetrain.averaging.handshake import open_handshake
from hivetrain.averaging.means import Mean
from hivetrain.averaging.messages import Contribution, Refusal
from hivetrain.averaging.results import mask_runs, sign_result
from hivetrain.averaging.transport import LinkLost
from hivetrain.errors import Fault, PeerFault

Tasks = dict[int, "asyncio.Task[AllReduceOutcome]"]


@dataclass
class Scene:
    """One round with a bad member: the last sender.

    Attributes:
        script: what happens while it runs.
        absent: members that do not run.
    """

    world: World
    bad: int
    monkeypatch: pytest.MonkeyPatch
    script: list[Callable[[World, Tasks], Awaitable[None]]] = field(default_factory=list)
    absent: set[int] = field(default_factory=set)

    @property
    def honest(self) -> list[int]:
        return [i for i in range(len(self.world.keys)) if i != self.bad]

    @property
    def good_senders(self) -> list[int]:
        return [i for i in range(self.world.num_senders) if i != self.bad]

    def links(self, **changes: Any) -> None:
        """Script every link from the bad member to the others."""
        for i in self.honest:
            script = self.world.hub.script(self.world.peer(self.bad), self.world.peer(i))
            for name, value in changes.items():
                setattr(script, name, value)

    def links_to(self, **changes: Any) -> None:
        """Script every link to the bad member."""
        for i in self.honest:
            script = self.world.hub.script(self.world.peer(i), self.world.peer(self.bad))
            for name, value in changes.items():
                setattr(script, name, value)

    def slow_all(self, delay_s: float) -> None:
        """Every frame takes so long: the round has a duration."""
        for i in range(len(self.world.keys)):
            for j in range(len(self.world.keys)):
                if i != j:
                    self.world.hub.script(self.world.peer(i), self.world.peer(j)).delay_s = delay_s

    def patch(self, where: Any, name: str, bad_version: Callable[..., Any]) -> None:
        """``bad_version(real, ...)`` in the bad member, ``real(...)`` in all others."""
        real = getattr(where, name)

        def either(*args: Any, **kwargs: Any) -> Any:
            return bad_version(real, *args, **kwargs) if RUNNING.get(-1) == self.bad else real(*args, **kwargs)

        self.monkeypatch.setattr(where, name, either)


def rewrite_message(kind: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[int, bytes], bytes]:
    def rewrite(index: int, frame: bytes) -> bytes:
        if b"\xa4kind" + msgpack.packb(kind) not in frame[:64]:
            return frame
        return msgpack.packb(change(msgpack.unpackb(frame)))  # type: ignore[no-any-return]

    return rewrite


def rewrite_data(change: Callable[[bytes], bytes]) -> Callable[[int, bytes], bytes]:
    """Of the frames with a vector's or mean's bytes, as opposed to messages."""
    return lambda index, frame: frame if b"\xa4kind" in frame[:8] else change(frame)


# What happens to its process


def dead_before(scene: Scene) -> None:
    scene.absent.add(scene.bad)


def dead_during(scene: Scene) -> None:
    scene.slow_all(0.1)
    scene.script.append(_kill_after(scene, 1.0))


def dead_after_sending(scene: Scene) -> None:
    scene.slow_all(0.1)
    scene.script.append(_kill_after(scene, 2.0))


def _kill_after(scene: Scene, seconds: float) -> Callable[[World, Tasks], Awaitable[None]]:
    async def kill(_: World, tasks: Tasks) -> None:
        await asyncio.sleep(seconds)
        tasks[scene.bad].cancel()

    return kill


def stopped(scene: Scene) -> None:
    """SIGSTOP in mid-round: its links stay up, and nothing moves on them."""
    scene.links(stall_after=7)
    scene.links_to(stall_after=7)


def stopped_before(scene: Scene) -> None:
    scene.links(stall_after=0)
    scene.links_to(stall_after=0)


def joins_no_round(scene: Scene) -> None:
    """It proves who it is, and then says nothing."""
    scene.links(stall_after=2)


def slow(scene: Scene) -> None:
    scene.links(delay_s=3.0)


def links_break(scene: Scene) -> None:
    """Every stream with it breaks soon after it began, again and again."""
    scene.links(drop_after=5)
    scene.links_to(drop_after=5)


# What it sends


def too_few_batches(scene: Scene) -> None:
    async def deliver(real: Any, self: Any, stream: Any, part: Any, rank: int, first: int, reducer: Any) -> None:
        await stream.send(
            Contribution(part=part.index, rank=rank, first=first, num_chunks=part.stop - part.start).to_bytes()
        )

    scene.patch(opening.Opener, "_deliver", deliver)


def too_many_batches(scene: Scene) -> None:
    again = rewrite_message("batch", lambda raw: {**raw, "start": 0, "stop": 2})
    scene.links(rewrite=lambda index, frame: again(index, frame) if index > 5 else frame)


def too_many_bytes(scene: Scene) -> None:
    scene.links(rewrite=rewrite_data(lambda data: data + b"\0"))


def too_few_bytes(scene: Scene) -> None:
    scene.links(rewrite=rewrite_data(lambda data: data[:-1]))


def other_bytes(scene: Scene) -> None:
    scene.links(rewrite=rewrite_data(lambda data: bytes([data[0] ^ 1]) + data[1:]))


def wrong_shape(scene: Scene) -> None:
    scene.links(rewrite=rewrite_message("contribution", lambda raw: {**raw, "num_chunks": raw["num_chunks"] + 1}))


def garbage(scene: Scene) -> None:
    scene.links(rewrite=lambda index, frame: b"\xff\x00garbage" if index >= 4 else frame)


def with_first_words(world: World, index: int, value: float) -> bytes:
    """A member's payload whose chunks begin with ``value``, as no encoder writes them."""
    return first_words(world.layout, world.layout.encode(world.vectors[index], seed=0), value)


def poisoned(value: float) -> Callable[[Scene], None]:
    def poison(scene: Scene) -> None:
        if scene.world.codec != "fp32" and not math.isfinite(value):  # which no encoder writes
            scene.world.crafted[scene.bad] = with_first_words(scene.world, scene.bad, value)
            scene.world.prepare()
            return
        for vector in scene.world.vectors[scene.bad].values():
            vector[::1000] = value
        scene.world.prepare()
        decoded = scene.world.layout.decode(scene.world.payloads[scene.bad] or b"")
        largest = max(float(vector.abs().max()) for vector in decoded.values())
        if largest <= scene.world.max_abs:
            pytest.skip(f"{scene.world.codec} cannot carry {value}")

    return poison


def other_schema(scene: Scene) -> None:
    """It works from another plan: nobody's handshake with it holds."""
    world = scene.world

    async def other_plan(_: World, tasks: Tasks) -> None:
        import dataclasses

        transport = world.hub.transport(world.peer(scene.bad))
        await transport.start()
        lie = dataclasses.replace(world.plan, max_abs=world.plan.max_abs / 2)
        try:
            await all_reduce(lie, world.keys[scene.bad], world.payloads[scene.bad], transport, verify)
        finally:
            await transport.close()

    scene.absent.add(scene.bad)
    scene.script.append(other_plan)


# What it does as a reducer


def wrong_average(scene: Scene) -> None:
    def lie(real: Any, plan: Any, start: int, stop: int, vectors: Any, weights: Any, seed: int) -> bytes:
        return real(plan, start, stop, [-vector for vector in vectors], weights, seed)  # type: ignore[no-any-return]

    scene.patch(reduction, "reduce_chunks", lie)


def one_wrong_block(scene: Scene) -> None:
    part = scene.world.plan.parts()[scene.bad]

    def lie(real: Any, plan: Any, start: int, stop: int, vectors: Any, weights: Any, seed: int) -> bytes:
        kept = [torch.zeros_like(vector) for vector in vectors] if start == part.start else vectors
        return real(plan, start, stop, kept, weights, seed)  # type: ignore[no-any-return]

    scene.patch(reduction, "reduce_chunks", lie)


def insane_average(scene: Scene) -> None:
    def lie(real: Any, plan: Any, start: int, stop: int, vectors: Any, weights: Any, seed: int) -> bytes:
        return real(plan, start, stop, [vector * 1e4 for vector in vectors], weights, seed)  # type: ignore[no-any-return]

    scene.patch(reduction, "reduce_chunks", lie)


def hides_its_own_vector(scene: Scene) -> None:
    """A wrong average behind which it does not show what it put in itself."""
    wrong_average(scene)

    async def deny(real: Any, self: Any, stream: Any, member: Any, request: Any) -> None:
        await stream.send(Refusal(fault="absent", detail="I have nothing to show").to_bytes())

    scene.patch(serving.Server, "_serve_open", deny)


def leaves_everyone_out(scene: Scene) -> None:
    async def gather(real: Any, self: Any, index: int) -> None:
        for sender in self._senders.values():
            if sender.member.hotkey != scene.world.hotkey(scene.bad):
                sender.status = reduction.Status.OUT
        await real(self, index)

    scene.patch(reduction.Reduction, "_gather", gather)


def refuses_everyone(scene: Scene) -> None:
    def admit(real: Any, self: Any, member: Any, first: int) -> None:
        raise PeerFault(Fault.LATE, "I do not like you")

    scene.patch(reduction.Reduction, "admit", admit)


def two_averages(scene: Scene) -> None:
    """Every other member gets another mean of the same part, signed."""
    lie_of: dict[int, Mean] = {}

    async def send(real: Any, stream: Any, mean: Mean, *rest: Any) -> None:
        while mean.result is None and mean.failed is None:
            await mean.grown.wait()
        if int(stream.remote_peer_id.rsplit("-", 1)[1]) % 2:
            mean = lie_of.setdefault(id(mean), _other_mean(scene, mean))
        await real(stream, mean, *rest)

    scene.patch(serving, "send_mean", send)


def _other_mean(scene: Scene, mean: Mean) -> Mean:
    world = scene.world
    store = type(mean._store)(world.layout)
    other = Mean(world.plan, store, mean.part, mean.rank)
    for index, mask in enumerate(mean.masks):
        data = bytearray(mean.view(index))
        data[: len(data) // 2] = bytes(len(data) // 2)
        other.view(index)[:] = data
        other.add(mask)
    key = world.keys[scene.bad]
    runs = mask_runs(other.batches, other.masks)
    assert mean.rank is not None
    other.finish(sign_result(key, world.plan.group_id(), mean.part.index, mean.rank, runs, other.tree.root))
    return other


def sends_to_some_and_dies(scene: Scene) -> None:
    """The first member gets its mean, nobody else does, and then it is gone."""

    async def send(real: Any, stream: Any, mean: Mean, *rest: Any) -> None:
        if stream.remote_peer_id != scene.world.peer(0):
            await asyncio.sleep(1000.0)
        await real(stream, mean, *rest)
        scene.world.dying.set()

    async def kill(world: World, tasks: Tasks) -> None:
        await world.dying.wait()
        tasks[scene.bad].cancel()

    scene.world.dying = asyncio.Event()
    scene.patch(serving, "send_mean", send)
    scene.script.append(kill)


def slow_reducer(scene: Scene) -> None:
    async def send(real: Any, stream: Any, mean: Mean, *rest: Any) -> None:
        await asyncio.sleep(1000.0)

    scene.patch(serving, "send_mean", send)


def false_holder(scene: Scene) -> None:
    """It confirms results that nobody signed."""

    def lie(real: Any, self: Any) -> Any:
        confirm = real(self)
        return confirm.model_copy(
            update={"results": [result.model_copy(update={"root": bytes(32)}) for result in confirm.results]}
        )

    from hivetrain.averaging.agreement import Agreement

    scene.patch(Agreement, "ours", lie)


# Who else is there


def duplicate_identity(scene: Scene) -> None:
    """A second process with its keys opens the same streams."""
    world = scene.world

    async def twin(_: World, tasks: Tasks) -> None:
        transport = world.hub.transport(world.peer(scene.bad))
        transport.alive = True
        plan, key = world.plan, world.keys[scene.bad]
        for part in plan.parts():
            if part.reducer.hotkey == key.hotkey:
                continue
            try:
                stream = await transport.open(part.reducer.peer_id, (), 5.0)
                await open_handshake(stream, plan, plan.group_id(), key, transport.peer_id, part.reducer, verify)
                header = Contribution(part=part.index, rank=0, first=0, num_chunks=part.stop - part.start)
                await stream.send(header.to_bytes())
            except LinkLost:
                pass

    scene.slow_all(0.01)
    scene.script.append(twin)


def outsider(scene: Scene) -> None:
    world = scene.world

    async def knock(_: World, tasks: Tasks) -> None:
        transport = world.hub.transport("peer-99")
        await transport.start()
        key, target = Key(99), world.plan.members[0]
        stream = await transport.open(target.peer_id, (), 5.0)
        try:
            await open_handshake(stream, world.plan, world.plan.group_id(), key, "peer-99", target, verify)
            await stream.receive(1000)
        except LinkLost:
            pass

    scene.slow_all(0.01)
    scene.script.append(knock)


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What the honest must see.

    Attributes:
        bad_is: "in" every chunk's mean, "out" of all, or "either".
        blame: the bad member is blamed for at least one of these by somebody, and for nothing else by anybody; empty:
            for nothing.
        cost: what it may cost: "nothing" (seconds), "stall" (some patience), "deadline".
        proven: evidence is recorded.
        certain: somebody must blame it.
    """

    bad_is: str
    blame: frozenset[str]
    cost: str
    proven: bool = False
    certain: bool = True


def expect(bad_is: str, *blame: str, cost: str, proven: bool = False, certain: bool = True) -> Expected:
    return Expected(bad_is=bad_is, blame=frozenset(blame), cost=cost, proven=proven, certain=certain)


ATTACKS: dict[str, tuple[Callable[[Scene], None], Expected]] = {
    "dead before": (dead_before, expect("out", "absent", cost="stall")),
    "dead during": (dead_during, expect("either", "absent", cost="stall")),
    "dead after sending": (dead_after_sending, expect("either", "absent", cost="stall")),
    "stopped": (stopped, expect("either", "absent", "late", cost="deadline")),
    "stopped before": (stopped_before, expect("out", "absent", cost="stall")),
    "joins no round": (joins_no_round, expect("out", "absent", "late", cost="deadline")),
    "slow": (slow, expect("either", "absent", "late", cost="deadline")),
    "links break": (links_break, expect("either", "absent", "late", cost="deadline")),
    "too few batches": (too_few_batches, expect("either", "late", cost="stall")),
    "too many batches": (too_many_batches, expect("either", "malformed", "absent", cost="nothing")),
    "too many bytes": (too_many_bytes, expect("out", "oversized", cost="nothing")),
    "too few bytes": (too_few_bytes, expect("out", "truncated", cost="nothing")),
    "other bytes": (other_bytes, expect("out", "not_committed", cost="nothing")),
    "wrong shape": (wrong_shape, expect("either", "wrong_schema", cost="nothing")),
    "garbage": (garbage, expect("either", "malformed", "truncated", cost="nothing")),
    "nan": (poisoned(float("nan")), expect("out", "not_finite", cost="nothing")),
    "infinity": (poisoned(float("inf")), expect("out", "not_finite", cost="nothing")),
    "1e30": (poisoned(1e30), expect("out", "out_of_bound", "not_finite", cost="nothing")),
    "other schema": (other_schema, expect("out", "absent", cost="stall")),
    "wrong average": (wrong_average, expect("either", "wrong_average", cost="nothing", proven=True)),
    "one wrong block": (one_wrong_block, expect("either", "wrong_average", cost="nothing", proven=True)),
    "insane average": (insane_average, expect("either", "wrong_average", cost="nothing")),
    "hides its own vector": (hides_its_own_vector, expect("either", "absent", cost="nothing")),
    "leaves everyone out": (leaves_everyone_out, expect("either", "absent", cost="nothing")),
    "refuses everyone": (refuses_everyone, expect("either", "absent", cost="stall")),
    "two averages": (two_averages, expect("either", "wrong_average", cost="nothing", proven=True)),
    "sends to some and dies": (sends_to_some_and_dies, expect("either", "absent", "late", cost="stall")),
    "slow reducer": (slow_reducer, expect("either", "late", cost="deadline")),
    "false holder": (false_holder, expect("either", "bad_signature", cost="nothing")),
    "duplicate identity": (duplicate_identity, expect("either", "late", cost="stall", certain=False)),
    "outsider": (outsider, expect("in", cost="nothing")),
}
