"""Recomputations over REST and from the command line: what is asked for, how far it is, and what is refused."""

import asyncio
import json
from collections.abc import Callable

import numpy as np
import pytest

from compressor_service.encoder import Encoder
from compressor_service.recompute import Recomputer
from deploy.cli import run_command
from qa_service.clock import parse_stream_time, write_stream_time
from qa_service.recomputing import BEGINS_WITHIN_S
from qa_service.settings import ApiSettings
from store.format import HOUR_SLOTS
from store.memory import Memory
from store.recomputations import facts
from store.room import Room
from store.source import NewVideo, VideoStatus
from tests.qa_http import serving
from tests.qa_parts import Parts, open_parts
from tests.recompute_parts import Place, load, work
from tests.test_api_service import api_key, bearer, code
from tests.untrained import write_untrained_checkpoint

SLOTS = list(range(20))


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    """The model that saw everything; the one that runs is another."""
    return load(write_untrained_checkpoint(tmp_path_factory.mktemp("old"), seed=1))


@pytest.fixture
async def parts(redis, checkpoint, tmp_path):
    async with open_parts(redis, checkpoint, tmp_path) as parts:
        yield parts


@pytest.fixture
async def client(parts):
    async with parts.client() as client:
        yield client


@pytest.fixture
def place(redis, tmp_path) -> Place:
    return Place(redis, tmp_path)


def recomputer(parts: Parts) -> Recomputer:
    memory = Memory(parts.redis, parts.segments, parts.keyframes)
    room = Room((parts.uploads.parent,), 0)
    return Recomputer(parts.redis, parts.sources, memory, parts.timeline, parts.writer, room=room, settle_s=600)


async def frames(client, source_id: str) -> int:
    timeline = (await client.get(f"/v1/sources/{source_id}/timeline")).json()
    return sum(bucket["frames"] for bucket in timeline["buckets"])


async def test_what_is_asked_for_is_done_in_the_background_and_shown(parts, client, place, old):
    video = await place.video(old, SLOTS)
    assert await frames(client, video.id) == 0
    asked = await client.post("/v1/recomputations", json={"sources": [video.id]})
    assert asked.status_code == 202
    body = asked.json()
    assert (body["object"], body["status"], body["progress"], body["frames"]) == ("recomputation", "queued", 0.0, 0)
    assert (body["model"], body["fingerprint"]) == ("small", parts.encoder.format.fingerprint)
    await work(recomputer(parts))
    shown = (await client.get(f"/v1/recomputations/{body['id']}")).json()
    assert (shown["status"], shown["progress"], shown["eta_s"], shown["waiting_until"]) == ("done", 1.0, None, None)
    per_source = {"source_id": video.id, "frames": 20, "done": 20, "unreadable": 0, "dropped": 0}
    assert shown["sources"] == [per_source]
    assert (shown["frames"], shown["done"], shown["unreadable_frames"]) == (20, 20, [])
    assert await frames(client, video.id) == 20
    listed = (await client.get("/v1/recomputations")).json()
    assert listed == {"object": "list", "data": [shown], "has_more": False, "next_cursor": None}
    picture = await client.get(f"/v1/sources/{video.id}/frames/3")
    assert (picture.status_code, picture.headers["X-Frame-Time"]) == (200, "3.25")


async def test_until_then_what_another_model_saw_is_a_gap_that_says_so(parts, client, place, old):
    stream = await place.stream()
    base = int(parts.now) - 3 * HOUR_SLOTS
    await place.see(old, stream.id, [base + slot for slot in (0, 1, 2, 5)])
    await parts.keep(stream.id, [base + 1])
    times = {"start": write_stream_time(base), "end": write_stream_time(base + 6)}

    async def gaps() -> list[tuple[int, str]]:
        shown = (await client.get(f"/v1/sources/{stream.id}/timeline", params=times)).json()["gaps"]
        return [(int(parse_stream_time(gap["start"])) - base, gap["reason"]) for gap in shown]

    before_it_was_registered = (3, "not_registered")
    assert await gaps() == [(0, "other_model"), (2, "other_model"), before_it_was_registered, (5, "other_model")]
    asked = {"question": "what is there?", "sources": [{"stream_id": stream.id, "start": times["start"]}]}
    asked["sources"][0]["end"] = write_stream_time(base + 1)
    empty = await client.post("/v1/questions", json=asked)
    assert code(empty) == (422, "empty_range")
    assert [gap["reason"] for gap in empty.json()["error"]["details"]["sources"][0]["gaps"]] == ["other_model"]
    told = (await client.get(f"/v1/sources/{stream.id}/export", params=times)).json()["gaps"]
    assert {gap["reason"] for gap in told} == {"not_registered"}  # where it goes nobody ever saw them
    await client.post("/v1/recomputations", json={})
    await work(recomputer(parts))
    assert await gaps() == [before_it_was_registered]


