"""Keyframes of an hour that is over lie in one file, and nobody can tell: reading, erasing, crashes and races."""

import asyncio
from pathlib import Path

import pytest

from store.connection import StoreRedis, StoreUnavailable, connect
from store.files import Files
from store.format import HOUR_SLOTS
from store.hot import FrameNotKept
from store.hour_files import HourFileDamaged
from store.keyframes import Keyframes
from store.memory import Memory
from store.packs import LABEL, Pack, Packs
from store.segments import Segments

FIRST = 500_000
START = FIRST * HOUR_SLOTS


@pytest.fixture
def keyframes(redis: StoreRedis, segments_root: str) -> Keyframes:
    return Keyframes(redis, segments_root)


def jpeg(slot: int, mark: int = 0) -> bytes:
    return b"\xff\xd8 slot %d, %d" % (slot, mark) + bytes(slot % 97)


async def remember(keyframes: Keyframes, slots: range | list[int], mark: int = 0) -> None:
    await keyframes.put_many({("str_a", slot): jpeg(slot, mark) for slot in slots})


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


async def test_packed_keyframes_come_back_byte_for_byte(keyframes):
    slots = [*range(START, START + 200, 3), *range(START + HOUR_SLOTS, START + HOUR_SLOTS + 50)]
    await remember(keyframes, slots)
    looks = [slots, slots[::-1], slots[5:9], [slots[7], slots[7]], [START + HOUR_SLOTS + 3]]
    assert await keyframes.loose_hours("str_a") == [FIRST, FIRST + 1]
    for hour in (FIRST, FIRST + 1):
        assert await keyframes.pack("str_a", hour)
        assert await keyframes.loose_hours("str_a") == [one for one in (FIRST, FIRST + 1) if one > hour]
        for look in looks:
            assert await keyframes.get_many("str_a", look) == [jpeg(slot) for slot in look]
    assert await keyframes.pack("str_a", FIRST)  # nothing to do
    with pytest.raises(FrameNotKept, match=f"slot {START + 1} of str_a"):
        await keyframes.get_many("str_a", [START, START + 1])


async def test_an_empty_file_that_a_crash_of_the_machine_left_is_no_keyframe(redis, tmp_path):
    keyframes = Keyframes(redis, str(tmp_path))
    await remember(keyframes, [START, START + 1, START + HOUR_SLOTS])
    for slot in (START + 1, START + HOUR_SLOTS):
        next(tmp_path.rglob(f"{slot}.jpg")).write_bytes(b"")
    assert await keyframes.find("str_a", [START, START + 1, START + HOUR_SLOTS]) == {START: jpeg(START)}
    assert (await keyframes.slots("str_a", FIRST)).tolist() == [START]
    for hour in (FIRST, FIRST + 1):
        assert await keyframes.pack("str_a", hour)
    assert await keyframes.find("str_a", [START, START + 1, START + HOUR_SLOTS]) == {START: jpeg(START)}
    assert await keyframes.hours("str_a") == [FIRST]
    assert list(tmp_path.rglob("*.jpg")) == []


async def test_keyframes_far_apart_in_a_pack_are_read_each_for_itself(redis, tmp_path, monkeypatch):
    keyframes = Keyframes(redis, str(tmp_path))
    large = {START + slot: bytes([slot]) * 200_000 for slot in range(6)}
    await keyframes.put_many({("str_a", slot): content for slot, content in large.items()})
    await keyframes.pack("str_a", FIRST)
    fetched: list[int] = []
    read_ranges = Files.read_ranges

    def count(self: Files, path: str, ranges: list[tuple[int, memoryview]]) -> None:
        fetched.extend(target.nbytes for _, target in ranges)
        read_ranges(self, path, ranges)

    monkeypatch.setattr(Files, "read_ranges", count)
    wanted = [START, START + 1, START + 3, START + 5]
    assert await keyframes.get_many("str_a", wanted) == [large[slot] for slot in wanted]
    await keyframes.get_many("str_a", [START, START + 5])
    assert fetched[-3:] == [1_200_000, 200_000, 200_000]


async def test_a_late_keyframe_is_packed_with_the_others(keyframes):
    await remember(keyframes, [START, START + 1])
    await keyframes.pack("str_a", FIRST)
    await remember(keyframes, [START + 2])
    assert await keyframes.get_many("str_a", [START, START + 2]) == [jpeg(START), jpeg(START + 2)]
    assert await keyframes.pack("str_a", FIRST)
    assert await keyframes.get_many("str_a", [START, START + 2]) == [jpeg(START), jpeg(START + 2)]
    assert len(await keyframes._packs.files("str_a", FIRST, LABEL)) == 1
    assert await keyframes.loose_hours("str_a") == []


