"""Keyframes in a local folder and in an object store, by one contract."""

import asyncio
import threading
from collections.abc import Mapping
from uuid import uuid4

import fsspec
import pytest

from store.cipher import Cipher, WrongKey
from store.connection import StoreRedis, StoreUnavailable
from store.files import Files
from store.format import HOUR_SLOTS
from store.hot import FrameNotKept
from store.keyframes import Keyframes
from store.loose import LooseHours

NOON = 1_800_000_000


@pytest.fixture
def keyframes(redis: StoreRedis, segments_root: str) -> Keyframes:
    return Keyframes(redis, segments_root)


async def test_a_keyframe_comes_back_byte_for_byte(keyframes):
    await keyframes.put("str_a", NOON, b"\xff\xd8 jpeg")
    assert await keyframes.get("str_a", NOON) == b"\xff\xd8 jpeg"
    await keyframes.put("str_a", NOON, b"again")
    assert await keyframes.get("str_a", NOON) == b"again"


async def test_many_keyframes_go_and_come_in_the_order_asked(keyframes):
    await keyframes.put_many({("str_a", slot): b"%d" % slot for slot in range(3590, 3610)} | {("str_b", 1): b"b"})
    assert await keyframes.get_many("str_a", [3605, 3590, 3605]) == [b"3605", b"3590", b"3605"]
    assert await keyframes.get_many("str_b", [1]) == [b"b"]
    assert await keyframes.get_many("str_b", []) == []
    await keyframes.put_many({})


