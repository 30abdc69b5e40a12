"""Hours move from Redis into segments, and no reader can tell: one timeline, whatever happens meanwhile."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from store.connection import StoreRedis, StoreUnavailable, connect
from store.files import Files
from store.format import HOUR_SLOTS
from store.hot import Entry, FrameNotKept
from store.hour_files import HourFileDamaged
from store.keyframes import Keyframes
from store.leases import Leases
from store.memory import Memory
from store.segments import Hour, Segments
from store.timeline import Timeline
from tests.test_store_timeline import FORMAT, entry

FIRST = 500_000  # hours since 1970
START = FIRST * HOUR_SLOTS


@pytest.fixture
def segments(segments_root: str) -> Segments:
    return Segments(segments_root)


@pytest.fixture
def timeline(redis: StoreRedis, segments: Segments) -> Timeline:
    return Timeline(redis, FORMAT, segments)


@pytest.fixture
async def epoch(redis: StoreRedis) -> int:
    taken = await Leases(redis).acquire("str_a", "writer", 600)
    assert taken is not None
    return taken


async def remember(timeline: Timeline, epoch: int, slots: Sequence[int], mark: int = 0) -> list[Entry]:
    entries = [entry(slot, mark) for slot in slots]
    await timeline.append("str_a", epoch, entries)
    return entries


def some_slots(hours: int, share: float = 0.1) -> list[int]:
    """Slots by chance, in runs and alone, of some hours."""
    chance = np.random.default_rng(7)
    picked = np.flatnonzero(chance.random(hours * HOUR_SLOTS) < share)
    runs = [np.arange(hour * HOUR_SLOTS + 1000, hour * HOUR_SLOTS + 1300) for hour in range(hours)]
    return (START + np.unique(np.concatenate([picked, *runs]))).tolist()


async def everything(timeline: Timeline, slots: Sequence[int]) -> tuple[bytes, bytes, bytes]:
    wanted = np.array(slots)
    return (
        (await timeline.read("str_a", wanted)).tobytes(),
        (await timeline.times("str_a", wanted)).tobytes(),
        (await timeline.vectors("str_a", wanted)).tobytes(),
    )


async def test_a_sealed_hour_reads_as_it_did_before(timeline, epoch, redis):
    slots = some_slots(3)
    await remember(timeline, epoch, slots)
    looks = [
        slots,
        slots[::-1],
        slots[5:400],
        slots[::37],
        [slot for slot in slots if slot // HOUR_SLOTS == FIRST + 1],
        [slots[9], slots[9], slots[3]],
    ]
    before = [await everything(timeline, look) for look in looks]
    extent, count = await timeline.extent("str_a"), await timeline.count("str_a")
    for hours in ([FIRST + 1], [FIRST, FIRST + 2]):
        for hour in hours:
            assert await timeline.seal("str_a", hour)
        assert [await everything(timeline, look) for look in looks] == before
        assert (await timeline.slots("str_a", START - 9, START + 10**6)).tolist() == slots
        assert (await timeline.slots("str_a", slots[7], slots[-7])).tolist() == slots[7:-7]
        assert await timeline.extent("str_a") == extent
        assert await timeline.count("str_a") == count == len(slots)
    assert [key for key in await redis.keys("tl:*") if b":t:" in key or b":p:" in key] == []
    assert await timeline.hot_hours("str_a") == []


async def test_an_absent_frame_is_named_wherever_its_neighbours_are(timeline, epoch):
    await remember(timeline, epoch, [START + 1, START + 3, START + HOUR_SLOTS])
    await timeline.seal("str_a", FIRST)
    for absent in (START + 2, START + HOUR_SLOTS + 1, START + 9 * HOUR_SLOTS):
        with pytest.raises(FrameNotKept, match=f"slot {absent} of str_a"):
            await timeline.read("str_a", np.array([START + 1, absent, START + HOUR_SLOTS]))


async def test_a_segment_is_a_safetensors_file_that_says_what_it_is(redis, epoch, tmp_path):
    format = FORMAT.model_copy(update={"dtype": "bfloat16"})
    timeline = Timeline(redis, format, Segments(str(tmp_path)))
    entries = [entry(START + slot, format=format) for slot in (1, 2, 50)]
    await timeline.append("str_a", epoch, entries)
    assert await timeline.seal("str_a", FIRST)
    [path] = (tmp_path / "str_a/hours" / str(FIRST)).iterdir()
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["format"])["fingerprint"] == format.fingerprint
        assert file.metadata()["source_id"] == "str_a"
        assert file.get_tensor("slots").tolist() == [1, 2, 50]
        tokens = file.get_tensor("tokens")
    assert str(tokens.dtype) == "torch.bfloat16"
    assert tokens.view(torch.uint16).numpy().tobytes() == b"".join(one.tokens.tobytes() for one in entries)


async def test_readers_never_notice_that_hours_are_sealed_and_sealed_anew(redis_url, redis, segments, epoch):
    hours = 4
    slots = some_slots(hours, 0.05)
    timeline = Timeline(redis, FORMAT, segments)
    entries = {one.slot: one for one in await remember(timeline, epoch, slots)}
    is_over = asyncio.Event()

    async def read(number: int) -> int:
        chance, reads = np.random.default_rng(number), 0
        async with connect(redis_url) as own:
            reader = Timeline(own, FORMAT, segments)
            while not is_over.is_set():
                first, last = np.sort(chance.integers(0, len(slots), 2))
                wanted = slots[first : last + 1 : int(chance.integers(1, 4))]
                assert (await reader.slots("str_a", slots[first], slots[last] + 1)).tolist() == slots[first : last + 1]
                tokens = await reader.read("str_a", np.array(wanted))
                assert tokens.tobytes() == b"".join(entries[slot].tokens.tobytes() for slot in wanted)
                reads += 1
        return reads

    async def seal() -> None:
        for turn in range(4):
            for hour in range(FIRST, FIRST + hours):
                assert await timeline.seal("str_a", hour) or turn > 0
            # The same frames again: hot now, and to be sealed anew.
            await timeline.append("str_a", epoch, [entries[slot] for slot in slots[turn::17]])
        is_over.set()

    *reads, _ = await asyncio.gather(*(read(number) for number in range(12)), seal())
    assert min(reads) > 1
    for hour in range(FIRST, FIRST + hours):
        await timeline.seal("str_a", hour)
        assert len(await segments.files("str_a", hour, FORMAT.fingerprint)) == 1
    assert await timeline.count("str_a") == len(slots)


async def test_a_late_frame_counts_before_the_sealed_one_and_is_sealed_with_it(timeline, epoch, segments):
    await remember(timeline, epoch, [START + 5, START + 6])
    await timeline.seal("str_a", FIRST)
    [late] = await remember(timeline, epoch, [START + 6], mark=1)
    [new] = await remember(timeline, epoch, [START + 900], mark=1)
    wanted = np.array([START + 6, START + 900])
    for _ in range(2):
        assert (await timeline.slots("str_a", START, START + 999)).tolist() == [START + 5, START + 6, START + 900]
        assert (await timeline.read("str_a", wanted)).tobytes() == late.tokens.tobytes() + new.tokens.tobytes()
        assert await timeline.hot_hours("str_a") in ([FIRST], [])
        await timeline.seal("str_a", FIRST)
    assert await timeline.count("str_a") == 3
    assert len(await segments.files("str_a", FIRST, FORMAT.fingerprint)) == 1


async def test_erasing_takes_sealed_frames_and_their_bytes(redis, epoch, tmp_path):
    segments = Segments(str(tmp_path))
    timeline = Timeline(redis, FORMAT, segments)
    slots = some_slots(3)
    entries = await remember(timeline, epoch, slots)
    for hour in (FIRST, FIRST + 1):
        await timeline.seal("str_a", hour)
    low, high = START + 1100, START + 2 * HOUR_SLOTS + 1100
    doomed = [one for one in entries if low <= one.slot < high]
    assert (await timeline.erase("str_a", low, high)).total == len(doomed)
    left = [one for one in entries if not low <= one.slot < high]
    assert (await timeline.slots("str_a", 0, 10**12)).tolist() == [one.slot for one in left]
    assert (await timeline.read("str_a", np.array([one.slot for one in left]))).tobytes() == b"".join(
        one.tokens.tobytes() for one in left
    )
    assert await timeline.count("str_a") == len(left)
    stored = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert all(one.tokens.tobytes() in stored for one in left if one.slot < START + 2 * HOUR_SLOTS)
    assert not any(one.tokens.tobytes() in stored for one in doomed)
    assert (await timeline.erase("str_a")).total == len(left)
    assert await timeline.extent("str_a") is None
    assert list(tmp_path.iterdir()) == []
    assert all([key.endswith(b":disowned") for key in await redis.keys("tl:*")])  # names of files, which fade


class MeddledSegments(Segments):
    """Lets something happen after a segment is written and before it counts."""

    meddle = None

    async def write(self, *about):
        manifest = await super().write(*about)
        if self.meddle is not None:
            meddle, self.meddle = self.meddle, None
            await meddle()
        return manifest


@pytest.mark.parametrize("change", ["a new frame", "the same frame", "an erasure", "another seal"])
async def test_an_hour_that_changes_while_it_is_sealed_stays_as_it_is(redis, epoch, segments_root, change):
    segments = MeddledSegments(segments_root)
    timeline = Timeline(redis, FORMAT, segments)
    await remember(timeline, epoch, [START + 5, START + 6])

    async def meddle() -> None:
        match change:
            case "a new frame":
                await remember(timeline, epoch, [START + 7], mark=1)
            case "the same frame":
                await remember(timeline, epoch, [START + 6], mark=1)
            case "an erasure":
                assert (await timeline.erase("str_a", START + 6, START + 7)).total == 1
            case "another seal":
                assert await Timeline(redis, FORMAT, Segments(segments_root)).seal("str_a", FIRST)

    segments.meddle = meddle
    assert not await timeline.seal("str_a", FIRST)
    now = (await timeline.slots("str_a", START, START + 99)).tolist()
    assert now == {"a new frame": [START + 5, START + 6, START + 7], "an erasure": [START + 5]}.get(
        change, [START + 5, START + 6]
    )
    mark = int(change == "the same frame")
    if change != "an erasure":
        assert (await timeline.read("str_a", np.array([START + 6]))).tobytes() == entry(
            START + 6, mark
        ).tokens.tobytes()
    assert await timeline.count("str_a") == len(now)
    await timeline.seal("str_a", FIRST)
    assert len(await segments.files("str_a", FIRST, FORMAT.fingerprint)) == 1


class LateSegments(Segments):
    """Lets something happen, once, after a segment is written and before it is checked."""

    meddle = None

    def _read_whole(self, *about):
        if self.meddle is not None:
            meddle, self.meddle = self.meddle, None
            meddle()
        return super()._read_whole(*about)


async def test_an_erasure_that_takes_a_new_segment_for_a_leftover_leaves_the_hour_to_be_sealed_later(
    redis_url, redis, epoch, segments_root
):
    segments = LateSegments(segments_root)
    timeline = Timeline(redis, FORMAT, segments)
    await remember(timeline, epoch, [START + slot for slot in range(100)])

    async def erase() -> None:
        async with connect(redis_url) as other:
            await Timeline(other, FORMAT, Segments(segments_root)).erase("str_a", START + 90, START + 100)

    segments.meddle = lambda: asyncio.run(erase())
    assert not await timeline.seal("str_a", FIRST)
    assert (await timeline.slots("str_a", START, START + 100)).tolist() == [START + slot for slot in range(90)]
    assert await timeline.seal("str_a", FIRST)
    assert await timeline.count("str_a") == 90


async def test_an_erasure_that_meets_a_seal_erases_all_the_same(redis, epoch, segments_root):
    segments = MeddledSegments(segments_root)
    timeline = Timeline(redis, FORMAT, segments)
    await remember(timeline, epoch, [START + slot for slot in range(100)])
    await timeline.seal("str_a", FIRST)

    async def meddle() -> None:
        await remember(timeline, epoch, [START + 50], mark=1)

    segments.meddle = meddle
    assert (await timeline.erase("str_a", START + 10, START + 90)).total >= 80
    assert len(await timeline.slots("str_a", START + 10, START + 90)) == 0
    assert await timeline.count("str_a") == 20


async def test_what_a_crash_left_of_a_seal_is_never_read_and_goes_with_the_next_erasure(timeline, epoch, segments):
    await remember(timeline, epoch, [START + slot for slot in range(100)])
    await segments.write("str_a", FORMAT, FIRST, 1, await timeline._hour("str_a", FIRST))  # and then a crash
    assert await timeline.seal("str_a", FIRST)
    assert len(await segments.files("str_a", FIRST, FORMAT.fingerprint)) == 2
    assert (await timeline.erase("str_a", START + 10, START + 20)).total == 10
    assert len(await segments.files("str_a", FIRST, FORMAT.fingerprint)) == 1
    assert len(await timeline.slots("str_a", START, START + 100)) == 90


async def test_a_segment_that_does_not_read_back_leaves_the_hour_in_redis(redis, epoch, tmp_path, monkeypatch):
    timeline = Timeline(redis, FORMAT, Segments(str(tmp_path)))
    entries = await remember(timeline, epoch, [START + slot for slot in range(100)])
    write = Path.replace

    def damage(draft: Path, target: Path) -> Path:
        content = bytearray(draft.read_bytes())
        content[-7] ^= 1
        draft.write_bytes(content)
        return write(draft, target)

    monkeypatch.setattr(Path, "replace", damage)
    with pytest.raises(HourFileDamaged, match="checksum"):
        await timeline.seal("str_a", FIRST)
    monkeypatch.undo()
    tokens = await timeline.read("str_a", np.array([one.slot for one in entries]))
    assert tokens.tobytes() == b"".join(one.tokens.tobytes() for one in entries)
    assert list(tmp_path.rglob("*.safetensors")) == []
    assert await timeline.seal("str_a", FIRST)


async def test_a_segment_that_was_lost_is_named(redis, epoch, tmp_path):
    timeline = Timeline(redis, FORMAT, Segments(str(tmp_path)))
    await remember(timeline, epoch, [START + 5])
    await timeline.seal("str_a", FIRST)
    [path] = tmp_path.rglob("*.safetensors")
    path.unlink()
    with pytest.raises(StoreUnavailable, match=f"{path.name} of str_a is lost"):
        await timeline.read("str_a", np.array([START + 5]))


@pytest.mark.parametrize("harm", ["cut", "empty", "another source", "noise"])
async def test_what_is_no_segment_is_told(redis, epoch, tmp_path, harm):
    segments = Segments(str(tmp_path))
    timeline = Timeline(redis, FORMAT, segments)
    await remember(timeline, epoch, [START + slot for slot in range(100)])
    await timeline.seal("str_a", FIRST)
    [path] = tmp_path.rglob("*.safetensors")
    content = path.read_bytes()
    harmed = {
        "cut": content[:-100],
        "empty": b"",
        "another source": content.replace(b'"str_a"', b'"str_b"'),
        "noise": np.random.default_rng(1).bytes(5000),
    }[harm]
    path.write_bytes(harmed)
    with pytest.raises(HourFileDamaged):
        await segments.check("str_a", FIRST, path.name)


async def test_a_range_read_fetches_only_the_rows_that_were_asked_for(redis, epoch, tmp_path, monkeypatch):
    timeline = Timeline(redis, FORMAT, Segments(str(tmp_path)))
    await remember(timeline, epoch, [START + slot for slot in range(3000)])
    await timeline.seal("str_a", FIRST)
    fetched: list[int] = []
    read_ranges = Files.read_ranges

    def count(self, path, ranges):
        fetched.extend(target.nbytes for _, target in ranges)
        return read_ranges(self, path, ranges)

    monkeypatch.setattr(Files, "read_ranges", count)
    await timeline.read("str_a", np.arange(START + 100, START + 200))
    assert fetched == [100 * FORMAT.token_bytes]


def hour_of(entries: Sequence[Entry]) -> Hour:
    return Hour(
        slots=np.array([one.slot for one in entries], np.int64),
        tokens=np.stack([one.tokens for one in entries]),
        vectors=np.stack([one.vector for one in entries]),
        times=np.array([one.time_ms for one in entries], np.int64),
    )


@pytest.mark.parametrize("sealed", [True, False])
async def test_what_is_restored_stands_beside_what_is_kept_and_never_instead_of_it(timeline, epoch, sealed):
    kept = await remember(timeline, epoch, [START + 5, START + 7])
    if sealed:
        await timeline.seal("str_a", FIRST)
    rows = [entry(START + slot, mark=3) for slot in (1, 5, 6, 3599)]
    assert await timeline.restore("str_a", hour_of(rows), await timeline.as_of("str_a"))
    slots = [START + slot for slot in (1, 5, 6, 7, 3599)]
    assert (await timeline.slots("str_a", START, START + HOUR_SLOTS)).tolist() == slots
    tokens = await timeline.read("str_a", np.array(slots))
    expected = [rows[0], kept[0], rows[2], kept[1], rows[3]]
    assert tokens.tobytes() == b"".join(one.tokens.tobytes() for one in expected)
    assert (await timeline.times("str_a", np.array(slots))).tolist() == [one.time_ms for one in expected]
    assert await timeline.count("str_a") == 5
    assert await timeline.restore("str_a", hour_of(rows), await timeline.as_of("str_a"))
    assert await timeline.count("str_a") == 5


async def test_a_source_without_frames_can_be_restored_whole(timeline):
    rows = [entry(START + slot) for slot in (1, 5)]
    assert await timeline.restore("str_new", hour_of(rows), await timeline.as_of("str_new"))
    assert await timeline.extent("str_new") == (START + 1, START + 5)
    assert await timeline.count("str_new") == 2
    await timeline.erase("str_new")
    assert await timeline.count("str_new") == 0


async def test_nothing_that_was_erased_is_restored(redis, timeline, segments, epoch, tmp_path):
    await remember(timeline, epoch, [START + 5])
    memory = Memory(redis, segments, Keyframes(redis, str(tmp_path)))
    as_of = await timeline.as_of("str_a")
    await memory.erase("str_a", START, START + 5)  # which finds nothing there yet
    rows = hour_of([entry(START + 1)])
    assert not await timeline.restore("str_a", rows, as_of)
    assert (await timeline.slots("str_a", START, START + 10)).tolist() == [START + 5]
    assert await timeline.restore("str_a", rows, await timeline.as_of("str_a"))


@pytest.mark.parametrize(
    "rows",
    [
        hour_of([entry(START + 3), entry(START + 1)]),
        hour_of([entry(START + 3), entry(START + 3)]),
        hour_of([entry(START - 1), entry(START)]),
        replace(hour_of([entry(START)]), times=np.empty(0, np.int64)),
        replace(hour_of([entry(START)]), tokens=np.zeros((1, 9, 9), np.float16)),
        replace(hour_of([entry(START)]), slots=np.array([-1])),
        replace(hour_of([entry(START)]), slots=np.empty(0, np.int64)),
    ],
)
async def test_rows_that_are_no_hour_are_refused(timeline, rows):
    with pytest.raises(ValueError, match=r"hour|format|fit"):
        await timeline.restore("str_a", rows, "")
