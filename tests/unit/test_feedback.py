"""Error feedback over many rounds: nothing that was trained is lost, and the honest are never found wanting."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hivetrain.averaging.feedback import MAX_PENDING, Feedback, Remainder, codec_seed
from hivetrain.averaging.layout import PayloadLayout, Section
from hivetrain.contribution import encode_payload
from hivetrain.errors import Fault, PeerFault
from hivetrain.manifest import Manifest, Runs
from hivetrain.run import CHUNK_ELEMENTS, Averaging
from hivetrain.training.state import Snapshot
from hivetrain.verification.receipt import NO_REMAINDER, Receipt
from hivetrain.verification.remainder import RemainderBytes, check_remainder

NUM_PARAMS = 3 * CHUNK_ELEMENTS + 10
NUM_CHUNKS = 4
RUN_ID, HOTKEY = "01" * 32, "miner"

torch.set_num_threads(1)


def make_parts(codec: str = "sign") -> SimpleNamespace:
    """What `encode_payload` needs of a run."""
    sections = (
        Section(name="delta", num_elements=NUM_PARAMS, codec=codec),
        Section(name="exp_avg", num_elements=NUM_PARAMS, codec="fp32"),
        Section(name="exp_avg_sq", num_elements=NUM_PARAMS, codec="fp32"),
    )
    averaging = Averaging(codec=codec)  # type: ignore[arg-type]
    return SimpleNamespace(layout=PayloadLayout(sections), recipe=SimpleNamespace(averaging=averaging))


def manifest(epoch: int, round_number: int, parent: str, **named: object) -> Manifest:
    return Manifest.model_validate(
        {
            "run_id": RUN_ID,
            "epoch": epoch,
            "round": round_number,
            "parent": parent,
            "schema_hash": "02" * 32,
            "state_hash": f"{epoch:064x}",
            "files": {},
            "val_loss": 1.0,
            "block": 1,
            "nonce": "0" * 16,
            "leader": "leader",
            **named,
        }
    )


GENESIS = manifest(0, -1, "")


@dataclass(kw_only=True)
class Handed:
    """One round of the miner."""

    receipt: Receipt
    remainder: Remainder | None
    delta: Tensor
    sent: Tensor  # what the payload decodes to


@dataclass(kw_only=True)
class Miner:
    """A miner whose training is a random vector."""

    folder: Path
    codec: str = "sign"
    feedback: Feedback = field(init=False)

    def __post_init__(self) -> None:
        self.parts = make_parts(self.codec)
        self.restart()

    def restart(self) -> None:
        self.feedback = Feedback(self.folder, self.parts.layout, run_id=RUN_ID, hotkey=HOTKEY)
        self.feedback.load()

    def round(self, number: int, base: Manifest) -> Handed:
        generator = torch.Generator().manual_seed(number)
        delta = torch.randn(NUM_PARAMS, generator=generator) * 1e-3
        remainder = self.feedback.remainder(base)
        start, final = vectors(delta, generator)
        seed = codec_seed(RUN_ID, number, HOTKEY)
        encoded = encode_payload(self.parts, start, final, seed, remainder.values if remainder else None)
        receipt = Receipt(
            run_id=RUN_ID,
            round=number,
            epoch=base.epoch,
            base_manifest=base.sha256(),
            base_state=base.state_hash,
            schema_hash=base.schema_hash,
            layout_hash=self.parts.layout.layout_hash,
            hotkey=HOTKEY,
            rank=0,
            num_steps=1,
            num_samples=1,
            num_tokens=1,
            loss=1.0,
            data_digests=(),
            steps_root="03" * 32,
            sketch="00" * 1024,
            snapshots_root="04" * 32,
            num_snapshots=1,
            payload_root="05" * 32,
            num_chunks=self.parts.layout.num_chunks,
            remainder_root=remainder.root if remainder else NO_REMAINDER,
            rest_root=encoded.rest_root,
            carried_root=encoded.carried_root,
        )
        assert encoded.carried is not None
        self.feedback.keep(receipt, encoded.carried)
        sent = self.parts.layout.decode(encoded.payload)["delta"]
        return Handed(receipt=receipt, remainder=remainder, delta=start.vector - final.vector, sent=sent)


def vectors(delta: Tensor, generator: torch.Generator) -> tuple[Snapshot, Snapshot]:
    start = torch.randn(NUM_PARAMS, generator=generator) * 1e-2
    moments = torch.randn(2, NUM_PARAMS, generator=generator) * 1e-4
    zeros = torch.zeros(NUM_PARAMS)
    return (
        Snapshot(step=0, vector=start, exp_avg=zeros, exp_avg_sq=zeros),
        Snapshot(step=1, vector=start - delta, exp_avg=moments[0], exp_avg_sq=moments[1] ** 2),
    )


def published(base: Manifest, handed: Handed, left_out: Runs = ()) -> Manifest:
    """The epoch that the round makes of ``base``."""
    return manifest(
        base.epoch + 1,
        handed.receipt.round,
        base.sha256(),
        receipts={HOTKEY: handed.receipt.sha256()},
        left_out={HOTKEY: left_out} if left_out else {},
    )


def without_us(base: Manifest, round_number: int) -> Manifest:
    return manifest(base.epoch + 1, round_number, base.sha256(), receipts={"another": "07" * 32})


def check(handed: Handed, base: Manifest) -> Tensor | None:
    """What a validator that has never seen this miner finds."""
    opened = handed.remainder.opening if handed.remainder else None
    return check_remainder(handed.receipt, base, opened, NUM_PARAMS)


def elements(chunk: int) -> slice:
    return slice(chunk * CHUNK_ELEMENTS, (chunk + 1) * CHUNK_ELEMENTS)


# -- what is owed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["fp16", "int8", "int4", "int2", "sign", "topk-1%", "topk-10%"])
def test_what_was_sent_and_what_remains_is_what_was_trained(codec: str, tmp_path: Path) -> None:
    miner, base = Miner(folder=tmp_path, codec=codec), GENESIS
    trained, sent = torch.zeros(NUM_PARAMS), torch.zeros(NUM_PARAMS)
    for number in range(12):
        handed = miner.round(number, base)
        trained, sent = trained + handed.delta, sent + handed.sent
        base = published(base, handed)
    remainder = miner.feedback.remainder(base)
    assert remainder is not None
    torch.testing.assert_close(sent + remainder.values, trained, rtol=0, atol=2e-8)


def test_feedback_sends_what_signs_alone_never_would(tmp_path: Path) -> None:
    miner, base = Miner(folder=tmp_path), GENESIS
    trained, sent, alone = (torch.zeros(NUM_PARAMS) for _ in range(3))
    for _ in range(30):  # the same delta again and again
        handed = miner.round(0, base)
        alone = handed.sent if handed.remainder is None else alone
        trained, sent = trained + handed.delta, sent + handed.sent
        base = published(base, handed)
    assert (sent - trained).norm() < 0.3 * (30 * alone - trained).norm()


def test_a_chunk_that_was_left_out_returns_whole(tmp_path: Path) -> None:
    miner = Miner(folder=tmp_path)
    first = miner.round(1, GENESIS)
    base = published(GENESIS, first, left_out=((1, 2), (3, 5)))
    remainder = miner.feedback.remainder(base)
    assert remainder is not None
    for chunk in range(NUM_CHUNKS):
        expected = first.delta if chunk in (1, 3) else first.delta - first.sent
        assert torch.equal(remainder.values[elements(chunk)], expected[elements(chunk)])
    second = miner.round(2, base)
    assert torch.equal(check(second, base), remainder.values)  # type: ignore[arg-type]


def test_what_other_sections_lack_is_no_matter_of_the_remainder(tmp_path: Path) -> None:
    miner = Miner(folder=tmp_path)
    first = miner.round(1, GENESIS)
    base = published(GENESIS, first, left_out=((NUM_CHUNKS, 3 * NUM_CHUNKS),))
    remainder = miner.feedback.remainder(base)
    assert remainder is not None
    assert torch.equal(remainder.values, first.delta - first.sent)
    assert remainder.opening.others == b""


def test_a_round_without_an_epoch_leaves_the_remainder_as_it_was(tmp_path: Path) -> None:
    miner = Miner(folder=tmp_path)
    base = published(GENESIS, miner.round(1, GENESIS))
    before = miner.feedback.remainder(base)
    assert before is not None
    for number in (2, 3, 4, 5):  # each of them fails
        handed = miner.round(number, base)
        assert handed.remainder is not None
        assert torch.equal(handed.remainder.values, before.values)
        assert torch.equal(check(handed, base), before.values)  # type: ignore[arg-type]
    assert miner.feedback.remainder(published(base, handed)) is not None


def test_an_epoch_that_is_anchored_a_round_late_still_has_its_remainder(tmp_path: Path) -> None:
    miner = Miner(folder=tmp_path)
    handed = miner.round(1, GENESIS)
    late = published(GENESIS, handed)
    miner.round(2, GENESIS)
    third = miner.round(3, late)
    assert third.remainder is not None
    assert torch.equal(check(third, late), handed.delta - handed.sent)  # type: ignore[arg-type]


def test_there_is_no_remainder_where_the_base_has_nothing_of_us(tmp_path: Path) -> None:
    miner = Miner(folder=tmp_path)
    assert miner.feedback.remainder(GENESIS) is None
    base = published(GENESIS, miner.round(1, GENESIS))
    assert miner.feedback.remainder(without_us(base, 2)) is None
    # Two epochs on, the receipt of the first is not what the base follows from.
    skipped = manifest(2, 2, base.sha256(), receipts={HOTKEY: "09" * 32})
    assert miner.feedback.remainder(skipped) is None


def test_a_merge_leaves_no_remainder(tmp_path: Path) -> None:
    miner = Miner(folder=tmp_path)
    base = published(GENESIS, miner.round(1, GENESIS))
    merged = base.model_copy(update={"base_epoch": base.epoch})
    assert miner.feedback.remainder(merged) is None
    second = miner.round(2, base)
    assert second.remainder is not None
    assert fault_of(second.receipt, merged, second.remainder.opening).fault is Fault.NOT_COMMITTED


@pytest.mark.parametrize("field_name", ["round", "parent"])
def test_a_receipt_that_is_not_of_the_round_that_made_the_base_is_not_followed(tmp_path: Path, field_name: str) -> None:
    miner = Miner(folder=tmp_path)
    base = published(GENESIS, miner.round(1, GENESIS))
    other = base.model_copy(update={field_name: 7 if field_name == "round" else "0f" * 32})
    assert miner.feedback.remainder(base) is not None
    assert miner.feedback.remainder(other) is None


# -- restarts ------------------------------------------------------------------------------------------------


def test_a_restart_keeps_the_remainder(tmp_path: Path) -> None:
    miner = Miner(folder=tmp_path)
    base = published(GENESIS, miner.round(1, GENESIS), left_out=((0, 1),))
    before = miner.feedback.remainder(base)
    miner.restart()
    after = miner.feedback.remainder(base)
    assert before is not None
    assert after is not None
    assert torch.equal(before.values, after.values)
    assert (before.root, before.opening) == (after.root, after.opening)


def test_old_rounds_do_not_pile_up(tmp_path: Path) -> None:
    miner, base = Miner(folder=tmp_path), GENESIS
    for number in range(6):
        base = published(base, miner.round(number, base))
    settled = base
    miner.feedback.remainder(settled)
    for number in range(6, 12):
        miner.round(number, settled)
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == [f"sent-{number:09d}.safetensors" for number in (5, 10, 11)]
    assert len(kept) == 1 + MAX_PENDING


def damage(path: Path, how: str) -> None:
    raw = path.read_bytes()
    match how:
        case "flipped bit":
            path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
        case "cut":
            path.write_bytes(raw[:-100])
        case "empty":
            path.write_bytes(b"")
        case "grown":
            path.write_bytes(raw + bytes(200_000))
        case "garbage":
            path.write_bytes(b"\xff" * 500)
        case "no receipt":
            path.write_bytes(raw.replace(b"hivetrain", b"hivetrail", 1))
        case "other tensor":
            path.write_bytes(raw.replace(b"carried", b"borried", 1))


@pytest.mark.parametrize("how", ["flipped bit", "cut", "empty", "grown", "garbage", "no receipt", "other tensor"])
def test_a_damaged_file_means_no_remainder_and_a_line_in_the_log(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    miner = Miner(folder=tmp_path)
    base = published(GENESIS, miner.round(1, GENESIS))
    damage(next(tmp_path.iterdir()), how)
    with caplog.at_level(logging.WARNING):
        miner.restart()
    assert "cannot use the remainder in" in caplog.text
    assert miner.feedback.remainder(base) is None
    assert check(miner.round(2, base), base) is None  # zero is always allowed


@pytest.mark.parametrize("whose", ["run", "hotkey", "layout"])
def test_a_file_of_another_run_or_miner_is_not_used(
    tmp_path: Path, whose: str, caplog: pytest.LogCaptureFixture
) -> None:
    miner = Miner(folder=tmp_path)
    base = published(GENESIS, miner.round(1, GENESIS))
    layout = make_parts("int2" if whose == "layout" else "sign").layout
    other = Feedback(
        tmp_path,
        layout,
        run_id="ee" * 32 if whose == "run" else RUN_ID,
        hotkey="somebody" if whose == "hotkey" else HOTKEY,
    )
    with caplog.at_level(logging.WARNING):
        other.load()
    assert "belongs to another run, hotkey or layout" in caplog.text
    assert other.remainder(base) is None


def test_a_disk_that_cannot_be_written_costs_the_restart_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    miner = Miner(folder=blocked)
    with caplog.at_level(logging.WARNING):
        base = published(GENESIS, miner.round(1, GENESIS))
    assert "a restart would lose it" in caplog.text
    assert miner.feedback.remainder(base) is not None


# -- any history ---------------------------------------------------------------------------------------------

EVENTS = st.lists(
    st.sampled_from(["in", "in", "part", "part", "out", "failed", "late", "restart", "lost", "resync"]),
    min_size=1,
    max_size=10,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(EVENTS, st.randoms(use_true_random=False))
def test_whatever_happens_the_honest_pass_and_owe_what_they_trained(
    tmp_path: Path, events: list[str], random: object
) -> None:
    shutil.rmtree(tmp_path / "state", ignore_errors=True)
    miner, base = Miner(folder=tmp_path / "state"), GENESIS
    owed = torch.zeros(NUM_PARAMS)  # trained and in epochs, less what was sent in them
    for index, event in enumerate(events):
        number = 2 * index
        if event == "restart":
            miner.restart()
        if event == "lost":
            shutil.rmtree(tmp_path / "state", ignore_errors=True)
            miner.restart()
            owed = torch.zeros(NUM_PARAMS)
        handed = miner.round(number, base)
        checked = check(handed, base)
        found = torch.zeros(NUM_PARAMS) if checked is None else checked
        torch.testing.assert_close(found, owed, rtol=0, atol=3e-8)
        if event in ("in", "restart", "lost"):
            base, owed = published(base, handed), owed + handed.delta - handed.sent
        elif event == "part":
            chunks = [c for c in range(NUM_CHUNKS) if random.random() < 0.5]  # type: ignore[attr-defined]
            base = published(base, handed, left_out=tuple((c, c + 1) for c in chunks))
            sent = handed.sent.clone()
            for chunk in chunks:
                sent[elements(chunk)] = 0
            owed = owed + handed.delta - sent
        elif event == "out":
            base, owed = without_us(base, number), torch.zeros(NUM_PARAMS)
        elif event == "late":  # the next round still starts from the old base, and its work is for nothing
            miner.round(number + 1, base)
            base, owed = published(base, handed), owed + handed.delta - handed.sent
        elif event == "resync":
            base = without_us(without_us(base, number), number)
            owed = torch.zeros(NUM_PARAMS)


# -- what is not the remainder -------------------------------------------------------------------------------


@pytest.fixture
def second(tmp_path: Path) -> tuple[Handed, Manifest]:
    """A round with a remainder, and its base, which left out one chunk of the round before."""
    miner = Miner(folder=tmp_path)
    base = published(GENESIS, miner.round(1, GENESIS), left_out=((2, 3),))
    return miner.round(2, base), base


def fault_of(receipt: Receipt, base: Manifest, opened: RemainderBytes | None) -> PeerFault:
    with pytest.raises(PeerFault) as caught:
        check_remainder(receipt, base, opened, NUM_PARAMS)
    return caught.value


def test_a_remainder_that_is_not_shown_is_refused(second: tuple[Handed, Manifest]) -> None:
    handed, base = second
    assert fault_of(handed.receipt, base, None).fault is Fault.REFUSED


@pytest.mark.parametrize("at", [0, 5000, 4 * NUM_PARAMS - 1])
def test_one_other_bit_is_not_what_was_committed(second: tuple[Handed, Manifest], at: int) -> None:
    handed, base = second
    assert handed.remainder is not None
    opening = handed.remainder.opening
    values = bytearray(opening.values)
    values[at] ^= 1
    fault = fault_of(handed.receipt, base, dataclasses.replace(opening, values=bytes(values)))
    assert fault.fault is Fault.NOT_COMMITTED
    assert "does not open" in fault.detail


@pytest.mark.parametrize("change", [-4, 4, -(4 * NUM_PARAMS)])
def test_a_remainder_of_another_size_is_refused_before_it_is_hashed(
    second: tuple[Handed, Manifest], change: int
) -> None:
    handed, base = second
    assert handed.remainder is not None
    values = bytes(4 * NUM_PARAMS + change)
    fault = fault_of(handed.receipt, base, dataclasses.replace(handed.remainder.opening, values=values))
    assert (fault.fault, "expected" in fault.detail) == (Fault.NOT_COMMITTED, True)


def committed_anew(handed: Handed, values: Tensor) -> tuple[Receipt, RemainderBytes]:
    """The miner commits to another remainder, consistently."""
    from hivetrain.verification.remainder import chunk_leaves, root_of, to_bytes

    raw = to_bytes(values)
    receipt = handed.receipt.model_copy(update={"remainder_root": root_of(chunk_leaves(raw))})
    assert handed.remainder is not None
    return receipt, dataclasses.replace(handed.remainder.opening, values=raw)


@pytest.mark.parametrize("chunk", range(NUM_CHUNKS))
@pytest.mark.parametrize("how", ["changed", "zero", "swapped version"])
def test_another_remainder_does_not_follow_from_the_round_before(
    second: tuple[Handed, Manifest], chunk: int, how: str, tmp_path: Path
) -> None:
    handed, base = second
    assert handed.remainder is not None
    values = handed.remainder.values.clone()
    if how == "changed":
        values[elements(chunk)] *= 1.001
    elif how == "zero":
        values[elements(chunk)] = 0.0
    else:  # rest where it was left out, carried where it was in
        first = Miner(folder=tmp_path / "again").round(1, GENESIS)
        versions = (first.delta, first.delta - first.sent)
        values[elements(chunk)] = versions[1 if chunk == 2 else 0][elements(chunk)]
    fault = fault_of(*_arguments(committed_anew(handed, values), base))
    assert fault.fault is Fault.NOT_COMMITTED
    assert "not what the round before left" in fault.detail


def _arguments(committed: tuple[Receipt, RemainderBytes], base: Manifest) -> tuple[Receipt, Manifest, RemainderBytes]:
    return committed[0], base, committed[1]


@pytest.mark.parametrize("how", ["mask", "no receipt of ours", "another round", "another parent", "no digests"])
def test_the_same_remainder_from_another_base_is_refused(second: tuple[Handed, Manifest], how: str) -> None:
    handed, base = second
    assert handed.remainder is not None
    opening = handed.remainder.opening
    match how:
        case "mask":
            base = base.model_copy(update={"left_out": {HOTKEY: ((1, 2),)}})
        case "no receipt of ours":
            base = base.model_copy(update={"receipts": {"another": handed.receipt.sha256()}})
        case "another round":
            base = base.model_copy(update={"round": 9})
        case "another parent":
            base = base.model_copy(update={"parent": "0e" * 32})
        case "no digests":
            opening = dataclasses.replace(opening, others=b"")
    assert fault_of(handed.receipt, base, opening).fault is Fault.NOT_COMMITTED


@pytest.mark.parametrize("others", [31, 32 * NUM_CHUNKS - 1, 32 * NUM_CHUNKS + 32, 32 * NUM_CHUNKS])
def test_digests_that_are_too_few_too_many_or_wrong_are_refused(second: tuple[Handed, Manifest], others: int) -> None:
    handed, base = second
    assert handed.remainder is not None
    opening = dataclasses.replace(handed.remainder.opening, others=bytes(others))
    assert fault_of(handed.receipt, base, opening).fault is Fault.NOT_COMMITTED


def test_the_receipt_that_is_shown_must_be_the_one_that_the_manifest_names(second: tuple[Handed, Manifest]) -> None:
    handed, base = second
    assert handed.remainder is not None
    opening = handed.remainder.opening
    shown = json.loads(opening.previous)
    for changed in (
        {**shown, "rest_root": "aa" * 32},
        {**shown, "carried_root": "aa" * 32},
        {**shown, "hotkey": "another"},
        {"run_id": 1},
    ):
        forged = dataclasses.replace(opening, previous=json.dumps(changed).encode())
        assert fault_of(handed.receipt, base, forged).fault is Fault.NOT_COMMITTED
    for garbage in (b"", b"\xff", b"[" * 1000):
        forged = dataclasses.replace(opening, previous=garbage)
        assert fault_of(handed.receipt, base, forged).fault is Fault.NOT_COMMITTED


def test_another_miners_receipt_is_no_ground_for_a_remainder(second: tuple[Handed, Manifest]) -> None:
    handed, base = second
    assert handed.remainder is not None
    shown = Receipt.model_validate_json(handed.remainder.opening.previous).model_copy(update={"hotkey": "another"})
    base = base.model_copy(update={"receipts": {**base.receipts, "another": shown.sha256()}})
    forged = dataclasses.replace(handed.remainder.opening, previous=shown.to_bytes())
    assert fault_of(handed.receipt, base, forged).fault is Fault.NOT_COMMITTED
