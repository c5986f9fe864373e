"""Averagers of hivemind without a swarm, for tests of what we bend in them. `loop` goes around each test."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from hivetrain.trainer import averagers

from hivetrain.trainer.config import Reach


@pytest.fixture(autouse=True)
def loop() -> Iterator[None]:
    """hivemind asks for the present event loop, and would make one that nobody closes."""
    with asyncio.Runner() as runner:
        asyncio.set_event_loop(runner.get_loop())
        yield
        asyncio.set_event_loop(None)


def averager(*parameters: torch.nn.Parameter) -> Any:
    return averagers.SwarmGradientAverager(
        parameters, dht=None, prefix="test", client_mode=False, start=False, notes=averagers.Notes(), codec="fp32",
        reach=Reach(host_maddrs=(), announce_maddrs=None),
    )  # fmt: skip
