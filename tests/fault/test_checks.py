"""Who is caught in COMMIT and VERIFY, for what, and who is not: cheats against the real checks on real sockets."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from hivetrain.contribution import Contribution
from hivetrain.data.assignment import NoSlot
from hivetrain.data.reader import RoundData
from hivetrain.errors import DataError, Fault
from hivetrain.ports import free_port
from hivetrain.scoring import CheckResult, MovingAverage, RoundFacts, Score, score_round
from hivetrain.scoring.score import Bandwidth
from hivetrain.training.inner import RoundWork
from hivetrain.training.state import Snapshot
from hivetrain.verification.receipt import Expected, Receipt, SnapshotBytes, SnapshotTree, sign_receipt
from template.axon import Caller
from template.chain.client import NeuronInfo
from template.chain.keys import verify
from template.dendrite import PeerAddress
from template.network import NetworkThread
from template.protocol import Opening, Train, TrainReply
from template.validator import verify as verify_module
from template.validator.collect import Collected, collect_receipts
from template.validator.verify import Draw
from tests.round_kit import (
    COINS_DIGEST,
    ROUND,
    WHOLE,
    Place,
    TrainHandler,
    Wire,
    World,
    caller,
    identity,
    neuron_info,
    open_wire,
    shared_world,
    whole_round,
)

MINER = identity("miner")
OTHERS = (identity("miner-2"), identity("miner-3"))
LIES = {Fault.WRONG_REPLAY, Fault.NOT_COMMITTED, Fault.DOUBLE_COMMIT}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return shared_world(tmp_path_factory)


@pytest.fixture(scope="module")
def wire() -> Iterator[Wire]:
    with open_wire() as opened:
        yield opened


@pytest.fixture(scope="module")
def honest(world: World) -> Contribution:
    return world.contribution(MINER)


@pytest.fixture(scope="module")
def places(wire: Wire) -> dict[str, Place]:
    names = {MINER.hotkey: "miner", OTHERS[0].hotkey: "miner-2", OTHERS[1].hotkey: "miner-3"}
    return {hotkey: Place(wire, name) for hotkey, name in names.items()}


def committed(world: World, contribution: Contribution) -> TrainHandler:
    """The real handler of a miner that committed, with the validator's coins already received."""
    miner = next(one for one in (MINER, *OTHERS) if one.hotkey == contribution.receipt.hotkey)
    handlers = world.handlers(miner, world.board(contribution))
    asyncio.run(handlers.train(ask("receipt", world, COINS_DIGEST), caller()))
    return handlers.train


def ask(want: str, world: World, coins: bytes) -> Train:
    return Train(run_id=world.parts.run_id, round=ROUND, want=want, coins=coins)  # type: ignore[arg-type]


def check(
    world: World,
    wire: Wire,
    places: dict[str, Place],
    contribution: Contribution,
    train: TrainHandler | None = None,
    windows: tuple[int, ...] = WHOLE,
    **changes: object,
) -> CheckResult | None:
    """What the validator finds of one miner."""
    hotkey = contribution.receipt.hotkey
    places[hotkey].train = train or committed(world, contribution)
    verifier = world.verifier(wire, **changes)
    draws = {hotkey: Draw(hotkey=hotkey, windows=windows)}
    return verifier.check({hotkey: contribution.receipt}, draws)[hotkey]


def assert_caught(result: CheckResult | None, fault: Fault, tmp_path: Path, world: World) -> None:
    """The fault and a score of zero; for a lie also a cooldown, which silence does not prove."""
    assert result is not None
    assert result.fault is fault, result
    scoring = world.parts.recipe.scoring
    facts = RoundFacts(tokens=256, checks=[result], bandwidth=Bandwidth(size_bytes=1, seconds=1.0, in_time=True))
    scores = score_round({"cheat": facts}, scoring)
    score = scores["cheat"]
    assert isinstance(score, Score)
    assert score.score == 0.0
    average = MovingAverage(tmp_path / "averages.json", scoring)
    average.update(ROUND, scores, {"cheat"})
    assert average.cooldown_left("cheat", ROUND + 1) == (scoring.cooldown_rounds if fault in LIES else 0)


