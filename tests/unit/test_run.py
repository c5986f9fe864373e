"""The recipe: round trip, every refusal, and what the run id depends on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hivetrain.averaging.codecs import CODEC_NAMES, get_codec
from hivetrain.averaging.robust import MEAN_NAMES
from hivetrain.errors import RecipeError
from hivetrain.run import (
    Averaging,
    Data,
    DeltaCodec,
    Inner,
    MeanName,
    MomentsCodec,
    Recipe,
    Schedule,
    Scoring,
    SecondMomentsCodec,
    differing_fields,
    parse_recipe,
    read_recipe,
    run_id,
)
from hivetrain.workbench import make_layout


def test_recipe_survives_a_round_trip() -> None:
    recipe = dataclasses.replace(Recipe(), name="x", inner=Inner(max_steps=7, lr=1e-3))
    assert parse_recipe(recipe.to_toml()) == recipe


@given(st.integers(1, 640), st.floats(1e-6, 1, allow_nan=False), st.integers(1, 64))
def test_any_valid_recipe_survives_a_round_trip(steps: int, lr: float, batch: int) -> None:
    recipe = dataclasses.replace(Recipe(), inner=Inner(max_steps=steps, lr=lr), data=Data(batch_size=batch))
    assert parse_recipe(recipe.to_toml()) == recipe


@pytest.mark.parametrize(
    ("text", "bounds"),
    [
        ("", (0.05, 0.08)),
        ("[inner]\nprecision = 'bf16'", (0.15, 0.2)),
        ("[inner]\nprecision = 'bf16'\n[scoring]\nema_alpha = 0.5", (0.15, 0.2)),
        ("[inner]\nprecision = 'bf16'\n[scoring]\ndistance_full = 0.07", (0.07, 0.08)),
    ],
)
def test_a_recipe_without_bounds_has_those_of_its_precision(text: str, bounds: tuple[float, float]) -> None:
    scoring = parse_recipe(text).scoring
    assert (scoring.distance_full, scoring.distance_zero) == bounds


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("scoring = 3", "scoring must be a table"),
        ("[inner]\nprecision = ['bf16']", "inner.precision"),
        ("[inner", "not valid TOML"),
        ("[inner]\nlearning = 1", "unknown field inner.learning"),
        ("surprise = 1", "unknown field surprise"),
        ("[inner]\nlr = 'fast'", "inner.lr must be float"),
        ("[inner]\nmax_steps = 1.5", "inner.max_steps must be int"),
        ("[inner]\nmax_steps = true", "inner.max_steps must be int"),
        ("[inner]\nmax_steps = 0", "inner.max_steps must be > 0, got 0"),
        ("[inner]\nlr = nan", "inner.lr must be > 0"),
        ("inner = 3", "inner must be a table"),
        ("[inner]\nmax_steps = 6000", "inner.max_steps / inner.snapshot_every must be <= 1024 snapshots, got 1200"),
        ("[inner]\nmax_steps = 325\n[scoring]\nwhole_round_share = 0.1", "cannot be opened"),
        ("[model]\nname = 'distilgpt2'", "model.revision is needed"),
        ("[model]\nhidden_size = 130", "must be a multiple of model.num_heads"),
        ("[adapter]\nkind = 'qlora'", "adapter.kind must be dora, dora_linear, lora or full"),
        ("[adapter]\nmerge_every = -1", "adapter.merge_every must be >= 0, got -1"),
        ("[adapter]\nkind = 'full'\nmerge_every = 2", "adapter.merge_every must be 0 without an adapter"),
        ("[inner]\nrewarm_steps = -1", "inner.rewarm_steps must be >= 0, got -1"),
        ("[adapter]\ntarget_modules = 'q_proj'", "must be a list of strings"),
        (
            "[averaging]\ncodec = 'zip'",
            "must be one of fp32, fp16, int8, int4, int2, sign, topk-1%, topk-10%, got 'zip'",
        ),
        (
            "[averaging]\nmean = 'mode'",
            "averaging.mean must be one of mean, norm_bound, trimmed_mean, median, centered",
        ),
        ("[averaging]\ncodec = 'none'", "averaging.codec must be one of fp32, fp16, int8"),
        (
            "[averaging]\nmoments_codec = 'log4'",
            "averaging.moments_codec must be one of fp32, fp16, int8, int4, int2, sign, none, got",
        ),
        ("[averaging]\nsecond_moments_codec = 'fp16'", "second_moments_codec must be one of fp32, log8, log4, got"),
        ("[averaging]\nsecond_moments_codec = 'none'", "second_moments_codec must be one of fp32, log8, log4, got"),
        ("[averaging]\ncodec = 'sign'\nerror_feedback = false", "averaging.codec = 'sign' needs averaging.error_feed"),
        ("[averaging]\nerror_feedback = 1", "averaging.error_feedback must be bool"),
        ("[scoring]\nsteps_weight = 0.9", "must be 1, got"),
        ("[scoring]\ndistance_zero = 0.01", "distance_full < distance_zero"),
        ("[gates]\nquorum = 0.0", "gates.quorum must be in (0, 1]"),
        ("[hub]\nrepo = 'model'", "hub.repo must be OWNER/NAME"),
        ("[data]\nmax_miners = 257", "data.max_miners must be <= 256, got 257"),
        ("[data]\nrepo = 'corpus'", "data.repo must be OWNER/NAME"),
        ("[outer]\nmomentum = 1.0", "outer.momentum must be in [0, 1)"),
        ("[schedule]\nleader_patience = 0", "schedule.leader_patience must be > 0"),
        ("[schedule]\nleader_patience = 7", "must be <= schedule.all_reduce (6), got 7"),
    ],
)
def test_a_bad_recipe_is_refused_and_names_the_field(text: str, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text)
    assert says in str(caught.value)


def test_differing_fields_names_each_with_both_values() -> None:
    theirs = dataclasses.replace(Recipe(), inner=Inner(lr=1e-3), scoring=Scoring(ema_alpha=0.5))
    assert differing_fields(Recipe(), theirs) == [
        "inner.lr: ours 0.01, the run's 0.001",
        "scoring.ema_alpha: ours 0.3, the run's 0.5",
    ]


def test_run_id_depends_on_recipe_tokenizer_and_state() -> None:
    base = run_id(Recipe(), "a" * 64, "b" * 64)
    others = {
        run_id(dataclasses.replace(Recipe(), schedule=Schedule(train=26)), "a" * 64, "b" * 64),
        run_id(Recipe(), "c" * 64, "b" * 64),
        run_id(Recipe(), "a" * 64, "c" * 64),
    }
    assert len(others | {base}) == 4
    assert run_id(Recipe(), "a" * 64, "b" * 64) == base


def test_a_recipe_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*missing\.toml"):
        read_recipe(tmp_path / "missing.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match=r"binary\.toml"):
        read_recipe(tmp_path / "binary.toml")
    (tmp_path / "run.toml").write_text(Recipe().to_toml())
    assert read_recipe(tmp_path / "run.toml") == Recipe()


def test_every_codec_that_a_recipe_may_name_exists_and_every_one_can_be_named() -> None:
    named = [name for literal in (DeltaCodec, MomentsCodec, SecondMomentsCodec) for name in get_args(literal)]
    assert {get_codec(name).name for name in named if name != "none"} == set(CODEC_NAMES)


def test_every_mean_that_a_recipe_may_name_exists_and_every_one_can_be_named() -> None:
    assert get_args(MeanName) == MEAN_NAMES


def test_feedback_is_for_lossy_codecs() -> None:
    assert not Averaging().feeds_back
    assert Averaging(codec="int4").feeds_back
    assert not Averaging(codec="int4", error_feedback=False).feeds_back
    for name in get_args(DeltaCodec):
        assert Averaging(codec=name).feeds_back is not get_codec(name).lossless


def test_each_section_travels_under_its_own_codec() -> None:
    averaging = Averaging(codec="int2", moments_codec="int4", second_moments_codec="log8")
    assert [(one.name, one.codec) for one in make_layout(10, averaging).sections] == [
        ("delta", "int2"),
        ("exp_avg", "int4"),
        ("exp_avg_sq", "log8"),
    ]


def test_first_moments_without_a_codec_have_no_section() -> None:
    averaging = Averaging(codec="int2", moments_codec="none", second_moments_codec="log4")
    assert [one.name for one in make_layout(10, averaging).sections] == ["delta", "exp_avg_sq"]
