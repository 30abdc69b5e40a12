"""Streams over REST: registering, changing, deleting, and that passwords never come back."""

import asyncio
import base64
import io
import json
import time

import pytest
from PIL import Image

from qa_service.settings import ApiSettings
from store.source import StreamStatus
from tests.ingest_parts import LOCAL, simulated_camera
from tests.qa_parts import open_parts

CAMERA = {"name": "dock", "url": "rtsp://203.0.113.7/one", "username": "viewer", "password": "t0p-secret"}


@pytest.fixture
async def parts(redis, checkpoint, tmp_path):
    async with open_parts(redis, checkpoint, tmp_path, api=ApiSettings(max_wait_s=30)) as parts:
        yield parts


@pytest.fixture
async def client(parts):
    async with parts.client() as client:
        yield client


def code(response):
    return response.status_code, response.json()["error"]["code"]


async def test_a_stream_is_registered_shown_listed_changed_and_deleted(client):
    made = await client.post("/v1/streams", json={**CAMERA, "labels": {"site": "north"}, "retention": {"hours": 24}})
    assert made.status_code == 201
    stream = made.json()
    assert stream["state"] == "connecting"
    assert stream["retention"] == {"hours": 24, "max_bytes": None, "keyframes": {"hours": None, "max_bytes": None}}
    assert stream["has_password"] is True
    assert stream["created_at"].endswith("Z")

    path = f"/v1/streams/{stream['id']}"
    assert (await client.get(path)).json() == stream
    assert (await client.get("/v1/streams", params={"label": "site=north"})).json()["data"] == [stream]
    assert (await client.get("/v1/streams", params={"state": "online"})).json()["data"] == []

    stopped = (await client.patch(path, json={"enabled": False})).json()
    assert (stopped["state"], stopped["enabled"]) == ("disabled", False)
    assert (await client.patch(path, json={"password": None})).json()["has_password"] is False

    health = (await client.get(f"{path}/health")).json()
    assert health["state"] == "disabled"
    assert set(health) == {
        "state",
        "reason",
        "since",
        "last_frame_at",
        "lag_s",
        "reconnects_1h",
        "frames_1h",
        "next_retry_at",
        "clock",
    }

    assert (await client.delete(path)).json() == {"id": stream["id"], "deleted": True, "purged_frames": 0}
    assert code(await client.get(path)) == (404, "stream_not_found")


async def test_lists_come_in_pages(client):
    for number in range(5):
        await client.post("/v1/streams", json={"name": str(number), "url": f"rtsp://203.0.113.7/{number}"})
    names, cursor = [], None
    for _ in range(3):
        params = {"limit": 2, **({"cursor": cursor} if cursor else {})}
        page = (await client.get("/v1/streams", params=params)).json()
        names += [stream["name"] for stream in page["data"]]
        assert page["object"] == "list"
        assert page["has_more"] is (page["next_cursor"] is not None)
        cursor = page["next_cursor"]
    assert names == ["0", "1", "2", "3", "4"]
    assert cursor is None
    assert code(await client.get("/v1/streams", params={"cursor": "nonsense"})) == (422, "validation_failed")


async def test_a_purge_erases_the_frames_and_counts_them(parts, client):
    stream, base = await parts.stream(range(4))
    deleted = await client.delete(f"/v1/streams/{stream.id}", params={"purge": "true"})
    assert deleted.json()["purged_frames"] == 4
    assert await parts.timeline.extent(stream.id) is None
    assert code(await client.get(f"/v1/sources/{stream.id}/timeline")) == (404, "stream_not_found")
    assert base


async def test_memory_outlives_a_stream_that_was_deleted_without_purge(parts, client):
    stream, _ = await parts.stream(range(4))
    await client.delete(f"/v1/streams/{stream.id}")
    timeline = (await client.get(f"/v1/sources/{stream.id}/timeline")).json()
    assert sum(bucket["frames"] for bucket in timeline["buckets"]) == 4


async def test_names_and_addresses_are_taken_once(client):
    await client.post("/v1/streams", json=CAMERA)
    same_name = {**CAMERA, "url": "rtsp://203.0.113.7/two"}
    same_url = {**CAMERA, "name": "gate"}
    for taken, param in ((same_name, "name"), (same_url, "url")):
        refused = await client.post("/v1/streams", json=taken)
        assert code(refused) == (409, "stream_exists")
        assert refused.json()["error"]["param"] == param


