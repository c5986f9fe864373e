"""A group in memory and in virtual time: real keys, real messages, scripted links."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from hivetrain.averaging.butterfly import AllReduceOutcome, all_reduce
from hivetrain.averaging.codecs import get_codec
from hivetrain.averaging.group import GroupPlan, Member
from hivetrain.averaging.layout import PayloadLayout, Section
from hivetrain.averaging.memory import MemoryHub, MemoryTransport, run_in_virtual_time
from hivetrain.averaging.reducing import rounding_seed
from hivetrain.errors import ServiceError
from hivetrain.verification.merkle import MerkleTree
from tests.keys import TestIdentity as Key
from tests.keys import verify

torch.set_num_threads(1)

RUNNING: contextvars.ContextVar[int] = contextvars.ContextVar("RUNNING")
"""The member whose code runs: what a test patches can misbehave for that one alone."""

SIZES = {"delta": 3 * 4096 + 100, "exp_avg": 2 * 4096, "exp_avg_sq": 2 * 4096 + 7}


def make_layout(codec: str = "fp32", scale: int = 1) -> PayloadLayout:
    return PayloadLayout([Section(name=name, num_elements=size * scale, codec=codec) for name, size in SIZES.items()])


def random_vectors(seed: int, layout: PayloadLayout) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {s.name: torch.randn(s.num_elements, generator=generator) for s in layout.sections}


@dataclass
class World:
    """``num_senders`` members of weight 3, 5, 7, ... that all reduce, then ``num_validators`` of weight 0."""

    num_senders: int = 3
    num_validators: int = 0
    codec: str = "fp32"
    send_deadline_s: float = 20.0
    deadline_s: float = 60.0
    max_abs: float = 1e3
    scale: int = 1
    stall_s: float | None = None
    audit_blocks: int = 2
    reducers: Sequence[int] | None = None
    hidden: Sequence[int] = ()  # who announces no address
    vectors: list[dict[str, Tensor]] = field(default_factory=list)
    roots: dict[int, bytes] = field(default_factory=dict)
    crafted: dict[int, bytes] = field(default_factory=dict)  # payloads that no encoder wrote

    def __post_init__(self) -> None:
        self.layout = make_layout(self.codec, self.scale)
        self.hub = MemoryHub()
        self.keys = [Key(i + 1) for i in range(self.num_senders + self.num_validators)]
        self.dying: asyncio.Event
        if not self.vectors:
            self.vectors = [random_vectors(i, self.layout) for i in range(self.num_senders)]
        self.prepare()

    def prepare(self) -> None:
        """Payloads and plan for the vectors as they are."""
        self.payloads: list[bytes | None] = [
            self.crafted[i] if i in self.crafted else self.layout.encode(v, seed=0) for i, v in enumerate(self.vectors)
        ]
        self.payloads += [None] * self.num_validators
        self.plan = GroupPlan(
            run_id="r" * 64,
            round=4,
            attempt=0,
            members=tuple(self._member(i) for i in range(len(self.keys))),
            layout=self.layout,
            send_deadline_s=self.send_deadline_s,
            deadline_s=self.deadline_s,
            max_abs=self.max_abs,
            stall_s=self.stall_s,
            audit_blocks=self.audit_blocks,
        )

    def _member(self, index: int) -> Member:
        payload = self.payloads[index]
        root = MerkleTree(self.layout.chunk_digests(payload)).root if payload is not None else None
        return Member(
            hotkey=self.keys[index].hotkey,
            peer_id=self.peer(index),
            maddrs=() if index in self.hidden else (f"/memory/{index}",),
            weight=0.0 if payload is None else 3.0 + 2 * index,
            reduces=self.reducers is None or index in self.reducers,
            root=self.roots.get(index, root),
        )

    @staticmethod
    def peer(index: int) -> str:
        return f"peer-{index}"

    def hotkey(self, index: int) -> str:
        return self.keys[index].hotkey

    def mean(self, senders: Sequence[int]) -> dict[str, Tensor]:
        """The definition, in plain torch: in order, multiply, add, divide, then what the codec keeps of it.

        Equal weights count as 1.
        """
        weights = {i: self.plan.members[i].weight for i in senders}
        if len(set(weights.values())) == 1:
            weights = dict.fromkeys(senders, 1.0)
        total = sum(torch.tensor(weight) for weight in weights.values())
        codec, seed, chunk = get_codec(self.codec), rounding_seed(self.plan.group_id()), 0
        means = {}
        for section in self.layout.sections:
            acc = torch.zeros(section.num_elements)
            for i in senders:
                sent = codec.decode(codec.encode(self.vectors[i][section.name], chunk), section.num_elements)
                acc = acc + sent * weights[i]
            means[section.name] = codec.decode(codec.encode(acc / total, seed + chunk), section.num_elements)
            chunk += -(-section.num_elements // 4096)
        return means

    def run(
        self,
        only: Sequence[int] | None = None,
        script: Callable[[World, dict[int, asyncio.Task[AllReduceOutcome]]], object] | None = None,
        may_fail: Sequence[int] = (),
    ) -> dict[int, AllReduceOutcome]:
        """Outcomes of ``only``; none of one that ``script`` cancels, nor of one in ``may_fail`` that fails."""
        members = range(len(self.keys)) if only is None else only

        async def main() -> dict[int, AllReduceOutcome]:
            transports = {i: self.hub.transport(self.peer(i)) for i in members}
            for transport in transports.values():
                await transport.start()
            tasks = {i: asyncio.create_task(self.member_round(i, transports[i])) for i in members}
            running = asyncio.ensure_future(script(self, tasks)) if script else None  # type: ignore[arg-type]
            done = await asyncio.gather(*tasks.values(), return_exceptions=True)
            elapsed = asyncio.get_running_loop().time()
            assert elapsed <= self.deadline_s + 0.01, f"took {elapsed:.2f} s"
            if running is not None:
                running.cancel()
            for transport in transports.values():
                await transport.close()
            for index, result in zip(tasks, done, strict=True):
                expected = asyncio.CancelledError | ServiceError if index in may_fail else asyncio.CancelledError
                if isinstance(result, BaseException) and not isinstance(result, expected):
                    raise result
            return {i: r for i, r in zip(tasks, done, strict=True) if isinstance(r, AllReduceOutcome)}

        return run_in_virtual_time(main())

    async def member_round(self, index: int, transport: MemoryTransport) -> AllReduceOutcome:
        RUNNING.set(index)
        try:
            return await all_reduce(self.plan, self.keys[index], self.payloads[index], transport, verify)
        except asyncio.CancelledError:
            await transport.close()  # a killed process takes its streams with it
            raise


def assert_same_bits(outcomes: dict[int, AllReduceOutcome]) -> None:
    first = next(iter(outcomes.values()))
    for outcome in outcomes.values():
        assert outcome.mean_sha256 == first.mean_sha256
        for name, vector in first.vectors.items():
            assert torch.equal(outcome.vectors[name].view(torch.int32), vector.view(torch.int32))


def assert_mean(world: World, outcomes: dict[int, AllReduceOutcome], senders: Sequence[int]) -> None:
    expected = world.mean(senders)
    for outcome in outcomes.values():
        assert outcome.complete
        for name, vector in expected.items():
            assert torch.equal(outcome.vectors[name], vector)


def blamed(outcome: AllReduceOutcome) -> set[tuple[str, str]]:
    """Whom one node blames for what."""
    return {(record.hotkey, record.fault.value) for record in outcome.faults}


def chunks_of(world: World, vectors: dict[str, Tensor]) -> list[Tensor]:
    """Every chunk's values, in order."""
    return [piece for section in world.layout.sections for piece in vectors[section.name].split(4096)]


