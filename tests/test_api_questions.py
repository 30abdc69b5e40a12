"""Questions, search, timelines and frames over REST, on real parts."""

import asyncio
import base64
import json

import pytest

from qa_service.clock import write_stream_time
from qa_service.coverage import RangeReader
from qa_service.finder import Finder
from qa_service.schemas import SearchRequest
from qa_service.settings import ApiSettings, QASettings
from store.moments import Moments
from store.settings import StoreSettings
from tests.qa_parts import QUESTION, asked, keyframe, open_parts, stream_range, whole_model


@pytest.fixture
async def parts(redis, checkpoint, tmp_path):
    async with open_parts(redis, checkpoint, tmp_path, QASettings(max_frames=64)) as parts:
        yield parts


@pytest.fixture
async def client(parts):
    async with parts.client() as client:
        yield client


def code(response):
    return response.status_code, response.json()["error"]["code"]


def read_events(text):
    """Return (event, data) of every message, comments left out."""
    events = []
    for message in text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in message.splitlines() if not line.startswith(":"))
        if fields:
            events.append((fields.get("event"), fields["data"]))
    return events


async def test_the_answer_over_rest_is_the_offline_model_s(parts, client):
    stream, base = await parts.stream(range(6))
    response = await client.post(
        "/v1/questions", json=asked(stream_range(stream, base, base + 6), text_fusion="exact", temperature=0)
    )
    assert response.status_code == 200
    answer = response.json()
    pictures = [keyframe(base + slot, parts.encoder.input_size_px) for slot in range(6)]
    _, prompt = whole_model(parts.checkpoint)
    assert answer["answer"] == prompt.decode(parts.offline(QUESTION, pictures, 12))
    assert set(answer) == {
        "id",
        "object",
        "created",
        "model",
        "answer",
        "finish_reason",
        "citations",
        "coverage",
        "usage",
        "timing_ms",
    }
    assert answer["object"] == "answer"
    assert answer["coverage"]["frames_used"] == 6
    for citation in answer["citations"]:
        frame = await client.get(citation["frame_url"])
        assert frame.status_code == 200
        assert frame.headers["content-type"] == "image/jpeg"


async def test_a_streamed_answer_is_the_same_in_pieces(parts, client):
    stream, base = await parts.stream(range(4))
    question = asked(stream_range(stream, base, base + 4))
    whole = (await client.post("/v1/questions", json=question)).json()

    response = await client.post("/v1/questions", json={**question, "stream": True})

    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-request-id"]
    events = read_events(response.text)
    names = [name for name, _ in events]
    assert names[0] == "answer.created"
    assert names[-3:] == ["answer.citations", "answer.completed", None]
    assert set(names[1:-3]) == {"answer.delta"}
    assert events[-1][1] == "[DONE]"
    assert "".join(json.loads(data)["delta"] for name, data in events if name == "answer.delta") == whole["answer"]
    completed = json.loads(events[-2][1])
    assert {"usage", "coverage", "timing_ms"} <= set(completed)
    assert completed["answer"] == whole["answer"]


async def test_errors_before_the_first_event_are_plain_ones(parts, client):
    stream, base = await parts.stream(range(4))
    wrong = asked(stream_range(stream, base + 4, base), stream=True)
    assert code(await client.post("/v1/questions", json=wrong)) == (422, "bad_time_range")


async def test_an_error_within_the_events_is_told_as_one(parts, client):
    stream, base = await parts.stream(range(4))
    for path in parts.uploads.parent.rglob(f"{base + 2}.jpg"):  # while nobody knows of it
        path.unlink()
    question = asked(stream_range(stream, base, base + 4), stream=True, text_fusion="exact")
    response = await client.post("/v1/questions", json=question)
    events = read_events(response.text)
    assert [name for name, _ in events] == ["answer.created", "error", None]
    error = json.loads(events[1][1])["error"]
    assert error["code"] == "keyframes_not_kept"
    assert error["request_id"] == response.headers["x-request-id"]