def noised(snapshot: Snapshot, share: float, start: torch.Tensor, seed: int = 1) -> Snapshot:
    """The snapshot with noise of ``share`` of what the vector moved."""
    noise = torch.randn(len(start), generator=torch.Generator().manual_seed(seed))
    moved = torch.linalg.vector_norm(snapshot.vector - start)
    return dataclasses.replace(snapshot, vector=snapshot.vector + noise * (share * moved / noise.norm()))


def resealed(contribution: Contribution, payloads: Sequence[bytes]) -> Contribution:
    """The miner signs other snapshot bytes; everything that a receipt can show adds up."""
    tree = SnapshotTree([SnapshotBytes(step=4 * (i + 1), payload=payload) for i, payload in enumerate(payloads)])
    receipt = contribution.receipt.model_copy(update={"snapshots_root": tree.root})
    return dataclasses.replace(contribution, receipt=sign_receipt(receipt, MINER), snapshots=tree)


# -- VERIFY: the honest --------------------------------------------------------------------------------------


@pytest.mark.parametrize("windows", [(0,), (1,), WHOLE])
def test_honest_work_passes_far_inside_the_bound(
    world: World, wire: Wire, places: dict[str, Place], honest: Contribution, windows: tuple[int, ...]
) -> None:
    result = check(world, wire, places, honest, windows=windows)
    assert result is not None
    assert result.fault is None
    assert result.distance is not None
    assert result.distance < 1e-3


def test_fewer_honest_steps_pass_as_well(world: World, wire: Wire, places: dict[str, Place]) -> None:
    short = world.contribution(MINER, work=world.work(num_steps=5))
    result = check(world, wire, places, short)
    assert result is not None
    assert (result.fault, short.receipt.num_snapshots) == (None, 2)


# -- VERIFY: cheats with the work ----------------------------------------------------------------------------


def skipped(world: World) -> RoundWork:
    """Every second step, claimed as all of them."""
    batch = world.bench.round_data(world.parts, ROUND, 0).batch
    snapshots = []
    for num_steps in (2, 4):
        work = world.work(num_steps=num_steps, batches=lambda step: batch(2 * step))
        snapshots.append(dataclasses.replace(work.snapshots[-1], step=2 * num_steps))
    return dataclasses.replace(
        work, num_steps=8, num_samples=16, num_tokens=256, losses=work.losses * 2, snapshots=tuple(snapshots)
    )


def other_data(world: World) -> RoundWork:
    return world.work(batches=world.bench.round_data(world.parts, ROUND, 1).batch)


def with_noise(world: World) -> RoundWork:
    work = world.work()
    return dataclasses.replace(
        work, snapshots=tuple(noised(one, 0.10, world.state.vector, seed=one.step) for one in work.snapshots)
    )


def stale_base(world: World) -> RoundWork:
    """Trained on from somewhere else than the round's state."""
    elsewhere = world.work(rank=2).snapshots[-1]
    return world.work(state=dataclasses.replace(world.state, vector=elsewhere.vector))


def random_vector(world: World) -> RoundWork:
    work = world.work()
    generator = torch.Generator().manual_seed(3)
    made = [
        dataclasses.replace(one, vector=world.state.vector + 0.01 * torch.randn(len(one.vector), generator=generator))
        for one in work.snapshots
    ]
    return dataclasses.replace(work, snapshots=tuple(made))


def poisoned(world: World, name: str) -> RoundWork:
    """An honest vector with moments that would harm everyone's next round."""
    work = world.work()
    last = work.snapshots[-1]
    poisoned = dataclasses.replace(last, **{name: getattr(last, name) * 4})
    return dataclasses.replace(work, snapshots=(work.snapshots[0], poisoned))


def not_finite(world: World) -> RoundWork:
    work = world.work()
    vector = work.snapshots[-1].vector.clone()
    vector[5] = float("nan")
    return dataclasses.replace(
        work, snapshots=(work.snapshots[0], dataclasses.replace(work.snapshots[-1], vector=vector))
    )