async def test_keyframes_of_open_hours_may_lie_in_a_folder_and_packs_in_a_bucket(redis, tmp_path, s3_root):
    bucket = f"{s3_root}/{uuid4().hex}"
    keyframes, files = Keyframes(redis, bucket, str(tmp_path)), Files(bucket)
    slots = [NOON, NOON + 1, NOON + 3600]
    await keyframes.put_many({("str_a", slot): b"%d" % slot for slot in slots})
    assert files.tree(bucket) == []
    assert len(list(tmp_path.rglob("*.jpg"))) == 3
    assert await keyframes.pack("str_a", NOON // 3600)
    [pack] = files.tree(bucket)
    assert pack.startswith(f"str_a/hours/{NOON // 3600}/keyframes-")
    assert [path.name for path in tmp_path.rglob("*.jpg")] == [f"{NOON + 3600}.jpg"]
    assert await keyframes.get_many("str_a", slots) == [b"%d" % slot for slot in slots]
    assert await keyframes.erase("str_a", NOON + 1, NOON + 3601) == 2
    assert await keyframes.find("str_a", slots) == {NOON: b"%d" % NOON}
    assert await keyframes.erase("str_a") == 1
    assert (files.tree(bucket), list(tmp_path.rglob("*"))) == ([], [])


async def test_both_roots_have_to_be_writable(redis, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for roots in (("good", "file/bad"), ("file/bad", "good")):
        with pytest.raises(StoreUnavailable):
            await Keyframes(redis, *(str(tmp_path / root) for root in roots)).check_writable()


async def test_an_absent_keyframe_is_named(keyframes):
    await keyframes.put("str_a", 1, b"x")
    with pytest.raises(FrameNotKept, match="slot 2 of str_a"):
        await keyframes.get_many("str_a", [1, 2])
    with pytest.raises(FrameNotKept):
        await keyframes.get("str_unknown", 1)


@pytest.mark.parametrize("source_id", ["../str_a", "str_a/..", "", ".", "a/b", "str_a\n", "*"])
async def test_an_id_cannot_leave_the_root(keyframes, source_id):
    for attempt in (
        keyframes.put(source_id, 1, b"x"),
        keyframes.get(source_id, 1),
        keyframes.erase(source_id),
    ):
        with pytest.raises(ValueError, match="source id"):
            await attempt


async def test_erasing_takes_the_range_and_nothing_else(keyframes):
    slots = [0, 1, 3599, 3600, 7199, 7200, 7201]
    await keyframes.put_many({("str_a", slot): b"x" for slot in slots} | {("str_b", 1): b"b"})
    assert await keyframes.erase("str_a", 1, 7201) == 5
    assert await keyframes.get_many("str_a", [0, 7201]) == [b"x", b"x"]
    for slot in slots[1:-1]:
        with pytest.raises(FrameNotKept):
            await keyframes.get("str_a", slot)
    assert await keyframes.erase("str_a", 1, 7201) == 0
    assert await keyframes.erase("str_a", None, 5) == 1
    assert await keyframes.erase("str_a") == 1
    assert await keyframes.erase("str_unknown") == 0
    assert await keyframes.get("str_b", 1) == b"b"


async def test_erased_sources_leave_no_folder(redis, tmp_path):
    keyframes = Keyframes(redis, str(tmp_path))
    await keyframes.put_many({("str_a", slot): b"x" for slot in (1, 2, 4000)})
    (tmp_path / "str_a/keyframes/0/.2.jpg.dead.tmp").write_bytes(b"left by a crash")
    assert await keyframes.erase("str_a", 4000, 4001) == 1
    assert [path.name for path in (tmp_path / "str_a/keyframes").iterdir()] == ["0"]
    assert await keyframes.erase("str_a") == 2
    assert list(tmp_path.iterdir()) == []


async def test_writing_leaves_only_whole_files(redis, tmp_path):
    keyframes = Keyframes(redis, str(tmp_path))
    await asyncio.gather(*(keyframes.put("str_a", 7, bytes([mark]) * 100_000) for mark in range(20)))
    jpeg = await keyframes.get("str_a", 7)
    assert jpeg == jpeg[:1] * 100_000
    assert [path.name for path in (tmp_path / "str_a/keyframes/0").iterdir()] == ["7.jpg"]


async def test_writing_and_erasing_at_once_loses_no_later_write(redis, tmp_path):
    keyframes = Keyframes(redis, str(tmp_path))

    async def erase() -> None:
        for _ in range(50):
            await keyframes.erase("str_a", 0, 100)

    async def write() -> None:
        for slot in range(100, 200):
            await keyframes.put("str_a", slot, b"x")

    await asyncio.gather(erase(), write())
    assert await keyframes.get_many("str_a", list(range(100, 200))) == [b"x"] * 100


async def test_an_unusable_root_is_reported_without_its_path(redis, tmp_path):
    (tmp_path / "file").write_text("in the way")
    keyframes = Keyframes(redis, str(tmp_path / "file" / "segments"))
    for writing in (keyframes.check_writable(), keyframes.put("str_a", 1, b"x")):
        with pytest.raises(StoreUnavailable, match="TOKENLINE_STORE__SEGMENTS_URL") as caught:
            await writing
        assert str(tmp_path) not in str(caught.value)


async def test_an_object_store_that_is_away_is_said_to_be(redis, s3_root, monkeypatch):
    nobody = {"endpoint_url": "http://127.0.0.1:1", "config_kwargs": {"retries": {"max_attempts": 0}}}
    monkeypatch.setitem(fsspec.config.conf, "s3", nobody)
    keyframes = Keyframes(redis, "s3://tokenline/away")
    for asked in (keyframes.put("str_a", 1, b"x"), keyframes.get("str_a", 1), keyframes.erase("str_a")):
        with pytest.raises(StoreUnavailable) as raised:
            await asked
        assert "127.0.0.1" not in str(raised.value)


async def test_what_could_not_be_written_does_not_count(redis, tmp_path):
    keyframes, loose = Keyframes(redis, str(tmp_path)), LooseHours(redis)
    await keyframes.put("str_a", 1, b"four")
    (tmp_path / "str_b").write_text("a file where a folder is needed")
    with pytest.raises(StoreUnavailable):
        await keyframes.put_many({("str_a", 2): b"more", ("str_b", 1): b"none"})
    assert {hour: one.nbytes for hour, one in (await loose.read("str_a")).items()} == {0: 4}
    assert await loose.read("str_b") == {}


async def being_written(
    keyframes: Keyframes, slot: int, jpeg: bytes, monkeypatch: pytest.MonkeyPatch
) -> tuple[asyncio.Task[None], threading.Event]:
    """A keyframe that is noted already, and is written when the event is set."""
    write, begun, go_on = Files.write, threading.Event(), threading.Event()

    def write_later(self: Files, files: Mapping[str, bytes]) -> None:
        begun.set()
        assert go_on.wait(20)
        write(self, files)

    with monkeypatch.context() as patch:
        patch.setattr(Files, "write", write_later)
        putting = asyncio.create_task(keyframes.put("str_a", slot, jpeg))
        assert await asyncio.to_thread(begun.wait, 20)
    return putting, go_on


async def packed_when_noted(keyframes: Keyframes, loose: LooseHours, nbytes: int) -> list[int]:
    """Pack the first hour, of which so many bytes are noted, and return the slots that are packed then."""
    assert {hour: one.nbytes for hour, one in (await loose.read("str_a")).items()} == {0: nbytes}
    assert await keyframes.pack("str_a", 0)
    assert await loose.read("str_a") == {}
    [pack] = await keyframes.packed("str_a")
    return pack.slots.tolist()


@pytest.mark.parametrize("act", ["pack", "expire"])
@pytest.mark.parametrize("others", [{}, {2: b"more", 3: b"most"}], ids=["alone", "with others"])
async def test_a_keyframe_that_is_written_while_its_hour_is_packed_or_erased_is_noted_and_packed(
    redis, tmp_path, monkeypatch, act, others
):
    keyframes, loose = Keyframes(redis, str(tmp_path)), LooseHours(redis)
    await keyframes.put_many({("str_a", slot): jpeg for slot, jpeg in others.items()})
    putting, go_on = await being_written(keyframes, 1, b"late", monkeypatch)
    await (keyframes.pack("str_a", 0) if act == "pack" else keyframes.expire("str_a", HOUR_SLOTS))
    assert await loose.read("str_a") == {}
    go_on.set()
    await putting
    assert await packed_when_noted(keyframes, loose, len(b"late")) == [1, *(others if act == "pack" else ())]


@pytest.mark.parametrize("act", ["pack", "expire"])
async def test_a_keyframe_that_comes_before_its_bytes_are_taken_with_others_is_noted_and_packed(
    redis, tmp_path, monkeypatch, act
):
    keyframes, loose = Keyframes(redis, str(tmp_path)), LooseHours(redis)
    await keyframes.put("str_a", 2, b"more")
    putting, go_on = await being_written(keyframes, 1, b"late", monkeypatch)
    take, about_to_take = LooseHours.take, asyncio.Event()

    async def take_late(self: LooseHours, *about: object) -> object:
        about_to_take.set()
        await putting
        return await take(self, *about)

    monkeypatch.setattr(LooseHours, "take", take_late)
    acting = asyncio.create_task(keyframes.pack("str_a", 0) if act == "pack" else keyframes.expire("str_a", HOUR_SLOTS))
    await about_to_take.wait()
    go_on.set()
    await acting
    assert await packed_when_noted(keyframes, loose, len(b"late")) == ([1, 2] if act == "pack" else [1])


async def test_a_usable_root_is_writable_and_left_as_it_was(keyframes, tmp_path):
    await keyframes.check_writable()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_key_is_made_once_and_readable_by_us_alone(tmp_path):
    secret = Cipher.open(None, tmp_path / "data").encrypt("hunter2")
    assert Cipher.open(None, tmp_path / "data").decrypt(secret) == "hunter2"
    [key] = (tmp_path / "data").iterdir()
    assert key.stat().st_mode & 0o777 == 0o600
    with pytest.raises(WrongKey):
        Cipher.open(None, tmp_path / "other").decrypt(secret)


def test_processes_that_start_together_share_one_key(tmp_path):
    async def open_all() -> list[Cipher]:
        return await asyncio.gather(*(asyncio.to_thread(Cipher.open, None, tmp_path) for _ in range(16)))

    ciphers = asyncio.run(open_all())
    secret = ciphers[0].encrypt("x")
    assert {cipher.decrypt(secret) for cipher in ciphers} == {"x"}


def test_a_secret_that_was_tampered_with_is_refused(tmp_path):
    cipher = Cipher.open(None, tmp_path)
    for broken in (cipher.encrypt("x")[:-8] + "AAAAAAA=", "", "not a token"):
        with pytest.raises(WrongKey):
            cipher.decrypt(broken)


def test_a_key_that_is_none_says_how_to_make_one(tmp_path):
    (tmp_path / "secret.key").write_text("too short")
    with pytest.raises(ValueError, match="generate_key") as caught:
        Cipher.open(None, tmp_path)
    assert "too short" not in str(caught.value)
