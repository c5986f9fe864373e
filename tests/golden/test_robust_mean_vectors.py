"""The robust means' bytes, pinned: members on any two machines must compute the same, and audit each other by it."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from torch import Tensor

from hivetrain.averaging.robust import get_mean

SIZE = 32_768 + 77
DIGESTS = {
    "mean": "143cf728bee7e2123e8af035011feddfeee5cd4adc0da6d6b48c5aaede8e0ee7",
    "norm_bound": "147d9ba013a321fb185127ef518ded398f9dc4a20fe08f22bbd49933f93125fb",
    "trimmed_mean": "e516a58a3576ad1daf48a9384da9c8eae48e3cfb9e058ebbcfb90d29748df106",
    "median": "e516a58a3576ad1daf48a9384da9c8eae48e3cfb9e058ebbcfb90d29748df106",
    "centered_clip": "aa9810a57463b0a50e4da386a5769a7fb0054094731077a29d7127559c86c2e8",
}


def vectors() -> list[Tensor]:
    """Four vectors from integers alone, of a wide range of magnitudes; the last one is far off."""
    places = np.arange(4 * SIZE, dtype=np.uint64)
    hashed = (places * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)) >> np.uint64(33)
    mantissas = (hashed % np.uint64(2**24)).astype(np.float32) - np.float32(2**23)
    exponents = (hashed // np.uint64(2**24) % np.uint64(40)).astype(np.int32) - 50
    values = np.ldexp(mantissas, exponents).reshape(4, SIZE)
    values[3] *= np.float32(-64)
    return [torch.from_numpy(row.copy()) for row in values]


@pytest.mark.parametrize("name", DIGESTS)
def test_the_means_bytes_are_those_that_were_pinned(name: str) -> None:
    found = get_mean(name)(vectors(), [3.0, 1.0, 7.0, 2.0])
    assert hashlib.sha256(found.numpy().astype("<f4").tobytes()).hexdigest() == DIGESTS[name]
