"""The desk between ingest and the store, on a real server: who gets which work, and who loses it."""

import asyncio

import pytest
from cryptography.fernet import Fernet
from pydantic import SecretStr

from deploy.desk import StoreDesk
from ingest.assignment import Archive, Camera
from store.cipher import Cipher
from store.connection import StoreRedis, connect
from store.format import TokenFormat
from store.leases import Leases
from store.segments import Segments
from store.source import NewStream, NewVideo
from store.sources import Sources
from store.timeline import Timeline

SEGMENTS = Segments("memory://segments")  # where nothing is sealed

FORMAT = TokenFormat(fingerprint="0123456789abcdef", dtype="float16", tokens_per_frame=1, width=2, vector_width=2)
SECRET = "s3cret"


def new_cipher() -> Cipher:
    return Cipher(SecretStr(Fernet.generate_key().decode()))


def desk_of(redis: StoreRedis, cipher: Cipher) -> StoreDesk:
    return StoreDesk(Sources(redis, cipher), Leases(redis), Timeline(redis, FORMAT, SEGMENTS), lease_s=60)


def door(**changes: object) -> NewStream:
    return NewStream(**({"name": "door", "url": "rtsp://cam/door", "username": "u", "password": SECRET} | changes))


@pytest.fixture
def cipher() -> Cipher:
    return new_cipher()


@pytest.fixture
def sources(redis: StoreRedis, cipher: Cipher) -> Sources:
    return Sources(redis, cipher)


@pytest.fixture
def desk(redis: StoreRedis, cipher: Cipher) -> StoreDesk:
    return desk_of(redis, cipher)


async def test_work_is_given_once_with_all_that_is_needed(sources, desk):
    stream = await sources.create_stream(door())
    video = await sources.create_video(NewVideo(name="clip", file="clip.upload", fps=0.5))
    given = {one.source_id: one for one in await desk.claim("one", 5, 5)}
    assert given[stream.id].media == Camera("rtsp://cam/door", "u", SECRET)
    assert (given[video.id].media, given[video.id].fps) == (Archive(path="clip.upload"), 0.5)
    assert await desk.claim("two", 5, 5) == []
    assert await desk.unowned() == 0


async def test_a_password_that_cannot_be_read_stops_that_stream_alone(redis, sources, cipher, desk, caplog):
    lost = await Sources(redis, new_cipher()).create_stream(door())
    other = await sources.create_stream(door(name="gate", url="rtsp://cam/gate"))
    assert [one.source_id for one in await desk.claim("one", 5, 5)] == [other.id]
    status = await sources.status(lost.id)
    assert status.state == "auth_failed"
    assert status.reason is not None
    assert "TOKENLINE_STORE__SECRET_KEY" in status.reason
    assert caplog.text.count("cannot be read") == 1
    await sources.update_stream(lost.id, password=SECRET)
    assert [one.source_id for one in await desk.claim("one", 5, 5)] == [lost.id]


async def test_an_owner_works_with_the_newest_settings_whenever_they_change(redis_url, sources, cipher):
    stream = await sources.create_stream(door())
    async with connect(redis_url) as other:
        desk = desk_of(other, cipher)
        for number in range(40):
            url = f"rtsp://cam/{number}"
            given, _ = await asyncio.gather(desk.claim("one", 5, 5), sources.update_stream(stream.id, url=url))
            held = {one.source_id: one.epoch for one in given}
            lost = await desk.renew("one", held)
            assert all(one.media.url == url for one in given if one.source_id not in lost)
            await desk.release("one", held)


async def test_a_stream_that_is_disabled_while_it_is_claimed_is_not_kept(redis_url, sources, cipher):
    stream = await sources.create_stream(door())
    async with connect(redis_url) as other:
        desk = desk_of(other, cipher)
        for _ in range(40):
            given, _ = await asyncio.gather(desk.claim("one", 5, 5), sources.update_stream(stream.id, enabled=False))
            held = {one.source_id: one.epoch for one in given}
            assert await desk.renew("one", held) == held.keys()
            await sources.update_stream(stream.id, enabled=True)


async def test_an_owner_loses_what_was_deleted_even_if_nobody_revoked_it(redis, sources, desk):
    stream = await sources.create_stream(door())
    await sources.delete_stream(stream.id)
    epoch = await Leases(redis).acquire(stream.id, "one", 60)  # as if the one who deleted it had died before revoking
    assert await desk.renew("one", {stream.id: epoch}) == {stream.id}
    assert await Leases(redis).stale({stream.id: epoch}) == {stream.id}
