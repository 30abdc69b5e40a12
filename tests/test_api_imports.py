"""Import over REST: a half of one is seen by nobody, and what no export wrote is refused by name and leaves nothing."""

import asyncio
import hashlib
import io
import json
import shutil
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from qa_service import exports, imports
from qa_service.clock import write_stream_time
from qa_service.coverage import RangeReader
from qa_service.errors import QueueFull
from qa_service.exports import HOURS_OUT, Exports
from qa_service.keys import Caller
from qa_service.settings import ApiKey, ApiSettings
from store.format import HOUR_SLOTS
from store.gaps import Gap
from store.hour_files import serialized
from store.imports import _key
from store.janitor import Janitor
from store.memory import Memory
from store.packs import Packs
from store.portable import read_frames, write_keyframes
from store.segments import Segments
from store.settings import StoreSettings
from tests.qa_parts import Parts, keyframe, open_parts
from tests.test_api_streams import code

SLOTS = range(10, 30)
SECRET = "k3y"
FADING = (b":erased", b":disowned", b":changes")  # keys without a frame that go by themselves


@pytest.fixture
async def parts(redis, checkpoint, tmp_path):
    async with open_parts(redis, checkpoint, tmp_path) as parts:
        yield parts


@pytest.fixture
async def client(parts):
    async with parts.client() as client:
        yield client


@dataclass(frozen=True, slots=True)
class Exported:
    contents: dict[str, Any]
    frames: bytes
    keyframes: bytes


_EXPORTED: list[Exported] = []


@pytest.fixture
async def exported(parts: Parts, client: httpx.AsyncClient, tmp_path: Path) -> Exported:
    """What an export of a video of this service told; of the video itself nothing is left."""
    if not _EXPORTED:
        video = await parts.video(SLOTS, duration_s=30)
        await parts.sources.add_gaps(video.id, None, [Gap(start_slot=0, end_slot=10, reason="decode_error")])
        told = Exported(
            (await client.get(f"/v1/sources/{video.id}/export")).json(),
            (await client.get(f"/v1/sources/{video.id}/export/frames/0")).content,
            (await client.get(f"/v1/sources/{video.id}/export/keyframes/0")).content,
        )
        _EXPORTED.append(told)
        await parts.redis.flushdb()
        shutil.rmtree(tmp_path / "segments")
    return _EXPORTED[0]


def janitor(parts: Parts) -> Janitor:
    memory = Memory(parts.redis, parts.segments, parts.keyframes)
    return Janitor(parts.redis, parts.sources, memory, StoreSettings(data_dir=parts.uploads.parent))


async def begun(client: httpx.AsyncClient, contents: dict[str, Any], **changes: Any) -> str:
    response = await client.post("/v1/imports", json=contents | changes)
    assert response.status_code == 201, response.text
    return str(response.json()["id"])


async def put(client: httpx.AsyncClient, source_id: str, part: str, content: bytes, hour: int = 0) -> httpx.Response:
    return await client.put(f"/v1/imports/{source_id}/{part}/{hour}", content=content)


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.suffix in (".import", ".safetensors", ".jpg")]


async def test_an_import_is_seen_by_nobody_before_it_is_completed(parts, client, exported):
    source_id = await begun(client, exported.contents)
    assert (await put(client, source_id, "frames", exported.frames)).json() == {"object": "import.hour", "frames": 20}
    assert (await put(client, source_id, "keyframes", exported.keyframes)).json()["frames"] == 20
    asked = {"question": "what?", "sources": [{"video_id": source_id}]}
    looks = [
        await client.get(f"/v1/videos/{source_id}"),
        await client.delete(f"/v1/videos/{source_id}"),
        await client.get(f"/v1/sources/{source_id}/timeline"),
        await client.get(f"/v1/sources/{source_id}/frames/12"),
        await client.get(f"/v1/sources/{source_id}/export"),
        await client.delete(f"/v1/sources/{source_id}/memory"),
        await client.post("/v1/questions", json=asked),
    ]
    assert {code(look) for look in looks} == {(404, "video_not_found")}
    assert (await client.get("/v1/videos")).json()["data"] == []
    done = await client.post(f"/v1/imports/{source_id}/complete", json={"frames": 20})
    assert done.json() == {"id": source_id, "object": "import", "kind": "video", "frames": 20}
    assert [one["id"] for one in (await client.get("/v1/videos")).json()["data"]] == [source_id]
    assert (await client.get(f"/v1/sources/{source_id}/frames/12")).content == keyframe(12, parts.encoder.input_size_px)
    again = [
        await put(client, source_id, "frames", exported.frames),
        await client.delete(f"/v1/imports/{source_id}"),
    ]
    assert {code(one) for one in again} == {(404, "import_not_found")}
    assert await parts.timeline.count(source_id) == 20


