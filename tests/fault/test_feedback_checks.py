"""The link check under lossy codecs: honest remainders pass on real sockets, tampered ones are lies.

Two rounds of real training: one from genesis, and one from an epoch whose mean left a chunk of the miner out. The first
moments are not sent.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch

from hivetrain.averaging.feedback import Feedback, Remainder
from hivetrain.contribution import Contribution, build_contribution
from hivetrain.errors import Fault
from hivetrain.manifest import Manifest, Ref
from hivetrain.run import Averaging
from hivetrain.scoring import CheckResult
from hivetrain.training.outer import outer_step
from hivetrain.training.state import state_hash
from hivetrain.verification.receipt import NO_REMAINDER, sign_receipt
from hivetrain.verification.remainder import chunk_leaves, root_of, to_bytes
from template.axon import Caller
from template.protocol import RemainderOpening, Train, TrainReply
from template.validator.verify import Draw
from tests.round_kit import (
    COINS,
    COINS_DIGEST,
    RECIPE,
    ROUND,
    WHOLE,
    Place,
    Wire,
    World,
    caller,
    identity,
    make_world,
    open_wire,
)

MINER = identity("miner")
AVERAGING = Averaging(codec="int2", moments_codec="none", second_moments_codec="log8")


@pytest.fixture(scope="module")
def genesis(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("lossy"), dataclasses.replace(RECIPE, averaging=AVERAGING))


@pytest.fixture(scope="module")
def wire() -> Iterator[Wire]:
    with open_wire() as opened:
        yield opened


@pytest.fixture(scope="module")
def place(wire: Wire) -> Place:
    return Place(wire, "miner")


def handed_in(world: World, round_number: int, remainder: Remainder | None) -> Contribution:
    data = world.bench.round_data(world.parts, round_number, 0)
    return build_contribution(
        parts=world.parts,
        base=world.base,
        start=world.state,
        work=world.parts.loop.run(world.state, data.batch, num_steps=RECIPE.inner.max_steps),
        data=data,
        round_number=round_number,
        rank=0,
        identity=MINER,
        remainder=remainder,
    )


@pytest.fixture(scope="module")
def first(genesis: World) -> Contribution:
    return handed_in(genesis, ROUND - 1, None)


@pytest.fixture(scope="module")
def world(genesis: World, first: Contribution) -> World:
    """The epoch that the first round made: of the miner's own vector, but for chunk 0."""
    vectors = genesis.parts.layout.decode(first.payload)
    delta = vectors["delta"].clone()
    delta[:4096] = 0
    state = outer_step(
        genesis.state, delta, vectors.get("exp_avg"), vectors["exp_avg_sq"], RECIPE.outer, RECIPE.inner.max_steps
    )
    manifest = genesis.base.manifest.model_copy(
        update={
            "epoch": 1,
            "round": ROUND - 1,
            "parent": genesis.base.manifest_sha256,
            "state_hash": state_hash(state),
            "receipts": {MINER.hotkey: first.receipt.sha256()},
            "left_out": {MINER.hotkey: ((0, 1),)},
        }
    )
    ref = Ref(epoch=1, commit="", manifest=Manifest.model_validate(manifest.model_dump()))
    return dataclasses.replace(genesis, base=ref, state=state)


@pytest.fixture(scope="module")
def remainder(world: World, first: Contribution, tmp_path_factory: pytest.TempPathFactory) -> Remainder:
    feedback = Feedback(
        tmp_path_factory.mktemp("remainder"), world.parts.layout, run_id=world.parts.run_id, hotkey=MINER.hotkey
    )
    assert first.carried is not None
    feedback.keep(first.receipt, first.carried)
    found = feedback.remainder(world.base.manifest)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def honest(world: World, remainder: Remainder) -> Contribution:
    return handed_in(world, ROUND, remainder)


def check(
    world: World,
    wire: Wire,
    place: Place,
    contribution: Contribution,
    change: Callable[[TrainReply], TrainReply] = lambda reply: reply,
    windows: tuple[int, ...] = WHOLE,
) -> CheckResult:
    """What the validator finds, the reply being changed on its way out of the miner."""
    handlers = world.handlers(MINER, world.board(contribution))
    run_id = world.parts.run_id
    asyncio.run(handlers.train(Train(run_id=run_id, round=ROUND, want="receipt", coins=COINS_DIGEST), caller()))

    async def train(synapse: Train, caller: Caller) -> TrainReply:
        return change(await handlers.train(synapse, caller))

    place.train = train
    draws = {MINER.hotkey: Draw(hotkey=MINER.hotkey, windows=windows)}
    result = world.verifier(wire).check({MINER.hotkey: contribution.receipt}, draws)[MINER.hotkey]
    assert result is not None
    return result


def resigned(contribution: Contribution, **changes: str) -> Contribution:
    return dataclasses.replace(
        contribution, receipt=sign_receipt(contribution.receipt.model_copy(update=changes), MINER)
    )


@pytest.mark.parametrize("windows", [(0,), (1,), WHOLE])
def test_an_honest_round_with_a_remainder_passes(
    world: World, wire: Wire, place: Place, honest: Contribution, windows: tuple[int, ...]
) -> None:
    assert honest.receipt.remainder_root != NO_REMAINDER
    result = check(world, wire, place, honest, windows=windows)
    assert result.fault is None, result
    assert result.distance is not None
    assert result.distance < 1e-3


def test_an_honest_round_after_a_lost_remainder_passes(world: World, wire: Wire, place: Place) -> None:
    assert check(world, wire, place, handed_in(world, ROUND, None)).fault is None


