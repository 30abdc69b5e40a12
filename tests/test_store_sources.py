"""The registry of streams and videos on a real server."""

import asyncio
import itertools
import time

import numpy as np
import pytest
from cryptography.fernet import Fernet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

from store.cipher import Cipher, WrongKey
from store.connection import StoreRedis, connect
from store.counters import Counters
from store.gaps import PRECEDENCE, Gap, Gaps
from store.idempotency import Idempotency, IdempotencyConflict
from store.leases import Leases
from store.pages import BadCursor
from store.source import (
    NewStream,
    NewVideo,
    SourceNotFound,
    StateConflict,
    Stream,
    StreamExists,
    StreamNotFound,
    StreamStatus,
    VideoNotFound,
    VideoStatus,
)
from store.sources import Sources

PASSWORD = "hunter2 is secret"
DOOR = NewStream(name="door", url="rtsp://cam/door", username="admin", password=SecretStr(PASSWORD))


def new_cipher() -> Cipher:
    return Cipher(SecretStr(Fernet.generate_key().decode()))


@pytest.fixture
def sources(redis: StoreRedis) -> Sources:
    return Sources(redis, new_cipher())


@pytest.fixture
def leases(redis: StoreRedis) -> Leases:
    return Leases(redis)


async def test_a_registered_stream_is_found_and_claimable(sources):
    stream = await sources.create_stream(DOOR)
    assert stream.id.startswith("str_")
    assert await sources.get_stream(stream.id) == stream
    assert await sources.source(stream.id) == stream
    assert await sources.claimable() == [stream]
    status = await sources.status(stream.id)
    assert (status.state, status.since) == ("connecting", stream.created_at)


async def test_a_password_is_kept_encrypted_and_shown_nowhere(sources, redis):
    stream = await sources.create_stream(DOOR)
    assert stream.has_password
    assert await sources.password(stream.id) == PASSWORD
    assert "hunter2" not in repr(stream) + stream.model_dump_json() + repr(DOOR) + str(await sources.everything())
    for key in await redis.keys("*"):
        raw = await redis.dump(key)
        assert b"hunter2" not in raw
    await sources.update_stream(stream.id, password=None)
    assert await sources.password(stream.id) is None
    assert not (await sources.get_stream(stream.id)).has_password


async def test_a_password_never_stands_in_a_validation_error():
    with pytest.raises(ValidationError) as caught:
        NewStream.model_validate({"name": "", "url": "rtsp://x", "password": PASSWORD, "transport": PASSWORD})
    assert "hunter2" not in str(caught.value)


async def test_another_key_cannot_read_the_password(sources, redis):
    stream = await sources.create_stream(DOOR)
    with pytest.raises(WrongKey, match="TOKENLINE_STORE__SECRET_KEY"):
        await Sources(redis, new_cipher()).password(stream.id)


async def test_names_and_urls_are_unique(sources):
    stream = await sources.create_stream(DOOR)
    with pytest.raises(StreamExists) as caught:
        await sources.create_stream(DOOR.model_copy(update={"url": "rtsp://cam/other"}))
    assert (caught.value.existing_id, caught.value.field) == (stream.id, "name")
    with pytest.raises(StreamExists) as caught:
        await sources.create_stream(DOOR.model_copy(update={"name": "other"}))
    assert (caught.value.existing_id, caught.value.field) == (stream.id, "url")
    other = await sources.create_stream(NewStream(name="yard", url="rtsp://cam/yard"))
    with pytest.raises(StreamExists):
        await sources.update_stream(other.id, name="door")
    assert (await sources.get_stream(other.id)).name == "yard"
    await sources.update_stream(stream.id, name="gate")
    await sources.update_stream(other.id, name="door")


async def test_of_racing_registrations_one_wins(sources):
    outcomes = await asyncio.gather(*(sources.create_stream(DOOR) for _ in range(20)), return_exceptions=True)
    [stream] = [outcome for outcome in outcomes if isinstance(outcome, Stream)]
    assert all(outcome.existing_id == stream.id for outcome in outcomes if isinstance(outcome, StreamExists))
    assert len((await sources.list_streams()).items) == 1