@pytest.mark.parametrize(
    "cheat",
    [
        skipped,
        other_data,
        with_noise,
        stale_base,
        random_vector,
        not_finite,
        functools.partial(poisoned, name="exp_avg"),
        functools.partial(poisoned, name="exp_avg_sq"),
    ],
)
def test_work_that_replay_does_not_give_is_a_lie(
    world: World, wire: Wire, places: dict[str, Place], tmp_path: Path, cheat: Callable[[World], RoundWork]
) -> None:
    result = check(world, wire, places, world.contribution(MINER, work=cheat(world)))
    assert_caught(result, Fault.WRONG_REPLAY, tmp_path, world)


def test_one_window_is_enough_to_see_skipped_steps_inside_it(
    world: World, wire: Wire, places: dict[str, Place], tmp_path: Path
) -> None:
    cheat = world.contribution(MINER, work=skipped(world))
    assert_caught(check(world, wire, places, cheat, windows=(1,)), Fault.WRONG_REPLAY, tmp_path, world)


def test_tokens_of_another_assignment_are_a_lie_before_anything_is_replayed(
    world: World, wire: Wire, places: dict[str, Place], honest: Contribution, tmp_path: Path
) -> None:
    digests = world.bench.round_data(world.parts, ROUND, 1).digests
    receipt = sign_receipt(honest.receipt.model_copy(update={"data_digests": digests}), MINER)
    result = check(world, wire, places, dataclasses.replace(honest, receipt=receipt))
    assert_caught(result, Fault.WRONG_REPLAY, tmp_path, world)
    assert result is not None
    assert "assignment" in result.detail


def test_a_receipt_of_a_rank_without_a_slot_is_a_lie_and_no_crash(
    world: World, wire: Wire, places: dict[str, Place], honest: Contribution, tmp_path: Path
) -> None:
    with pytest.raises(NoSlot):
        world.bench.round_data(world.parts, ROUND, 4)
    receipt = sign_receipt(honest.receipt.model_copy(update={"rank": 4}), MINER)
    result = check(world, wire, places, dataclasses.replace(honest, receipt=receipt))
    assert_caught(result, Fault.WRONG_REPLAY, tmp_path, world)


# -- VERIFY: cheats with the bytes ---------------------------------------------------------------------------


def test_a_payload_that_does_not_encode_the_final_snapshot_was_not_committed_to(
    world: World, wire: Wire, places: dict[str, Place], honest: Contribution, tmp_path: Path
) -> None:
    other = world.contribution(MINER, rank=1)
    receipt = honest.receipt.model_copy(update={"payload_root": other.receipt.payload_root})
    cheat = dataclasses.replace(honest, receipt=sign_receipt(receipt, MINER), payload=other.payload)
    assert_caught(check(world, wire, places, cheat), Fault.NOT_COMMITTED, tmp_path, world)


def test_a_snapshot_that_was_changed_after_the_commit_does_not_open(
    world: World, wire: Wire, places: dict[str, Place], honest: Contribution, tmp_path: Path
) -> None:
    train = committed(world, honest)

    async def tampered(synapse: Train, caller: Caller) -> TrainReply:
        reply = await train(synapse, caller)
        first = reply.openings[0]
        payload = first.payload[:-1] + bytes([first.payload[-1] ^ 1])
        return reply.model_copy(
            update={"openings": (first.model_copy(update={"payload": payload}), *reply.openings[1:])}
        )

    assert_caught(check(world, wire, places, honest, tampered), Fault.NOT_COMMITTED, tmp_path, world)


def test_snapshots_under_each_others_index_do_not_open(
    world: World, wire: Wire, places: dict[str, Place], honest: Contribution, tmp_path: Path
) -> None:
    train = committed(world, honest)

    async def swapped(synapse: Train, caller: Caller) -> TrainReply:
        reply = await train(synapse, caller)
        first, second = reply.openings
        openings = (first.model_copy(update={"index": 1}), second.model_copy(update={"index": 0}))
        return reply.model_copy(update={"openings": openings})

    assert_caught(check(world, wire, places, honest, swapped), Fault.NOT_COMMITTED, tmp_path, world)


