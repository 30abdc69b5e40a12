"""A new model looks at kept pictures: it makes what ingest would have made, goes on after a kill, and brings back
nothing that was erased."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from compressor_service.device import Device
from compressor_service.encoder import Encoder
from compressor_service.facts import Encoded
from compressor_service.recompute import PUT_OFF_S, Recomputer
from compressor_service.writer import FrameWriter
from ingest.frame import SinkUnavailable
from store.connection import EmbeddedRedis, StoreUnavailable, connect
from store.format import HOUR_SLOTS
from store.recomputations import (
    KEPT_ENDED,
    HourLeft,
    Recomputation,
    RecomputationEnded,
    RecomputationNotFound,
    Wanted,
    ended,
    facts,
)
from store.source import Source, VideoStatus
from tests.recompute_parts import LATE_MS, PASS, Place, load, work
from tests.test_ingest_store import eventually
from tests.test_store_connection import server_pid
from tests.untrained import write_untrained_checkpoint

ROOT = Path(__file__).parent.parent
SLOTS = [*range(24), *range(HOUR_SLOTS, HOUR_SLOTS + 20)]  # of two hours


@pytest.fixture(scope="module")
def old(checkpoint: Path) -> Encoder:
    return load(checkpoint)


@pytest.fixture(scope="module")
def new_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_untrained_checkpoint(tmp_path_factory.mktemp("new"), seed=1)


@pytest.fixture(scope="module")
def new(new_checkpoint: Path, old: Encoder) -> Encoder:
    encoder = load(new_checkpoint)
    assert encoder.format.fingerprint != old.format.fingerprint
    return encoder


@pytest.fixture
def place(redis, tmp_path) -> Place:
    return Place(redis, tmp_path)


class Eyes:
    """The real ones, with something that happens before each look."""

    def __init__(self, writer: FrameWriter) -> None:
        self._writer = writer
        self.looks = 0

    async def before(self) -> None: ...

    async def encode(self, keyframes: Sequence[bytes]) -> Encoded:
        self.looks += 1
        await self.before()
        return await self._writer.encode(keyframes)


def watched(place: Place, new: Encoder, recomputer: Recomputer) -> Eyes:
    eyes = Eyes(place.writer(new))
    recomputer._second._eyes = eyes
    return eyes


@pytest.mark.parametrize("sealed", [True, False])
async def test_what_is_made_anew_is_what_ingest_makes_with_the_new_model(place, old, new, sealed):
    video = await place.video(old, SLOTS)
    if sealed:
        for hour in (0, 1):
            assert await place.timeline(old).seal(video.id, hour)
            assert await place.keyframes.pack(video.id, hour)
    fresh = await place.video(new, SLOTS, name="fresh.mp4")
    job = await place.ask(new, video.id)
    await work(place.recomputer(new))
    assert await place.kept(new, video.id, SLOTS) == await place.kept(new, fresh.id, SLOTS)
    times = await place.timeline(new).times(video.id, np.array(SLOTS))
    assert times.tolist() == [slot * 1000 + LATE_MS for slot in SLOTS]
    assert await place.timeline(new).count(video.id) == len(SLOTS)
    assert await place.slots(old, video.id) == SLOTS
    done = await place.jobs.get(job.id)
    assert (done.status, done.total.slots, done.total.done, done.total.unreadable) == ("done", 44, 44, 0)
    assert done.ended_at is not None
    assert done.frames_per_s is not None


async def test_the_newest_hours_come_first(place, old, new):
    video = await place.video(old, SLOTS)
    stream = await place.stream(retention_hours=24.0)
    hour = int(time.time()) // HOUR_SLOTS - 3
    for one in (hour - 1, hour):
        await place.see(old, stream.id, [one * HOUR_SLOTS + 5])
    await place.ask(new, video.id, stream.id)
    recomputer = place.recomputer(new)
    order = []
    while await recomputer.step():
        order.append((len(await place.slots(new, video.id)), await place.slots(new, stream.id)))
    first, second = (hour - 1) * HOUR_SLOTS + 5, hour * HOUR_SLOTS + 5
    assert order[0] == (0, [])  # planned
    # The video came just now: it is the newest.
    assert [held for _, held in order][-2:] == [[second], [first, second]]
    assert order[-1][0] == len(SLOTS)


async def test_what_the_new_model_saw_stays_as_it_is(place, old, new):
    video = await place.video(old, SLOTS)
    await place.see(new, video.id, SLOTS[:5])
    seen = await place.kept(new, video.id, SLOTS[:5])
    job = await place.ask(new, video.id)
    await work(place.recomputer(new))
    assert await place.kept(new, video.id, SLOTS[:5]) == seen
    assert await place.slots(new, video.id) == SLOTS
    assert (await place.jobs.get(job.id)).total.slots == len(SLOTS) - 5


async def test_a_second_wish_finds_nothing_to_do(place, old, new):
    video = await place.video(old, SLOTS)
    first, second = await place.ask(new, video.id), await place.ask(new, video.id)
    await work(place.recomputer(new))
    assert [(await place.jobs.get(job.id)).total.slots for job in (first, second)] == [len(SLOTS), 0]
    assert (await place.jobs.get(second.id)).status == "done"


async def test_a_picture_without_tokens_gets_the_time_of_its_slot(place, old, new):
    video = await place.video(old, [3, 4])
    await place.timeline(old).erase(video.id, 4, 5)
    await place.ask(new, video.id)
    await work(place.recomputer(new))
    times = await place.timeline(new).times(video.id, np.array([3, 4]))
    assert times.tolist() == [3000 + LATE_MS, 4000]


async def test_only_the_range_that_is_named_is_made(place, old, new):
    video = await place.video(old, SLOTS)
    wanted = [Wanted(source_id=video.id, start=5, end=9), Wanted(source_id=video.id, start=HOUR_SLOTS + 15)]
    job = await place.jobs.create("new", new.format.fingerprint, wanted)
    await work(place.recomputer(new))
    assert await place.slots(new, video.id) == [5, 6, 7, 8, *range(HOUR_SLOTS + 15, HOUR_SLOTS + 20)]
    assert (await place.jobs.get(job.id)).total.slots == 9


async def test_a_picture_that_cannot_be_decoded_is_named_and_the_others_are_made(place, old, new, caplog):
    video = await place.video(old, SLOTS)
    await place.keyframes.put(video.id, 7, b"no picture")
    job = await place.ask(new, video.id, drop_old=True)
    await work(place.recomputer(new))
    assert await place.slots(new, video.id) == [slot for slot in SLOTS if slot != 7]
    done = await place.jobs.get(job.id)
    assert (done.status, done.total.slots, done.total.done, done.total.unreadable) == ("done", 44, 43, 1)
    assert [(one.source_id, one.slot) for one in done.unreadable] == [(video.id, 7)]
    assert f"{video.id} slot 7" in caplog.text
    [gap] = await place.sources.gaps(video.id, 0, 100)
    assert (gap.start_slot, gap.end_slot, gap.reason) == (7, 8, "decode_error")
    # The hour of the lost picture is not taken from the old model; the other one is.
    assert done.total.dropped == 20
    assert await place.slots(old, video.id) == SLOTS[:24]


async def test_an_hour_of_which_no_picture_can_be_decoded_ends(place, old, new):
    video = await place.video(old, [1, 2])
    await place.keyframes.put_many({(video.id, slot): b"no picture" for slot in (1, 2)})
    job = await place.ask(new, video.id)
    await work(place.recomputer(new))
    done = await place.jobs.get(job.id)
    assert (done.status, done.total.done, done.total.unreadable) == ("done", 0, 2)
    assert await place.slots(new, video.id) == []


async def test_old_tokens_go_when_asked_for_an_hour_at_a_time(place, old, new):
    video = await place.video(old, SLOTS)
    for hour in (0, 1):
        assert await place.timeline(old).seal(video.id, hour)
    job = await place.ask(new, video.id)
    recomputer = place.recomputer(new)
    await work(recomputer)
    assert await place.slots(old, video.id) == SLOTS
    again = await place.ask(new, video.id, drop_old=True)  # nothing is left to make, and still something to drop
    await work(recomputer)
    assert await place.slots(old, video.id) == []
    assert [one.format.fingerprint for one in await place.memory.timelines(video.id)] == [new.format.fingerprint]
    assert (await place.jobs.get(job.id)).total.dropped == 0
    assert (await place.jobs.get(again.id)).total.dropped == len(SLOTS)
    files = list((place.folder / "segments").rglob("*.safetensors"))
    assert len(files) == 2
    assert all(new.format.fingerprint in file.name for file in files)


async def test_old_tokens_without_a_picture_are_kept(place, old, new):
    video = await place.video(old, SLOTS)
    await place.keyframes.erase(video.id, 0, 5)
    await place.ask(new, video.id, drop_old=True)
    await work(place.recomputer(new))
    assert await place.slots(old, video.id) == SLOTS[:24]
    assert await place.slots(new, video.id) == SLOTS[5:]


async def test_the_hour_that_is_still_recorded_is_made_when_it_is_over(place, old, new):
    hour = int(time.time()) // HOUR_SLOTS
    stream = await place.stream()
    before, now = [(hour - 1) * HOUR_SLOTS + 7], [hour * HOUR_SLOTS + slot for slot in (1, 2)]
    await place.see(old, stream.id, [*before, *now])
    await place.see(new, stream.id, [hour * HOUR_SLOTS + 3])
    job = await place.ask(new, stream.id)
    over_s = (hour + 1) * HOUR_SLOTS + 600
    clock = [over_s - 1.0]
    recomputer = place.recomputer(new, now=lambda: clock[0])
    await work(recomputer)
    waiting = await place.jobs.get(job.id)
    assert (waiting.status, waiting.total.slots, waiting.total.done) == ("running", 3, 1)
    assert waiting.resumes_at == over_s
    other = await place.ask(new, (await place.video(old, [1])).id)
    await work(recomputer)
    assert (await place.jobs.get(other.id)).status == "done"  # what waits holds up nothing
    clock[0] = over_s
    await work(recomputer)
    assert (await place.jobs.get(job.id)).status == "done"
    assert await place.slots(new, stream.id) == [*before, *now, hour * HOUR_SLOTS + 3]


async def test_a_video_that_is_still_read_is_looked_at_later(place, old, new):
    video = await place.video(old, SLOTS)
    reading = VideoStatus(status="processing", progress=0.5)
    await place.see(old, video.id, [], reading)
    job = await place.ask(new, video.id)
    clock = [time.time()]
    recomputer = place.recomputer(new, now=lambda: clock[0])
    await work(recomputer)
    assert await place.slots(new, video.id) == []
    clock[0] += PUT_OFF_S
    await work(recomputer)
    assert (await place.jobs.get(job.id)).status == "running"
    await place.see(old, video.id, [], VideoStatus(status="ready", progress=1.0))
    clock[0] += 2 * PUT_OFF_S
    await work(recomputer)
    assert (await place.jobs.get(job.id)).status == "done"
    assert await place.slots(new, video.id) == SLOTS


async def test_what_retention_takes_is_not_made(place, old, new):
    stream = await place.stream(retention_hours=2.0)
    now = int(time.time())
    slots = [now - 20_000, now - 6_000]
    await place.see(old, stream.id, slots)
    await place.ask(new, stream.id)
    await work(place.recomputer(new, now=lambda: now + 1000.0))
    assert await place.slots(new, stream.id) == [slots[1]]


async def test_a_recomputation_can_be_cancelled_in_the_middle_of_an_hour(place, old, new):
    video = await place.video(old, SLOTS)
    job = await place.ask(new, video.id)
    recomputer = place.recomputer(new, keep_every_s=0.0)
    eyes = watched(place, new, recomputer)

    async def cancel() -> None:
        if eyes.looks == 2:
            assert (await place.jobs.cancel(job.id)).status == "cancelled"

    eyes.before = cancel
    await work(recomputer)
    made = await place.slots(new, video.id)
    assert 0 < len(made) < len(SLOTS)
    assert eyes.looks == 2
    assert (await place.jobs.cancel(job.id)).status == "cancelled"  # once more changes nothing
    assert await place.jobs.active(new.format.fingerprint) == []
    await place.ask(new, video.id)
    await work(recomputer)
    assert await place.slots(new, video.id) == SLOTS


async def test_what_has_ended_cannot_be_cancelled(place, old, new):
    job = await place.ask(new, (await place.video(old, [1])).id)
    await work(place.recomputer(new))
    with pytest.raises(RecomputationEnded, match="ended already"):
        await place.jobs.cancel(job.id)
    with pytest.raises(RecomputationNotFound, match="there is no recomputation"):
        await place.jobs.cancel("rec_nothing")


async def test_one_of_several_works_and_the_next_takes_over(place, old, new):
    video = await place.video(old, SLOTS)
    job = await place.ask(new, video.id)
    first, second = place.recomputer(new), place.recomputer(new)
    assert await first.step()
    assert not await second.step()
    assert await place.jobs.has_worker(new.format.fingerprint)
    running = asyncio.create_task(first.run())
    await asyncio.sleep(0)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert not await place.jobs.has_worker(new.format.fingerprint)
    await work(second)
    assert (await place.jobs.get(job.id)).status == "done"
    assert await place.slots(new, video.id) == SLOTS


async def test_who_waits_for_the_device_longer_than_a_lease_stays_the_one_who_works(place, old, new, monkeypatch):
    monkeypatch.setattr("compressor_service.recompute.LEASE_S", 0.3)
    monkeypatch.setattr("compressor_service.second_look.GO_ON_EVERY_S", 0.05)
    video = await place.video(old, [1, 2])
    job = await place.ask(new, video.id)
    recomputer = place.recomputer(new)
    worked, eyes = [], watched(place, new, recomputer)

    async def be_busy() -> None:
        for _ in range(8):
            await asyncio.sleep(0.1)
            worked.append(await place.jobs.has_worker(new.format.fingerprint))

    eyes.before = be_busy
    await work(recomputer)
    assert worked == [True] * 8
    assert (await place.jobs.get(job.id)).status == "done"


async def test_a_recomputation_can_be_cancelled_while_it_waits_for_the_device(place, old, new, monkeypatch):
    monkeypatch.setattr("compressor_service.second_look.GO_ON_EVERY_S", 0.05)
    video = await place.video(old, SLOTS)
    job = await place.ask(new, video.id)
    recomputer = place.recomputer(new)
    eyes, waits = watched(place, new, recomputer), asyncio.Event()

    async def wait_for_ever() -> None:
        waits.set()
        await asyncio.Event().wait()

    eyes.before = wait_for_ever
    working = asyncio.create_task(work(recomputer))
    await waits.wait()
    await place.jobs.cancel(job.id)
    await asyncio.wait_for(working, 10)


async def test_a_service_of_another_model_leaves_it_alone(place, old, new):
    video = await place.video(old, SLOTS)
    job = await place.ask(new, video.id)
    await work(place.recomputer(old))
    assert (await place.jobs.get(job.id)).status == "queued"
    await work(place.recomputer(new))
    assert (await place.jobs.get(job.id)).status == "done"


async def test_a_source_that_is_deleted_meanwhile_is_no_failure(place, old, new):
    gone, stays = await place.video(old, SLOTS, name="gone.mp4"), await place.video(old, SLOTS)
    job = await place.ask(new, gone.id, stays.id)
    recomputer = place.recomputer(new)
    assert await recomputer.step()
    await place.sources.delete_video(gone.id)
    await place.memory.erase(gone.id)
    await work(recomputer)
    done = await place.jobs.get(job.id)
    assert (done.status, done.total.done) == ("done", 2 * len(SLOTS))
    assert await place.slots(new, gone.id) == []
    assert await place.slots(new, stays.id) == SLOTS


async def test_what_stands_in_the_way_is_told_and_tried_again(place, old, new):
    video = await place.video(old, SLOTS)
    job = await place.ask(new, video.id)
    clock = [time.time()]
    recomputer = place.recomputer(new, now=lambda: clock[0])
    eyes = watched(place, new, recomputer)

    async def lose() -> None:
        raise SinkUnavailable("the compressor was lost")

    eyes.before = lose
    await work(recomputer)
    told = await place.jobs.get(job.id)
    assert (told.status, told.reason, told.total.done) == ("running", "the compressor was lost", 0)
    del eyes.before
    clock[0] += PUT_OFF_S
    await work(recomputer)
    done = await place.jobs.get(job.id)
    assert (done.status, done.reason, done.total.done) == ("done", None, len(SLOTS))


async def test_on_a_full_disk_it_waits_for_room(place, old, new):
    video = await place.video(old, SLOTS)
    job = await place.ask(new, video.id)
    clock = [time.time()]
    recomputer = place.recomputer(new, now=lambda: clock[0])
    recomputer._room = place.room(1 << 60)
    await work(recomputer)
    assert "disk of the store is full" in (await place.jobs.get(job.id)).reason
    assert await place.slots(new, video.id) == []
    recomputer._room = place.room()
    clock[0] += PUT_OFF_S
    await work(recomputer)
    assert (await place.jobs.get(job.id)).status == "done"


async def test_after_an_outage_the_newest_hours_still_come_first(place, old, new, caplog):
    video = await place.video(old, [hour * HOUR_SLOTS for hour in range(4)])
    stream = await place.stream(retention_hours=24.0)
    hour = int(time.time()) // HOUR_SLOTS - 3
    for one in (hour - 1, hour):
        await place.see(old, stream.id, [one * HOUR_SLOTS + 5])
    job = await place.ask(new, stream.id, video.id)
    recomputer = place.recomputer(new)
    assert await recomputer.step()
    eyes = watched(place, new, recomputer)
    recomputer._room = place.room(1 << 60)
    assert not await recomputer.step()
    recomputer._room = place.room()

    async def lose() -> None:
        raise SinkUnavailable("the compressor was lost")

    eyes.before = lose
    for _ in range(3):
        assert not await recomputer.step()
    assert eyes.looks == 3  # once a step, and not once an hour
    told = await place.jobs.get(job.id)
    assert (told.status, told.reason, told.total.done) == ("running", "the compressor was lost", 0)
    assert caplog.text.count("the compressor was lost") == 1
    del eyes.before
    order = []
    while await recomputer.step():
        order.append(await place.slots(new, stream.id))
    first, second = (hour - 1) * HOUR_SLOTS + 5, hour * HOUR_SLOTS + 5
    assert order[-2:] == [[second], [first, second]]  # the video came just now: its hours were before these
    done = await place.jobs.get(job.id)
    assert (done.status, done.reason) == ("done", None)


async def test_what_cannot_be_planned_says_so_and_holds_up_nothing_else(place, old, new, monkeypatch):
    bad, good = await place.video(old, SLOTS, name="bad.mp4"), await place.video(old, SLOTS)
    first, second = await place.ask(new, bad.id), await place.ask(new, good.id)
    recomputer = place.recomputer(new)
    hours = recomputer._second.hours

    async def fail(job: Recomputation, source: Source) -> list[int]:
        if source.id == bad.id:
            raise StoreUnavailable("its folder is away")
        return await hours(job, source)

    monkeypatch.setattr(recomputer._second, "hours", fail)
    await work(recomputer)
    waiting = await place.jobs.get(first.id)
    assert (waiting.status, waiting.reason) == ("queued", "its folder is away")
    assert (await place.jobs.get(second.id)).status == "done"
    monkeypatch.undo()
    await recomputer.step()
    assert (await place.jobs.get(first.id)).reason is None
    await work(recomputer)
    assert (await place.jobs.get(first.id)).status == "done"


async def test_what_another_model_makes_is_never_kept_for_the_running_one(place, old, new):
    """In an upgrade the compressor may be replaced before those who call it."""
    video = await place.video(old, SLOTS)
    job = await place.ask(new, video.id)
    recomputer = place.recomputer(new)
    recomputer._second._eyes = place.writer(old)
    await work(recomputer)
    told = await place.jobs.get(job.id)
    assert (told.status, told.total.done) == ("running", 0)
    assert "another model" in told.reason
    assert await place.slots(new, video.id) == []


async def test_a_damaged_pack_holds_up_its_own_hour_alone(place, old, new):
    video = await place.video(old, SLOTS)
    assert await place.keyframes.pack(video.id, 0)
    [pack] = (place.folder / "segments").rglob("keyframes-*.safetensors")
    pack.write_bytes(pack.read_bytes()[:1000])
    job = await place.ask(new, video.id)
    clock = [time.time()]
    recomputer = place.recomputer(new, now=lambda: clock[0])
    await work(recomputer)
    told = await place.jobs.get(job.id)
    assert told.status == "running"
    assert "is cut off" in told.reason
    assert await place.slots(new, video.id) == SLOTS[24:]


async def test_an_error_nobody_foresaw_ends_it_and_says_so(place, old, new, caplog):
    video = await place.video(old, SLOTS)
    job = await place.ask(new, video.id)
    recomputer = place.recomputer(new)

    async def fail() -> None:
        raise ZeroDivisionError("secret insides")

    watched(place, new, recomputer).before = fail
    await work(recomputer)
    failed = await place.jobs.get(job.id)
    assert failed.status == "failed"
    assert "insides" not in failed.reason
    assert "secret insides" in caplog.text
    assert not await recomputer.step()


def start(command: Sequence[object]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([str(word) for word in command], cwd=ROOT)


async def test_it_goes_on_after_kills_and_makes_every_frame_once(tmp_path, old, new, new_checkpoint):
    chance = random.Random(1)
    slots = list(range(600))
    with EmbeddedRedis.start(tmp_path) as server:
        async with connect(server.url) as redis:
            place = Place(redis, tmp_path)
            video = await place.video(old, slots)
            job = await place.ask(new, video.id)
            kills = 0
            while kills < 2:
                known = len(await place.slots(new, video.id))
                command = [sys.executable, "-m", "tests.recompute_parts", server.url, str(tmp_path), new_checkpoint]
                process = start(command)

                async def gets_on(known: int, process: subprocess.Popen[bytes] = process) -> None:
                    deadline = time.monotonic() + 150
                    while len(await place.slots(new, video.id)) == known:
                        assert process.poll() is None
                        assert time.monotonic() < deadline, "it does not get on"
                        await asyncio.sleep(0.01)

                try:
                    await gets_on(known)
                    if kills == 0:
                        os.kill(server_pid(tmp_path), signal.SIGKILL)
                        await eventually(lambda: redis.ping())
                        await gets_on(len(await place.slots(new, video.id)))
                    await asyncio.sleep(chance.uniform(0.0, 0.1))
                finally:
                    process.kill()
                    process.wait()
                kills += 1
                await redis.delete(f"own:{{recomputer-{new.format.fingerprint}}}")  # as its lease would run out
            assert 0 < len(await place.slots(new, video.id)) < len(slots)
            await work(place.recomputer(new))
            done = await place.jobs.get(job.id)
            assert (done.status, done.total.slots, done.total.done) == ("done", 600, 600)
            assert await place.slots(new, video.id) == slots
            assert await place.timeline(new).count(video.id) == len(slots)
            assert len(list((tmp_path / "segments").rglob(f"{new.format.fingerprint}-*.safetensors"))) <= 1 + kills


@pytest.mark.parametrize("seed", range(12))
async def test_nothing_that_is_erased_meanwhile_comes_back(place, old, new, seed):
    chance = random.Random(seed)
    slots = [*range(40), *range(HOUR_SLOTS, HOUR_SLOTS + 40)]
    video = await place.video(old, slots)
    for hour in (0, 1):
        if chance.random() < 0.5:
            assert await place.keyframes.pack(video.id, hour)
    job = await place.ask(new, video.id)
    recomputer = place.recomputer(new, keep_every_s=chance.choice([0.0, 0.05, 60.0]))
    doomed: set[int] = set()

    async def erase() -> None:
        for _ in range(chance.randint(1, 6)):
            await asyncio.sleep(chance.uniform(0.0, 0.06))
            start = chance.choice(slots)
            end = start + chance.randint(1, 12)
            await place.memory.erase(video.id, start, end)
            doomed.update(range(start, end))

    async def tidy() -> None:
        while True:
            for hour in (0, 1):
                await place.timeline(chance.choice([old, new])).seal(video.id, hour)
                await place.keyframes.pack(video.id, hour)
            await asyncio.sleep(chance.uniform(0.0, 0.05))

    tidying = asyncio.create_task(tidy())
    await asyncio.gather(work(recomputer), erase())
    tidying.cancel()
    await asyncio.gather(tidying, return_exceptions=True)
    await work(recomputer)
    left = [slot for slot in slots if slot not in doomed]
    assert await place.slots(new, video.id) == left
    assert await place.timeline(new).count(video.id) == len(left)
    assert await place.slots(old, video.id) == left
    done = await place.jobs.get(job.id)
    assert (done.status, done.total.done) == ("done", done.total.slots)


async def test_live_frames_have_the_device_first(place, new):
    """Work that can wait begins when nothing else wants the device, and holds up what comes for one pass at most."""
    writer = place.writer(new)
    order: list[str] = []
    begun, all_wait = threading.Event(), threading.Event()
    look = writer._encode

    def noted(name: str):
        def encode(keyframes: Sequence[bytes]) -> Encoded:
            order.append(name)
            begun.set()
            assert all_wait.wait(60)
            return look(keyframes[:1])

        return encode

    async def live() -> None:
        await writer._device.run(noted("live"), [b""])

    writer._encode = noted("background")
    background = asyncio.create_task(writer.encode([b""] * 4 * PASS))
    assert await asyncio.to_thread(begun.wait, 60)
    lives = [asyncio.create_task(live()) for _ in range(3)]
    await asyncio.sleep(0)  # each of them waits for the device now
    all_wait.set()
    await asyncio.gather(background, *lives)
    assert order == ["background", *["live"] * 3, *["background"] * 3]


async def test_work_that_nobody_waits_for_any_more_has_the_device_until_it_ends():
    """A thread cannot be stopped: a second one beside it would have half of a device that is whole for each."""
    device, begun, may_end, ended = Device(), threading.Event(), threading.Event(), []

    def work() -> None:
        begun.set()
        assert may_end.wait(60)
        ended.append("the first")

    left_alone = asyncio.create_task(device.run(work))
    assert await asyncio.to_thread(begun.wait, 60)
    second = asyncio.create_task(device.run(lambda: ended.append("the second")))
    for _ in range(2):  # by the client, and by the replica that ends
        left_alone.cancel()
        await asyncio.sleep(0.05)
    assert ended == []
    may_end.set()
    await second
    assert ended == ["the first", "the second"]
    assert left_alone.cancelled()


async def test_a_plan_that_was_cut_short_is_made_anew(place, new):
    job = await place.ask(new, "str_a")
    assert await place.jobs.plan(job.id, {HourLeft("str_a", 1, 5): 0.0, HourLeft("str_a", 2, 5): 0.0})
    await place.jobs.update(job.id, facts(status="queued"))
    assert await place.jobs.plan(job.id, {HourLeft("str_a", 1, 7): 5.0})
    assert (await place.jobs.get(job.id)).total.slots == 7
    assert await place.jobs.due(job.id, 4.0) is None
    assert await place.jobs.due(job.id, 5.0) == HourLeft("str_a", 1, 7)
    await place.jobs.cancel(job.id)
    assert not await place.jobs.plan(job.id, {HourLeft("str_a", 1, 7): 5.0})
    assert await place.jobs.next_at(job.id) is None


async def test_of_two_that_do_the_same_hour_one_counts(place, new):
    job = await place.ask(new, "str_a")
    hour, half = HourLeft("str_a", 1, 8), HourLeft("str_a", 1, 4)
    await place.jobs.plan(job.id, {hour: 7.0})
    first = await place.jobs.update(job.id, lambda job: job.advanced(hour, half), hour=hour, after=half)
    assert first is not None
    assert await place.jobs.update(job.id, lambda job: job.advanced(hour, None), hour=hour) is None
    assert (await place.jobs.get(job.id)).total.done == 4
    assert await place.jobs.next_at(job.id) == 7.0  # its place in the order stays
    await place.jobs.update(job.id, facts(), hour=half, after=half, at=9.0)
    assert await place.jobs.next_at(job.id) == 9.0


async def test_only_the_last_of_those_that_ended_are_remembered(place):
    ids = []
    for _ in range(KEPT_ENDED + 5):
        job = await place.jobs.create("new", "0" * 16, [])
        ids.append(job.id)
        await place.jobs.update(job.id, ended("done"))
    waiting = await place.jobs.create("new", "0" * 16, [])
    known = [job.id for job in await place.jobs.everything()]
    assert known == [waiting.id, *reversed(ids[-KEPT_ENDED + 1 :])]
    assert [job.id for job in await place.jobs.active("0" * 16)] == [waiting.id]