async def test_a_client_that_goes_away_ends_its_answer(redis, checkpoint, tmp_path):
    qa, api = QASettings(max_waiting=1), ApiSettings(sse_ping_s=0.01)
    async with open_parts(redis, checkpoint, tmp_path, qa, api) as parts:
        stream, base = await parts.stream(range(4))
        question = asked(stream_range(stream, base, base + 4), stream=True, text_fusion="exact")
        parts.compressor.gate.clear()
        for streamed in (True, False):
            parts.compressor.entered.clear()
            body = json.dumps({**question, "stream": streamed}).encode()
            messages = [{"type": "http.request", "body": body, "more_body": False}]
            sent = []

            async def receive(messages=messages):
                if messages:
                    return messages.pop()
                await parts.compressor.entered.wait()
                return {"type": "http.disconnect"}

            async def send(message, sent=sent):
                sent.append(message)

            headers = [(b"content-type", b"application/json")]
            scope = {"type": "http", "method": "POST", "path": "/v1/questions", "query_string": b"", "headers": headers}
            scope["asgi"] = {"version": "3.0", "spec_version": "2.4"}
            async with asyncio.timeout(20):
                await parts.api(scope, receive, send)
            assert parts.answerer.asked == 0


async def test_pings_fill_the_pauses(redis, checkpoint, tmp_path):
    async with open_parts(redis, checkpoint, tmp_path, api=ApiSettings(sse_ping_s=0.01)) as parts:
        stream, base = await parts.stream(range(4))
        parts.compressor.gate.clear()
        sent = []
        question = asked(stream_range(stream, base, base + 4), stream=True, text_fusion="exact")
        messages = [{"type": "http.request", "body": json.dumps(question).encode(), "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            await asyncio.Event().wait()

        async def send(message):
            sent.append(message.get("body", b""))
            if message.get("body", b"").startswith(b": ping"):
                parts.compressor.gate.set()

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/questions", "query_string": b"", "headers": headers}
        async with asyncio.timeout(20):
            await parts.api(scope, receive, send)
        assert b"event: answer.completed" in b"".join(sent)


async def test_bad_ranges_are_told_apart(parts, client):
    stream, base = await parts.stream([0, 1, 8])
    good = stream_range(stream, base, base + 2)
    video = await parts.video(range(3), duration_s=3)
    times = {"start": 0, "end": 3}
    cases = [
        (stream_range(stream, base + 2, base), (422, "bad_time_range"), "sources[0].end"),
        (stream_range(stream, base, base), (422, "bad_time_range"), "sources[0].end"),
        ({**good, "start": "2026-07-01T06:00:00"}, (422, "bad_time_range"), "sources[0].start"),
        ({**good, "start": 1782900000}, (422, "bad_time_range"), "sources[0].start"),
        ({**good, "end": "yesterday"}, (422, "bad_time_range"), "sources[0].end"),
        ({**good, "end": "2026-13-01T06:00:00Z"}, (422, "bad_time_range"), "sources[0].end"),
        ({"video_id": video.id, "start": "0", "end": 3}, (422, "bad_time_range"), "sources[0].start"),
        ({"video_id": video.id, "start": 2, "end": 1}, (422, "bad_time_range"), "sources[0].end"),
        ({"video_id": video.id, "start": -1}, (422, "bad_time_range"), "sources[0].start"),
        (stream_range(stream, base + 2, base + 8), (422, "empty_range"), "sources"),
        (stream_range(stream, base + 100_000, base + 100_010), (422, "empty_range"), "sources"),
        ({**good, "start": "0001-01-01T00:00:00Z", "end": "1969-01-01T00:00:00Z"}, (422, "empty_range"), "sources"),
        ({"video_id": video.id, "start": 50, "end": 60}, (422, "empty_range"), "sources"),
        ({**good, "stream_id": "str_000000000000"}, (404, "stream_not_found"), None),
        ({**good, "stream_id": video.id}, (404, "stream_not_found"), None),
        ({"video_id": "vid_000000000000", **times}, (404, "video_not_found"), None),
        ({"video_id": stream.id, **times}, (404, "video_not_found"), None),
        ({"video_id": "str_none", **times}, (404, "video_not_found"), None),
        ({"video_id": video.id, "start": 0, "end": 1e308}, (422, "bad_time_range"), "sources[0].end"),
        ({**good, "start": "0001-01-01T00:00:00+14:00"}, (422, "bad_time_range"), "sources[0].start"),
        ({**good, "end": "9999-12-31T23:59:59-12:00"}, (422, "bad_time_range"), "sources[0].end"),
        ({**good, "video_id": video.id}, (422, "validation_failed"), "sources[0]"),
        ({}, (422, "validation_failed"), "sources[0]"),
        ("str_1", (422, "validation_failed"), "sources[0]"),
    ]
    for source, expected, param in cases:
        response = await client.post("/v1/questions", json=asked(source))
        assert code(response) == expected, source
        assert "_kind_of" not in response.text
        assert response.json()["error"]["param"] == param, source


async def test_an_empty_range_tells_the_nearest_frames_and_the_reasons(parts, client):
    stream, base = await parts.stream([0, 1, 8])
    response = await client.post("/v1/questions", json=asked(stream_range(stream, base + 3, base + 6)))
    [told] = response.json()["error"]["details"]["sources"]
    assert told["source_id"] == stream.id
    assert told["nearest_before"] == write_stream_time(base + 1)
    assert told["nearest_after"] == write_stream_time(base + 8)
    assert [gap["reason"] for gap in told["gaps"]] == ["stream_down"]


async def test_a_range_that_is_too_long_tells_both_numbers(parts, client):
    video = await parts.video(range(70), duration_s=70)
    response = await client.post("/v1/questions", json=asked({"video_id": video.id}))
    assert code(response) == (413, "range_too_long")
    assert response.json()["error"]["details"] == {"frames": 70, "max_frames": 64}
    fitting = await client.post("/v1/questions", json=asked({"video_id": video.id}, stride="auto"))
    assert fitting.json()["coverage"]["stride"] == 2


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"question": "x" * 100_000}, "question"),
        ({"question": ""}, "question"),
        ({"question": "\ud800"}, "question"),
        ({"sources": []}, "sources"),
        ({"stride": 0}, "stride"),
        ({"stride": "some"}, "stride"),
        ({"text_fusion": "cold"}, "text_fusion"),
        ({"temperature": -1}, "temperature"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"stride": "most"}, "stride"),
        ({"max_output_tokens": 10**9}, "max_output_tokens"),
        ({"seed": -1}, "seed"),
        ({"colour": "red"}, "colour"),
    ],
)
async def test_a_field_at_fault_is_named(parts, client, fields, param):
    stream, base = await parts.stream(range(2))
    body = {**asked(stream_range(stream, base, base + 2)), **fields}
    response = await client.post(
        "/v1/questions", content=json.dumps(body), headers={"content-type": "application/json"}
    )
    assert code(response) == (422, "validation_failed")
    assert response.json()["error"]["param"] == param
    assert len(response.text) < 2000


