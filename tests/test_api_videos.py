"""Videos over REST: uploads to disk, refusals that leave nothing behind, and deletion."""

import httpx
import pytest

from qa_service.clock import write_stream_time
from qa_service.settings import ApiSettings
from store.connection import EmbeddedRedis, StoreFull, connect
from tests.ingest_parts import real_clip
from tests.qa_parts import asked, open_parts, stream_range
from tests.small_disk import fill, make_room, small_disk

LIMIT = 2_000_000


@pytest.fixture
async def parts(redis, checkpoint, tmp_path):
    async with open_parts(redis, checkpoint, tmp_path, api=ApiSettings(max_upload_bytes=LIMIT)) as parts:
        yield parts


@pytest.fixture
async def client(parts):
    async with parts.client() as client:
        yield client


@pytest.fixture(scope="module")
def clip():
    return real_clip("bikes").read_bytes()


def code(response):
    return response.status_code, response.json()["error"]["code"]


def left(parts):
    return list(parts.uploads.iterdir()) if parts.uploads.exists() else []


async def test_an_upload_is_kept_whole_and_registered(parts, client, clip):
    form = {"fps": "2", "recorded_at": "2026-07-01T06:00:00+02:00"}
    made = await client.post("/v1/videos", files={"file": ("../../yard.mp4", clip, "video/mp4")}, data=form)
    assert made.status_code == 202
    video = made.json()
    assert (video["object"], video["status"], video["progress"]) == ("video", "queued", 0)
    assert (video["name"], video["fps"], video["recorded_at"]) == ("yard.mp4", 2, "2026-07-01T04:00:00Z")
    [file] = left(parts)
    assert file.read_bytes() == clip
    assert file.name == (await parts.sources.get_video(video["id"])).file
    assert (await client.get(f"/v1/videos/{video['id']}")).json() == video
    assert (await client.get("/v1/videos")).json()["data"] == [video]

    deleted = await client.delete(f"/v1/videos/{video['id']}")
    assert deleted.json() == {"id": video["id"], "deleted": True, "purged_frames": 0}
    assert left(parts) == []
    assert code(await client.get(f"/v1/videos/{video['id']}")) == (404, "video_not_found")


async def test_an_upload_that_finds_no_room_is_refused_and_questions_go_on(redis, checkpoint, tmp_path, clip):
    with small_disk(tmp_path / "disk", 16 * 2**20) as disk:
        async with open_parts(redis, checkpoint, disk, spare_bytes=4 * 2**20) as parts, parts.client() as client:
            stream, base = await parts.stream(range(3))
            fill(disk, leave_bytes=3 * 2**20)
            refused = await client.post("/v1/videos", files={"file": ("yard.mp4", clip)})
            assert code(refused) == (503, "store_unavailable")
            assert "room" in refused.json()["error"]["message"]
            assert int(refused.headers["retry-after"]) >= 60
            assert left(parts) == []
            with pytest.raises(StoreFull):
                await parts.keep(stream.id, [base + 3])
            answer = await client.post("/v1/questions", json=asked(stream_range(stream, base, base + 4)))
            assert answer.json()["coverage"]["frames_used"] == 3
            make_room(disk)
            assert (await client.post("/v1/videos", files={"file": ("yard.mp4", clip)})).status_code == 202


async def test_what_is_kept_is_shown_and_asked_about_while_redis_can_write_nothing(checkpoint, tmp_path):
    with small_disk(tmp_path / "disk", 16 * 2**20) as disk, EmbeddedRedis.start(disk) as server:
        async with (
            connect(server.url) as redis,
            open_parts(redis, checkpoint, disk, api=ApiSettings(requests_per_minute=1000)) as parts,
            parts.client() as client,
        ):
            stream, base = await parts.stream(range(3))
            fill(disk)
            while not isinstance(await written(redis), StoreFull):
                pass
            ask = asked(stream_range(stream, base, base + 3))
            search = {"query": "a van", "sources": [stream_range(stream, base, base + 3)]}
            for response in (
                await client.post("/v1/questions", json=ask),
                await client.post("/v1/search", json=search),
                await client.get("/v1/streams"),
                await client.get(f"/v1/streams/{stream.id}/health"),
                await client.get(f"/v1/sources/{stream.id}/timeline"),
                await client.get(f"/v1/sources/{stream.id}/frames/{write_stream_time(base)}"),
                await client.get("/metrics"),
            ):
                assert response.status_code == 200, response.text
            refused = await client.post("/v1/streams", json={"name": "new", "url": "rtsp://203.0.113.7/new"})
            assert code(refused) == (503, "store_unavailable")
            assert "full" in refused.json()["error"]["message"]


async def written(redis):
    """Write something, and return what went wrong."""
    try:
        await redis.append("ballast", bytes(1000))
    except StoreFull as error:
        return error


