"""What a neuron answers: a real board, a real contribution, and handlers that never touch the model."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import hashlib
from collections.abc import Callable

import msgpack
import pytest

from hivetrain.averaging.group import GroupPlan, Member, plan_to_dict
from hivetrain.contribution import Contribution
from hivetrain.errors import Fault, PeerFault
from hivetrain.manifest import state_message
from hivetrain.verification.receipt import check_opening, decode_snapshot, parse_receipt
from hivetrain.workbench import make_layout
from template.board import AllReduceTask, Board
from template.chain.keys import verify
from template.handlers import MAX_DEADLINE_S, MAX_PLAN_BYTES, Handlers, parse_plan, spec_version
from template.protocol import AllReduce, AllReduceReply, IsAlive
from tests.round_kit import COINS, COINS_DIGEST, ROUND, VALIDATOR, World, ask, caller, identity, shared_world

ME = identity("miner")
SECOND_VALIDATOR = identity("validator-2")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return shared_world(tmp_path_factory)


@pytest.fixture(scope="module")
def contribution(world: World) -> Contribution:
    return world.contribution(ME)


@pytest.fixture
def board(world: World, contribution: Contribution) -> Board:
    return world.board(contribution)


@pytest.fixture
def handlers(world: World, board: Board) -> Handlers:
    return world.handlers(ME, board)


def hand_over_coins(handlers: Handlers, world: World, who: object = VALIDATOR) -> None:
    assert ask(handlers, world, who, want="receipt", coins=COINS_DIGEST).status == "committed"


# -- IsAlive -------------------------------------------------------------------------------------------------


def test_is_alive_says_who_is_here_and_where_it_stands(world: World, board: Board, handlers: Handlers) -> None:
    board.update(state="all-reduce")
    reply = asyncio.run(handlers.is_alive(IsAlive(), caller()))
    assert (reply.role, reply.run_id, reply.epoch, reply.round) == ("miner", world.parts.run_id, 0, ROUND)
    assert reply.state == "all_reduce"
    reply.to_bytes()


def test_is_alive_answers_before_the_first_round(world: World) -> None:
    reply = asyncio.run(world.handlers(ME, Board()).is_alive(IsAlive(), caller()))
    assert (reply.epoch, reply.round, reply.state) == (-1, -1, "starting")
    reply.to_bytes()


def test_the_version_is_one_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("template.handlers.__version__", "1.23.4")
    assert spec_version() == 1234


# -- Train ---------------------------------------------------------------------------------------------------


def test_a_report_says_how_far_training_is(world: World, board: Board, handlers: Handlers) -> None:
    board.update(state="training", step=3, num_steps=8, loss=5.5, tokens_per_second=100.0)
    reply = ask(handlers, world)
    assert (reply.status, reply.step, reply.num_steps, reply.loss) == ("training", 3, 8, 5.5)
    assert (reply.receipt, reply.openings) == (None, ())
    reply.to_bytes()


def test_another_run_learns_nothing_but_that(world: World, handlers: Handlers) -> None:
    for want in ("report", "receipt", "open"):
        reply = ask(handlers, world, run_id="ff" * 32, want=want)
        assert (reply.status, reply.receipt, reply.openings) == ("wrong_run", None, ())


@pytest.mark.parametrize("want", ["receipt", "open"])
def test_before_the_commit_there_is_nothing_to_show(world: World, want: str) -> None:
    reply = ask(world.handlers(ME, world.board()), world, want=want)
    assert (reply.status, reply.receipt, reply.openings) == ("not_committed", None, ())


@pytest.mark.parametrize("want", ["receipt", "open"])
def test_another_rounds_contribution_is_not_shown(world: World, handlers: Handlers, want: str) -> None:
    assert ask(handlers, world, want=want, round=ROUND - 1).status == "not_committed"


def test_the_receipt_is_the_signed_one(world: World, handlers: Handlers, contribution: Contribution) -> None:
    reply = ask(handlers, world, want="receipt", coins=COINS_DIGEST)
    assert reply.receipt is not None
    assert parse_receipt(reply.receipt, hotkey=ME.hotkey, verify=verify) == contribution.receipt


def test_openings_come_for_the_coins_that_were_committed_to(
    world: World, handlers: Handlers, contribution: Contribution
) -> None:
    hand_over_coins(handlers, world)
    reply = ask(handlers, world, want="open", snapshots=(1, 0), coins=COINS)
    assert (reply.status, [one.index for one in reply.openings]) == ("opened", [1, 0])
    for opening in reply.openings:
        check_opening(contribution.receipt, opening.index, opening.payload, opening.proof)
        assert decode_snapshot(opening.payload, world.parts.flat.size).step == opening.step == 4 * (opening.index + 1)


@pytest.mark.parametrize("coins", [b"", b"\x08" * 32, COINS_DIGEST, COINS + b"\x00"])
def test_other_coins_open_nothing(world: World, handlers: Handlers, coins: bytes) -> None:
    hand_over_coins(handlers, world)
    reply = ask(handlers, world, want="open", snapshots=(0,), coins=coins)
    assert (reply.status, reply.openings) == ("wrong_coins", ())


def test_without_a_commitment_to_coins_nothing_is_opened(world: World, handlers: Handlers) -> None:
    reply = ask(handlers, world, want="open", snapshots=(0,), coins=COINS)
    assert (reply.status, reply.openings) == ("wrong_coins", ())


def test_coins_count_for_the_validator_that_committed_to_them(world: World, handlers: Handlers) -> None:
    hand_over_coins(handlers, world)
    assert ask(handlers, world, SECOND_VALIDATOR, want="open", coins=COINS).status == "wrong_coins"


def test_a_validator_cannot_choose_other_coins_after_it_has_seen_the_receipt(world: World, handlers: Handlers) -> None:
    hand_over_coins(handlers, world)
    chosen = b"\x09" * 32
    assert ask(handlers, world, want="receipt", coins=hashlib.sha256(chosen).digest()).status == "committed"
    assert ask(handlers, world, want="open", snapshots=(0,), coins=chosen).status == "wrong_coins"
    assert ask(handlers, world, want="open", snapshots=(0,), coins=COINS).status == "opened"


def test_a_snapshot_that_is_not_there_is_named(world: World, handlers: Handlers) -> None:
    hand_over_coins(handlers, world)
    reply = ask(handlers, world, want="open", snapshots=(0, 2), coins=COINS)
    assert (reply.status, reply.openings, reply.detail) == ("no_such_snapshot", (), "snapshot 2 of 2")


def test_coins_of_past_rounds_are_forgotten(world: World, contribution: Contribution) -> None:
    board = world.board(contribution)
    handlers = world.handlers(ME, board)
    hand_over_coins(handlers, world)
    later = dataclasses.replace(contribution, receipt=contribution.receipt.model_copy(update={"round": ROUND + 2}))
    board.commit(later)
    assert ask(handlers, world, round=ROUND + 2, want="receipt", coins=COINS_DIGEST).status == "committed"
    board.commit(contribution)
    assert ask(handlers, world, want="open", snapshots=(0,), coins=COINS).status == "wrong_coins"


# -- the plan ------------------------------------------------------------------------------------------------


def make_plan(world: World, contribution: Contribution, **changes: object) -> GroupPlan:
    mine = Member(
        hotkey=ME.hotkey,
        peer_id="peer-me",
        maddrs=(),
        weight=16.0,
        reduces=True,
        root=contribution.payload_root,
    )
    leader = Member(hotkey=VALIDATOR.hotkey, peer_id="peer-leader", maddrs=(), weight=0.0, reduces=True)
    plan = GroupPlan(
        run_id=world.parts.run_id,
        round=ROUND,
        attempt=0,
        members=(mine, leader),
        layout=world.parts.layout,
        send_deadline_s=5.0,
        deadline_s=10.0,
        max_abs=1e3,
    )
    return dataclasses.replace(plan, **changes)  # type: ignore[arg-type]


def synapse_of(world: World, group: GroupPlan, **changes: object) -> AllReduce:
    fields: dict[str, object] = {
        "run_id": group.run_id,
        "round": group.round,
        "attempt": group.attempt,
        "plan": msgpack.packb(plan_to_dict(group)),
        "base_manifest": world.base.manifest_sha256,
    }
    return AllReduce.model_validate({**fields, **changes})


def test_a_plan_survives_the_synapse(world: World, contribution: Contribution) -> None:
    plan = make_plan(world, contribution)
    assert parse_plan(synapse_of(world, plan).plan) == plan


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "not msgpack"),
        (b"\xc1", "not msgpack"),
        (b"\x81\x01\x02", "not msgpack"),
        (b"\x91" * 5000, "not msgpack"),
        (msgpack.packb([1]), "not a group plan"),
        (msgpack.packb({"run_id": "x"}), "not a group plan"),
        (bytes(MAX_PLAN_BYTES + 1), "the limit is 1048576"),
    ],
)
def test_what_is_no_plan_is_malformed(raw: bytes, says: str) -> None:
    with pytest.raises(PeerFault, match=says) as caught:
        parse_plan(raw)
    assert caught.value.fault is Fault.MALFORMED


# -- AllReduce -----------------------------------------------------------------------------------------------


def refusal(handlers: Handlers, board: Board, synapse: AllReduce) -> str:
    """Why a call is refused; nothing of it may reach the model's thread."""
    reply = asyncio.run(handlers.all_reduce(synapse, caller()))
    reply.to_bytes()
    assert (reply.accepted, reply.completed, board.mailbox.empty()) == (False, False, True)
    assert (reply.round, reply.attempt) == (synapse.round, synapse.attempt)
    return reply.detail