async def test_racing_changes_all_arrive(sources):
    stream = await sources.create_stream(DOOR)
    await asyncio.gather(
        sources.update_stream(stream.id, name="gate"),
        sources.update_stream(stream.id, labels={"floor": "2"}),
        sources.update_stream(stream.id, retention_hours=1.5),
    )
    changed = await sources.get_stream(stream.id)
    assert (changed.name, changed.labels, changed.retention_hours) == ("gate", {"floor": "2"}, 1.5)


@pytest.mark.parametrize(
    ("change", "revokes"),
    [
        ({"url": "rtsp://cam/new"}, True),
        ({"username": "root"}, True),
        ({"password": "new"}, True),
        ({"transport": "udp"}, True),
        ({"fps": 2.0}, True),
        ({"enabled": False}, True),
        ({"name": "gate"}, False),
        ({"labels": {"a": "b"}}, False),
        ({"retention_hours": 2.0}, False),
    ],
)
async def test_the_owner_loses_the_stream_only_when_recording_changes(sources, leases, change, revokes):
    stream = await sources.create_stream(DOOR)
    epoch = await leases.acquire(stream.id, "worker", 60)
    await sources.update_stream(stream.id, **change)
    lost = await leases.renew("worker", {stream.id: epoch}, 60)
    assert lost == ({stream.id} if revokes else frozenset())


@pytest.mark.parametrize(
    "change", [{"fps": 0}, {"fps": float("nan")}, {"transport": "carrier pigeon"}, {"name": ""}, {"colour": "red"}]
)
async def test_impossible_changes_are_refused(sources, change):
    stream = await sources.create_stream(DOOR)
    with pytest.raises(ValueError, match="validation error"):
        await sources.update_stream(stream.id, **change)
    assert await sources.get_stream(stream.id) == stream


async def test_the_grid_of_kept_frames_cannot_change(sources, redis):
    stream = await sources.create_stream(DOOR)
    await redis.hset(f"tl:{{{stream.id}}}:formats", "f" * 16, "{}")
    with pytest.raises(StateConflict, match="fps"):
        await sources.update_stream(stream.id, fps=2.0)
    assert (await sources.update_stream(stream.id, fps=1.0, name="gate")).name == "gate"


async def test_a_disabled_stream_is_kept_but_not_recorded(sources):
    stream = await sources.create_stream(DOOR)
    before = time.time()
    disabled = await sources.update_stream(stream.id, enabled=False)
    status = await sources.status(stream.id)
    assert status.state == "disabled"
    assert status.since >= before
    assert await sources.claimable() == []
    assert await sources.get_stream(stream.id) == disabled
    await sources.update_stream(stream.id, enabled=True)
    assert (await sources.status(stream.id)).state == "connecting"


async def test_nobody_expected_frames_while_a_stream_was_disabled(sources):
    stream = await sources.create_stream(DOOR.model_copy(update={"fps": 30.0}))
    await sources.update_stream(stream.id, enabled=False)
    since = (await sources.status(stream.id)).since
    await sources.update_stream(stream.id, username="other")
    assert (await sources.status(stream.id)).since == since
    await asyncio.sleep(1 / 30)  # a pause as long as a slot
    await sources.update_stream(stream.id, enabled=True)
    [gap] = await sources.gaps(stream.id, int(since * 30), int(since * 30) + 300)
    assert (gap.start_slot, gap.reason) == (int(since * 30), "not_registered")


async def test_only_the_owner_reports(sources, leases):
    stream = await sources.create_stream(DOOR)
    epoch = await leases.acquire(stream.id, "worker", 60)
    online = StreamStatus(state="online", since=5.0, last_frame_at=6.0, frames_1h=3)
    assert await sources.set_status(stream.id, epoch, online)
    assert await sources.status(stream.id) == online
    assert not await sources.set_status(stream.id, epoch - 1, StreamStatus(state="auth_failed", since=9.0))
    assert await sources.status(stream.id) == online
    assert not await sources.set_status("str_unknown", 1, online)


async def test_a_stream_whose_worker_died_is_not_called_online(sources, leases):
    stream = await sources.create_stream(DOOR)
    epoch = await leases.acquire(stream.id, "worker", 60)
    await sources.set_status(stream.id, epoch, StreamStatus(state="online", since=5.0))
    await leases.release("worker", {stream.id: epoch})
    status = await sources.status(stream.id)
    assert status.state == "reconnecting"
    assert "worker" in status.reason