async def test_erasing_takes_packed_keyframes_and_their_bytes(redis, tmp_path):
    keyframes = Keyframes(redis, str(tmp_path))
    slots = range(START, START + 2 * HOUR_SLOTS, 60)
    await remember(keyframes, slots)
    await keyframes.pack("str_a", FIRST)
    low, high = START + 600, START + HOUR_SLOTS + 600
    doomed, left = [one for one in slots if low <= one < high], [one for one in slots if not low <= one < high]
    assert await keyframes.erase("str_a", low, high) == len(doomed)
    assert await keyframes.get_many("str_a", left) == [jpeg(slot) for slot in left]
    for slot in doomed:
        with pytest.raises(FrameNotKept):
            await keyframes.get("str_a", slot)
    stored = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert not [slot for slot in doomed if jpeg(slot) in stored]
    assert all(jpeg(slot) in stored for slot in left)
    assert await keyframes.erase("str_a", low, high) == 0
    assert await keyframes.erase("str_a") == len(left)
    assert list(tmp_path.iterdir()) == []
    assert set(await redis.keys("kf:*")) <= {b"kf:{str_a}:disowned", b"kf:{str_a}:changes"}  # no pictures, and
    assert all([await redis.ttl(key) > 0 for key in await redis.keys("kf:*")])  # both fade


async def test_an_hour_that_is_packed_while_all_is_erased_does_not_come_back(redis, tmp_path, monkeypatch):
    keyframes = Keyframes(redis, str(tmp_path))
    await remember(keyframes, range(START, START + 100))
    write = Packs.write

    async def erased_first(self, *arguments):
        written = await write(self, *arguments)
        monkeypatch.setattr(Packs, "write", write)
        assert await keyframes.erase("str_a") == 100
        return written

    monkeypatch.setattr(Packs, "write", erased_first)
    assert not await keyframes.pack("str_a", FIRST)
    with pytest.raises(FrameNotKept):
        await keyframes.get("str_a", START)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


async def test_what_expires_is_taken_by_the_hour_where_it_is_packed(keyframes):
    slots = [START, START + 1800, START + HOUR_SLOTS, START + 2 * HOUR_SLOTS]
    await remember(keyframes, slots)
    await keyframes.pack("str_a", FIRST)
    await keyframes.pack("str_a", FIRST + 1)
    assert await keyframes.expire("str_a", START + 1000) == 0
    assert await keyframes.expire("str_a", START + 2 * HOUR_SLOTS - 1) == 2
    assert await keyframes.get_many("str_a", slots[2:]) == [jpeg(slot) for slot in slots[2:]]
    assert await keyframes.expire("str_a", START + 2 * HOUR_SLOTS + 1) == 2


async def test_readers_never_notice_that_hours_are_packed(redis_url, keyframes, segments_root):
    slots = list(range(START, START + 120))
    await remember(keyframes, slots)
    is_over = asyncio.Event()

    async def read() -> int:
        reads = 0
        async with connect(redis_url) as own:
            reader = Keyframes(own, segments_root)
            while not is_over.is_set():
                assert await reader.get_many("str_a", slots[reads % 7 :: 7]) == [
                    jpeg(one) for one in slots[reads % 7 :: 7]
                ]
                reads += 1
        return reads

    async def pack() -> None:
        for turn in range(4):
            assert await keyframes.pack("str_a", FIRST)
            await remember(keyframes, slots[turn::5])
        is_over.set()

    *reads, _ = await asyncio.gather(*(read() for _ in range(6)), pack())
    assert min(reads) > 0


@pytest.mark.parametrize("change", ["an erasure", "another packing"])
async def test_an_hour_that_changes_while_it_is_packed_stays_as_it_is(redis, keyframes, segments_root, change):
    await remember(keyframes, [START, START + 1, START + 2])
    write = keyframes._packs.write

    async def meddle(*about: object) -> Pack:
        keyframes._packs.write = write  # type: ignore[method-assign]
        pack = await write(*about)
        if change == "an erasure":
            assert await Keyframes(redis, segments_root).erase("str_a", START + 1, START + 2) == 1
        else:
            assert await Keyframes(redis, segments_root).pack("str_a", FIRST)
        return pack

    keyframes._packs.write = meddle  # type: ignore[method-assign]
    assert not await keyframes.pack("str_a", FIRST)
    left = [START, START + 2] if change == "an erasure" else [START, START + 1, START + 2]
    assert await keyframes.get_many("str_a", left) == [jpeg(slot) for slot in left]
    if change == "an erasure":
        with pytest.raises(FrameNotKept):
            await keyframes.get("str_a", START + 1)
    assert await keyframes.pack("str_a", FIRST)
    assert await keyframes.get_many("str_a", left) == [jpeg(slot) for slot in left]
    assert len(await keyframes._packs.files("str_a", FIRST, LABEL)) == 1


async def test_what_a_crash_left_of_a_packing_is_never_read_and_goes_with_the_next_erasure(keyframes):
    await remember(keyframes, [START, START + 1])
    await keyframes._packs.write("str_a", FIRST, 9, {START: b"never counted", START + 1: b"nor this"})
    assert await keyframes.get_many("str_a", [START, START + 1]) == [jpeg(START), jpeg(START + 1)]
    assert await keyframes.erase("str_a", START, START + 1) == 1
    assert await keyframes._packs.files("str_a", FIRST, LABEL) == []
    assert await keyframes.get("str_a", START + 1) == jpeg(START + 1)


