"""Nothing acknowledged is lost, whoever is killed or paused when: the short form of `make crashes`."""

import asyncio
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from store.connection import EmbeddedRedis, connect
from store.segments import Segments
from store.timeline import Timeline
from tests.crashes import BATCH, FORMAT, LEASE_S, SOURCE, STEP, Crashes, Place, start_playing

pytestmark = pytest.mark.alone


@pytest.mark.parametrize("seed", [1, 2])
def test_what_was_acknowledged_outlives_kills_of_everything(tmp_path, seed):
    crashes = Crashes(tmp_path, seed)
    assert crashes.run(rounds=10) == []
    assert crashes.acknowledged >= 10 * BATCH


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with EmbeddedRedis.start(tmp_path) as server:
        yield Place(server.url, str(tmp_path / "segments"), tmp_path / "write.log")


def written(place: Place) -> list[int]:
    """The slots that a writer knows to be kept, in the order it learned of them."""
    return [slot for first, last in place.notes() for slot in range(int(str(first)), int(str(last)) + 1, STEP)]


def wait_for(place: Place, frames: int) -> None:
    deadline = time.monotonic() + 30
    while len(written(place)) < frames:
        assert time.monotonic() < deadline, "the writer does not get on"
        time.sleep(0.02)


def test_an_owner_that_was_paused_is_refused_when_it_wakes(place):
    successor = Place(place.url, place.root, place.log.with_name("successor.log"))
    former = start_playing("write", place)
    try:
        wait_for(place, 100)
        former.send_signal(signal.SIGSTOP)
        known = len(written(place))
        second = start_playing("write", successor)
        try:
            wait_for(successor, 100)
            former.send_signal(signal.SIGCONT)
            time.sleep(2 * LEASE_S)
            # The one batch that was kept before the pause may be learned of behind it.
            late = written(place)[known:]
            count = len(written(successor))
            wait_for(successor, count + 100)
        finally:
            second.kill()
            second.wait()
    finally:
        former.kill()
        former.wait()
    assert len(late) in (0, BATCH)

    async def present() -> set[int]:
        async with connect(place.url) as redis:
            return set((await Timeline(redis, FORMAT, Segments(place.root)).slots(SOURCE, 0, 10**12)).tolist())

    assert set(written(place)) | set(written(successor)) <= asyncio.run(present())