async def test_fps_is_fixed_while_frames_are_kept(parts, client):
    stream, _ = await parts.stream([0])
    assert code(await client.patch(f"/v1/streams/{stream.id}", json={"fps": 2})) == (409, "state_conflict")


async def test_addresses_are_checked_when_registered_and_when_changed(parts, client):
    stream, _ = await parts.stream()
    for url in (
        "http://203.0.113.7/",
        "rtsp://127.0.0.1/",
        "rtsp://169.254.169.254/latest",
        "rtsp://u:t0p-secret@203.0.113.7/",
    ):
        for response in (
            await client.post("/v1/streams", json={"name": "x", "url": url}),
            await client.patch(f"/v1/streams/{stream.id}", json={"url": url}),
        ):
            assert code(response) == (422, "bad_url")
            assert "t0p-secret" not in response.text


async def test_the_password_is_in_no_response_log_or_error(client, caplog):
    caplog.set_level("DEBUG")
    texts = [
        await client.post("/v1/streams", json={**CAMERA, "fps": 99}),
        await client.post("/v1/streams", json={**CAMERA, "password": ["t0p-secret"]}),
        await client.post("/v1/streams", json={**CAMERA, "passwort": "t0p-secret"}),
        await client.post("/v1/streams", content='{"password": "t0p-secret"'),
        made := await client.post("/v1/streams", json=CAMERA),
        await client.post("/v1/streams", json=CAMERA),
        await client.get("/v1/streams"),
        await client.get(f"/v1/streams/{made.json()['id']}/health"),
        await client.patch(f"/v1/streams/{made.json()['id']}", json={"password": "t0p-secret", "fps": -1}),
        await client.get("/metrics"),
    ]
    assert made.status_code == 201
    for response in texts:
        assert "t0p-secret" not in response.text
    assert "t0p-secret" not in caplog.text


async def test_waiting_ends_with_the_first_frame(parts, client):
    waiting = asyncio.create_task(client.post("/v1/streams", params={"wait": 25}, json=CAMERA))
    async with asyncio.timeout(20):
        while not (page := await parts.sources.list_streams()).items:  # noqa: ASYNC110 - Redis has no event for it
            await asyncio.sleep(0.01)
        [stream] = page.items
        online = StreamStatus(state="online", since=time.time(), last_frame_at=time.time())
        await parts.keep(stream.id, [], stream_status=online)
        made = await waiting
    assert (made.status_code, made.json()["state"]) == (201, "online")


async def test_waiting_ends_after_its_time(client):
    made = await client.post("/v1/streams", params={"wait": 0.3}, json=CAMERA)
    assert (made.status_code, made.json()["state"]) == (201, "connecting")
    assert code(await client.post("/v1/streams", params={"wait": 31}, json=CAMERA)) == (422, "validation_failed")


async def test_a_repeated_request_changes_nothing_and_is_told_the_same(client):
    headers = {"Idempotency-Key": "one"}
    first = await client.post("/v1/streams", json=CAMERA, headers=headers)
    again = await client.post("/v1/streams", json=CAMERA, headers=headers)
    assert (first.status_code, first.json()) == (again.status_code, again.json())
    assert len((await client.get("/v1/streams")).json()["data"]) == 1

    other = await client.post("/v1/streams", json={**CAMERA, "name": "gate"}, headers=headers)
    assert code(other) == (409, "state_conflict")
    assert code(await client.post("/v1/streams", json=CAMERA, headers={"Idempotency-Key": "x" * 300}))[0] == 422


