"""What holds for every request: keys, scopes, rates, ids, health, metrics and the shape of errors."""

import asyncio
import hashlib
import pickle
import re

import httpx
import pytest
from starlette.responses import JSONResponse

from qa_service import errors
from qa_service.door import Door
from qa_service.errors import TABLE, ServiceError, tell
from qa_service.health import Readiness
from qa_service.keys import Keyring
from qa_service.schemas import ErrorBody
from qa_service.settings import ApiKey, ApiSettings
from store.connection import EmbeddedRedis, StoreFull, connect
from store.counters import Counters
from tests.qa_parts import asked, open_parts, stream_range


def api_key(name, *scopes, sources=None):
    return ApiKey(name=name, sha256=hashlib.sha256(name.encode()).hexdigest(), scopes=scopes, sources=sources)


def bearer(name):
    return {"Authorization": f"Bearer {name}"}


def code(response):
    return response.status_code, response.json()["error"]["code"]


@pytest.fixture
async def parts(redis, checkpoint, tmp_path):
    async with open_parts(redis, checkpoint, tmp_path) as parts:
        yield parts


@pytest.fixture
async def client(parts):
    async with parts.client() as client:
        yield client


async def test_keys_open_what_their_scopes_say(redis, checkpoint, tmp_path):
    keys = (api_key("reader", "streams:read"), api_key("writer", "streams:write"), api_key("boss", "admin"))
    async with open_parts(redis, checkpoint, tmp_path, api=ApiSettings(keys=keys)) as parts, parts.client() as client:
        camera = {"name": "a", "url": "rtsp://203.0.113.7/"}
        missing = await client.get("/v1/streams")
        assert code(missing) == (401, "missing_key")
        assert missing.headers["www-authenticate"] == "Bearer"
        for wrong in ("Bearer nobody", "Bearer r\xe9ader", "Basic reader", "Bearer", "Bearer  "):
            response = await client.get("/v1/streams", headers={"Authorization": wrong.encode("latin-1")})
            assert code(response) in {(401, "bad_key"), (401, "missing_key")}
        assert (await client.get("/v1/streams", headers=bearer("reader"))).status_code == 200
        refused = await client.post("/v1/streams", json=camera, headers=bearer("reader"))
        assert code(refused) == (403, "scope_missing")
        assert code(await client.get("/v1/streams", headers=bearer("writer"))) == (403, "scope_missing")
        assert (await client.post("/v1/streams", json=camera, headers=bearer("writer"))).status_code == 201
        assert (await client.get("/v1/streams", headers=bearer("boss"))).status_code == 200
        assert (await client.get("/v1/health/live")).status_code == 200
        assert code(await client.get("/metrics")) == (401, "missing_key")
        assert code(await client.post("/v1/questions", content=b"{")) == (401, "missing_key")
        assert code(await client.get("/v1/nowhere")) == (401, "missing_key")