Changed = Callable[[World, GroupPlan], AllReduce]


def with_plan(**changes: object) -> Changed:
    return lambda world, plan: synapse_of(world, dataclasses.replace(plan, **changes))  # type: ignore[arg-type]


def with_synapse(**changes: object) -> Changed:
    return lambda world, plan: synapse_of(world, plan, **changes)


def other_mean(world: World, plan: GroupPlan) -> AllReduce:
    return synapse_of(world, dataclasses.replace(plan, mean="median"))


def no_audits(world: World, plan: GroupPlan) -> AllReduce:
    return synapse_of(world, dataclasses.replace(plan, audit_blocks=0))


def no_patience(world: World, plan: GroupPlan) -> AllReduce:
    return synapse_of(world, dataclasses.replace(plan, stall_s=1e-9))


def no_time_to_send(world: World, plan: GroupPlan) -> AllReduce:
    return synapse_of(world, dataclasses.replace(plan, send_deadline_s=plan.deadline_s / 100))


def other_bound(world: World, plan: GroupPlan) -> AllReduce:
    return synapse_of(world, dataclasses.replace(plan, max_abs=10.0))


def other_layout(world: World, plan: GroupPlan) -> AllReduce:
    layout = make_layout(world.parts.flat.size + 1, world.parts.recipe.averaging)
    return synapse_of(world, dataclasses.replace(plan, layout=layout))


