from __future__ import annotations

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from hivetrain.verification.merkle import MerkleTree, leaf_digest, leaf_digests, verify_range


def tagged(kind: str, *parts: bytes) -> bytes:
    key = b"hivetrain-merkle/1 " + kind.encode()
    return blake3(b"".join(parts), key=key + bytes(32 - len(key))).digest()


def leaves(count: int) -> list[bytes]:
    return [leaf_digest(bytes([i])) for i in range(count)]


def test_leaf_is_hashed_under_its_own_key() -> None:
    assert leaf_digest(b"abc") == tagged("leaf", b"abc")
    assert leaf_digest(memoryview(b"abc")) == tagged("leaf", b"abc")


def test_leaves_are_cut_evenly_and_the_last_one_may_be_shorter() -> None:
    assert leaf_digests(memoryview(b"abcde"), 2) == [leaf_digest(piece) for piece in (b"ab", b"cd", b"e")]
    assert leaf_digests(memoryview(b"abcd"), 2) == [leaf_digest(piece) for piece in (b"ab", b"cd")]


def test_root_of_one_leaf_by_hand() -> None:
    (leaf,) = leaves(1)
    assert MerkleTree([leaf]).root == tagged("root", (1).to_bytes(8, "big"), leaf)


def test_root_of_three_leaves_is_one_node_of_three() -> None:
    a, b, c = leaves(3)
    assert MerkleTree([a, b, c]).root == tagged("root", (3).to_bytes(8, "big"), tagged("node", a, b, c))


def test_root_of_nine_leaves_promotes_the_last_one() -> None:
    nine = leaves(9)
    top = tagged("node", tagged("node", *nine[:8]), nine[8])
    assert MerkleTree(nine).root == tagged("root", (9).to_bytes(8, "big"), top)


def test_root_of_eleven_leaves_as_a_golden_vector() -> None:
    eleven = leaves(11)
    top = tagged("node", tagged("node", *eleven[:8]), tagged("node", *eleven[8:]))
    root = MerkleTree(eleven).root
    assert root == tagged("root", (11).to_bytes(8, "big"), top)
    assert root.hex() == "d85d9189b9508497c00bad974a595fb6ca2ffbf6f85beb9253c6791fdf9752f1"


def test_proof_of_a_range_holds_left_before_right_from_the_leaves_up() -> None:
    some = leaves(11)
    tree = MerkleTree(some)
    assert tree.range_proof(1, 3) == [some[0], *some[3:8], tagged("node", *some[8:])]
    assert tree.range_proof(7, 9) == [*some[:7], *some[9:]]
    assert tree.range_proof(0, 11) == []
    assert tree.range_proof(8, 11) == [tagged("node", *some[:8])]


@pytest.mark.parametrize("count", [*range(1, 19), 64, 65, 66, 73])
def test_every_range_of_every_tree_verifies(count: int) -> None:
    all_leaves = leaves(count)
    tree = MerkleTree(all_leaves)
    for start in range(count):
        for stop in range(start + 1, count + 1):
            proof = tree.range_proof(start, stop)
            assert verify_range(tree.root, count, start, all_leaves[start:stop], proof)


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (2, 1), (-1, 1), (0, 4), (3, 4)])
def test_range_outside_the_tree_is_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="range"):
        MerkleTree(leaves(3)).range_proof(start, stop)


def test_tree_without_leaves_or_with_a_short_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        MerkleTree([])
    with pytest.raises(ValueError, match=r"leaves must be 32 bytes, got \[3\]"):
        MerkleTree([bytes(32), b"abc"])


def test_two_leaf_lists_that_duplication_would_confuse_have_two_roots() -> None:
    a, b, c = leaves(3)
    assert MerkleTree([a, b, c]).root != MerkleTree([a, b, c, c]).root


@st.composite
def proofs(draw: st.DrawFn) -> tuple[bytes, int, int, list[bytes], list[bytes]]:
    count = draw(st.integers(1, 80))
    start = draw(st.integers(0, count - 1))
    stop = draw(st.integers(start + 1, count))
    all_leaves = leaves(count)
    tree = MerkleTree(all_leaves)
    return tree.root, count, start, all_leaves[start:stop], tree.range_proof(start, stop)


def flip(digest: bytes, bit: int) -> bytes:
    changed = bytearray(digest)
    changed[bit // 8] ^= 1 << (bit % 8)
    return bytes(changed)


@settings(max_examples=200, deadline=None)
@given(proofs(), st.data())
def test_every_mutation_is_refused(
    opening: tuple[bytes, int, int, list[bytes], list[bytes]], data: st.DataObject
) -> None:
    root, count, start, digests, proof = opening
    assert verify_range(root, count, start, digests, proof)
    bit = data.draw(st.integers(0, 255))
    where = data.draw(st.integers(0, len(digests) - 1))
    changed = [*digests[:where], flip(digests[where], bit), *digests[where + 1 :]]
    refused = [
        verify_range(flip(root, bit), count, start, digests, proof),
        verify_range(root, count, start, changed, proof),
        verify_range(root, count, start, digests[:-1], proof),
        verify_range(root, count, start, [*digests, digests[-1]], proof),
        verify_range(root, count, start, digests, [*proof, bytes(32)]),
        verify_range(root, count, start + 1, digests, proof),
        verify_range(root, count, start - 1, digests, proof),
        verify_range(root, count + 1, start, digests, proof),
        verify_range(root, count - 1, start, digests, proof),
        verify_range(root, count, start, [], proof),
        verify_range(root, count, start, [digests[0][:31], *digests[1:]], proof),
        verify_range(root[:-1], count, start, digests, proof),
    ]
    if len(digests) > 1:
        refused.append(verify_range(root, count, start, [*digests[1:], digests[0]], proof))
    for index in range(len(proof)):
        refused.append(verify_range(root, count, start, digests, [*proof[:index], *proof[index + 1 :]]))
        refused.append(
            verify_range(root, count, start, digests, [*proof[:index], flip(proof[index], bit), *proof[index + 1 :]])
        )
    assert not any(refused)


def test_a_node_cannot_be_shown_as_a_leaf() -> None:
    some = leaves(16)
    tree = MerkleTree(some)
    left, right = tagged("node", *some[:8]), tagged("node", *some[8:])
    assert not verify_range(tree.root, 2, 0, [left, right], [])
