"""Erasing a time of a source: a receipt, a reason in every later answer, and not one byte left."""

import asyncio
import logging
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from redis.exceptions import NoPermissionError

from qa_service.clock import write_stream_time
from store.erasures import Erasures
from store.format import HOUR_SLOTS
from store.hot import Entry
from store.keyframes import Keyframes
from store.leases import Leases
from store.timeline import Timeline
from tests.ingest_parts import until
from tests.qa_parts import Parts, open_parts
from tests.test_api_streams import code


@pytest.fixture
async def parts(redis, checkpoint, tmp_path):
    async with open_parts(redis, checkpoint, tmp_path) as parts:
        yield parts


@pytest.fixture
async def client(parts):
    async with parts.client() as client:
        yield client


async def test_a_receipt_counts_what_was_erased_and_where(parts, client):
    stream, base = await parts.stream(range(20))
    times = {"start": write_stream_time(base + 5), "end": write_stream_time(base + 9)}
    receipt = (await client.delete(f"/v1/sources/{stream.id}/memory", params=times)).json()
    assert receipt["erased"] == {"redis_frames": 4, "sealed_frames": 0, "keyframes": 4}
    assert (receipt["source_id"], receipt["start"], receipt["end"]) == (stream.id, times["start"], times["end"])
    timeline = (await client.get(f"/v1/sources/{stream.id}/timeline")).json()
    assert timeline["gaps"] == [{**times, "reason": "erased"}]
    missing = await client.get(f"/v1/sources/{stream.id}/frames/{write_stream_time(base + 6)}")
    assert code(missing) == (404, "frame_not_kept")
    again = (await client.delete(f"/v1/sources/{stream.id}/memory", params=times)).json()
    assert again["erased"] == {"redis_frames": 0, "sealed_frames": 0, "keyframes": 0}
    assert again["id"] != receipt["id"]


async def test_without_times_all_memory_goes_and_the_source_stays(parts, client):
    video = await parts.video(range(30), duration_s=30)
    assert await parts.timeline.seal(video.id, 0)
    receipt = (await client.delete(f"/v1/sources/{video.id}/memory")).json()
    assert receipt["erased"] == {"redis_frames": 0, "sealed_frames": 30, "keyframes": 30}
    assert (receipt["start"], receipt["end"]) == (None, None)
    assert (await client.get(f"/v1/videos/{video.id}")).json()["status"] == "ready"
    asked = await client.post("/v1/questions", json={"question": "What is there?", "sources": [{"video_id": video.id}]})
    assert code(asked) == (422, "empty_range")


async def test_no_byte_of_what_was_erased_is_left_in_any_store(parts: Parts, client, redis_url):
    video = await parts.video([*range(40), *range(HOUR_SLOTS, HOUR_SLOTS + 40)], duration_s=HOUR_SLOTS + 40)
    assert await parts.timeline.seal(video.id, 0)
    doomed, kept = np.arange(10, 20), np.arange(20, 30)
    doomed_hot, kept_hot = doomed + HOUR_SLOTS, kept + HOUR_SLOTS
    gone = await bytes_of(parts, video.id, [*doomed, *doomed_hot])
    left = await bytes_of(parts, video.id, [*kept, *kept_hot])
    assert len(gone) == len(left) == 40  # no two of them are alike
    await parts.redis.config_set("rdbcompression", "no")  # or the bytes would not be found in the log
    folders = [Path(redis_url.removeprefix("unix://")).parent, parts.uploads.parent]
    assert all(one in everything_on_disk(folders) for one in left)
    for start in (10, HOUR_SLOTS + 10):
        receipt = (
            await client.delete(f"/v1/sources/{video.id}/memory", params={"start": start, "end": start + 10})
        ).json()
        assert receipt["redis_log_rewritten"] is True
        await log_rewritten(parts)
    stored = everything_on_disk(folders)
    assert not [one for one in gone if one in stored]
    assert all(one in stored for one in left)


@pytest.mark.parametrize("why", ["no append-only file", "no right to"])
async def test_a_receipt_does_not_claim_that_a_log_is_rewritten_which_is_not(parts: Parts, client, monkeypatch, why):
    async def refuse() -> None:
        raise NoPermissionError("this user has no permissions to run the 'bgrewriteaof' command")

    video = await parts.video(range(3), duration_s=3)
    if why == "no right to":
        monkeypatch.setattr(parts.redis, "bgrewriteaof", refuse)
    else:
        await parts.redis.config_set("appendonly", "no")
    try:
        receipt = (await client.delete(f"/v1/sources/{video.id}/memory")).json()
    finally:
        await parts.redis.config_set("appendonly", "yes")
    assert receipt["redis_log_rewritten"] is False
    assert receipt["erased"]["redis_frames"] == 3


async def log_rewritten(parts: Parts) -> None:
    for _ in range(200):
        if not (await parts.redis.info("persistence"))["aof_rewrite_in_progress"]:
            return
        await asyncio.sleep(0.05)
    raise AssertionError("the log is not rewritten in time")


async def bytes_of(parts: Parts, source_id: str, slots: list[int]) -> set[bytes]:
    """Everything that is kept of frames: tokens and pictures, each a marker that is found nowhere else."""
    tokens = await parts.timeline.read(source_id, np.array(slots))
    return {row.tobytes() for row in tokens} | set(await parts.keyframes.get_many(source_id, slots))