async def test_deleting_a_video_erases_its_frames(parts, client):
    video = await parts.video(range(5), duration_s=5)
    assert (await client.delete(f"/v1/videos/{video.id}")).json()["purged_frames"] == 5
    assert await parts.timeline.extent(video.id) is None


async def test_a_file_that_is_too_large_is_refused_before_all_of_it_came(parts):
    sent = 0
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.mp4"\r\n\r\n'

    async def receive():
        nonlocal sent
        sent += 1
        body = head if sent == 1 else b"x" * 65536
        return {"type": "http.request", "body": body, "more_body": sent < 1_000_000}

    told = []

    async def send(message):
        told.append(message)

    headers = [(b"content-type", b"multipart/form-data; boundary=b")]
    scope = {"type": "http", "method": "POST", "path": "/v1/videos", "query_string": b"", "headers": headers}
    await parts.api(scope, receive, send)

    assert told[0]["status"] == 413
    assert b"file_too_large" in told[1]["body"]
    assert sent < 40
    assert left(parts) == []


@pytest.mark.parametrize(
    "content", [b"This is a text, not a video.\n" * 100, b"", b"\x00\x00\x00\x18ftypmp42" + b"\0" * 5000]
)
async def test_a_file_that_is_no_video_is_refused_and_removed(parts, client, content):
    response = await client.post("/v1/videos", files={"file": ("a.mp4", content, "video/mp4")})
    assert code(response) == (415, "unsupported_media")
    assert str(parts.uploads) not in response.text
    assert left(parts) == []


async def test_an_upload_that_breaks_off_leaves_nothing(parts, client, clip):
    whole = httpx.Request("POST", "http://test", files={"file": ("a.mp4", clip)})
    response = await client.post("/v1/videos", content=whole.read()[:5000], headers=whole.headers)
    assert code(response) == (400, "invalid_json")
    assert left(parts) == []


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ({"fps": "fast"}, (422, "validation_failed")),
        ({"fps": "0"}, (422, "validation_failed")),
        ({"colour": "red"}, (422, "validation_failed")),
        ({"name": "x" * 5000}, (422, "validation_failed")),
        ({"recorded_at": "2026-07-01T06:00:00"}, (422, "bad_time_range")),
    ],
)
async def test_fields_beside_the_file_are_checked(parts, client, clip, form, expected):
    response = await client.post("/v1/videos", files={"file": ("a.mp4", clip)}, data=form)
    assert code(response) == expected
    assert left(parts) == []


async def test_a_form_without_a_file_or_with_two_is_refused(parts, client, clip):
    assert code(await client.post("/v1/videos", files={"video": ("a.mp4", b"x")})) == (422, "validation_failed")
    two = [("file", ("a.mp4", clip)), ("file", ("b.mp4", clip))]
    assert code(await client.post("/v1/videos", files=two)) == (422, "validation_failed")
    bad = {"content-type": "multipart/form-data"}
    assert code(await client.post("/v1/videos", content=b"x", headers=bad)) == (400, "invalid_json")
    assert left(parts) == []


async def test_a_video_is_registered_by_its_address(client):
    wanted = {"url": "http://203.0.113.7/yard.mp4", "name": "yard"}
    made = await client.post("/v1/videos", json=wanted)
    assert made.status_code == 202
    assert (made.json()["url"], made.json()["status"]) == (wanted["url"], "queued")
    for url in ("file:///etc/passwd", "http://127.0.0.1/a.mp4", "http://[::1]/a.mp4", "http://169.254.169.254/"):
        assert code(await client.post("/v1/videos", json={**wanted, "url": url})) == (422, "bad_url")
    assert code(await client.post("/v1/videos", content=b"{")) == (400, "invalid_json")
    assert code(await client.post("/v1/videos", json={"url": "http://203.0.113.7/"})) == (422, "validation_failed")


async def test_a_repeated_upload_is_registered_once(parts, client, clip):
    headers = {"Idempotency-Key": "one"}
    first = await client.post("/v1/videos", files={"file": ("a.mp4", clip)}, headers=headers)
    again = await client.post("/v1/videos", files={"file": ("a.mp4", clip)}, headers=headers)
    assert first.json() == again.json()
    assert len(left(parts)) == 1
    other = await client.post("/v1/videos", files={"file": ("a.mp4", clip + b"x")}, headers=headers)
    assert code(other) == (409, "state_conflict")
    assert len(left(parts)) == 1


async def test_unknown_videos_are_not_found(client):
    for video_id in ("vid_000000000000", "nonsense", "str_000000000000"):
        assert code(await client.get(f"/v1/videos/{video_id}")) == (404, "video_not_found")
        assert code(await client.delete(f"/v1/videos/{video_id}")) == (404, "video_not_found")