@pytest.mark.parametrize("change", [-4, 4])
def test_committing_to_a_snapshot_of_another_size_is_a_lie(
    world: World, wire: Wire, places: dict[str, Place], honest: Contribution, tmp_path: Path, change: int
) -> None:
    payloads = [one.payload for one in honest.snapshots.snapshots]
    payloads[0] = payloads[0][:change] if change < 0 else payloads[0] + bytes(change)
    assert_caught(check(world, wire, places, resealed(honest, payloads)), Fault.WRONG_REPLAY, tmp_path, world)


@pytest.mark.parametrize("step", [0, 5, 8, 9, 2**53])
def test_committing_to_a_snapshot_of_another_step_is_a_lie(
    world: World, wire: Wire, places: dict[str, Place], honest: Contribution, tmp_path: Path, step: int
) -> None:
    payloads = [one.payload for one in honest.snapshots.snapshots]
    payloads[0] = step.to_bytes(8, "little") + payloads[0][8:]
    result = check(world, wire, places, resealed(honest, payloads))
    assert_caught(result, Fault.WRONG_REPLAY, tmp_path, world)
    assert result is not None
    assert f"is of step {step}, expected 4" in result.detail


def test_opening_fewer_snapshots_than_asked_is_a_refusal(
    world: World, wire: Wire, places: dict[str, Place], honest: Contribution, tmp_path: Path
) -> None:
    train = committed(world, honest)

    async def too_few(synapse: Train, caller: Caller) -> TrainReply:
        return await train(synapse.model_copy(update={"snapshots": synapse.snapshots[:1]}), caller)

    result = check(world, wire, places, honest, too_few)
    assert_caught(result, Fault.REFUSED, tmp_path, world)
    assert result is not None
    assert "[0] of [0, 1]" in result.detail


def test_opening_one_snapshot_twice_instead_of_two_is_a_refusal(
    world: World, wire: Wire, places: dict[str, Place], honest: Contribution, tmp_path: Path
) -> None:
    train = committed(world, honest)

    async def twice(synapse: Train, caller: Caller) -> TrainReply:
        reply = await train(synapse, caller)
        return reply.model_copy(update={"openings": (reply.openings[0], reply.openings[0])})

    assert_caught(check(world, wire, places, honest, twice), Fault.REFUSED, tmp_path, world)


def test_a_second_receipt_in_the_answer_is_a_lie_with_both_as_evidence(
    world: World, wire: Wire, places: dict[str, Place], honest: Contribution, tmp_path: Path
) -> None:
    train = committed(world, honest)
    second = sign_receipt(honest.receipt.model_copy(update={"loss": 1.0}), MINER)

    async def two_faced(synapse: Train, caller: Caller) -> TrainReply:
        return (await train(synapse, caller)).model_copy(update={"receipt": second.to_bytes()})

    result = check(world, wire, places, honest, two_faced)
    assert_caught(result, Fault.DOUBLE_COMMIT, tmp_path, world)
    assert result is not None
    assert set(result.evidence.values()) == {honest.receipt.to_bytes(), second.to_bytes()}


def test_an_answer_without_openings_is_a_refusal(
    world: World, wire: Wire, places: dict[str, Place], honest: Contribution, tmp_path: Path
) -> None:
    never_asked = world.handlers(MINER, world.board(honest)).train  # has not heard of these coins
    result = check(world, wire, places, honest, never_asked)
    assert_caught(result, Fault.REFUSED, tmp_path, world)
    assert result is not None
    assert "wrong_coins" in result.detail


def test_a_miner_that_fails_when_it_is_asked_to_open_refused(
    world: World, wire: Wire, places: dict[str, Place], honest: Contribution, tmp_path: Path
) -> None:
    async def fails(synapse: Train, caller: Caller) -> TrainReply:
        raise OSError("disk on fire")

    assert_caught(check(world, wire, places, honest, fails), Fault.REFUSED, tmp_path, world)


def test_more_bytes_than_the_snapshots_have_are_cut_and_count_as_a_refusal(
    world: World, wire: Wire, places: dict[str, Place], honest: Contribution, tmp_path: Path
) -> None:
    train = committed(world, honest)

    async def flood(synapse: Train, caller: Caller) -> TrainReply:
        reply = await train(synapse, caller)
        huge = Opening(index=0, step=4, payload=bytes(1 << 20))
        return reply.model_copy(update={"openings": (huge, reply.openings[1])})

    assert_caught(check(world, wire, places, honest, flood), Fault.REFUSED, tmp_path, world)