def without_me(world: World, plan: GroupPlan) -> AllReduce:
    stranger = dataclasses.replace(plan.members[0], hotkey=SECOND_VALIDATOR.hotkey)
    return synapse_of(world, dataclasses.replace(plan, members=(stranger, plan.members[1])))


def other_root(world: World, plan: GroupPlan) -> AllReduce:
    mine = dataclasses.replace(plan.members[0], root=b"\xff" * 32)
    return synapse_of(world, dataclasses.replace(plan, members=(mine, plan.members[1])))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (with_synapse(run_id="ff" * 32), "another run: ffffffffffff"),
        (with_plan(run_id="ff" * 32), "another run"),
        (with_plan(round=ROUND + 1), f"round {ROUND + 1}, here {ROUND}"),
        (with_synapse(round=ROUND + 1), f"round {ROUND + 1}, here {ROUND}"),
        (with_synapse(attempt=1), f"plan is of round {ROUND}.0, the call of {ROUND}.1"),
        (with_synapse(base_manifest="ff" * 32), "base ffffffffffff, here"),
        (other_layout, "layout"),
        (other_mean, "the recipe says 'mean'"),
        (other_bound, "within ±10, the recipe says"),
        (no_audits, "audits of 0 blocks"),
        (no_patience, "stall 1e-09"),
        (no_time_to_send, "a quarter to three quarters is due"),
        (without_me, "this hotkey is not in the group"),
        (other_root, "the plan names another root than the receipt's"),
        (with_synapse(plan=b"\xc1"), "malformed: plan is not msgpack"),
        (with_synapse(plan=msgpack.packb({"run_id": "x"})), "malformed: not a group plan"),
        (with_plan(deadline_s=MAX_DEADLINE_S + 1), "deadline 581 s, the limit is 580 s"),
    ],
)
def test_a_call_that_does_not_fit_is_refused_with_its_reason(
    world: World, contribution: Contribution, board: Board, handlers: Handlers, change: Changed, says: str
) -> None:
    assert says in refusal(handlers, board, change(world, make_plan(world, contribution)))
    # A stand-by waits for a leader that it has heard: not for one whose plan it refuses.
    assert board.heard == (0 if change is without_me else -1)