async def test_search_finds_the_moment_of_a_picture(parts, client):
    stream, base = await parts.stream(range(30))
    wanted = base64.b64encode(keyframe(base + 12, parts.encoder.input_size_px)).decode()
    for image in (wanted, f"data:image/jpeg;base64,{wanted}"):
        found = (await client.post("/v1/search", json={"image": image, "sources": [stream.id], "top_k": 1})).json()
        [moment] = found["data"]
        assert found["object"] == "list"
        assert found["coverage"] == {"frames_kept": 30, "frames_searched": 30, "partial": False}
        assert moment["time"] == write_stream_time(base + 12)
        assert moment["score"] == pytest.approx(1, abs=0.01)
        assert moment["frame_url"] == f"/v1/sources/{stream.id}/frames/{moment['time']}"


async def test_search_by_text_stays_inside_its_ranges(parts, client):
    stream, base = await parts.stream(range(30))
    video = await parts.video(range(5), duration_s=5)
    sources = [stream_range(stream, base + 3, base + 9), {"video_id": video.id, "start": 1, "end": 3}]
    found = (await client.post("/v1/search", json={"query": "a red car", "sources": sources})).json()["data"]
    assert found
    for moment in found:
        if moment["source_id"] == video.id:
            assert 1 <= moment["start"] <= moment["time"] < moment["end"] <= 3
        else:
            assert write_stream_time(base + 3) <= moment["time"] < write_stream_time(base + 9)
    nothing = await client.post("/v1/search", json={"query": "a red car", "sources": sources, "min_score": 1})
    assert nothing.json()["data"] == []


async def test_a_search_tells_how_much_it_could_not_look_at_in_time(parts):
    stream, _ = await parts.stream(range(30))
    reader = RangeReader(parts.timeline, parts.keyframes, parts.sources, live_lag_s=5, now=lambda: parts.now)
    hurried = Finder(reader, parts.compressor, Moments(parts.timeline, StoreSettings(moments_patience_s=1e-9)))
    wanted = SearchRequest.model_validate({"query": "a red car", "sources": [stream.id]})
    found = await hurried.find(wanted)
    assert (found.data, found.coverage.model_dump()) == (
        [],
        {"frames_kept": 30, "frames_searched": 0, "partial": True},
    )


