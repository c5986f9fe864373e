"""A cheating miner's answers in the real network: what a validator asks for passes through the cheat."""

from __future__ import annotations

import pytest

from bench.attacks.catalogue import make_cheat
from bench.attacks.cheat import Cheat
from bench.attacks.miner import BentHandlers
from hivetrain.contribution import Contribution
from template.protocol import Train, TrainReply
from tests.round_kit import COINS, COINS_DIGEST, World, ask, identity, shared_world

ME = identity("miner")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return shared_world(tmp_path_factory)


@pytest.fixture(scope="module")
def contribution(world: World) -> Contribution:
    return world.contribution(ME)


def challenged(world: World, contribution: Contribution, cheat: Cheat) -> tuple[TrainReply, TrainReply]:
    """What the cheat answers when its receipt is asked for, and then its first snapshot."""
    bent = BentHandlers(world.handlers(ME, world.board(contribution)), cheat, late_s=0.0)
    receipt = ask(bent, world, want="receipt", coins=COINS_DIGEST)
    return receipt, ask(bent, world, want="open", snapshots=(0,), coins=COINS)


def test_a_cheat_that_bends_no_answer_answers_as_an_honest_miner(world: World, contribution: Contribution) -> None:
    receipt, opened = challenged(world, contribution, make_cheat("random"))
    assert receipt.receipt == contribution.receipt.to_bytes() == opened.receipt
    assert (opened.status, len(opened.openings)) == ("opened", 1)


def test_who_refuses_opens_nothing(world: World, contribution: Contribution) -> None:
    receipt, opened = challenged(world, contribution, make_cheat("refuses"))
    assert receipt.status == "committed"
    assert (opened.status, opened.openings) == ("refused", ())


def test_a_sleeper_hears_that_it_was_challenged(world: World, contribution: Contribution) -> None:
    asked: list[Train] = []

    class Listening(Cheat):
        def answer(self, request: Train, honest: TrainReply) -> TrainReply | None:
            asked.append(request)
            return honest

    challenged(world, contribution, Listening("listening", "hears what it is asked"))
    assert [one.snapshots for one in asked] == [(0,)]


def test_another_receipt_may_come_with_what_is_opened(world: World, contribution: Contribution) -> None:
    class Second(Cheat):
        def receipt(self, asked: int, honest: bytes) -> bytes:
            return honest + bytes(asked)

    receipt, opened = challenged(world, contribution, Second("second", "signs another receipt every time"))
    assert (receipt.receipt, opened.receipt) == (
        contribution.receipt.to_bytes(),
        contribution.receipt.to_bytes() + b"\0",
    )