async def test_a_deleted_stream_is_unlisted_but_answers_for_its_memory(sources, leases):
    stream = await sources.create_stream(DOOR)
    epoch = await leases.acquire(stream.id, "worker", 60)
    await sources.delete_stream(stream.id)
    assert (await sources.list_streams()).items == ()
    assert await sources.claimable() == []
    assert (await sources.source(stream.id)).deleted
    assert await leases.renew("worker", {stream.id: epoch}, 60) == {stream.id}
    for gone in (sources.get_stream, sources.password, sources.update_stream, sources.delete_stream):
        with pytest.raises(StreamNotFound, match=stream.id):
            await gone(stream.id)
    again = await sources.create_stream(DOOR)  # its name and url are free
    assert again.id != stream.id


async def test_a_purged_stream_is_gone_at_once_and_left_to_the_janitor(sources):
    stream = await sources.create_stream(DOOR)
    await sources.delete_stream(stream.id, purge=True)
    for find in (sources.source, sources.status, sources.get_stream):
        with pytest.raises(SourceNotFound):
            await find(stream.id)
    [kept] = await sources.everything()
    assert kept.purge
    assert kept.source.id == stream.id
    await sources.forget(stream.id)
    assert await sources.everything() == []


async def test_lists_are_paged_in_order_of_creation(sources):
    streams = [await sources.create_stream(NewStream(name=f"s{n}", url=f"rtsp://cam/{n}")) for n in range(25)]
    found = []
    cursor = None
    while True:
        page = await sources.list_streams(cursor=cursor, limit=10)
        found.append(page.items)
        cursor = page.next_cursor
        if cursor is None:
            break
        if len(found) == 1:  # a stream that goes does not shift the next page
            await sources.delete_stream(streams[3].id)
    assert [len(items) for items in found] == [10, 10, 5]
    assert [stream for items in found for stream in items] == streams


async def test_a_full_last_page_has_no_cursor(sources):
    for n in range(3):
        await sources.create_stream(NewStream(name=f"s{n}", url=f"rtsp://cam/{n}"))
    page = await sources.list_streams(limit=3)
    assert (len(page.items), page.next_cursor) == (3, None)
    assert len((await sources.list_streams(limit=0)).items) == 1


@pytest.mark.parametrize("cursor", ["", "x", "!!!", "YWZ0ZXI6", "YWZ0ZXI6LTE", "é", "A" * 10_000])
async def test_a_made_up_cursor_is_refused(sources, cursor):
    with pytest.raises(BadCursor):
        await sources.list_streams(cursor=cursor)


async def test_lists_are_filtered(sources, leases):
    door = await sources.create_stream(DOOR.model_copy(update={"labels": {"floor": "1"}}))
    yard = await sources.create_stream(NewStream(name="yard", url="rtsp://cam/yard", labels={"floor": "2"}))
    epoch = await leases.acquire(yard.id, "worker", 60)
    await sources.set_status(yard.id, epoch, StreamStatus(state="online", since=1.0))
    assert (await sources.list_streams(state="online")).items == (yard,)
    assert (await sources.list_streams(state="connecting")).items == (door,)
    assert (await sources.list_streams(label="floor=2")).items == (yard,)
    assert (await sources.list_streams(label="floor")).items == (door, yard)
    assert (await sources.list_streams(label="floor=3")).items == ()
    assert (await sources.list_streams(visible=frozenset({door.id}))).items == (door,)
    assert (await sources.list_streams(visible=frozenset())).items == ()