async def test_a_stream_that_is_imported_cannot_be_changed_or_deleted_before_it_is_there(parts, client):
    stream, base = await parts.stream(range(5))
    contents = (await client.get(f"/v1/sources/{stream.id}/export")).json()
    frames = (await client.get(f"/v1/sources/{stream.id}/export/frames/{base // HOUR_SLOTS}")).content
    if base // HOUR_SLOTS != (base + 4) // HOUR_SLOTS:
        pytest.skip("the five seconds lie in two hours")
    assert code(await client.post("/v1/imports", json=contents)) == (409, "stream_exists")
    source_id = await begun(client, contents, name="second")
    assert code(await client.patch(f"/v1/streams/{source_id}", json={"name": "x"})) == (404, "stream_not_found")
    assert code(await client.delete(f"/v1/streams/{source_id}")) == (404, "stream_not_found")
    assert code(await client.get(f"/v1/streams/{source_id}/health")) == (404, "stream_not_found")
    assert [one["id"] for one in (await client.get("/v1/streams")).json()["data"]] == [stream.id]
    assert (await put(client, source_id, "frames", frames, base // HOUR_SLOTS)).status_code == 200
    taken, _ = await parts.stream(name="second")  # the name is free until the import is complete
    done = await client.post(f"/v1/imports/{source_id}/complete", json={"frames": 5})
    assert code(done) == (409, "stream_exists")
    await client.delete(f"/v1/streams/{taken.id}?purge=true")
    assert (await client.post(f"/v1/imports/{source_id}/complete", json={"frames": 5})).status_code == 200
    assert [one["name"] for one in (await client.get("/v1/streams")).json()["data"]] == ["dock", "second"]
    assert (await client.delete(f"/v1/streams/{source_id}?purge=true")).json()["purged_frames"] == 5


async def test_hours_that_are_sent_again_count_once(parts, client, exported):
    source_id = await begun(client, exported.contents)
    for _ in range(2):
        assert (await put(client, source_id, "frames", exported.frames)).status_code == 200
        assert (await put(client, source_id, "keyframes", exported.keyframes)).status_code == 200
    assert (await client.post(f"/v1/imports/{source_id}/complete", json={"frames": 20})).status_code == 200


async def test_who_did_not_hear_that_it_is_completed_asks_again(parts, client, exported):
    source_id = await begun(client, exported.contents)
    await put(client, source_id, "frames", exported.frames)
    done = [await client.post(f"/v1/imports/{source_id}/complete", json={"frames": 20}) for _ in range(2)]
    assert [one.status_code for one in done] == [200, 200]
    assert done[0].json() == done[1].json()
    assert code(await put(client, source_id, "frames", exported.frames)) == (404, "import_not_found")
    assert code(await client.delete(f"/v1/imports/{source_id}")) == (404, "import_not_found")
    await client.delete(f"/v1/videos/{source_id}")
    again = await client.post(f"/v1/imports/{source_id}/complete", json={"frames": 20})
    assert code(again) == (404, "import_not_found")


async def test_hours_that_nobody_reads_are_few(parts):
    video = await parts.video(SLOTS, duration_s=30)
    reader = RangeReader(parts.timeline, parts.keyframes, parts.sources, live_lag_s=5)
    exports = Exports(reader, parts.timeline, parts.keyframes)
    ask = partial(exports.frames, Caller("operator", frozenset({"streams:read"})), video.id, 0, 0, HOUR_SLOTS)
    out = [await ask() for _ in range(HOURS_OUT)]
    with pytest.raises(QueueFull):
        await ask()
    sent = [len(piece) async for piece in out.pop()]
    assert sent == [len(piece) async for piece in await ask()]


@pytest.mark.parametrize(
    ("method", "part", "place", "name"),
    [
        ("GET", "frames", exports, "write_frames"),
        ("GET", "keyframes", Packs, "_read"),
        ("PUT", "frames", imports, "read_frames"),
        ("PUT", "frames", Segments, "_write"),
    ],
)
async def test_who_is_cancelled_gives_up_the_room_of_an_hour_when_its_thread_has_ended(
    parts, client, exported, monkeypatch, method, part, place, name
):
    video = await parts.video(SLOTS, duration_s=30)
    assert await parts.keyframes.pack(video.id, 0)
    path = f"/v1/sources/{video.id}/export/{part}/0"
    if method == "PUT":
        path = f"/v1/imports/{await begun(client, exported.contents)}/{part}/0"
    begins, may_end, at_work, work = threading.Event(), threading.Event(), [], getattr(place, name)

    def held_up(*arguments: Any) -> Any:
        at_work.append(name)
        begins.set()
        assert may_end.wait(60)
        return work(*arguments)

    monkeypatch.setattr(place, name, held_up)
    first, second = (asyncio.create_task(client.request(method, path, content=exported.frames)) for _ in range(2))
    try:
        assert await asyncio.to_thread(begins.wait, 60)
        for _ in range(2):
            first.cancel()
            await asyncio.sleep(0.05)
        assert at_work == [name]
    finally:
        may_end.set()
    assert (await second).status_code == 200
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_an_import_of_which_something_is_missing_is_not_completed(client, exported):
    source_id = await begun(client, exported.contents)
    refused = await client.post(f"/v1/imports/{source_id}/complete", json={"frames": 20})
    assert code(refused) == (409, "state_conflict")
    assert refused.json()["error"]["details"] == {"frames": 0}


async def test_what_came_of_an_import_that_stopped_is_erased(parts, client, exported, tmp_path):
    source_id = await begun(client, exported.contents)
    await put(client, source_id, "frames", exported.frames)
    await put(client, source_id, "keyframes", exported.keyframes)
    sweeper = janitor(parts)
    await sweeper.sweep()
    assert await parts.timeline.count(source_id) == 20  # somebody may still be working at it
    assert len(files(tmp_path)) == 2
    await parts.redis.delete(_key(source_id))  # nobody did, for an hour
    for _ in range(4):
        await sweeper.sweep()
    assert files(tmp_path) == []
    assert await parts.sources.everything() == []
    assert [key async for key in parts.redis.scan_iter(f"*{source_id}*") if not key.endswith(FADING)] == []


async def test_an_import_that_is_given_up_does_not_come_back(parts, client, exported, tmp_path):
    source_id = await begun(client, exported.contents)
    await put(client, source_id, "frames", exported.frames)
    as_of = await parts.timeline.as_of(source_id)
    assert (await client.delete(f"/v1/imports/{source_id}")).json() == {"id": source_id, "deleted": True}
    sweeper = janitor(parts)
    await sweeper.sweep()
    assert await parts.timeline.count(source_id) == 0
    late = read_frames(exported.frames, parts.timeline.format, 0)
    assert not await parts.timeline.restore(source_id, late, as_of)  # a request that was on its way
    assert code(await client.post(f"/v1/imports/{source_id}/complete", json={"frames": 20})) == (
        404,
        "import_not_found",
    )
    for _ in range(2):
        await sweeper.sweep()
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"version": 2}, "version"),
        ({"kind": "camera"}, "kind"),
        ({"name": ""}, "name"),
        ({"name": "a\x1b[2Jb"}, "name"),
        ({"fps": 0}, "fps"),
        ({"fps": 1e9}, "fps"),
        ({"start_slot": -1}, "start_slot"),
        ({"end_slot": 10**15}, "end_slot"),
        ({"end_slot": 10**12}, None),
        ({"end_slot": 0}, None),
        ({"duration_s": 1e9}, None),
        ({"duration_s": None}, None),
        ({"kind": "stream"}, None),
        ({"recorded_at": "yesterday"}, "recorded_at"),
        ({"gaps": [{"start_slot": 0, "end_slot": 10**9, "reason": "erased"}]}, None),
        ({"gaps": [{"start_slot": 3, "end_slot": 2, "reason": "erased"}]}, "gaps[0]"),
        ({"gaps": [{"start_slot": 2, "end_slot": 3, "reason": "<script>"}]}, "gaps[0].reason"),
        ({"format": {"fingerprint": "../../etc/passwd"}}, "format.fingerprint"),
        ({"url": "rtsp://10.0.0.1/"}, "url"),
    ],
)
async def test_a_description_that_no_export_told_is_refused(parts, client, exported, changes, param):
    refused = await client.post("/v1/imports", json=exported.contents | changes)
    assert refused.status_code == 422, refused.text
    assert refused.json()["error"]["param"] == param
    assert await parts.sources.everything() == []