def test_the_remainder_is_opened_with_the_last_snapshot_alone(world: World, honest: Contribution) -> None:
    handlers = world.handlers(MINER, world.board(honest))
    run_id = world.parts.run_id

    def ask(want: str, coins: bytes, *snapshots: int) -> TrainReply:
        synapse = Train(run_id=run_id, round=ROUND, want=want, coins=coins, snapshots=snapshots)  # type: ignore[arg-type]
        return asyncio.run(handlers.train(synapse, caller()))

    assert ask("receipt", COINS_DIGEST).remainder is None
    assert ask("open", COINS, 0).remainder is None
    opened = ask("open", COINS, 1).remainder
    assert opened is not None
    assert honest.remainder is not None
    assert opened.values == honest.remainder.values
    assert len(opened.others) == 32 * -(-world.parts.flat.size // 4096)


def test_leaving_the_remainder_out_of_the_payload_is_a_lie(
    world: World, wire: Wire, place: Place, honest: Contribution
) -> None:
    without = handed_in(world, ROUND, None)
    cheat = resigned(honest, payload_root=without.receipt.payload_root)
    result = check(world, wire, place, cheat)
    assert result.fault is Fault.NOT_COMMITTED
    assert "do not encode" in result.detail


def test_adding_it_and_denying_it_is_a_lie(world: World, wire: Wire, place: Place, honest: Contribution) -> None:
    result = check(world, wire, place, resigned(honest, remainder_root=NO_REMAINDER))
    assert result.fault is Fault.NOT_COMMITTED


@pytest.mark.parametrize("name", ["rest_root", "carried_root"])
def test_committing_to_another_remainder_for_the_next_round_is_a_lie(
    world: World, wire: Wire, place: Place, honest: Contribution, name: str
) -> None:
    result = check(world, wire, place, resigned(honest, **{name: "ab" * 32}))
    assert result.fault is Fault.NOT_COMMITTED
    assert "not what its payload leaves" in result.detail


def test_rounding_under_another_seed_is_a_lie(
    world: World, wire: Wire, place: Place, remainder: Remainder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("hivetrain.contribution.codec_seed", lambda *_: 12345)
        cheat = handed_in(world, ROUND, remainder)
    result = check(world, wire, place, cheat)  # int8 of the moments is what rounds under it here
    assert result.fault is Fault.NOT_COMMITTED


def test_a_remainder_of_ones_own_making_is_a_lie(world: World, wire: Wire, place: Place, remainder: Remainder) -> None:
    values = remainder.values + 0.01 * torch.randn(len(remainder.values), generator=torch.Generator().manual_seed(1))
    raw = to_bytes(values)
    made_up = dataclasses.replace(
        remainder,
        values=values,
        root=root_of(chunk_leaves(raw)),
        opening=dataclasses.replace(remainder.opening, values=raw),
    )
    result = check(world, wire, place, handed_in(world, ROUND, made_up))
    assert result.fault is Fault.NOT_COMMITTED
    assert "not what the round before left" in result.detail


def changed(**fields: bytes) -> Callable[[TrainReply], TrainReply]:
    def change(reply: TrainReply) -> TrainReply:
        if reply.remainder is None:
            return reply
        return reply.model_copy(update={"remainder": reply.remainder.model_copy(update=fields)})

    return change


@pytest.mark.parametrize("field_name", ["values", "previous", "others"])
def test_other_bytes_than_were_committed_do_not_open(
    world: World, wire: Wire, place: Place, honest: Contribution, field_name: str
) -> None:
    assert honest.remainder is not None
    good: bytes = getattr(honest.remainder, field_name)
    for bad in (good[:-1] + bytes([good[-1] ^ 1]), good[:-1], b""):
        assert check(world, wire, place, honest, changed(**{field_name: bad})).fault is Fault.NOT_COMMITTED


def test_opening_no_remainder_is_a_refusal(world: World, wire: Wire, place: Place, honest: Contribution) -> None:
    result = check(world, wire, place, honest, lambda reply: reply.model_copy(update={"remainder": None}))
    assert result.fault is Fault.REFUSED


def test_a_remainder_past_its_size_is_cut_and_counts_as_a_refusal(
    world: World, wire: Wire, place: Place, honest: Contribution
) -> None:
    result = check(world, wire, place, honest, changed(values=bytes(4 << 20)))
    assert result.fault is Fault.REFUSED


def test_one_that_is_shown_and_not_committed_to_changes_nothing(world: World, wire: Wire, place: Place) -> None:
    opening = RemainderOpening(values=b"1234", previous=b"junk")
    without = handed_in(world, ROUND, None)
    result = check(world, wire, place, without, lambda reply: reply.model_copy(update={"remainder": opening}))
    assert result.fault is None


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("vector", float("nan"), "cannot be encoded"),
        ("exp_avg", float("inf"), "replay distance inf"),  # not sent, and replayed all the same
        ("exp_avg_sq", -1.0, "cannot be encoded"),
    ],
)
def test_a_final_snapshot_with_values_that_none_can_have_is_a_lie(
    world: World, wire: Wire, place: Place, honest: Contribution, name: str, value: float, says: str
) -> None:
    from tests.fault.test_checks import resealed

    payloads = [one.payload for one in honest.snapshots.snapshots]
    size = world.parts.flat.size
    at = 8 + 4 * size * ("vector", "exp_avg", "exp_avg_sq").index(name)
    payloads[-1] = payloads[-1][:at] + torch.tensor([value]).numpy().tobytes() + payloads[-1][at + 4 :]
    result = check(world, wire, place, resealed(honest, payloads))
    assert result.fault is Fault.WRONG_REPLAY
    assert says in result.detail