async def test_bad_searches_are_refused(parts, client):
    stream, _ = await parts.stream([0])
    cases = [
        ({"sources": [stream.id]}, (422, "validation_failed")),
        ({"query": "a", "image": "b", "sources": [stream.id]}, (422, "validation_failed")),
        ({"query": "a", "sources": []}, (422, "validation_failed")),
        ({"query": "a", "sources": [stream.id], "top_k": 0}, (422, "validation_failed")),
        ({"image": "not base64!", "sources": [stream.id]}, (422, "validation_failed")),
        ({"image": base64.b64encode(b"GIF89a").decode(), "sources": [stream.id]}, (422, "validation_failed")),
        (
            {"image": base64.b64encode(b"\xff\xd8\xffbroken").decode(), "sources": [stream.id]},
            (415, "unsupported_media"),
        ),
        ({"query": "a", "sources": ["str_000000000000"]}, (404, "stream_not_found")),
        ({"query": "a", "sources": ["vid_000000000000"]}, (404, "video_not_found")),
    ]
    for body, expected in cases:
        assert code(await client.post("/v1/search", json=body)) == expected, body


async def test_a_timeline_counts_frames_a_bucket_and_names_gaps(parts, client):
    stream, base = await parts.stream([0, 1, 2, 3, 12, 13])
    params = {"start": write_stream_time(base), "end": write_stream_time(base + 25), "resolution_s": 10}
    told = (await client.get(f"/v1/sources/{stream.id}/timeline", params=params)).json()
    assert [(bucket["frames"], bucket["slots"]) for bucket in told["buckets"]] == [(4, 10), (2, 10), (0, 5)]
    assert [bucket["start"] for bucket in told["buckets"]] == [write_stream_time(base + at) for at in (0, 10, 20)]
    assert [gap["reason"] for gap in told["gaps"]] == ["stream_down", "stream_down"]
    whole = (await client.get(f"/v1/sources/{stream.id}/timeline")).json()
    assert (whole["start"], whole["end"]) == (write_stream_time(base), write_stream_time(base + 14))


async def test_a_frame_is_the_keyframe_of_its_slot(parts, client):
    stream, base = await parts.stream([0, 5])
    path = f"/v1/sources/{stream.id}/frames"
    for time in (write_stream_time(base + 5), write_stream_time(base + 5.9)):
        frame = await client.get(f"{path}/{time}")
        assert frame.content == keyframe(base + 5, parts.encoder.input_size_px)
        assert frame.headers["x-frame-time"] == write_stream_time(base + 5.25)
    missing = await client.get(f"{path}/{write_stream_time(base + 3)}")
    assert code(missing) == (404, "frame_not_kept")
    assert missing.json()["error"]["details"] == {
        "nearest_before": write_stream_time(base),
        "nearest_after": write_stream_time(base + 5),
    }
    for never in ("now", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-12:00", "9999-12-31T23:59:59.999999Z"):
        assert code(await client.get(f"{path}/{never}")) == (422, "bad_time_range"), never
    end = {"start": "9999-12-31T23:59:00Z", "end": "9999-12-31T23:59:59Z"}
    assert (await client.get(f"/v1/sources/{stream.id}/timeline", params=end)).status_code == 200


async def test_times_of_videos_are_seconds(parts, client):
    video = await parts.video([0, 1, 2], duration_s=3)
    frame = await client.get(f"/v1/sources/{video.id}/frames/1.5")
    assert frame.headers["x-frame-time"] == "1.25"
    told = (await client.get(f"/v1/sources/{video.id}/timeline", params={"start": 0, "end": 3})).json()
    assert (told["start"], told["end"], told["gaps"]) == (0, 3, [])
    assert code(await client.get(f"/v1/sources/{video.id}/frames/1e308")) == (422, "bad_time_range")
    for bad in (
        {"start": "nan"},
        {"start": -1},
        {"end": 0},
        {"end": 1e308, "resolution_s": 0.01},
        {"start": 2, "end": 1},
        {"start": "2026-07-01T06:00:00Z"},
    ):
        assert code(await client.get(f"/v1/sources/{video.id}/timeline", params=bad)) == (422, "bad_time_range"), bad
    fine = {"start": 0, "end": 3e6, "resolution_s": 0.01}
    assert code(await client.get(f"/v1/sources/{video.id}/timeline", params=fine)) == (422, "validation_failed")