def test_the_only_miner_there_is_may_be_gone_by_our_own_fault(world: World, wire: Wire, honest: Contribution) -> None:
    verifier = world.verifier(wire, address=nowhere(free_port()))
    receipts = {MINER.hotkey: honest.receipt}
    assert verifier.check(receipts, whole_round([honest.receipt])) == {MINER.hotkey: None}


# -- VERIFY: ours --------------------------------------------------------------------------------------------


def test_our_own_data_failure_checks_nobody_and_blames_nobody(
    world: World, wire: Wire, places: dict[str, Place], honest: Contribution
) -> None:
    def unreadable(rank: int) -> RoundData:
        raise DataError(f"the data of rank {rank} cannot be read: disk full")

    assert check(world, wire, places, honest, load_data=unreadable) is None


def test_out_of_time_is_our_own_failure(
    world: World, wire: Wire, places: dict[str, Place], honest: Contribution
) -> None:
    assert check(world, wire, places, honest, in_time=lambda: False) is None


def test_without_a_network_nobody_is_blamed(world: World, wire: Wire, honest: Contribution) -> None:
    verifier = world.verifier(wire, network=NetworkThread())
    assert verifier.check({MINER.hotkey: honest.receipt}, whole_round([honest.receipt])) == {MINER.hotkey: None}


def test_who_is_not_drawn_is_not_asked(world: World, wire: Wire, honest: Contribution) -> None:
    def nobody(hotkey: str) -> object:
        raise AssertionError(f"{hotkey} was asked")

    verifier = world.verifier(wire, address=nobody)
    not_drawn = {MINER.hotkey: Draw(hotkey=MINER.hotkey, windows=())}
    assert verifier.check({MINER.hotkey: honest.receipt}, not_drawn) == {}


def test_when_nobody_of_several_can_be_reached_it_is_our_line(world: World, wire: Wire) -> None:
    contributions = [world.contribution(miner, rank) for rank, miner in enumerate((MINER, *OTHERS))]
    receipts = {one.receipt.hotkey: one.receipt for one in contributions}
    verifier = world.verifier(wire, address=nowhere(free_port()))
    assert verifier.check(receipts, whole_round(list(receipts.values()))) == dict.fromkeys(receipts)


def test_a_miner_that_keeps_us_waiting_is_blamed_alone_and_delays_nobody(
    world: World, wire: Wire, places: dict[str, Place], honest: Contribution, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_module, "OPEN_PATIENCE_S", 0.05)
    other = world.contribution(OTHERS[0], rank=1)
    places[OTHERS[0].hotkey].train = committed(world, other)
    checked: list[int] = []

    async def silent(synapse: Train, caller: Caller) -> TrainReply:
        await asyncio.sleep(3600)
        raise AssertionError

    def load_data(rank: int) -> RoundData:
        checked.append(rank)
        return world.bench.round_data(world.parts, ROUND, rank)

    places[MINER.hotkey].train = silent
    began = time.monotonic()

    def in_time() -> bool:
        """VERIFY ends once the other miner was checked, and patience with this one is over."""
        waited = time.monotonic() - began
        return waited < 20 and not (checked and waited > 10 * verify_module.OPEN_PATIENCE_S)

    verifier = world.verifier(wire, load_data=load_data, in_time=in_time)
    receipts = {one.receipt.hotkey: one.receipt for one in (honest, other)}
    results = verifier.check(receipts, whole_round(list(receipts.values())))
    late, checked_one = results[MINER.hotkey], results[OTHERS[0].hotkey]
    assert late is not None
    assert late.fault is Fault.REFUSED
    assert checked_one is not None
    assert checked_one.fault is None