def test_a_sender_that_committed_to_nothing_is_refused(world: World, contribution: Contribution) -> None:
    board = world.board()
    synapse = synapse_of(world, make_plan(world, contribution))
    assert refusal(world.handlers(ME, board), board, synapse) == "nothing is committed for this round"


def test_who_may_not_lead_is_refused(world: World, contribution: Contribution, board: Board) -> None:
    def why_not(hotkey: str, round_number: int, attempt: int, want: str) -> str | None:
        assert (hotkey, round_number, attempt, want) == (VALIDATOR.hotkey, ROUND, 0, "mean")
        return "attempt 0 is led by somebody else"

    synapse = synapse_of(world, make_plan(world, contribution))
    assert refusal(world.handlers(ME, board, why_not), board, synapse) == "attempt 0 is led by somebody else"


def done(plan: GroupPlan) -> AllReduceReply:
    return AllReduceReply(
        run_id=plan.run_id, round=plan.round, attempt=plan.attempt, accepted=True, completed=True, state_hash="aa" * 32
    )


async def next_task(board: Board) -> AllReduceTask:
    for _ in range(1000):
        if not board.mailbox.empty():
            return board.mailbox.get()
        await asyncio.sleep(0)
    raise AssertionError("nothing was posted to the model's thread")


def test_an_accepted_call_goes_to_the_models_thread_and_its_answer_comes_back(
    world: World, contribution: Contribution, board: Board, handlers: Handlers
) -> None:
    plan = make_plan(world, contribution)

    async def scene() -> AllReduceReply:
        call = asyncio.create_task(handlers.all_reduce(synapse_of(world, plan), caller()))
        task = await next_task(board)
        assert (task.plan, task.caller) == (plan, VALIDATOR.hotkey)
        assert not call.done()
        task.reply.set_result(done(plan))
        return await call

    assert asyncio.run(scene()) == done(plan)


def test_a_member_of_weight_zero_needs_no_contribution(world: World, contribution: Contribution) -> None:
    board = world.board()
    plan = make_plan(world, contribution)
    me = dataclasses.replace(plan.members[0], weight=0.0, root=None)
    sender = dataclasses.replace(plan.members[0], hotkey=SECOND_VALIDATOR.hotkey, peer_id="other")
    plan = dataclasses.replace(plan, members=(sender, me))

    async def scene() -> AllReduceReply:
        call = asyncio.create_task(world.handlers(ME, board).all_reduce(synapse_of(world, plan), caller()))
        (await next_task(board)).reply.set_result(done(plan))
        return await call

    assert asyncio.run(scene()).completed


def test_a_call_that_is_delivered_twice_is_done_once_and_answered_twice(
    world: World, contribution: Contribution, board: Board, handlers: Handlers
) -> None:
    plan = make_plan(world, contribution)

    async def scene() -> list[AllReduceReply]:
        calls = [asyncio.create_task(handlers.all_reduce(synapse_of(world, plan), caller())) for _ in range(2)]
        task = await next_task(board)
        await asyncio.sleep(0)
        assert board.mailbox.empty()
        task.reply.set_result(done(plan))
        return await asyncio.gather(*calls)

    assert asyncio.run(scene()) == [done(plan)] * 2


def test_a_caller_that_hangs_up_does_not_end_the_work_of_the_one_that_waits(
    world: World, contribution: Contribution, board: Board, handlers: Handlers
) -> None:
    plan = make_plan(world, contribution)

    async def scene() -> AllReduceReply:
        first, second = (asyncio.create_task(handlers.all_reduce(synapse_of(world, plan), caller())) for _ in "ab")
        task = await next_task(board)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert not task.reply.cancelled()
        task.reply.set_result(done(plan))
        return await second

    assert asyncio.run(scene()) == done(plan)