def assert_each_chunk_is_a_mean(
    world: World, outcomes: dict[int, AllReduceOutcome], *choices: Sequence[int]
) -> dict[int, set[int]]:
    """Everyone holds the same bits, each chunk the mean of one of ``choices``, and says truly of which.

    Returns:
        By choice, the chunks that are its mean.
    """
    assert_same_bits(outcomes)
    means = [chunks_of(world, world.mean(choice)) for choice in choices]
    first = next(iter(outcomes.values()))
    found: dict[int, set[int]] = {i: set() for i in range(len(choices))}
    for chunk, values in enumerate(chunks_of(world, first.vectors)):
        choice = next((i for i, mean in enumerate(means) if torch.equal(mean[chunk], values)), None)
        assert choice is not None, f"chunk {chunk} is no mean of {choices}"
        found[choice].add(chunk)
    for outcome in outcomes.values():
        assert outcome.complete
        for i in range(world.num_senders):
            share = sum(len(found[j]) for j, choice in enumerate(choices) if i in choice) / world.layout.num_chunks
            assert outcome.included[world.hotkey(i)] == pytest.approx(share)
            out = sum(stop - start for start, stop in outcome.left_out.get(world.hotkey(i), ()))
            assert out == (round((1 - share) * world.layout.num_chunks) if share else 0)
    return found