def test_an_answer_that_would_come_too_late_to_be_judged_is_a_refusal_where_others_are_heard(
    world: World, wire: Wire, places: dict[str, Place], honest: Contribution
) -> None:
    other = world.contribution(OTHERS[0], rank=1)
    places[OTHERS[0].hotkey].train = committed(world, other)

    async def slow(synapse: Train, caller: Caller) -> TrainReply:
        await asyncio.sleep(3600)
        raise AssertionError

    places[MINER.hotkey].train = slow
    receipts = {one.receipt.hotkey: one.receipt for one in (honest, other)}
    draws = whole_round([honest.receipt])  # the other one is not drawn, and is up
    result = world.verifier(wire, answer_s=0.2).check(receipts, draws)[MINER.hotkey]
    assert result is not None
    assert result.fault is Fault.REFUSED


def test_who_was_asked_just_before_the_end_is_not_blamed(
    world: World, wire: Wire, places: dict[str, Place], honest: Contribution
) -> None:
    async def slow(synapse: Train, caller: Caller) -> TrainReply:
        await asyncio.sleep(3600)
        raise AssertionError

    looks = iter([True, True, False])
    assert check(world, wire, places, honest, slow, in_time=lambda: next(looks)) is None


# -- COMMIT --------------------------------------------------------------------------------------------------


def collect(world: World, wire: Wire, miners: Sequence[NeuronInfo], rounds: int = 1) -> Collected:
    """What is in after COMMIT, which lasts for so many rounds of asking."""
    left = iter(range(1, rounds))
    expected: dict[str, Expected] = {one.hotkey: world.expected(rank) for rank, one in enumerate(miners)}
    return collect_receipts(
        miners=miners,
        expected=expected,
        run_id=world.parts.run_id,
        round_number=ROUND,
        coins_digest=COINS_DIGEST,
        dendrite=wire.dendrite,
        network=wire.network,
        verify=verify,
        keep_waiting=lambda: next(left, None) is not None,
    )


def receipt_of(receipt: bytes | None, status: str = "committed") -> TrainHandler:
    async def answer(synapse: Train, caller: Caller) -> TrainReply:
        return TrainReply(
            run_id=synapse.run_id, round=synapse.round, status=status, epoch=0, step=8, num_steps=8, receipt=receipt
        )

    return answer


@pytest.fixture
def three(world: World, places: dict[str, Place]) -> list[NeuronInfo]:
    """Three miners that have committed."""
    for rank, miner in enumerate((MINER, *OTHERS)):
        places[miner.hotkey].train = world.handlers(miner, world.board(world.contribution(miner, rank))).train
    return [places[miner.hotkey].info for miner in (MINER, *OTHERS)]


def test_every_honest_receipt_comes_in(world: World, wire: Wire, three: list[NeuronInfo]) -> None:
    collected = collect(world, wire, three)
    assert set(collected.receipts) == {one.hotkey for one in three}
    assert (collected.refused, collected.ours) == ({}, {})


def test_a_miner_that_commits_late_is_asked_again(
    world: World, wire: Wire, three: list[NeuronInfo], places: dict[str, Place]
) -> None:
    ready = places[MINER.hotkey].train
    turns = iter([receipt_of(None, "training")])

    async def later(synapse: Train, caller: Caller) -> TrainReply:
        return await next(turns, ready)(synapse, caller)

    places[MINER.hotkey].train = later
    collected = collect(world, wire, three, rounds=2)
    assert (len(collected.receipts), collected.refused) == (3, {})


def unsigned(receipt: Receipt) -> bytes:
    return receipt.model_copy(update={"signature": ""}).to_bytes()


def odd_signature(receipt: Receipt) -> bytes:
    """Half a byte too many: hex that no parser takes."""
    return receipt.to_bytes().replace(receipt.signature.encode(), receipt.signature.encode() + b"a")


def anothers(receipt: Receipt) -> bytes:
    return sign_receipt(receipt.model_copy(update={"hotkey": OTHERS[0].hotkey}), OTHERS[0]).to_bytes()


def too_many_steps(receipt: Receipt) -> bytes:
    """Consistent with itself, and past the recipe's eight."""
    more = {"num_steps": 12, "num_samples": 24, "num_tokens": 384, "num_snapshots": 3}
    return sign_receipt(receipt.model_copy(update=more), MINER).to_bytes()


def another_base(receipt: Receipt) -> bytes:
    return sign_receipt(receipt.model_copy(update={"base_state": "0" * 64}), MINER).to_bytes()