async def test_a_pack_that_does_not_read_back_leaves_the_keyframes_where_they_are(redis, tmp_path, monkeypatch):
    keyframes = Keyframes(redis, str(tmp_path))
    await remember(keyframes, range(START, START + 20))
    replace = Path.replace

    def damage(draft: Path, target: Path) -> Path:
        content = bytearray(draft.read_bytes())
        content[-7] ^= 1
        draft.write_bytes(content)
        return replace(draft, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", damage)
        with pytest.raises(HourFileDamaged):
            await keyframes.pack("str_a", FIRST)
    assert len(files_of(tmp_path)) == 20
    assert await keyframes.get("str_a", START + 3) == jpeg(START + 3)
    assert await keyframes.pack("str_a", FIRST)
    assert len(files_of(tmp_path)) == 1


@pytest.mark.parametrize("part", ["cut off", "ends", "slots"])
async def test_a_damaged_pack_is_named_with_what_to_do_by_whatever_reads_it(redis, tmp_path, part):
    keyframes = Keyframes(redis, str(tmp_path))
    await remember(keyframes, range(START, START + 20))
    await keyframes.pack("str_a", FIRST)
    [pack] = await keyframes.packed("str_a")
    path, content = next(tmp_path.rglob("*.safetensors")), bytearray(next(tmp_path.rglob("*.safetensors")).read_bytes())
    if part == "cut off":
        del content[pack.offsets["jpegs"] + 5 :]
    else:
        content[pack.offsets[part] + 2] ^= 0x40
    path.write_bytes(content)
    keyframes = Keyframes(redis, str(tmp_path))  # which knows no index yet
    for reading in (
        keyframes.find("str_a", [START + 3]),
        keyframes.get_many("str_a", list(range(START, START + 20))),
        keyframes.erase("str_a", START, START + 5),
    ):
        with pytest.raises(StoreUnavailable, match="restore the file, or erase the hour") as raised:
            await reading
        assert str(tmp_path) not in str(raised.value)
    assert await keyframes.erase("str_a", START, START + HOUR_SLOTS) == 20


async def test_a_part_of_a_pack_that_was_lost_cannot_be_erased_but_all_of_it(redis, tmp_path):
    keyframes = Keyframes(redis, str(tmp_path))
    await remember(keyframes, range(START, START + 20))
    await keyframes.pack("str_a", FIRST)
    next(tmp_path.rglob("*.safetensors")).unlink()
    with pytest.raises(StoreUnavailable, match="is lost: restore it, or erase the hour"):
        await keyframes.erase("str_a", START, START + 5)
    assert await keyframes.erase("str_a", START, START + HOUR_SLOTS) == 20


@pytest.mark.parametrize("begun", ["pack", "restore"])
async def test_what_is_packed_while_all_is_erased_does_not_come_back(redis, segments_root, begun):
    keyframes = Keyframes(redis, segments_root)
    memory = Memory(redis, Segments(segments_root), keyframes)
    await remember(keyframes, [START, START + 1])
    write = keyframes._packs.write

    async def overtaken(*about: object) -> Pack:
        keyframes._packs.write = write
        await keyframes.pack("str_a", FIRST)  # by another one: then the erasure finds a pack
        await memory.erase("str_a")
        return await write(*about)

    keyframes._packs.write = overtaken
    if begun == "pack":
        assert not await keyframes.pack("str_a", FIRST)
    else:
        assert not await keyframes.restore("str_a", FIRST, {START + 9: jpeg(START + 9)}, "")
    assert await keyframes.hours("str_a") == []
    assert await keyframes.find("str_a", [START, START + 1, START + 9]) == {}
    assert Files(segments_root).tree(segments_root) == []


async def test_a_pack_that_was_lost_is_named(redis, tmp_path):
    keyframes = Keyframes(redis, str(tmp_path))
    await remember(keyframes, [START])
    await keyframes.pack("str_a", FIRST)
    [path] = tmp_path.rglob("*.safetensors")
    path.unlink()
    with pytest.raises(StoreUnavailable, match=f"{path.name} of str_a is lost"):
        await keyframes.get("str_a", START)


async def test_what_a_crash_left_half_written_goes_with_the_next_file_of_its_hour_or_with_an_erasure(redis, tmp_path):
    keyframes = Keyframes(redis, str(tmp_path))
    drafts = [
        tmp_path / "str_a" / kind / str(hour) / ".7.0123.tmp" for kind in ("keyframes", "hours") for hour in (0, 1)
    ]
    await keyframes.put_many({("str_a", slot): b"%d" % slot for slot in (7, 8, HOUR_SLOTS, HOUR_SLOTS + 1)})
    for draft in drafts:
        draft.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(b"half of it")
    assert await keyframes.pack("str_a", 0)
    assert [draft.exists() for draft in drafts] == [False, True, False, True]
    assert await keyframes.erase("str_a", HOUR_SLOTS, HOUR_SLOTS + 1) == 1
    assert not any(draft.exists() for draft in drafts)
    assert await keyframes.get_many("str_a", [7, 8, HOUR_SLOTS + 1]) == [b"7", b"8", b"%d" % (HOUR_SLOTS + 1)]