async def test_a_key_limited_to_sources_sees_no_other(redis, checkpoint, tmp_path):
    async with open_parts(redis, checkpoint, tmp_path) as parts:
        mine, base = await parts.stream(range(3), name="mine")
        theirs, _ = await parts.stream(range(3), name="theirs")
    keys = (api_key("guest", "streams:read", "streams:write", "ask", sources=[mine.id]),)
    settings = ApiSettings(keys=keys)
    async with (
        open_parts(redis, checkpoint, tmp_path, api=settings) as parts,
        parts.client(headers=bearer("guest")) as client,
    ):
        listed = (await client.get("/v1/streams")).json()["data"]
        assert [stream["id"] for stream in listed] == [mine.id]
        assert (await client.get("/v1/videos")).json()["data"] == []
        own, other = (asked(stream_range(stream, base, base + 3)) for stream in (mine, theirs))
        assert (await client.post("/v1/questions", json=own)).status_code == 200
        both = {**own, "sources": own["sources"] + other["sources"]}
        refused = await client.post("/v1/questions", json=both)
        assert refused.json()["error"]["param"] == "sources[1].stream_id"
        responses = [
            refused,
            await client.post("/v1/questions", json=other),
            await client.post("/v1/search", json={"query": "a", "sources": [theirs.id]}),
            await client.get(f"/v1/streams/{theirs.id}"),
            await client.get(f"/v1/streams/{theirs.id}/health"),
            await client.patch(f"/v1/streams/{theirs.id}", json={"enabled": False}),
            await client.delete(f"/v1/streams/{theirs.id}"),
            await client.get(f"/v1/sources/{theirs.id}/timeline"),
            await client.get(f"/v1/sources/{theirs.id}/frames/2026-07-01T06:00:00Z"),
            await client.get("/v1/videos/vid_000000000000"),
            await client.delete("/v1/videos/vid_000000000000"),
            await client.get("/v1/streams/str_000000000000"),  # whether it is there is none of their business
            await client.post("/v1/streams", json={"name": "b", "url": "rtsp://203.0.113.7/b"}),
            await client.post("/v1/videos", json={"name": "b", "url": "http://203.0.113.7/b.mp4"}),
            await client.post("/v1/videos", files={"file": ("a.mp4", b"x")}),
        ]
        for response in responses:
            assert code(response) == (403, "source_forbidden"), response.request


async def test_a_taken_name_does_not_tell_a_limited_key_of_the_other_stream(redis, checkpoint, tmp_path):
    async with open_parts(redis, checkpoint, tmp_path) as parts:
        own, _ = await parts.stream(name="own")
        other, _ = await parts.stream(name="other")
    keys = (api_key("guest", "streams:write", sources={own.id}), api_key("boss", "admin"))
    async with open_parts(redis, checkpoint, tmp_path, api=ApiSettings(keys=keys)) as parts, parts.client() as client:
        rename = {"url": f"/v1/streams/{own.id}", "json": {"name": "other"}}
        for name, seen in (("guest", False), ("boss", True)):
            refused = await client.patch(**rename, headers=bearer(name))
            assert code(refused) == (409, "stream_exists")
            assert (other.id in refused.text) is seen


def test_keys_of_one_name_would_share_rates_and_repeated_requests():
    twice = (api_key("ops", "ask"), api_key("ops", "admin"))
    same = (api_key("ops", "ask"), api_key("ops", "ask").model_copy(update={"name": "dev"}))
    for keys in (twice, same):
        with pytest.raises(ValueError, match="same name or the same sha256"):
            ApiSettings(keys=keys)


async def test_a_client_that_goes_away_in_its_request_is_no_failure(parts, caplog):
    async def receive():
        return {"type": "http.disconnect"}

    sent = []

    async def send(message):
        sent.append(message)

    for content_type in (b"application/json", b"multipart/form-data; boundary=x"):
        headers = [(b"content-type", content_type)]
        scope = {"type": "http", "method": "POST", "path": "/v1/videos", "query_string": b"", "headers": headers}
        await parts.api(scope, receive, send)
    assert not sent
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    assert not list(parts.uploads.iterdir())


async def test_a_body_that_is_no_json_object_is_told_how_to_be_one(client):
    text = {"content-type": "text/plain"}
    for response in (
        await client.post("/v1/questions", content=b'{"question": "a"}', headers=text),
        await client.post("/v1/questions"),
        await client.post("/v1/streams", json=[]),
        await client.post("/v1/videos", json=[]),
    ):
        assert code(response) == (422, "validation_failed")
        assert "Content-Type: application/json" in response.json()["error"]["message"]


async def test_requests_beyond_the_rate_are_told_when_to_come_back(redis, checkpoint, tmp_path):
    keys = (api_key("fast", "admin"), api_key("calm", "admin"))
    settings = ApiSettings(keys=keys, requests_per_minute=3)
    async with open_parts(redis, checkpoint, tmp_path, api=settings) as parts, parts.client() as client:
        for _ in range(3):
            assert (await client.get("/v1/streams", headers=bearer("fast"))).status_code == 200
        refused = await client.get("/v1/streams", headers=bearer("fast"))
        assert code(refused) == (429, "rate_limited")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert (await client.get("/v1/streams", headers=bearer("calm"))).status_code == 200