@pytest.mark.parametrize(
    ("forge", "says"),
    [
        (lambda _: b"\xff\x00 no receipt at all", "malformed"),
        (unsigned, "bad_signature"),
        (odd_signature, "malformed"),
        (anothers, "bad_signature"),
        (too_many_steps, "malformed: receipt.num_steps"),
        (another_base, "wrong_schema: receipt.base_state"),
    ],
)
def test_a_false_receipt_is_refused_alone(
    world: World,
    wire: Wire,
    three: list[NeuronInfo],
    places: dict[str, Place],
    honest: Contribution,
    forge: Callable[[Receipt], bytes],
    says: str,
) -> None:
    places[MINER.hotkey].train = receipt_of(forge(honest.receipt))
    collected = collect(world, wire, three)
    assert set(collected.receipts) == {miner.hotkey for miner in OTHERS}
    assert set(collected.refused) == {MINER.hotkey}
    assert says in collected.refused[MINER.hotkey]
    assert collected.ours == {}


def test_a_miner_whose_handler_fails_is_refused_alone(
    world: World, wire: Wire, three: list[NeuronInfo], places: dict[str, Place]
) -> None:
    async def fails(synapse: Train, caller: Caller) -> TrainReply:
        raise RuntimeError("a bug over there")

    places[MINER.hotkey].train = fails
    collected = collect(world, wire, three)
    assert set(collected.receipts) == {miner.hotkey for miner in OTHERS}
    assert collected.refused[MINER.hotkey].startswith("failed")


def test_a_miner_that_is_down_is_refused_alone(world: World, wire: Wire, three: list[NeuronInfo]) -> None:
    down = neuron_info(MINER.hotkey, free_port())
    collected = collect(world, wire, [down, *three[1:]])
    assert set(collected.receipts) == {miner.hotkey for miner in OTHERS}
    assert collected.refused[MINER.hotkey].startswith("unreachable")
    assert collected.ours == {}


def test_bytes_that_are_no_http_are_that_miners_own(world: World, wire: Wire, three: list[NeuronInfo]) -> None:
    async def open_garbage() -> asyncio.Server:
        async def garbage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"\x00\x01\x02 what?\r\n\r\n")
            await writer.drain()
            writer.close()

        return await asyncio.start_server(garbage, "127.0.0.1", 0)

    server = wire.network.run(open_garbage(), 5)
    try:
        babble = neuron_info(MINER.hotkey, server.sockets[0].getsockname()[1])
        collected = collect(world, wire, [babble, *three[1:]])
    finally:
        wire.network.run(_close(server), 5)
    assert set(collected.receipts) == {miner.hotkey for miner in OTHERS}
    assert set(collected.refused) == {MINER.hotkey}


def test_a_miner_without_an_axon_is_refused(world: World, wire: Wire, three: list[NeuronInfo]) -> None:
    collected = collect(world, wire, [neuron_info(MINER.hotkey, 0), *three[1:]])
    assert collected.refused == {MINER.hotkey: "serves no axon"}
    assert len(collected.receipts) == 2


def test_when_no_miner_can_be_reached_it_is_our_line_even_if_one_serves_nothing(world: World, wire: Wire) -> None:
    port = free_port()
    down = [neuron_info(miner.hotkey, port) for miner in OTHERS]
    collected = collect(world, wire, [neuron_info(MINER.hotkey, 0), *down])
    assert collected.receipts == {}
    assert set(collected.ours) == {miner.hotkey for miner in OTHERS}
    assert MINER.hotkey not in collected.ours


def test_miners_that_answer_and_have_nothing_are_not_excused_as_unreachable(
    world: World, wire: Wire, three: list[NeuronInfo], places: dict[str, Place]
) -> None:
    for one in three:
        places[one.hotkey].train = receipt_of(None, "idle")
    collected = collect(world, wire, three)
    assert collected.ours == {}
    assert set(collected.refused.values()) == {"no receipt yet: idle"}


def nowhere(port: int) -> Callable[[str], PeerAddress]:
    """Addresses at which nobody listens."""
    return lambda hotkey: PeerAddress(hotkey=hotkey, ip="127.0.0.1", port=port)


async def _close(server: asyncio.Server) -> None:
    server.close()
    await server.wait_closed()