async def test_tokens_of_another_model_or_layout_are_refused(parts, client, exported):
    theirs = exported.contents["format"] | {"fingerprint": "0123456789abcdef"}
    refused = await client.post("/v1/imports", json=exported.contents | {"format": theirs})
    assert code(refused) == (409, "model_mismatch")
    ours = parts.encoder.format.fingerprint
    assert refused.json()["error"]["details"] == {"fingerprint": "0123456789abcdef", "fingerprint_here": ours}
    assert all(one in refused.json()["error"]["message"] for one in ("0123456789abcdef", ours))
    wider = exported.contents["format"] | {"width": 99}
    assert code(await client.post("/v1/imports", json=exported.contents | {"format": wider})) == (409, "model_mismatch")


# Hours that were made to do harm.

Forge = Callable[[Parts], bytes]


def tensors(parts: Parts, slots: list[int]) -> dict[str, tuple[str, Any]]:
    format = parts.encoder.format
    return {
        "tokens": (format.dtype, np.ones((len(slots), *format.token_shape), format.numpy_dtype)),
        "vectors": ("float16", np.eye(len(slots), format.vector_width).astype(np.float16)),
        "times": ("int64", np.array(slots, np.int64) * 1000),
        "slots": ("int32", np.array(slots, np.int32)),
    }