async def test_without_sources_everything_is_meant(parts, client, place, old):
    video, stream = await place.video(old, SLOTS), await place.stream()
    now = int(stream.created_at)
    await place.see(old, stream.id, [now - 2 * HOUR_SLOTS])
    body = (await client.post("/v1/recomputations", json={})).json()
    assert {one["source_id"] for one in body["sources"]} == {video.id, stream.id}
    await work(recomputer(parts))
    assert await frames(client, video.id) == 20
    assert await frames(client, stream.id) == 1


async def test_a_source_that_is_still_imported_is_not_meant(parts, client, place, old):
    new = NewVideo(name="on its way", file="a.mp4")
    await place.sources.add_hidden_video("vid_hidden", new, VideoStatus(status="ready", progress=1.0))
    assert (await client.post("/v1/recomputations", json={})).json()["sources"] == []
    named = await client.post("/v1/recomputations", json={"sources": ["vid_hidden"]})
    assert code(named) == (404, "video_not_found")


async def test_ranges_are_told_in_the_clock_of_their_source(parts, client, place, old):
    video, stream = await place.video(old, SLOTS), await place.stream()
    base = int(stream.created_at) - 3 * HOUR_SLOTS
    await place.see(old, stream.id, [base, base + 1, base + 2])
    wanted = [
        {"video_id": video.id, "start": 5, "end": 7},
        {"stream_id": stream.id, "start": write_stream_time(base + 1), "end": write_stream_time(base + 2)},
    ]
    await client.post("/v1/recomputations", json={"sources": wanted})
    await work(recomputer(parts))
    assert (await parts.timeline.slots(video.id, 0, 100)).tolist() == [5, 6]
    assert (await parts.timeline.slots(stream.id, 0, 1 << 40)).tolist() == [base + 1]


