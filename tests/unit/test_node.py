"""What a neuron takes from the chain: addresses to announce and to join through, ranks, and who may lead."""

from __future__ import annotations

from pathlib import Path

import pytest

from hivetrain.errors import ConfigError
from hivetrain.run import Schedule
from template.anchor import MAX_MADDR_CHARS, Anchor, parse_anchor
from template.chain.client import ChainCommitment, Metagraph, NeuronInfo
from template.config import Secrets, parse_config
from template.leader import Leaders, leader_order
from template.neuron import Neuron
from template.node import announced_maddrs

LOCAL, PUBLIC = "/ip4/127.0.0.1/tcp/1/p2p/Qm", "/ip4/203.0.113.7/tcp/1/p2p/Qm"
SCHEDULE = Schedule(start_block=0, train=5, commit=2, verify=3, all_reduce=4, publish=1)


def neuron_info(uid: int, registered_at: int = 0, *, permit: bool = False) -> NeuronInfo:
    return NeuronInfo(
        uid=uid,
        hotkey=f"hotkey-{uid}",
        coldkey="cold",
        stake=1.0,
        validator_permit=permit,
        ip="127.0.0.1",
        port=1,
        incentive=0.0,
        dividends=0.0,
        emission=0.0,
        last_update=0,
        registered_at=registered_at,
        active=True,
    )


class FakeChain:
    """Commitments as strangers write them."""

    def __init__(self, anchors: dict[str, Anchor]) -> None:
        self._anchors = anchors

    def commitments(self) -> dict[str, ChainCommitment]:
        return {hotkey: ChainCommitment(block=1, data=anchor.to_bytes()) for hotkey, anchor in self._anchors.items()}

    def commit(self, data: bytes) -> None:
        self._anchors["hotkey-0"] = parse_anchor(data)

    def block_hash(self, block: int) -> str:
        return f"0x{block:064x}"


class FakeIdentity:
    hotkey = "hotkey-0"


class FakeBlocks:
    block = 10


def neuron(folder: Path, neurons: list[NeuronInfo], anchors: dict[str, Anchor] | None = None) -> Neuron:
    made = Neuron(parse_config(["--neuron.dir", str(folder)], "miner", {}), Secrets())
    made.metagraph = Metagraph(netuid=1, block=20, neurons=tuple(neurons))
    made.chain = FakeChain(anchors or {})  # type: ignore[assignment]
    made.identity = FakeIdentity()  # type: ignore[assignment]
    made.blocks = FakeBlocks()  # type: ignore[assignment]
    made.schedule = SCHEDULE
    return made


def test_public_addresses_are_announced_before_loopback() -> None:
    assert announced_maddrs([LOCAL, PUBLIC]) == (PUBLIC, LOCAL)
    assert announced_maddrs([LOCAL, LOCAL + "2", PUBLIC]) == (PUBLIC, LOCAL)


def test_addresses_too_long_for_an_anchor_are_left_out_and_said() -> None:
    long = PUBLIC + "x" * MAX_MADDR_CHARS
    assert announced_maddrs([long, LOCAL]) == (LOCAL,)
    with pytest.raises(ConfigError, match=r"--dht\.announce_maddrs"):
        announced_maddrs([long])


class FakeSwarm:
    peer_id = "12D3me"

    def visible_maddrs(self) -> list[str]:
        return [LOCAL, PUBLIC]


@pytest.mark.parametrize(("flags", "maddrs"), [([], (PUBLIC, LOCAL)), (["--dht.client_mode"], ())])
def test_who_connects_outwards_only_announces_no_address(
    tmp_path: Path, flags: list[str], maddrs: tuple[str, ...]
) -> None:
    made = neuron(tmp_path, [neuron_info(0)])
    made.config = parse_config(["--neuron.dir", str(tmp_path), *flags], "miner", {})
    made.swarm = FakeSwarm()  # type: ignore[assignment]
    made.run_id, made._repo = "ab" * 32, "me/model"
    made.announce(epoch=3, manifest="cd" * 32)
    written = parse_anchor(made.chain.commitments()["hotkey-0"].data)
    assert (written.peer_id, written.maddrs, written.epoch) == ("12D3me", maddrs, 3)
    made.announce()  # where it is reached may change: what it stands for stays
    assert parse_anchor(made.chain.commitments()["hotkey-0"].data) == written


def test_strangers_and_addresses_that_cannot_be_dialled_are_no_peers_to_join_through(tmp_path: Path) -> None:
    anchors = {
        "hotkey-0": Anchor(peer_id="me", maddrs=(LOCAL,)),
        "hotkey-1": Anchor(peer_id="one", maddrs=("nonsense", "/ip4/10.0.0.1/tcp/1", PUBLIC)),
        "gone": Anchor(peer_id="gone", maddrs=(PUBLIC + "gone",)),
    }
    assert neuron(tmp_path, [neuron_info(0), neuron_info(1)], anchors)._peers_on_chain() == [PUBLIC]


def test_a_uid_that_changes_hands_in_mid_round_shifts_nobodys_rank(tmp_path: Path) -> None:
    before = neuron(tmp_path, [neuron_info(uid) for uid in range(4)]).ranks(10)
    after = neuron(tmp_path, [neuron_info(0), neuron_info(1, registered_at=11), neuron_info(2), neuron_info(3)]).ranks(
        10
    )
    assert after == {hotkey: rank for hotkey, rank in before.items() if hotkey != "hotkey-1"}


def test_the_order_of_a_round_is_drawn_once_from_the_first_block_of_its_verify(tmp_path: Path) -> None:
    made = neuron(tmp_path, [neuron_info(uid, permit=uid < 3) for uid in range(5)])
    made.leaders = Leaders(SCHEDULE)
    order = made.leader_order(2)
    assert order == tuple(leader_order("0x" + f"{2 * SCHEDULE.round_blocks + 7:064x}", dict.fromkeys(order, 1.0)))
    assert set(order) == {"hotkey-0", "hotkey-1", "hotkey-2"}
    made.metagraph = Metagraph(netuid=1, block=40, neurons=())  # stakes that change later change nothing
    assert made.leader_order(2) == order
    assert "led by" in (made._why_not_leader(order[1], 2, 0, "mean") or "")
    made.blocks.block = 2 * SCHEDULE.round_blocks + 10  # type: ignore[misc]
    assert made._why_not_leader(order[0], 2, 0, "mean") is None
