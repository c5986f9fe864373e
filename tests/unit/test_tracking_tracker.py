"""Run records, plain values and metric names."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hivetrain.tracking import metrics
from hivetrain.tracking.tracker import RunInfo, finite_or_none, plain


@pytest.mark.parametrize("name", ["", "../miner", "a/b", ".hidden", "x" * 101, "spaced name", "new\nline"])
def test_a_run_name_that_cannot_be_a_file_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="name must be"):
        RunInfo(project="p", name=name, group="g")


def test_a_project_with_a_dot_is_refused() -> None:
    with pytest.raises(ValueError, match="must not hold a"):
        RunInfo(project="my.model", name="miner-1", group="g")


def test_numbers_of_numpy_and_torch_become_floats_and_the_rest_is_left_out() -> None:
    values = plain(
        {
            "float": 1.5,
            "int": 2,
            "str": "x",
            "numpy": np.float32(0.25),
            "torch": torch.tensor(4.0),
            "vector": torch.zeros(2),
            "list": [1.0],
            "none": None,
        }
    )
    assert values == {"float": 1.5, "int": 2, "str": "x", "numpy": 0.25, "torch": 4.0}
    assert type(values["torch"]) is float


def test_only_values_that_are_not_finite_become_none() -> None:
    assert [finite_or_none(value) for value in (math.nan, math.inf, -math.inf)] == [None, None, None]
    assert [finite_or_none(value) for value in (0.0, 3, "nan")] == [0.0, 3, "nan"]


def test_a_member_metric_ends_in_the_members_label() -> None:
    assert metrics.per_member(metrics.SCORE_GRADIENT, "uid-3") == "scores/gradient/uid-3"