def everything_on_disk(folders: list[Path]) -> bytes:
    return b"".join(path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file())


async def test_answers_hold_nothing_of_what_was_erased(parts: Parts, client):
    stream, base = await parts.stream(range(20))
    asked = {"question": "What is there?", "sources": [{"stream_id": stream.id}], "max_output_tokens": 1}
    assert (await client.post("/v1/questions", json=asked)).status_code == 200
    assert parts.answerer._prefixes._held
    following = asyncio.create_task(Erasures(parts.redis).follow(parts.answerer.forget, every_s=0.02))
    await asyncio.sleep(0.1)
    await client.delete(f"/v1/sources/{stream.id}/memory", params={"end": write_stream_time(base + 3)})
    await until(lambda: not parts.answerer._prefixes._held)
    following.cancel()


async def test_frames_on_their_way_do_not_come_back(parts: Parts, client):
    stream, _ = await parts.stream(range(3))
    epoch = await parts.writer._leases.acquire(stream.id, "ingest", 60)
    assert epoch is not None
    await client.delete(f"/v1/sources/{stream.id}/memory")
    assert await parts.writer._leases.stale({stream.id: epoch}) == {stream.id}


async def test_up_to_now_is_told_as_erased_for_frames_on_their_way_are_refused(parts: Parts, client):
    stream, base = await parts.stream(range(3))
    await client.delete(f"/v1/sources/{stream.id}/memory", params={"start": write_stream_time(base + 1)})
    [gap] = await parts.sources.gaps(stream.id, base, 1 << 40)
    assert (gap.reason, gap.start_slot) == ("erased", base + 1)
    assert gap.end_slot == pytest.approx(parts.now, abs=2)
    await parts.sources.update_stream(stream.id, enabled=False)
    await client.delete(f"/v1/sources/{stream.id}/memory")
    [gap] = [gap for gap in await parts.sources.gaps(stream.id, 0, 1 << 40) if gap.reason == "erased"]
    assert gap.start_slot == base


async def test_what_only_another_model_saw_is_erased_and_told(parts: Parts, client):
    stream, base = await parts.stream(range(9))
    other = Timeline(parts.redis, parts.timeline.format.model_copy(update={"fingerprint": "f" * 16}), parts.segments)
    seen = await parts.timeline.read(stream.id, np.arange(base, base + 9))
    vectors = await parts.timeline.vectors(stream.id, np.arange(base, base + 9))
    epoch = await Leases(parts.redis).acquire(stream.id, "other", 60)
    assert epoch is not None
    await other.append(stream.id, epoch, [Entry(base + n, 1000 * (base + n), seen[n], vectors[n]) for n in range(9)])
    await parts.timeline.erase(stream.id)
    times = {"start": write_stream_time(base + 2), "end": write_stream_time(base + 5)}
    receipt = (await client.delete(f"/v1/sources/{stream.id}/memory", params=times)).json()
    assert receipt["erased"]["redis_frames"] == 3
    told = (await client.get(f"/v1/sources/{stream.id}/timeline", params={**times, "resolution_s": 60})).json()
    assert told["gaps"] == [{**times, "reason": "erased"}]


async def test_an_erasure_for_whose_receipt_nobody_waits_is_finished(parts: Parts, client, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    video = await parts.video(range(30), duration_s=30)
    erase, begun, may_go_on = Keyframes.erase, asyncio.Event(), asyncio.Event()

    async def slow(self: Keyframes, *about: object) -> int:
        begun.set()
        await may_go_on.wait()
        return await erase(self, *about)

    monkeypatch.setattr(Keyframes, "erase", slow)
    erasing = asyncio.create_task(client.delete(f"/v1/sources/{video.id}/memory"))
    await begun.wait()
    for _ in range(3):
        erasing.cancel()
        await asyncio.sleep(0.01)
    may_go_on.set()
    with suppress(asyncio.CancelledError):
        await erasing
    assert await parts.keyframes.hours(video.id) == []
    assert '"keyframes":30' in caplog.text  # the receipt, for whoever reads the log


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"start": "yesterday"}, (422, "bad_time_range")),
        ({"start": "12", "end": "12"}, (422, "bad_time_range")),
        ({"start": "12", "end": "3"}, (422, "bad_time_range")),
        ({"start": "-1"}, (422, "bad_time_range")),
    ],
)
async def test_a_time_that_is_none_erases_nothing(parts, client, params, told):
    video = await parts.video(range(20), duration_s=20)
    assert code(await client.delete(f"/v1/sources/{video.id}/memory", params=params)) == told
    assert await parts.timeline.count(video.id) == 20


async def test_a_video_that_is_still_read_is_not_erased(parts, client):
    video = await parts.video(range(20), duration_s=90, status="processing")
    assert code(await client.delete(f"/v1/sources/{video.id}/memory")) == (409, "state_conflict")
    assert await parts.timeline.count(video.id) == 20


async def test_an_unknown_source_is_named(client):
    assert code(await client.delete("/v1/sources/str_nobody/memory")) == (404, "stream_not_found")
    assert code(await client.delete("/v1/sources/vid_nobody/memory")) == (404, "video_not_found")
