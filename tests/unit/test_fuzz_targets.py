"""What reads bytes from strangers, on bytes that hypothesis draws and alters; and that the watch over it sees."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench import fuzz
from bench.fuzzing import guard
from bench.fuzzing.accusing import GUILTY
from bench.fuzzing.campaign import CORPUS
from bench.fuzzing.choices import Choices, altered, flipped
from bench.fuzzing.guard import Target, Violation, exercise
from bench.fuzzing.samples import CHEAT, MINERS, honest_group, layout, signed_mean
from bench.fuzzing.seeds import make_seeds
from bench.fuzzing.targets import PLANTED, TARGETS, find_target, warm_up
from hivetrain.averaging.group import plan_to_dict
from hivetrain.averaging.messages import MaskRun
from hivetrain.averaging.proofs import pack_two_averages, proves_two_averages
from hivetrain.averaging.results import require_sound, sign_result
from hivetrain.errors import Fault, IntegrityError, PeerFault
from hivetrain.manifest import parse_manifest
from hivetrain.scoring.explain import proves
from hivetrain.scoring.record import parse_record
from hivetrain.validation import MAX_LISTED
from template.protocol import AllReduceReply
from tests.keys import verify

NUM_EXAMPLES = {"answer": 8, "signed-record": 25, "accusation": 25, "signed-receipt": 25}


@pytest.mark.parametrize("name", TARGETS)
def test_no_bytes_break_a_target(name: str) -> None:
    target, seeds = TARGETS[name], list(make_seeds()[name].values())
    warm_up(target)
    altered_seed = st.builds(
        lambda raw, how: flipped(raw, Choices(how)), st.sampled_from(seeds), st.binary(max_size=64)
    )

    @settings(
        max_examples=NUM_EXAMPLES.get(name, 60), deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(data=st.one_of(st.binary(max_size=128), altered_seed))
    def holds(data: bytes) -> None:
        exercise(target, data)

    holds()


@pytest.mark.parametrize("name", TARGETS)
def test_the_seeds_in_the_repository_are_the_ones_that_the_script_makes_and_hold(name: str) -> None:
    files = {path.name: path.read_bytes() for path in (CORPUS / name).iterdir()}
    assert files == make_seeds()[name], "run python -m bench.fuzzing.seeds"
    warm_up(TARGETS[name])
    for raw in files.values():
        exercise(TARGETS[name], raw)


def test_no_choices_leave_a_message_as_it_is() -> None:
    message = {"a": [1, 2.5, "x", b"y", None], "b": {"c": True}}
    assert altered(message, Choices(b"")) == message
    assert flipped(b"raw", Choices(b"")) == b"raw"


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=64))
def test_the_same_choices_alter_a_message_in_the_same_way(data: bytes) -> None:
    message = {"a": [1, 2.5, "x", b"y", None], "b": {"c": True}}
    before = repr(message)
    assert repr(altered(message, Choices(data))) == repr(altered(message, Choices(data)))
    assert repr(message) == before


# -- the watch ------------------------------------------------------------------------------------------------


def test_a_target_that_breaks_its_promise_is_a_finding() -> None:
    warm_up(PLANTED)
    exercise(find_target("planted"), b"Hiv")
    with pytest.raises(Violation, match="planted"):
        exercise(find_target("planted"), b"Hive!")


def test_an_input_that_takes_more_memory_than_it_explains_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target(name="greedy", run=lambda data: None, max_len=9, promise="none")
    peaks = iter([0, guard.SPARE_BYTES + 3 * guard.BYTES_PER_BYTE, 0, guard.SPARE_BYTES + 3 * guard.BYTES_PER_BYTE + 1])
    monkeypatch.setattr(guard, "_peak_bytes", lambda: next(peaks))
    exercise(target, b"abc")
    with pytest.raises(Violation, match="for 3 bytes"):
        exercise(target, b"abc")


def test_an_input_that_takes_too_long_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MAX_CPU_S", 0.01)
    target = Target(name="slow", run=lambda data: sum(range(3_000_000)) and None, max_len=9, promise="none")
    with pytest.raises(Violation, match="CPU seconds"):
        exercise(target, b"")


def test_an_input_that_broke_something_is_run_again_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "input").write_bytes(b"Hive")
    monkeypatch.setattr("sys.argv", ["fuzz", "--target", "planted", "--reproduce", str(tmp_path / "input")])
    with pytest.raises(Violation):
        fuzz.main()
    (tmp_path / "input").write_bytes(b"fine")
    assert fuzz.main() == 0
    assert "nothing breaks" in capsys.readouterr().out


def test_without_atheris_the_fuzzer_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fuzz, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["fuzz", "--quick"])
    assert fuzz.main() == 2
    assert "atheris" in capsys.readouterr().err


# -- what it found -------------------------------------------------------------------------------------------


def test_evidence_under_a_made_up_plan_of_any_size_is_judged_at_once() -> None:
    plan = honest_group().plan
    members = tuple(dataclasses.replace(member, reduces=not place) for place, member in enumerate(plan.members))
    huge = dataclasses.replace(plan, layout=layout(1 << 40), members=members)
    masks = [MaskRun(stop=huge.layout.num_chunks, included=b"\7")]
    result = sign_result(CHEAT, huge.group_id(), 0, 0, masks, bytes(32))
    require_sound(result, huge, huge.parts()[0])
    block = {"result": result.model_dump(), "start": 0, "stop": 8, "data": b"", "proof": [], "openings": []}
    block["openings"] = [{"member": 0, "data": b"", "proof": []}]
    files = {"wrong_average": msgpack.packb(block), "group_plan": msgpack.packb(plan_to_dict(huge))}
    target = Target(
        name="huge",
        run=lambda _: guard.require(not proves(Fault.WRONG_AVERAGE, CHEAT.hotkey, files, verify), "it is convicted"),
        max_len=0,
        promise="none",
    )
    exercise(target, b"")


@pytest.mark.parametrize("num_chunks", [1, 7, 8, 9, 130, 700])
def test_blocks_and_ends_of_batches_are_those_that_the_plan_lists(num_chunks: int) -> None:
    plan = dataclasses.replace(honest_group().plan, layout=layout(4096 * num_chunks))
    for part in plan.parts():
        ends, blocks = {stop for _, stop in plan.batches(part)}, plan.blocks(part.start, part.stop)
        around = range(part.start - 2, part.stop + 3)
        assert {stop for stop in around if plan.ends_batch(part, stop)} == ends
        found = [
            (start, stop) for start in around for stop in range(start, start + 10) if plan.is_block(part, start, stop)
        ]
        assert found == blocks


def test_a_reducer_that_signs_two_means_is_convicted_and_nobody_else() -> None:
    group = honest_group()
    honest = group.results[1]
    lie = signed_mean(group.plan, 0, group.means[1][:-1] + b"\0", CHEAT)
    assert proves_two_averages(pack_two_averages(group.results[0], lie), group.plan, verify) == CHEAT.hotkey
    assert proves_two_averages(pack_two_averages(honest, lie), group.plan, verify) in GUILTY
    forged = signed_mean(group.plan, 1, group.means[0], CHEAT)
    assert proves_two_averages(pack_two_averages(honest, forged), group.plan, verify) is None
    assert MINERS[1].hotkey not in GUILTY


def test_thousands_of_unknown_fields_are_counted_and_not_listed() -> None:
    raw = json.dumps({f"field-{number}": 0 for number in range(MAX_LISTED + 1)}).encode()
    with pytest.raises(IntegrityError, match="fields are wrong"):
        parse_record(raw, validator="v", round_number=0, verify=verify)
    with pytest.raises(IntegrityError, match="fields are wrong"):
        parse_manifest(raw)
    with pytest.raises(PeerFault, match="fields are wrong") as caught:
        AllReduceReply.from_bytes(msgpack.packb(json.loads(raw)), 1 << 20)
    assert caught.value.fault is Fault.MALFORMED