def forged(parts: Parts, slots: list[int] | None = None, hour: int = 0, **changed: Any) -> bytes:
    """Frames with a right checksum, and something else wrong."""
    made = tensors(parts, [10, 11] if slots is None else slots)
    for name, array in changed.items():
        made[name] = (made[name][0], array)
    return serialized(made, {"hour": str(hour), "format": parts.encoder.format.model_dump_json()})[0]


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def changed_byte(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


BAD_FRAMES: dict[str, Forge] = {
    "nothing": lambda parts: b"",
    "a zip": lambda parts: b"PK\x03\x04" + bytes(100),
    "a header of 8 EiB": lambda parts: struct.pack("<Q", 2**63) + b"{}",
    "a header that is a list": lambda parts: with_header(b"[]"),
    "a header nested to death": lambda parts: with_header(b"[" * 60_000),
    "no metadata": lambda parts: with_header(b'{"tokens":1,"vectors":1,"times":1,"slots":1}'),
    "places that are words": lambda parts: with_header(
        b'{"__metadata__":{"checksum":"0"},'
        + b",".join(b'"%s":{"data_offsets":["a","b"]}' % name for name in (b"tokens", b"vectors", b"times", b"slots"))
        + b"}"
    ),
    "a thousand names of the same bytes": lambda parts: with_header(
        json.dumps({f"t{n}": {"dtype": "U8", "shape": [9], "data_offsets": [0, 9]} for n in range(900)}).encode(),
        bytes(9),
    ),
    "cut off": lambda parts: forged(parts)[:-9],
    "another byte": lambda parts: changed_byte(forged(parts)),
    "another hour": lambda parts: forged(parts, hour=1),
    "another model inside": lambda parts: forged(parts).replace(
        parts.encoder.format.fingerprint.encode(), b"0123456789abcdef"
    ),
    "no frame": lambda parts: forged(parts, []),
    "a slot twice": lambda parts: forged(parts, [10, 10]),
    "slots that go back": lambda parts: forged(parts, [11, 10]),
    "a slot before the hour": lambda parts: forged(parts, [-1, 10]),
    "a slot behind the hour": lambda parts: forged(parts, [10, HOUR_SLOTS]),
    "a slot outside of what is imported": lambda parts: forged(parts, [10, 40]),
    "fewer tokens than slots": lambda parts: forged(
        parts, tokens=np.ones((1, *parts.encoder.format.token_shape), "f4")
    ),
    "wider tokens": lambda parts: forged(parts, tokens=np.ones((2, 1, 7), "f4")),
    "tokens that are no numbers": lambda parts: forged(
        parts, tokens=np.full((2, *parts.encoder.format.token_shape), np.nan, "f4")
    ),
    "endless tokens": lambda parts: forged(parts, tokens=np.full((2, *parts.encoder.format.token_shape), np.inf, "f4")),
    "a vector that drowns all others": lambda parts: forged(
        parts, vectors=np.full((2, parts.encoder.format.vector_width), 6e4, np.float16)
    ),
    "a vector that is no number": lambda parts: forged(
        parts, vectors=np.full((2, parts.encoder.format.vector_width), np.nan, np.float16)
    ),
    "a vector of nothing": lambda parts: forged(
        parts, vectors=np.zeros((2, parts.encoder.format.vector_width), np.float16)
    ),
    "a time after all dates": lambda parts: forged(parts, times=np.array([0, 2**62])),
    "a time before all dates": lambda parts: forged(parts, times=np.array([-(2**62), 0])),
}


@pytest.mark.parametrize("what", BAD_FRAMES)
async def test_frames_that_no_export_wrote_are_refused_and_leave_nothing(parts, client, exported, tmp_path, what):
    source_id = await begun(client, exported.contents)
    refused = await put(client, source_id, "frames", BAD_FRAMES[what](parts))
    assert code(refused) == (422, "damaged_export"), refused.text
    assert str(tmp_path) not in refused.text
    assert await parts.timeline.count(source_id) == 0
    assert files(tmp_path) == []
    assert (await put(client, source_id, "frames", forged(parts))).status_code == 200  # only that hour was refused


def picture(side: int, kind: str = "JPEG", mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (side, side)).save(file, kind)
    return file.getvalue()


def bomb(parts: Parts) -> bytes:
    """A small JPEG that says it has 65,535 x 65,535 pixels."""
    whole = picture(parts.encoder.input_size_px)
    at = whole.index(b"\xff\xc0") + 5
    return whole[:at] + b"\xff\xff\xff\xff" + whole[at + 4 :]


def repeated_scan(parts: Parts) -> bytes:
    """A progressive JPEG whose last scan is said a hundred times more."""
    file, side = io.BytesIO(), parts.encoder.input_size_px
    Image.new("RGB", (side, side)).save(file, "JPEG", progressive=True)
    whole = file.getvalue()
    return whole[:-2] + whole[whole.rindex(b"\xff\xda") : -2] * 100 + whole[-2:]


def filled(parts: Parts) -> bytes:
    """A JPEG with more bytes than its pixels can fill."""
    side = parts.encoder.input_size_px
    return picture(side) + bytes(3 * side**2 + (64 << 10))


def packed(jpegs: dict[int, bytes], ends: list[int]) -> bytes:
    slots = np.array(sorted(jpegs), np.int32)
    content = np.frombuffer(b"".join(jpegs[slot] for slot in slots.tolist()), np.uint8)
    made = {"jpegs": ("uint8", content), "ends": ("int64", np.array(ends, np.int64)), "slots": ("int32", slots)}
    return serialized(made, {"hour": "0"})[0]


BAD_KEYFRAMES: dict[str, Forge] = {
    "a page": lambda parts: write_keyframes(0, {10: b"<html><script>alert(1)</script>"}),
    "a PNG": lambda parts: write_keyframes(0, {10: picture(parts.encoder.input_size_px, "PNG")}),
    "the first half": lambda parts: write_keyframes(0, {10: keyframe(10, parts.encoder.input_size_px)[:400]}),
    "another size": lambda parts: write_keyframes(0, {10: picture(8)}),
    "grey": lambda parts: write_keyframes(0, {10: picture(parts.encoder.input_size_px, mode="L")}),
    "a picture that unfolds to 4 gigapixels": lambda parts: write_keyframes(0, {10: bomb(parts)}),
    "a picture that is looked over a hundred times": lambda parts: write_keyframes(0, {10: repeated_scan(parts)}),
    "a picture with more bytes than any": lambda parts: write_keyframes(0, {10: filled(parts)}),
    "one outside of what is imported": lambda parts: write_keyframes(0, {40: picture(parts.encoder.input_size_px)}),
    "an end behind the end": lambda parts: packed({10: b"abc", 11: b"def"}, [3, 7]),
    "an end before the start": lambda parts: packed({10: b"abc", 11: b"def"}, [-3, 6]),
    "ends that go back": lambda parts: packed({10: b"abc", 11: b"def"}, [6, 6]),
    "fewer ends than slots": lambda parts: packed({10: b"abc", 11: b"def"}, [6]),
    "frames": lambda parts: forged(parts),
}


@pytest.mark.parametrize("what", BAD_KEYFRAMES)
async def test_keyframes_that_no_export_wrote_are_refused(parts, client, exported, tmp_path, what):
    source_id = await begun(client, exported.contents)
    assert (await put(client, source_id, "frames", forged(parts))).status_code == 200
    refused = await put(client, source_id, "keyframes", BAD_KEYFRAMES[what](parts))
    assert code(refused) == (422, "damaged_export"), refused.text
    assert len(files(tmp_path)) == 1
    good = write_keyframes(0, {10: keyframe(10, parts.encoder.input_size_px)})
    assert (await put(client, source_id, "keyframes", good)).json()["frames"] == 1


async def test_a_picture_whose_frame_did_not_come_is_left_out(parts, client, exported):
    """Frames may come to an hour between the reading of its frames and that of its keyframes."""
    source_id = await begun(client, exported.contents)
    assert (await put(client, source_id, "frames", forged(parts, [10, 11]))).status_code == 200
    late, side = [12, 13], parts.encoder.input_size_px
    alone = write_keyframes(0, {slot: keyframe(slot, side) for slot in late})
    assert (await put(client, source_id, "keyframes", alone)).json()["frames"] == 0
    assert (await put(client, source_id, "keyframes", exported.keyframes)).json()["frames"] == 2
    assert (await parts.keyframes.slots(source_id, 0)).tolist() == [10, 11]


async def test_what_was_erased_behind_its_export_is_not_imported(parts, client, exported):
    gaps = [{"start_slot": start, "end_slot": end, "reason": "erased"} for start, end in ((5, 12), (20, 23), (29, 30))]
    source_id = await begun(client, exported.contents, gaps=gaps)
    left = [*range(12, 20), *range(23, 29)]
    for part in ("frames", "keyframes"):
        assert (await put(client, source_id, part, getattr(exported, part))).json()["frames"] == len(left)
    assert (await parts.timeline.slots(source_id, 0, 30)).tolist() == left
    assert (await parts.keyframes.slots(source_id, 0)).tolist() == left
    assert (await client.post(f"/v1/imports/{source_id}/complete", json={"frames": len(left)})).status_code == 200
    told = (await client.get(f"/v1/sources/{source_id}/timeline?start=0&end=30")).json()["gaps"]
    assert [(gap["start"], gap["end"]) for gap in told if gap["reason"] == "erased"] == [(5, 12), (20, 23), (29, 30)]


async def test_of_an_hour_that_was_erased_behind_its_export_nothing_is_imported(parts, client, exported):
    gaps = [{"start_slot": 0, "end_slot": 30, "reason": "erased"}]
    source_id = await begun(client, exported.contents, gaps=gaps)
    for part in ("frames", "keyframes"):
        assert (await put(client, source_id, part, getattr(exported, part))).json()["frames"] == 0
    assert await parts.timeline.count(source_id) == 0


@pytest.mark.parametrize("path", ["frames/-1", "frames/x", "frames/99999999999999999999", "pictures/0", "frames/0/x"])
async def test_an_hour_that_there_is_not_is_refused(client, exported, path):
    source_id = await begun(client, exported.contents)
    refused = await client.put(f"/v1/imports/{source_id}/{path}", content=exported.frames)
    assert refused.status_code in (404, 422)


@pytest.mark.parametrize("source_id", ["vid_nobody", "x", "..%2f..%2fetc", "str_0123456789ab"])
async def test_an_import_that_nobody_began_takes_nothing(client, exported, tmp_path, source_id):
    for part in ("frames", "keyframes"):
        assert code(await put(client, source_id, part, exported.frames)) in (
            (404, "import_not_found"),
            (404, "not_found"),
        )
    assert files(tmp_path) == []


async def test_an_import_never_writes_into_a_source_of_this_service(parts, client, exported):
    video = await parts.video([0], duration_s=30)
    assert code(await put(client, video.id, "frames", exported.frames)) == (404, "import_not_found")
    assert code(await client.delete(f"/v1/imports/{video.id}")) == (404, "import_not_found")
    assert code(await client.post(f"/v1/imports/{video.id}/complete", json={"frames": 1})) == (404, "import_not_found")
    assert await parts.timeline.count(video.id) == 1


async def test_too_much_is_refused_before_all_of_it_came(redis, checkpoint, tmp_path):
    limits = ApiSettings(max_hour_bytes=20_000, max_import_bytes=30_000)
    async with open_parts(redis, checkpoint, tmp_path, api=limits) as parts, parts.client() as client:
        video = await parts.video(SLOTS, duration_s=30)
        contents = (await client.get(f"/v1/sources/{video.id}/export")).json()
        source_id = await begun(client, contents)
        sent = 0

        async def endless() -> Any:
            nonlocal sent
            while sent < 1 << 30:
                sent += 1000
                yield bytes(1000)

        refused = await client.put(f"/v1/imports/{source_id}/keyframes/0", content=endless())
        assert code(refused) == (413, "file_too_large")
        assert [await put(client, source_id, "keyframes", bytes(19_000)) for _ in range(2)][1].status_code == 413
        assert [path for path in files(tmp_path) if path.suffix == ".import"] == []


async def test_hours_are_taken_side_by_side(parts, client, exported):
    contents = exported.contents | {"end_slot": 8 * HOUR_SLOTS, "duration_s": 8.0 * HOUR_SLOTS}
    source_id = await begun(client, contents)
    sent = [put(client, source_id, "frames", forged(parts, hour=hour), hour) for hour in range(8)]
    taken = await asyncio.gather(*sent, *[put(client, source_id, "frames", forged(parts)) for _ in range(3)])
    assert {one.status_code for one in taken} == {200}
    assert await parts.timeline.count(source_id) == 16


async def test_what_a_key_may_not_do_is_refused(redis, checkpoint, tmp_path):
    def key(name: str, *scopes: Any, sources: Any = None) -> ApiKey:
        return ApiKey(name=name, sha256=hashlib.sha256(name.encode()).hexdigest(), scopes=scopes, sources=sources)

    keys = (
        key("reader", "streams:read"),
        key("asker", "ask"),
        key("writer", "streams:write"),
        key("limited", "streams:read", "streams:write", sources={"vid_other"}),
    )
    async with open_parts(redis, checkpoint, tmp_path, api=ApiSettings(keys=keys)) as parts:
        video = await parts.video(SLOTS, duration_s=30)

        async def told(name: str) -> list[tuple[int, str | None]]:
            async with parts.client(headers={"Authorization": f"Bearer {name}"}) as client:
                responses = [
                    await client.get(f"/v1/sources/{video.id}/export"),
                    await client.get(f"/v1/sources/{video.id}/export/frames/0"),
                    await client.get(f"/v1/sources/{video.id}/export/keyframes/0"),
                    await client.post("/v1/imports", json=contents),
                    await client.put("/v1/imports/vid_other/frames/0", content=b"x"),
                    await client.delete("/v1/imports/vid_other"),
                ]
                return [one.json()["error"]["code"] if one.is_error else "" for one in responses]

        async with parts.client(headers={"Authorization": "Bearer reader"}) as client:
            contents = (await client.get(f"/v1/sources/{video.id}/export")).json()
        assert await told("reader") == ["", "", "", *["scope_missing"] * 3]
        assert await told("asker") == ["scope_missing"] * 6
        assert await told("writer") == [*["scope_missing"] * 3, "", *["import_not_found"] * 2]
        assert await told("limited") == ["source_forbidden"] * 6


async def test_only_what_is_there_can_be_exported(parts, client):
    video = await parts.video([0, 1], duration_s=2, status="processing")
    assert code(await client.get(f"/v1/sources/{video.id}/export")) == (409, "state_conflict")
    stream, _ = await parts.stream()
    assert code(await client.get(f"/v1/sources/{stream.id}/export")) == (422, "empty_range")
    assert code(await client.get("/v1/sources/vid_nobody/export")) == (404, "video_not_found")
    ready = await parts.video([0, 1, 5], duration_s=8)
    assert code(await client.get(f"/v1/sources/{ready.id}/export?start=5&end=5")) == (422, "bad_time_range")
    assert code(await client.get(f"/v1/sources/{ready.id}/export?start=2&end=4")) == (422, "empty_range")
    assert code(await client.get(f"/v1/sources/{ready.id}/export?start=yesterday")) == (422, "bad_time_range")
    for part in ("frames", "keyframes"):
        assert code(await client.get(f"/v1/sources/{ready.id}/export/{part}/7")) == (422, "empty_range")
        assert code(await client.get(f"/v1/sources/{ready.id}/export/{part}/0?start_slot=2&end_slot=4"))[0] == 422
    assert code(await client.get(f"/v1/sources/{ready.id}/export/pictures/0")) == (422, "validation_failed")


async def test_a_camera_that_is_slower_than_its_grid_is_exported_in_few_words_and_means_the_same(parts, client):
    stream, base = await parts.stream([*range(0, 40, 2), *range(51, 60)])
    erased = [Gap(start_slot=base + 61, end_slot=base + 62, reason="erased")]
    await parts.sources.add_gaps(stream.id, None, erased)
    times = {"start": write_stream_time(stream.created_at), "end": write_stream_time(stream.created_at + 70)}
    told = (await client.get(f"/v1/sources/{stream.id}/export", params=times)).json()
    source_id = await begun(client, told, name="moved")
    frames = 0
    for hour in told["hours"]:
        content = (await client.get(f"/v1/sources/{stream.id}/export/frames/{hour}")).content
        frames += (await put(client, source_id, "frames", content, hour)).json()["frames"]
    assert (await client.post(f"/v1/imports/{source_id}/complete", json={"frames": frames})).status_code == 200
    timelines = [
        (await client.get(f"/v1/sources/{one}/timeline", params=times)).json()["gaps"] for one in (stream.id, source_id)
    ]
    assert len(timelines[0]) > 20 > len(told["gaps"])
    assert timelines[0] == timelines[1]


async def test_what_has_too_many_gaps_for_one_export_is_refused_by_their_number(parts, client, monkeypatch):
    monkeypatch.setattr(exports, "MAX_LISTED", 5)
    video = await parts.video([0], duration_s=20)
    gaps = [Gap(start_slot=start, end_slot=start + 1, reason="decode_error") for start in range(2, 14, 2)]
    await parts.sources.add_gaps(video.id, None, gaps)
    refused = await client.get(f"/v1/sources/{video.id}/export")
    assert code(refused) == (413, "range_too_long")
    assert refused.json()["error"]["details"] == {"hours": 1, "gaps": 6, "max": 5}
    assert "shorter" in refused.json()["error"]["message"]
    assert (await client.get(f"/v1/sources/{video.id}/export?end=12")).status_code == 200


async def test_what_is_erased_while_it_is_exported_is_a_gap(parts, client):
    video = await parts.video([*range(5), *range(HOUR_SLOTS, HOUR_SLOTS + 5)], duration_s=HOUR_SLOTS + 5)
    assert (await client.get(f"/v1/sources/{video.id}/export")).json()["hours"] == [0, 1]
    await client.delete(f"/v1/sources/{video.id}/memory?start={HOUR_SLOTS}")
    assert code(await client.get(f"/v1/sources/{video.id}/export/frames/1")) == (422, "empty_range")
    told = (await client.get(f"/v1/sources/{video.id}/export")).json()
    assert told["gaps"] == [{"start_slot": HOUR_SLOTS, "end_slot": HOUR_SLOTS + 5, "reason": "erased"}]