async def test_a_video_goes_from_queued_to_ready(sources, leases):
    video = await sources.create_video(NewVideo(name="clip", file="abc.mp4"))
    assert (video.status, video.progress) == ("queued", 0.0)
    assert await sources.claimable() == [video]
    epoch = await leases.acquire(video.id, "worker", 60)
    assert await sources.set_video_status(video.id, epoch, VideoStatus(status="processing", progress=0.5, eta_s=3))
    assert (await sources.get_video(video.id)).progress == 0.5
    assert len(await sources.claimable()) == 1
    assert not await sources.set_video_status(video.id, epoch - 1, VideoStatus(status="failed"))
    assert await sources.set_video_status(video.id, epoch, VideoStatus(status="ready", progress=1, duration_s=9))
    assert await sources.claimable() == []
    assert (await sources.list_videos(status="ready")).items == (await sources.get_video(video.id),)
    assert (await sources.list_videos(status="failed")).items == ()


async def test_a_deleted_video_is_gone_and_left_to_the_janitor(sources):
    video = await sources.create_video(NewVideo(name="clip", file="abc.mp4"))
    await sources.delete_video(video.id)
    for find in (sources.get_video, sources.source, sources.delete_video):
        with pytest.raises(SourceNotFound, match=video.id):
            await find(video.id)
    assert await sources.claimable() == []
    assert (await sources.list_videos()).items == ()
    [kept] = await sources.everything()
    assert (kept.source.id, kept.purge) == (video.id, True)


@pytest.mark.parametrize("origin", [{}, {"file": "a.mp4", "url": "https://x/a.mp4"}])
async def test_a_video_has_one_origin(sources, origin):
    with pytest.raises(ValueError, match="exactly one"):
        await sources.create_video(NewVideo(name="clip", **origin))


@pytest.mark.parametrize("unknown", ["", "str_x", "vid_x", "nonsense", "str_{a}", "x" * 1000])
async def test_unknown_ids_are_named_errors(sources, unknown):
    with pytest.raises(SourceNotFound):
        await sources.source(unknown)
    with pytest.raises(StreamNotFound):
        await sources.get_stream(unknown)
    with pytest.raises(VideoNotFound):
        await sources.get_video(unknown)
    with pytest.raises(StreamNotFound):
        await sources.status(unknown)


# gaps


@pytest.mark.parametrize("seed", range(8))
async def test_where_reasons_of_gaps_overlap_the_first_in_precedence_speaks_for_every_slot(redis, seed):
    chance = np.random.default_rng(seed)
    gaps, told = Gaps(redis), ["shed", "stream_down", "erased"]  # the last one wins
    expected: dict[int, str] = {}
    for reason in told:
        runs = [(int(start), int(start + chance.integers(1, 9))) for start in chance.integers(0, 90, 12)]
        await gaps.add("str_a", None, [Gap(start_slot=low, end_slot=high, reason=reason) for low, high in runs])
        expected |= {slot: reason for low, high in runs for slot in range(low, high)}
    found = await gaps.read("str_a", 10, 80)
    shown = {slot: gap.reason for gap in found for slot in range(gap.start_slot, gap.end_slot)}
    assert shown == {slot: reason for slot, reason in expected.items() if 10 <= slot < 80}
    assert all(one.end_slot <= other.start_slot for one, other in itertools.pairwise(found))


async def test_gaps_that_touch_become_one(sources, leases):
    video = await sources.create_video(NewVideo(name="clip", file="abc.mp4"))
    epoch = await leases.acquire(video.id, "worker", 60)
    for start in range(100, 200, 10):
        assert await sources.add_gaps(
            video.id, epoch, [Gap(start_slot=start, end_slot=start + 10, reason="stream_down")]
        )
    assert await sources.gaps(video.id, 0, 1000) == [Gap(start_slot=100, end_slot=200, reason="stream_down")]
    assert await sources.gaps(video.id, 150, 160) == [Gap(start_slot=150, end_slot=160, reason="stream_down")]
    assert await sources.gaps(video.id, 200, 1000) == []
    assert await sources.gaps(video.id, 160, 150) == []


async def test_a_stale_owner_records_no_gap(sources, leases):
    video = await sources.create_video(NewVideo(name="clip", file="abc.mp4"))
    epoch = await leases.acquire(video.id, "worker", 60)
    assert not await sources.add_gaps(video.id, epoch - 1, [Gap(start_slot=1, end_slot=2, reason="shed")])
    assert await sources.add_gaps(video.id, None, [Gap(start_slot=4, end_slot=5, reason="erased")])
    assert await sources.gaps(video.id, 0, 10) == [Gap(start_slot=4, end_slot=5, reason="erased")]