async def test_every_response_has_a_request_id_and_keeps_a_sane_one(client):
    for path in ("/v1/streams", "/v1/nowhere", "/v1/health/live", "/openapi.json"):
        assert re.fullmatch(r"req_[0-9a-f]{16}", (await client.get(path)).headers["x-request-id"])
    kept = await client.get("/v1/nowhere", headers={"X-Request-Id": "trace-1.2_3"})
    assert kept.headers["x-request-id"] == kept.json()["error"]["request_id"] == "trace-1.2_3"
    for strange in ("a b", "x" * 65, "a;b"):
        assert (await client.get("/v1/streams", headers={"X-Request-Id": strange})).headers["x-request-id"] != strange


async def test_behind_ray_the_request_keeps_the_id_that_its_proxy_writes():
    async def app(scope, receive, send):
        await JSONResponse({"id": scope["state"]["request_id"]})(scope, receive, send)

    door = Door(app, Keyring(()), None, 1000, behind_ray=True)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(door), base_url="http://test") as client:
        response = await client.get("/", headers={"X-Request-Id": "as the proxy says"})
    assert response.json() == {"id": "as the proxy says"}
    assert "x-request-id" not in response.headers


async def test_unknown_paths_methods_and_bodies_are_errors_of_the_usual_shape(client):
    as_json = {"content-type": "application/json"}
    cases = [
        (await client.get("/v1/nowhere"), (404, "not_found")),
        (await client.put("/v1/streams"), (405, "method_not_allowed")),
        (await client.post("/v1/streams", content=b'{"name": ', headers=as_json), (400, "invalid_json")),
        (await client.post("/v1/questions", content=b"\xff\xfe\x00", headers=as_json), (400, "invalid_json")),
        (await client.post("/v1/questions", content=b"[" * 100_000, headers=as_json), (400, "invalid_json")),
        (await client.post("/v1/questions", json=None), (422, "validation_failed")),
        (await client.get("/v1/streams", params={"limit": 0}), (422, "validation_failed")),
        (await client.get("/v1/streams", params={"state": "asleep"}), (422, "validation_failed")),
    ]
    for response, expected in cases:
        body = ErrorBody.model_validate(response.json())
        assert (response.status_code, body.error.code) == expected
        assert body.error.request_id == response.headers["x-request-id"]


async def test_a_body_that_is_too_large_is_refused(redis, checkpoint, tmp_path):
    settings = ApiSettings(max_body_bytes=1000)
    async with open_parts(redis, checkpoint, tmp_path, api=settings) as parts, parts.client() as client:
        for path in ("/v1/questions", "/v1/videos"):
            assert code(await client.post(path, json={"question": "x" * 2000})) == (413, "file_too_large")
        form = {"content-type": "multipart/form-data; boundary=b"}  # which is counted for uploads alone
        long = await client.post("/v1/questions", content=b"x" * 2000, headers=form)
        assert code(long) == (413, "file_too_large")


async def test_a_store_that_is_away_is_told_with_a_time_to_come_back(checkpoint, tmp_path):
    server = EmbeddedRedis.start(tmp_path / "data")
    async with connect(server.url) as away, open_parts(away, checkpoint, tmp_path) as parts:
        stream, base = await parts.stream(range(2))
        server.stop()
        async with parts.client() as client:
            for response in (
                await client.get("/v1/streams"),
                await client.post("/v1/questions", json=asked(stream_range(stream, base, base + 2))),
            ):
                assert code(response) == (503, "store_unavailable")
                assert int(response.headers["retry-after"]) > 0
                assert str(tmp_path) not in response.text
            ready = await client.get("/v1/health/ready")
            assert (ready.status_code, ready.json()["parts"]) == (503, {"redis": "unavailable"})
            assert (await client.get("/v1/health/live")).status_code == 200


