"""Which row groups a miner trains on in a round: a pure function of public values, O(1) in memory.

A run reads the index in passes. Each pass is one keyed permutation of all training row groups, and each
round takes the next S of its positions, K for every slot:

    position = (round mod rounds_per_pass) * S + rank * K + k        k in [0, K)

so within a round no two miners share a row group, and within a pass none is read twice. The permutation
is a Feistel network with cycle walking, so that position n of a hundred million costs a few hashes instead
of a table.

Source: Black and Rogaway, Ciphers with Arbitrary Finite Domains, https://web.cs.ucdavis.edu/~rogaway/papers/subset.pdf
"""

from __future__ import annotations

import hashlib

from hivetrain.run import Data

FEISTEL_ROUNDS = 8  # 4 make a pseudo-random permutation of a large domain; ours can be as small as 4 bits


class NoSlot(ValueError):
    """The rank is past the round's slots: this miner has no assignment."""


def permute(key: bytes, size: int, position: int) -> int:
    """Image of `position` under the permutation of [0, size) that `key` names.

    Args:
        key: at most 64 bytes.
        size: at least 1.
        position: in [0, size).

    Raises:
        ValueError: size or position is out of its range.
    """
    if size < 1 or not 0 <= position < size:
        raise ValueError(f"permute needs 0 <= position < size, got position {position} of size {size}")
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    value = position
    # Cycle walking: the network permutes [0, 4^half_bits), at most 4 times as large. Leave it only inside [0, size).
    while True:
        value = _feistel(key, half_bits, value)
        if value < size:
            return value


def _feistel(key: bytes, half_bits: int, value: int) -> int:
    mask = (1 << half_bits) - 1
    left, right = value >> half_bits, value & mask
    for turn in range(FEISTEL_ROUNDS):
        message = bytes([turn]) + right.to_bytes(8, "little")
        digest = hashlib.blake2b(message, key=key, digest_size=8).digest()
        left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
    return left << half_bits | right


def num_slots(num_row_groups: int, data: Data) -> int:
    """Miners that can have an assignment in one round: `data.max_miners`, or fewer if the data set is too small."""
    return min(data.max_miners, num_row_groups // data.row_groups_per_miner)


def assigned_row_groups(*, run_id: str, round_number: int, rank: int, num_row_groups: int, data: Data) -> list[int]:
    """The K row groups, as places in the index's training row groups, of the miner at `rank` in a round.

    Args:
        run_id: the run's id.
        round_number: from 0.
        rank: the hotkey's place among those registered at the round's first block, from 0.
        num_row_groups: training row groups in the index, held-out ones left out.
        data: `row_groups_per_miner`, `max_miners` and `seed` are used.

    Returns:
        K distinct numbers in [0, num_row_groups), in the order in which they are read.

    Raises:
        NoSlot: the round has no slot for this rank.
        ValueError: a negative round or rank.
    """
    if round_number < 0 or rank < 0:
        raise ValueError(f"round and rank must be >= 0, got round {round_number} and rank {rank}")
    slots, per_miner = num_slots(num_row_groups, data), data.row_groups_per_miner
    if rank >= slots:
        raise NoSlot(
            f"no slot for rank {rank}: {num_row_groups} row groups at {per_miner} a miner, "
            f"and data.max_miners = {data.max_miners}, make {slots} slots"
        )
    per_round = slots * per_miner
    rounds_per_pass = num_row_groups // per_round
    number_of_pass, round_in_pass = divmod(round_number, rounds_per_pass)
    key = _pass_key(run_id, data.seed, number_of_pass)
    first = round_in_pass * per_round + rank * per_miner
    return [permute(key, num_row_groups, first + k) for k in range(per_miner)]


def _pass_key(run_id: str, seed: int, number_of_pass: int) -> bytes:
    text = f"hivetrain-assignment/1\n{run_id}\n{seed}\n{number_of_pass}"
    return hashlib.blake2b(text.encode(), digest_size=32).digest()