async def test_a_request_that_failed_may_be_repeated_with_its_key(client):
    headers = {"Idempotency-Key": "two"}
    bad = {**CAMERA, "url": "rtsp://127.0.0.1/"}
    assert code(await client.post("/v1/streams", json=bad, headers=headers)) == (422, "bad_url")
    assert (await client.post("/v1/streams", json=CAMERA, headers=headers)).status_code == 201


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"url": "rtsp://203.0.113.7/"}, "name"),
        ({**CAMERA, "name": ""}, "name"),
        ({**CAMERA, "fps": 0}, "fps"),
        ({**CAMERA, "transport": "carrier pigeon"}, "transport"),
        ({**CAMERA, "retention": {"hours": 0}}, "retention.hours"),
        ({**CAMERA, "labels": {"a": 1}}, "labels.a"),
        ({**CAMERA, "fps": float("nan")}, "fps"),
        ({**CAMERA, "retention": {"hours": float("inf")}}, "retention.hours"),
        ({**CAMERA, "url": "rtsp://203.0.113.7/" + "x" * 1990}, "url"),
        ({**CAMERA, "name": " "}, "name"),
        ({**CAMERA, "name": "yard\x1b[31m"}, "name"),
        ({**CAMERA, "name": "\ud800"}, "name"),
        ({**CAMERA, "labels": {"site\n": "north"}}, "labels.site\n"),
        ({**CAMERA, "labels": {"site": "north\x00"}}, "labels.site"),
        ({**CAMERA, "username": "a\r\nb"}, "username"),
        ({**CAMERA, "password": "p" * 1001}, "password"),
        ({**CAMERA, "fps": 1e-300}, "fps"),
        ({**CAMERA, "colour": "red"}, "colour"),
        ([], None),
    ],
)
async def test_a_field_at_fault_is_named(client, body, param):
    as_json = {"content-type": "application/json"}
    response = await client.post("/v1/streams", content=json.dumps(body), headers=as_json)
    assert code(response) == (422, "validation_failed")
    assert response.json()["error"]["param"] == param


async def test_an_empty_patch_and_unknown_streams_are_refused(client):
    assert code(await client.patch("/v1/streams/str_000000000000", json={})) == (422, "validation_failed")
    for response in (
        await client.get("/v1/streams/str_000000000000"),
        await client.get("/v1/streams/nonsense"),
        await client.patch("/v1/streams/str_000000000000", json={"enabled": False}),
        await client.delete("/v1/streams/str_000000000000"),
        await client.get("/v1/streams/str_000000000000/health"),
    ):
        assert code(response) == (404, "stream_not_found")


@pytest.fixture
async def near(redis, checkpoint, tmp_path):
    """A client of a service that may look at the cameras of this machine."""
    async with (
        open_parts(redis, checkpoint, tmp_path, allowed_networks=LOCAL) as parts,
        parts.client() as client,
    ):
        yield client


async def test_a_camera_can_be_looked_at_before_it_is_registered(near):
    with simulated_camera("--user", "viewer", "--password", "t0p-secret", "--fps", "10") as camera:
        body = {"url": camera.url, "username": "viewer", "password": "t0p-secret"}
        response = await near.post("/v1/streams/probe", json=body)
    seen = response.json()
    assert response.status_code == 200, seen
    assert (seen["codec"], seen["width"], seen["height"]) == ("h264", 320, 180)
    assert seen["fps"] == pytest.approx(10, abs=2)
    assert seen["first_frame_ms"] > 0
    kind, _, picture = seen["snapshot"].partition(",")
    assert kind == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(picture))) as snapshot:
        assert snapshot.size == (320, 180)
    assert "t0p-secret" not in response.text
    assert (await near.get("/v1/streams")).json()["data"] == []


async def test_what_is_wrong_with_a_camera_has_a_name(near):
    with simulated_camera("--user", "viewer", "--password", "t0p-secret") as camera:
        refused = await near.post("/v1/streams/probe", json={"url": camera.url, "password": "wr0ng-secret"})
    assert code(refused) == (502, "rtsp_auth_failed")
    assert "wr0ng-secret" not in refused.text
    gone = await near.post("/v1/streams/probe", json={"url": camera.url})
    assert code(gone) == (502, "rtsp_unreachable")
    with simulated_camera("--blackhole") as camera:
        silent = await near.post("/v1/streams/probe", json={"url": camera.url})
    assert code(silent) == (502, "rtsp_unreachable")


async def test_what_may_not_be_opened_is_not_looked_at(client):
    for url in ("rtsp://127.0.0.1/", "http://203.0.113.7/one", "file:///etc/passwd", "rtsp://user:pw@203.0.113.7/one"):
        assert code(await client.post("/v1/streams/probe", json={"url": url})) == (422, "bad_url")
    assert code(await client.post("/v1/streams/probe", json={})) == (422, "validation_failed")
