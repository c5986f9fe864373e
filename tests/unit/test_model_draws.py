"""Draws that every machine must repeat: pinned values, range and spread."""

from __future__ import annotations

import hashlib

import pytest
import torch

from hivetrain.model.draws import signs, uniform


def test_signs_are_the_bits_of_shake_256() -> None:
    raw = hashlib.shake_256(b"hivetrain-draw/1\na layer").digest(2)
    expected = [1.0 if raw[place // 8] >> (place % 8) & 1 else -1.0 for place in range(12)]
    assert signs("a layer", (3, 4)).flatten().tolist() == expected


def test_uniform_is_its_words_scaled() -> None:
    raw = hashlib.shake_256(b"hivetrain-draw/1\na layer").digest(24)
    words = [int.from_bytes(raw[start : start + 4], "little") >> 8 for start in range(0, 24, 4)]
    expected = [0.5 * (word / 2**23 - 1) for word in words]
    assert uniform("a layer", (2, 3), 0.5).flatten().tolist() == expected


def test_the_draws_are_spread_as_they_should_be() -> None:
    drawn = signs("spread", (64, 256))
    assert drawn.unique().tolist() == [-1, 1]
    assert abs(drawn.mean().item()) < 0.03
    between = uniform("spread", (64, 256), 2.0)
    assert between.min() >= -2
    assert between.max() < 2
    assert between.std().item() == pytest.approx(2 / 3**0.5, rel=0.02)
    # Rows of random signs are all but orthogonal, which is what the linear form wants of A.
    gram = drawn @ drawn.T / 256
    assert (gram - torch.eye(64)).abs().max() < 0.4


def test_another_label_gives_another_matrix() -> None:
    assert not torch.equal(signs("a", (8, 8)), signs("b", (8, 8)))
    assert not torch.equal(uniform("a", (8, 8), 1.0), uniform("b", (8, 8), 1.0))
