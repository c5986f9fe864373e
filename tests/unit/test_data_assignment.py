from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hivetrain.data.assignment import NoSlot, assigned_row_groups, num_slots, permute
from hivetrain.run import Data

RUN = "ab" * 32
keys = st.binary(min_size=1, max_size=32)
small = settings(max_examples=40, deadline=None)


def assigned(round_number: int, rank: int, num_row_groups: int, data: Data, run_id: str = RUN) -> list[int]:
    return assigned_row_groups(
        run_id=run_id, round_number=round_number, rank=rank, num_row_groups=num_row_groups, data=data
    )


@small
@given(key=keys, size=st.integers(1, 300))
def test_permute_reaches_every_position_exactly_once(key: bytes, size: int) -> None:
    assert sorted(permute(key, size, position) for position in range(size)) == list(range(size))


@given(key=keys, size=st.integers(1, 2**60), data=st.data())
def test_permute_of_a_huge_range_stays_inside_and_repeats_itself(key: bytes, size: int, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, size - 1))
    image = permute(key, size, position)
    assert 0 <= image < size
    assert permute(key, size, position) == image


def test_permute_sends_a_position_evenly_over_the_range() -> None:
    counts = [0] * 10
    for number in range(2000):
        counts[permute(number.to_bytes(4, "big"), 10, 3)] += 1
    chi_squared = sum((count - 200) ** 2 / 200 for count in counts)
    assert chi_squared < 27.9  # 9 degrees of freedom, p = 0.001; the keys are fixed, so this cannot flake


@pytest.mark.parametrize(("size", "position"), [(0, 0), (5, 5), (5, -1)])
def test_permute_refuses_a_position_outside_the_range(size: int, position: int) -> None:
    with pytest.raises(ValueError, match="0 <= position < size"):
        permute(b"k", size, position)


shapes = st.fixed_dictionaries(
    {
        "num_row_groups": st.integers(1, 120),
        "row_groups_per_miner": st.integers(1, 5),
        "max_miners": st.integers(1, 12),
        "seed": st.integers(0, 2**32),
        "number_of_pass": st.integers(0, 5),
    }
)


@small
@given(shape=shapes)
def test_no_row_group_is_read_twice_within_a_pass(shape: dict[str, int]) -> None:
    size, per_miner = shape["num_row_groups"], shape["row_groups_per_miner"]
    data = Data(row_groups_per_miner=per_miner, max_miners=shape["max_miners"], seed=shape["seed"])
    slots = num_slots(size, data)
    if slots == 0:
        with pytest.raises(NoSlot):
            assigned(0, 0, size, data)
        return
    rounds_per_pass = size // (slots * per_miner)
    first = shape["number_of_pass"] * rounds_per_pass
    read = [
        row_group
        for round_number in range(first, first + rounds_per_pass)
        for rank in range(slots)
        for row_group in assigned(round_number, rank, size, data)
    ]
    assert len(read) == rounds_per_pass * slots * per_miner
    assert len(set(read)) == len(read)
    assert set(read) <= set(range(size))


@small
@given(shape=shapes, round_number=st.integers(0, 10**6))
def test_miners_of_one_round_share_no_row_group(shape: dict[str, int], round_number: int) -> None:
    size = shape["num_row_groups"]
    data = Data(row_groups_per_miner=shape["row_groups_per_miner"], max_miners=shape["max_miners"], seed=shape["seed"])
    read = [
        row_group for rank in range(num_slots(size, data)) for row_group in assigned(round_number, rank, size, data)
    ]
    assert len(set(read)) == len(read) == num_slots(size, data) * data.row_groups_per_miner


def slow_assignment(run_id: str, round_number: int, rank: int, size: int, data: Data) -> list[int]:
    """The same rule as tables: the whole network as a list, composed turn by turn."""
    per_round = data.max_miners * data.row_groups_per_miner
    rounds_per_pass = size // per_round
    text = f"hivetrain-assignment/1\n{run_id}\n{data.seed}\n{round_number // rounds_per_pass}"
    key = hashlib.blake2b(text.encode(), digest_size=32).digest()
    side = 1
    while side * side < size:
        side *= 2
    table = list(range(side * side))
    for turn in range(8):
        mixed = []
        for value in table:
            left, right = divmod(value, side)
            digest = hashlib.blake2b(bytes([turn]) + right.to_bytes(8, "little"), key=key, digest_size=8).digest()
            mixed.append(right * side + (left ^ int.from_bytes(digest, "little") % side))
        table = mixed
    permutation = []
    for position in range(size):
        value = table[position]
        while value >= size:
            value = table[value]
        permutation.append(value)
    start = (round_number % rounds_per_pass) * per_round + rank * data.row_groups_per_miner
    return permutation[start : start + data.row_groups_per_miner]


@pytest.mark.parametrize("round_number", [0, 1, 2, 3, 4, 1000])
def test_assignment_agrees_with_the_rule_written_as_tables(round_number: int) -> None:
    data = Data(row_groups_per_miner=3, max_miners=7, seed=5)
    for size in (63, 64, 65, 200, 257):
        for rank in range(7):
            assert assigned(round_number, rank, size, data) == slow_assignment(RUN, round_number, rank, size, data)


def test_assignment_is_pinned() -> None:
    # Computed by slow_assignment; a change of these numbers is a change of the protocol.
    assert assigned(0, 0, 120, Data()) == [33, 86]
    assert assigned(0, 15, 120, Data()) == [53, 41]
    assert assigned(3, 0, 120, Data()) == [96, 30]
    assert assigned(41, 7, 500_000, Data(max_miners=256, row_groups_per_miner=4, seed=9)) == [
        343292,
        147098,
        146792,
        9042,
    ]


def test_assignment_depends_on_run_and_seed_and_pass() -> None:
    here = assigned(0, 0, 5000, Data(row_groups_per_miner=8))
    assert here != assigned(0, 0, 5000, Data(row_groups_per_miner=8), run_id="cd" * 32)
    assert here != assigned(0, 0, 5000, Data(row_groups_per_miner=8, seed=1))
    assert here != assigned(5000 // (16 * 8), 0, 5000, Data(row_groups_per_miner=8))


def test_rank_past_the_slots_has_no_assignment() -> None:
    with pytest.raises(NoSlot, match="no slot for rank 16"):
        assigned(0, 16, 1000, Data())


def test_small_data_set_has_fewer_slots_than_max_miners() -> None:
    data = Data(row_groups_per_miner=2, max_miners=16)
    assert num_slots(11, data) == 5
    assert sorted(row_group for rank in range(5) for row_group in assigned(0, rank, 10, data)) == list(range(10))
    with pytest.raises(NoSlot, match="11 row groups at 2 a miner"):
        assigned(0, 5, 11, data)


@pytest.mark.parametrize(("round_number", "rank"), [(-1, 0), (0, -1)])
def test_negative_round_or_rank_is_refused(round_number: int, rank: int) -> None:
    with pytest.raises(ValueError, match="must be >= 0"):
        assigned(round_number, rank, 100, Data())