def test_a_leader_that_asks_again_hears_what_its_attempt_gave(
    world: World, contribution: Contribution, board: Board, handlers: Handlers
) -> None:
    plan = make_plan(world, contribution)
    board.record_outcome(done(plan))
    assert asyncio.run(handlers.all_reduce(synapse_of(world, plan), caller())) == done(plan)
    assert board.mailbox.empty()


def test_an_outcome_does_not_answer_for_another_attempt(
    world: World, contribution: Contribution, board: Board, handlers: Handlers
) -> None:
    plan = make_plan(world, contribution)
    board.record_outcome(done(plan))
    second = dataclasses.replace(plan, attempt=1)

    async def scene() -> AllReduceReply:
        call = asyncio.create_task(handlers.all_reduce(synapse_of(world, second), caller()))
        (await next_task(board)).reply.set_result(done(second))
        return await call

    assert asyncio.run(scene()).attempt == 1


def test_a_new_round_forgets_contribution_and_outcomes(world: World, contribution: Contribution, board: Board) -> None:
    board.record_outcome(done(make_plan(world, contribution)))
    board.begin_round(ROUND + 1, 1, "bb" * 32)
    assert board.contribution is None
    assert board.outcome(ROUND, 0) is None
    assert (board.report.round, board.report.epoch, board.report.step) == (ROUND + 1, 1, 0)


def test_a_task_that_the_models_thread_gives_up_is_answered_as_not_accepted(
    world: World, contribution: Contribution, board: Board, handlers: Handlers
) -> None:
    plan = make_plan(world, contribution)

    async def scene() -> AllReduceReply:
        call = asyncio.create_task(handlers.all_reduce(synapse_of(world, plan), caller()))
        (await next_task(board)).reply.cancel()
        return await call

    reply = asyncio.run(scene())
    assert (reply.accepted, reply.detail) == (False, "the round has moved on")


def test_a_models_thread_that_does_not_answer_is_not_waited_for_past_the_deadline(
    world: World, contribution: Contribution, board: Board, handlers: Handlers
) -> None:
    plan = make_plan(world, contribution)

    async def scene() -> AllReduceReply:
        loop = asyncio.get_running_loop()
        skipped = 0.0
        real = loop.time
        loop.time = lambda: real() + skipped  # type: ignore[method-assign]
        call = asyncio.create_task(handlers.all_reduce(synapse_of(world, plan), caller()))
        task = await next_task(board)
        skipped = plan.deadline_s + 10.5
        reply = await call
        assert isinstance(task.reply, concurrent.futures.Future)
        assert not task.reply.cancelled()
        return reply

    reply = asyncio.run(scene())
    assert (reply.accepted, reply.completed) == (True, False)
    assert "did not answer in time" in reply.detail


# -- attempts ------------------------------------------------------------------------------------------------

STATE, OTHER_STATE = "aa" * 32, "bb" * 32


def sign_synapse(world: World, attempt: int = 1, state: str = STATE, **changes: object) -> AllReduce:
    """The call of a leader who holds ``state`` and asks for a signature."""
    fields: dict[str, object] = {
        "run_id": world.parts.run_id,
        "round": ROUND,
        "attempt": attempt,
        "plan": b"",
        "base_manifest": world.base.manifest_sha256,
        "want": "state",
        "state_hash": state,
    }
    return AllReduce.model_validate({**fields, **changes})


def call(handlers: Handlers, synapse: AllReduce) -> AllReduceReply:
    reply = asyncio.run(handlers.all_reduce(synapse, caller()))
    reply.to_bytes()
    return reply