async def test_an_unforeseen_failure_is_told_without_its_insides_and_logged(parts, client, caplog):
    await parts.redis.set("reg:{sources}:streams", "no hash")
    response = await client.get("/v1/streams/str_000000000000")
    assert code(response) == (500, "internal_error")
    assert "WRONGTYPE" not in response.text
    assert "Traceback" not in response.text
    assert "WRONGTYPE" in caplog.text
    assert response.json()["error"]["request_id"] in caplog.text


async def test_readiness_names_the_part_that_hangs_and_asks_the_others():
    async def fine():
        pass

    async def hangs():
        await asyncio.Event().wait()

    async def fails():
        raise RuntimeError("/secret/path")

    health = await Readiness({"redis": fine, "qa": hangs, "ingest": fails}, timeout_s=0.05).check()
    assert health.status == "unavailable"
    assert health.parts == {"redis": "ok", "qa": "timeout", "ingest": "unavailable"}


async def test_readiness_says_what_to_do_about_a_part_that_is_full_and_logs_it_once(caplog):
    room = ["make room"]

    async def takes():
        if room:
            raise StoreFull(room[0])

    readiness = Readiness({"segments": takes}, timeout_s=1)
    for _ in range(3):
        health = await readiness.check()
        assert (health.status, health.parts) == ("unavailable", {"segments": "full"})
        assert health.advice == {"segments": "make room"}
    assert caplog.text.count("segments is full") == 1
    room.clear()
    assert (await readiness.check()).model_dump() == {"status": "ok", "parts": {"segments": "ok"}, "advice": {}}


async def test_the_model_and_its_readiness_are_told(client):
    [model] = (await client.get("/v1/models")).json()["data"]
    assert model["object"] == "model"
    assert model["untrained"] is True
    assert "no meaning" in model["note"]
    assert (await client.get("/v1/health/ready")).json() == {"status": "ok", "parts": {"redis": "ok"}, "advice": {}}


async def test_metrics_count_states_and_events(parts, client):
    await parts.stream(range(2))
    await parts.video(range(2), duration_s=2)
    await Counters(parts.redis).bump("frames", 7)
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert 'tokenline_streams{state="connecting"} 1.0' in response.text
    assert 'tokenline_videos{status="ready"} 1.0' in response.text
    assert 'tokenline_events_total{event="frames"} 7.0' in response.text


async def test_the_document_shows_examples_scopes_and_errors(client):
    document = (await client.get("/openapi.json")).json()
    assert set(document["paths"]) >= {"/v1/streams", "/v1/videos", "/v1/questions", "/v1/search", "/metrics"}
    question = document["components"]["schemas"]["Question"]
    assert question["examples"][0]["text_fusion"] == "auto"
    responses = document["paths"]["/v1/questions"]["post"]["responses"]
    assert "`range_too_long`" in responses["413"]["description"]
    assert all(route.get("summary") for path in document["paths"].values() for route in path.values())
    assert "multipart/form-data" in document["paths"]["/v1/videos"]["post"]["requestBody"]["content"]
    assert (await client.get("/docs")).status_code == 200


def test_every_error_of_ours_stands_in_the_table_and_survives_a_process_border():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ServiceError)]
    for kind in kinds:
        if kind is ServiceError:
            continue
        assert kind in TABLE
        error = kind("told", param="sources[0].end", details={"frames": 1}, retry_after_s=7)
        back = pickle.loads(pickle.dumps(error))
        assert tell(back, "req_1") == tell(error, "req_1")
        body = ErrorBody.model_validate(tell(error, "req_1").body)
        assert (body.error.message, body.error.details) == ("told", {"frames": 1})


def test_waiting_times_stand_in_the_header_of_429_and_503_alone():
    for kind, reply in TABLE.items():
        if issubclass(kind, ServiceError):
            told = tell(kind("told", retry_after_s=7), "req_1")
            assert (told.headers.get("Retry-After") == "7") is (reply.status in (429, 503))