async def test_time_before_registration_is_not_registered(sources):
    stream = await sources.create_stream(DOOR)
    created = int(stream.created_at)
    assert await sources.gaps(stream.id, created - 50, created + 50) == [
        Gap(start_slot=created - 50, end_slot=created, reason="not_registered")
    ]
    with pytest.raises(SourceNotFound):
        await sources.gaps("str_unknown", 0, 1)


async def test_what_expires_is_one_gap_and_takes_older_records_but_those_of_erasures_along(sources):
    video = await sources.create_video(NewVideo(name="clip", file="abc.mp4"))
    gaps = [Gap(start_slot=start, end_slot=start + 5, reason="shed") for start in (0, 10, 20)]
    await sources.add_gaps(video.id, None, gaps)
    await sources.add_gaps(video.id, None, [Gap(start_slot=6, end_slot=8, reason="erased")])
    for before in (3, 12, 9):
        await sources.note_expired(video.id, 0, before)
    found = [(gap.start_slot, gap.end_slot, gap.reason) for gap in await sources.gaps(video.id, 0, 100)]
    expired = [(0, 6, "expired"), (6, 8, "erased"), (8, 12, "expired")]
    assert found == [*expired, (12, 15, "shed"), (20, 25, "shed")]


@pytest.mark.parametrize("bad", [(5, 5), (6, 5), (-1, 5)])
def test_a_gap_is_a_run_of_slots(bad):
    with pytest.raises(ValidationError):
        Gap(start_slot=bad[0], end_slot=bad[1], reason="shed")


RUNS = st.tuples(st.integers(0, 60), st.integers(1, 15), st.sampled_from(PRECEDENCE))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(runs=st.lists(RUNS, max_size=12), start=st.integers(0, 70), length=st.integers(0, 70))
def test_gaps_equal_a_reason_for_each_slot(redis_url, runs, start, length):
    async def check() -> None:
        async with connect(redis_url) as redis:
            await redis.flushdb()
            gaps = Gaps(redis)
            reasons: dict[int, str] = {}
            for first, size, reason in runs:
                await gaps.add("vid_a", None, [Gap(start_slot=first, end_slot=first + size, reason=reason)])
                for slot in range(first, first + size):
                    reasons[slot] = min(reason, reasons.get(slot, reason), key=PRECEDENCE.index)
            found = await gaps.read("vid_a", start, start + length)
            assert found == sorted(found, key=lambda gap: gap.start_slot)
            told = [(slot, gap.reason) for gap in found for slot in range(gap.start_slot, gap.end_slot)]
            assert told == [(slot, reasons[slot]) for slot in range(start, start + length) if slot in reasons]
            touching = [a for a, b in itertools.pairwise(found) if a.end_slot == b.start_slot]
            assert all(gap.reason != found[found.index(gap) + 1].reason for gap in touching)

    asyncio.run(check())


# what repeats and what counts


async def test_a_repeated_request_gets_the_first_response(redis):
    requests = Idempotency(redis)
    assert await requests.remember("key_1 POST /v1/streams", "k", "hash") is None
    with pytest.raises(IdempotencyConflict, match="still running"):
        await requests.remember("key_1 POST /v1/streams", "k", "hash")
    await requests.complete("key_1 POST /v1/streams", "k", "hash", '{"id": 1}')
    assert await requests.remember("key_1 POST /v1/streams", "k", "hash") == '{"id": 1}'
    with pytest.raises(IdempotencyConflict, match="another body"):
        await requests.remember("key_1 POST /v1/streams", "k", "other")
    assert await requests.remember("key_2 POST /v1/streams", "k", "other") is None


async def test_a_failed_request_may_be_repeated(redis):
    requests = Idempotency(redis)
    assert await requests.remember("scope", "k", "hash") is None
    await requests.forget("scope", "k")
    assert await requests.remember("scope", "k", "changed") is None


async def test_totals_add_up(redis):
    counters = Counters(redis)
    assert await counters.counters() == {}
    await asyncio.gather(*(counters.bump("frames", 3) for _ in range(10)), counters.bump("questions"))
    assert await counters.counters() == {"frames": 30, "questions": 1}