def test_a_member_signs_the_state_that_it_holds_for_the_leader_who_goes_on_with_it(
    world: World, board: Board, handlers: Handlers
) -> None:
    assert board.sign_once(0, STATE)
    reply = call(handlers, sign_synapse(world))
    assert (reply.accepted, reply.completed, reply.attempt, reply.state_hash) == (True, True, 1, STATE)
    message = state_message(world.parts.run_id, ROUND, 1, STATE)
    assert verify(ME.hotkey, message, bytes.fromhex(reply.state_signature))
    assert call(handlers, sign_synapse(world)).completed  # asked twice, for the same
    assert board.mailbox.empty()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"run_id": "ff" * 32}, "another run"),
        ({"round": ROUND + 1}, f"round {ROUND + 1}, here {ROUND}"),
        ({"base_manifest": "ff" * 32}, "base ffffffffffff, here"),
        ({"state": OTHER_STATE}, "state bbbbbbbbbbbb is not held here"),
        ({"state": ""}, "is not held here"),
    ],
)
def test_nothing_else_is_signed(
    world: World, board: Board, handlers: Handlers, changes: dict[str, object], says: str
) -> None:
    board.sign_once(0, STATE)
    reply = call(handlers, sign_synapse(world, **changes))  # type: ignore[arg-type]
    assert (reply.accepted, reply.completed, reply.state_signature) == (False, False, "")
    assert says in reply.detail


def test_a_member_that_holds_no_state_signs_none(world: World, handlers: Handlers) -> None:
    assert "is not held here" in call(handlers, sign_synapse(world)).detail


def test_one_state_is_signed_for_one_attempt(world: World, board: Board, handlers: Handlers) -> None:
    board.sign_once(0, STATE)
    board.sign_once(1, OTHER_STATE)
    assert call(handlers, sign_synapse(world, attempt=1)).detail == "another state is signed for attempt 1"
    assert call(handlers, sign_synapse(world, attempt=2)).completed
    assert not call(handlers, sign_synapse(world, attempt=2, state=OTHER_STATE)).completed


def test_who_may_not_lead_gets_no_signature(world: World, board: Board) -> None:
    asked = []

    def why_not(*claim: object) -> str | None:
        asked.append(claim)
        return "too early"

    board.sign_once(0, STATE)
    assert call(world.handlers(ME, board, why_not), sign_synapse(world)).detail == "too early"
    assert asked == [(VALIDATOR.hotkey, ROUND, 1, "state")]
    assert board.heard == -1


def test_after_a_signature_for_a_higher_attempt_a_lower_one_is_over(
    world: World, contribution: Contribution, board: Board, handlers: Handlers
) -> None:
    board.sign_once(0, STATE)
    assert call(handlers, sign_synapse(world, attempt=2)).completed
    late = dataclasses.replace(make_plan(world, contribution), attempt=1)
    assert refusal(handlers, board, synapse_of(world, late)) == "attempt 1 is over: attempt 2 has begun here"
    assert "attempt 2 has begun here" in call(handlers, sign_synapse(world, attempt=1)).detail


def test_a_lower_attempt_than_the_one_that_has_begun_is_refused(
    world: World, contribution: Contribution, board: Board, handlers: Handlers
) -> None:
    plan = make_plan(world, contribution)
    board.begin_attempt(1)
    assert refusal(handlers, board, synapse_of(world, plan)) == "attempt 0 is over: attempt 1 has begun here"


def test_an_accepted_call_begins_its_attempt_and_a_refused_one_does_not(
    world: World, contribution: Contribution, board: Board, handlers: Handlers
) -> None:
    plan = make_plan(world, contribution)
    assert "this hotkey is not in the group" in refusal(handlers, board, without_me(world, plan))
    assert (board.begun, board.heard) == (-1, 0)  # the leader lives, though we are not in its group

    async def scene() -> None:
        call = asyncio.create_task(handlers.all_reduce(synapse_of(world, plan), caller()))
        task = await next_task(board)
        assert board.begun == 0
        task.reply.set_result(done(plan))
        await call

    asyncio.run(scene())


def test_a_call_of_who_may_not_lead_is_no_sign_of_life(world: World, contribution: Contribution, board: Board) -> None:
    handlers = world.handlers(ME, board, lambda *_: "not its turn")
    refusal(handlers, board, synapse_of(world, make_plan(world, contribution)))
    assert board.heard == -1


def test_a_new_round_forgets_attempts_and_what_was_signed(board: Board) -> None:
    board.begin_attempt(2)
    board.sign_once(2, STATE)
    board.begin_round(ROUND + 1, 1, "bb" * 32)
    assert (board.heard, board.begun, board.newest_attempt, board.holds(STATE)) == (-1, -1, -1, False)