async def test_the_time_left_and_what_is_waited_for_are_told(parts, client, place, old):
    stream = await place.stream()
    now = int(stream.created_at)
    await place.see(old, stream.id, [now])
    body = (await client.post("/v1/recomputations", json={"sources": [stream.id]})).json()
    await work(recomputer(parts))
    waiting = (await client.get(f"/v1/recomputations/{body['id']}")).json()
    over_s = (now // HOUR_SLOTS + 1) * HOUR_SLOTS + 600
    assert (waiting["status"], waiting["waiting_until"]) == ("running", write_stream_time(over_s))
    assert waiting["eta_s"] == max(over_s - parts.now, 0)
    job = await place.jobs.update(body["id"], facts(resumes_at=None, frames_per_s=4.0))
    assert job is not None
    assert (await client.get(f"/v1/recomputations/{body['id']}")).json()["eta_s"] == 0.2  # one frame, rounded


async def test_pictures_that_cannot_be_decoded_are_named_by_their_time(parts, client, place, old):
    video = await place.video(old, SLOTS)
    await place.keyframes.put(video.id, 4, b"no picture")
    body = (await client.post("/v1/recomputations", json={"sources": [video.id]})).json()
    await work(recomputer(parts))
    shown = (await client.get(f"/v1/recomputations/{body['id']}")).json()
    assert (shown["status"], shown["done"], shown["unreadable"]) == ("done", 19, 1)
    assert shown["unreadable_frames"] == [{"source_id": video.id, "time": 4.0}]
    [gap] = (await client.get(f"/v1/sources/{video.id}/timeline")).json()["gaps"]
    assert gap == {"start": 4.0, "end": 5.0, "reason": "decode_error"}
    await client.delete(f"/v1/videos/{video.id}")
    assert (await client.get(f"/v1/recomputations/{body['id']}")).json()["unreadable_frames"] == []


async def test_a_recomputation_is_cancelled_once_and_for_all(parts, client, place, old):
    video = await place.video(old, SLOTS)
    path = f"/v1/recomputations/{(await client.post('/v1/recomputations', json={})).json()['id']}"
    cancelled = await client.delete(path)
    assert (cancelled.status_code, cancelled.json()["status"]) == (200, "cancelled")
    assert cancelled.json()["ended_at"] is not None
    assert (await client.delete(path)).json() == cancelled.json()
    await work(recomputer(parts))
    assert await frames(client, video.id) == 0
    done = f"/v1/recomputations/{(await client.post('/v1/recomputations', json={})).json()['id']}"
    await work(recomputer(parts))
    assert code(await client.delete(done)) == (409, "state_conflict")


async def test_a_wish_that_no_service_of_its_model_takes_says_so(parts, client, place, old):
    job = await place.ask(old)
    await place.jobs.update(job.id, facts(created_at=parts.now - BEGINS_WITHIN_S - 1))
    told = (await client.get(f"/v1/recomputations/{job.id}")).json()
    assert told["status"] == "queued"
    assert old.format.fingerprint in told["reason"]
    await place.recomputer(old).step()
    assert (await client.get(f"/v1/recomputations/{job.id}")).json()["reason"] is None


async def test_the_same_key_asks_once(client, place, old):
    video = await place.video(old, SLOTS)
    headers = {"Idempotency-Key": "again"}
    first = await client.post("/v1/recomputations", json={"sources": [video.id]}, headers=headers)
    second = await client.post("/v1/recomputations", json={"sources": [video.id]}, headers=headers)
    assert first.json() == second.json()
    assert len((await client.get("/v1/recomputations")).json()["data"]) == 1
    other = await client.post("/v1/recomputations", json={}, headers=headers)
    assert code(other) == (409, "state_conflict")


@pytest.mark.parametrize(
    ("body", "told", "param"),
    [
        ({"sources": ["str_nobody"]}, (404, "stream_not_found"), None),
        ({"sources": ["vid_nobody"]}, (404, "video_not_found"), None),
        ({"sources": [{"stream_id": "vid_nobody"}]}, (404, "stream_not_found"), None),
        ({"sources": [{"video_id": "vid_1", "start": "now"}]}, (422, "bad_time_range"), "sources[0].start"),
        ({"sources": []}, (422, "validation_failed"), "sources"),
        ({"sources": [{}]}, (422, "validation_failed"), "sources[0]"),
        ({"sources": "all"}, (422, "validation_failed"), "sources"),
        ({"drop_old": "perhaps"}, (422, "validation_failed"), "drop_old"),
        ({"model": "another"}, (422, "validation_failed"), "model"),
        ({"sources": ["str_x"] * 1001}, (422, "validation_failed"), "sources"),
    ],
    ids=str,
)
async def test_what_cannot_be_recomputed_is_refused_by_name(client, body, told, param):
    response = await client.post("/v1/recomputations", json=body)
    assert code(response) == told
    assert response.json()["error"]["param"] == param
    assert (await client.get("/v1/recomputations")).json()["data"] == []


async def test_a_range_that_ends_before_it_begins_is_refused(client, place, old):
    video = await place.video(old, SLOTS)
    body = {"sources": [{"video_id": video.id, "start": 7, "end": 7}]}
    assert code(await client.post("/v1/recomputations", json=body)) == (422, "bad_time_range")


async def test_an_unknown_recomputation_is_told(client):
    for method in ("GET", "DELETE"):
        response = await client.request(method, "/v1/recomputations/rec_nobody")
        assert code(response) == (404, "recomputation_not_found")


async def test_only_an_operator_may_ask_and_only_for_what_the_key_sees(redis, checkpoint, tmp_path, place, old):
    keys = [api_key("writer", "streams:read", "streams:write", "ask"), api_key("boss", "admin")]
    first, second = await place.video(old, SLOTS), await place.video(old, SLOTS, name="other.mp4")
    keys.append(api_key("tenant", "admin", sources=[first.id]))
    async with open_parts(redis, checkpoint, tmp_path, api=ApiSettings(keys=keys)) as parts, parts.client() as client:
        for method, path in (("POST", ""), ("GET", ""), ("GET", "/rec_1"), ("DELETE", "/rec_1")):
            body = {"json": {}} if method == "POST" else {}
            refused = await client.request(method, f"/v1/recomputations{path}", headers=bearer("writer"), **body)
            assert code(refused) == (403, "scope_missing")
        tenant, boss = bearer("tenant"), bearer("boss")
        own = (await client.post("/v1/recomputations", json={}, headers=tenant)).json()
        assert [one["source_id"] for one in own["sources"]] == [first.id]
        forbidden = await client.post("/v1/recomputations", json={"sources": [second.id]}, headers=tenant)
        assert code(forbidden) == (403, "source_forbidden")
        whole = (await client.post("/v1/recomputations", json={}, headers=boss)).json()
        for method in ("GET", "DELETE"):
            unseen = await client.request(method, f"/v1/recomputations/{whole['id']}", headers=tenant)
            assert code(unseen) == (403, "source_forbidden")
        listed = (await client.get("/v1/recomputations", headers=tenant)).json()["data"]
        assert [one["id"] for one in listed] == [own["id"]]
        listed = (await client.get("/v1/recomputations", headers=boss)).json()["data"]
        assert [one["id"] for one in listed] == [whole["id"], own["id"]]


# The command line


@pytest.fixture
def service(redis_url, checkpoint, tmp_path):
    with serving(redis_url, checkpoint, tmp_path, ApiSettings()) as running:
        yield running


@pytest.fixture
def tokenline(service, monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.setenv("TOKENLINE_URL", service.url)
    monkeypatch.delenv("TOKENLINE_API_KEY", raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        code = run_command(list(arguments))
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


def test_the_command_line_asks_waits_lists_shows_and_cancels(service, tokenline, tmp_path, old):
    place = Place(service.parts.redis, tmp_path)
    video = service.do(place.video(old, SLOTS))
    worker = recomputer(service.parts)

    async def begin() -> asyncio.Task[None]:
        return asyncio.create_task(worker.run())

    async def end(task: asyncio.Task[None]) -> None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    code, out, err = tokenline("recompute", "--json", video.id)
    assert (code, err) == (0, "")
    waiting = json.loads(out)
    assert waiting["status"] == "queued"
    assert tokenline("recomputations", "cancel", waiting["id"])[:1] == (0,)
    code, out, err = tokenline("recompute", f"{video.id}@0:05..0:09")
    assert code == 0
    assert "queued" in out
    task = service.do(begin())
    code, out, err = tokenline("recompute", video.id, "--from", "2", "--to", "0:18", "--wait", "--json")
    service.do(end(task))
    assert code == 0
    done = json.loads(out)
    assert (done["status"], done["frames"]) == ("done", 12)  # the wish before made four of sixteen
    assert service.do(service.parts.timeline.slots(video.id, 0, 100)).tolist() == SLOTS[2:18]
    tokens = service.do(service.parts.timeline.read(video.id, np.arange(2, 18)))
    assert tokens.shape == (16, *service.parts.encoder.format.token_shape)
    code, out, _ = tokenline("recomputations", "list")
    assert out.count("rec_") == 3
    assert "cancelled" in out
    code, out, _ = tokenline("recomputations", "show", done["id"])
    assert (code, video.id in out) == (0, True)
    code, out, err = tokenline("recomputations", "cancel", done["id"])
    assert (code, out) == (1, "")
    assert "state_conflict" in err


def test_waiting_for_what_is_cancelled_is_an_error(service, tokenline, tmp_path, old):
    place = Place(service.parts.redis, tmp_path)
    service.do(place.video(old, SLOTS))

    async def cancel_soon() -> None:
        for _ in range(500):
            if jobs := await place.jobs.everything():
                await place.jobs.cancel(jobs[0].id)
                return
            await asyncio.sleep(0.02)

    async def begin() -> asyncio.Task[None]:
        return asyncio.create_task(cancel_soon())

    task = service.do(begin())
    code, out, err = tokenline("recompute", "--wait")
    assert task.done()
    assert (code, out) == (1, "")
    assert "cancelled" in err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--from", "2d"], "name the streams or videos"),
        (["str_a", "vid_b", "--to", "1h"], "ID@START..END"),
        (["vid_a", "--from", "yesterday"], "'yesterday'"),
        (["str_a@1:30"], "ID@START..END"),
    ],
)
def test_a_command_line_that_cannot_be_meant_asks_for_nothing(tokenline, arguments, told):
    code, out, err = tokenline("recompute", *arguments)
    assert (code, out) == (2, "")
    assert told in err
    assert "no recomputations" in tokenline("recomputations", "list")[1]
