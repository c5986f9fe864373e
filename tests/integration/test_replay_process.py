"""The process that replays: the same verdicts as here, and its death, slowness or hub are our own failures."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from hivetrain.contribution import Contribution
from hivetrain.errors import Fault, ServiceError
from hivetrain.hub.client import HubStore, publish_dataset
from hivetrain.manifest import Ref
from hivetrain.run import Recipe
from hivetrain.verification.challenge import Draw
from hivetrain.verification.judge import Answer
from hivetrain.verification.worker import ReplayProcess, WorkerSpec
from tests.hub_fixture import HubProcess, running_hub
from tests.round_kit import RECIPE, ROUND, WHOLE, World, identity, make_world

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")]
MINER = identity("miner")
REPO = "test/model"


@dataclasses.dataclass(kw_only=True)
class Place:
    """A run on a real hub, and a process that replays for it."""

    world: World
    base: Ref
    hub: HubProcess
    replay: ReplayProcess
    contribution: Contribution

    def draw(self) -> Draw:
        return Draw(hotkey=MINER.hotkey, windows=WHOLE)


def answer_of(contribution: Contribution) -> Answer:
    opened = {index: contribution.snapshots.open(index) for index in WHOLE}
    return Answer(
        openings={index: (snapshot.payload, proof) for index, (snapshot, proof) in opened.items()},
        steps=contribution.steps,
        status="opened",
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("replay")
    with running_hub(folder / "hub") as hub:
        world = make_world(folder / "world")
        revision = publish_dataset(
            hub.url, "test/corpus", {"part.parquet": folder / "world" / "corpus" / "part.parquet"}
        )
        recipe: Recipe = dataclasses.replace(RECIPE, data=dataclasses.replace(RECIPE.data, revision=revision))
        (folder / "pinned").mkdir()
        (folder / "pinned" / "corpus").symlink_to(folder / "world" / "corpus")
        world = make_world(folder / "pinned", recipe)
        store = HubStore(endpoint=hub.url, repo=REPO)
        files = {name: world.store.read(world.base, name) for name in world.base.manifest.files}
        base = store.publish(world.base.manifest, files)
        spec = WorkerSpec(endpoint=hub.url, repo=REPO, token=None, run_id=world.parts.run_id, cache=folder / "cache")
        replay = ReplayProcess(spec)
        try:
            yield Place(world=world, base=base, hub=hub, replay=replay, contribution=world.contribution(MINER))
        finally:
            replay.close()


def test_it_judges_as_we_do_at_low_priority_and_on_one_thread(place: Place) -> None:
    waited: list[int] = []
    place.replay._on_wait = lambda: waited.append(1)
    place.replay.begin_round(place.base, ROUND, lambda: True)
    result = place.replay.judge(place.contribution.receipt, place.draw(), answer_of(place.contribution))
    assert result.fault is None, result
    assert result.windows == WHOLE
    assert result.distance is not None
    assert result.distance < 1e-3
    assert result.evidence == {"steps": place.contribution.steps}
    assert waited  # the thread that waits is not blocked
    assert place.replay.pid is not None
    assert psutil.Process(place.replay.pid).nice() == 10


def test_a_lie_is_a_lie_there_too(place: Place) -> None:
    place.replay.begin_round(place.base, ROUND, lambda: True)
    other = place.world.work(batches=place.world.bench.round_data(place.world.parts, ROUND, 1).batch)
    cheat = place.world.contribution(MINER, work=other)
    result = place.replay.judge(cheat.receipt, place.draw(), answer_of(cheat))
    assert (result.fault, result.first_wrong_step) == (Fault.WRONG_REPLAY, 0)


def test_one_that_stands_still_is_our_failure_and_the_next_one_takes_its_place(place: Place) -> None:
    place.replay.begin_round(place.base, ROUND, lambda: True)
    first = place.replay.pid
    assert first is not None
    os.kill(first, signal.SIGSTOP)
    place.replay._on_wait = lambda: os.kill(first, signal.SIGKILL)
    with pytest.raises(ServiceError, match="died"):
        place.replay.judge(place.contribution.receipt, place.draw(), answer_of(place.contribution))
    assert not psutil.pid_exists(first)
    place.replay._on_wait = lambda: None
    place.replay._in_time = lambda: False
    with pytest.raises(ServiceError, match="not done in time"):
        place.replay.judge(place.contribution.receipt, place.draw(), answer_of(place.contribution))
    assert place.replay.pid is None


def test_a_run_that_it_cannot_open_is_our_failure(place: Place, tmp_path: Path) -> None:
    replay = ReplayProcess(dataclasses.replace(place.replay._spec, run_id="00" * 32, cache=tmp_path))
    try:
        replay.begin_round(place.base, ROUND, lambda: True)
        with pytest.raises(ServiceError, match="the replay failed here: IntegrityError"):
            replay.judge(place.contribution.receipt, place.draw(), answer_of(place.contribution))
    finally:
        replay.close()
