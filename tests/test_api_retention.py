"""Retention over REST: setting it, what is told of what expired, and questions about times whose pictures are gone."""

import json

import numpy as np
import pytest
import torch

from qa_service.clock import write_stream_time
from store.format import HOUR_SLOTS
from store.janitor import Janitor
from store.memory import Memory
from store.settings import StoreSettings
from store.sizes import TokenHours
from tests.qa_parts import QUESTION, Parts, asked, keyframe, open_parts, stream_range, whole_model
from tests.test_api_streams import CAMERA, code

USUAL = {"hours": 168, "max_bytes": None, "keyframes": {"hours": None, "max_bytes": None}}


@pytest.fixture
async def parts(redis, checkpoint, tmp_path):
    async with open_parts(redis, checkpoint, tmp_path) as parts:
        yield parts


@pytest.fixture
async def client(parts):
    async with parts.client() as client:
        yield client


def janitor(parts: Parts, **limits: object) -> Janitor:
    settings = StoreSettings.model_validate({"data_dir": parts.uploads.parent, "seal_settle_s": 1e-3, **limits})
    return Janitor(parts.redis, parts.sources, Memory(parts.redis, parts.segments, parts.keyframes), settings)


# Setting it


@pytest.mark.parametrize(
    ("asked_for", "told"),
    [
        ({}, USUAL),
        ({"hours": 24}, {**USUAL, "hours": 24}),
        ({"max_bytes": 10**9}, {**USUAL, "max_bytes": 10**9}),
        ({"keyframes": {"hours": 24}}, {**USUAL, "keyframes": {"hours": 24, "max_bytes": None}}),
        (
            {"hours": 720.5, "max_bytes": 5, "keyframes": {"hours": 720.5, "max_bytes": 2**60}},
            {"hours": 720.5, "max_bytes": 5, "keyframes": {"hours": 720.5, "max_bytes": 2**60}},
        ),
    ],
)
async def test_a_stream_is_registered_with_limits_by_age_and_size(client, asked_for, told):
    made = await client.post("/v1/streams", json={**CAMERA, "retention": asked_for})
    assert (made.status_code, made.json()["retention"]) == (201, told)
    assert (await client.get(f"/v1/streams/{made.json()['id']}")).json()["retention"] == told


async def test_a_change_touches_only_the_limits_that_it_names(client):
    path = f"/v1/streams/{(await client.post('/v1/streams', json=CAMERA)).json()['id']}"
    expected = {"hours": 168, "max_bytes": None, "keyframes": {"hours": None, "max_bytes": None}}
    for change, result in [
        ({"max_bytes": 7}, {"max_bytes": 7}),
        ({"keyframes": {"hours": 24}}, {"keyframes": {"hours": 24, "max_bytes": None}}),
        ({"hours": 30}, {"hours": 30}),
        ({"keyframes": {"max_bytes": 9}}, {"keyframes": {"hours": 24, "max_bytes": 9}}),
        (
            {"max_bytes": None, "keyframes": {"hours": None}},
            {"max_bytes": None, "keyframes": {"hours": None, "max_bytes": 9}},
        ),
        ({}, {}),
    ]:
        expected |= result
        changed = await client.patch(path, json={"retention": change})
        assert (changed.status_code, changed.json()["retention"]) == (200, expected)


@pytest.mark.parametrize(
    ("bad", "param"),
    [
        ({"hours": -1}, "retention.hours"),
        ({"hours": None}, "retention.hours"),
        ({"hours": float("nan")}, "retention.hours"),
        ({"hours": 1e9}, "retention.hours"),
        ({"max_bytes": 0}, "retention.max_bytes"),
        ({"max_bytes": -5}, "retention.max_bytes"),
        ({"max_bytes": 1.5}, "retention.max_bytes"),
        ({"max_bytes": True}, "retention.max_bytes"),
        ({"max_bytes": "10GiB"}, "retention.max_bytes"),
        ({"max_bytes": 10**30}, "retention.max_bytes"),
        ({"keyframes": {"hours": 0}}, "retention.keyframes.hours"),
        ({"keyframes": {"hours": float("-inf")}}, "retention.keyframes.hours"),
        ({"keyframes": {"max_bytes": 0}}, "retention.keyframes.max_bytes"),
        ({"keyframes": None}, "retention.keyframes"),
        ({"keyframes": {"days": 1}}, "retention.keyframes.days"),
        ({"days": 1}, "retention.days"),
        ({"hours": 12, "keyframes": {"hours": 24}}, "retention.keyframes.hours"),
        ({"keyframes": {"hours": 169}}, "retention.keyframes.hours"),
        (5, "retention"),
    ],
)
async def test_limits_that_make_no_sense_are_refused_by_name(client, bad, param):
    as_json = {"content-type": "application/json"}
    path = f"/v1/streams/{(await client.post('/v1/streams', json={**CAMERA, 'name': 'x'})).json()['id']}"
    url = {"url": "rtsp://203.0.113.7/two"}
    for response in (
        await client.post("/v1/streams", content=json.dumps({**CAMERA, **url, "retention": bad}), headers=as_json),
        await client.patch(path, content=json.dumps({"retention": bad}), headers=as_json),
    ):
        assert code(response) == (422, "validation_failed")
        assert response.json()["error"]["param"] == param
    assert (await client.get(path)).json()["retention"] == USUAL


async def test_frames_that_would_go_before_their_pictures_are_named_with_both_times(client):
    path = f"/v1/streams/{(await client.post('/v1/streams', json=CAMERA)).json()['id']}"
    await client.patch(path, json={"retention": {"keyframes": {"hours": 48}}})
    refused = (await client.patch(path, json={"retention": {"hours": 24}})).json()["error"]
    assert refused["details"] == {"hours": 24, "keyframe_hours": 48}
    assert "lower the one or raise the other" in refused["message"]


# What is told of what is gone


async def two_hours(parts: Parts) -> tuple[str, int]:
    """A video of whose first two hours some frames are kept: its id, and where the second hour begins."""
    slots = [*range(6), *range(HOUR_SLOTS, HOUR_SLOTS + 6)]
    return (await parts.video(slots, duration_s=2 * HOUR_SLOTS)).id, HOUR_SLOTS


async def test_what_expired_is_a_gap_with_that_reason_everywhere(parts, client):
    video_id, second = await two_hours(parts)
    await janitor(parts).sweep()
    kept = (await TokenHours(parts.redis).totals([video_id]))[video_id].total
    assert (await janitor(parts, retention_max_bytes=kept - 1).sweep()).frames == 6

    whole = {"video_id": video_id, "start": 0, "end": second + 6}
    expired = {"start": 0.0, "end": float(second), "reason": "expired"}
    timeline = (await client.get(f"/v1/sources/{video_id}/timeline", params={"start": 0, "end": second + 6})).json()
    assert timeline["gaps"] == [expired]
    told = (await client.post("/v1/questions", json=asked(whole))).json()["coverage"]
    assert (told["frames_used"], told["slots_expected"]) == (6, second + 6)
    assert told["gaps"] == [{"source_id": video_id, **expired}]
    empty = await client.post("/v1/questions", json=asked({"video_id": video_id, "start": 0, "end": 60}))
    assert code(empty) == (422, "empty_range")
    [details] = empty.json()["error"]["details"]["sources"]
    assert details["gaps"] == [{"start": 0.0, "end": 60.0, "reason": "expired"}]
    assert details["nearest_after"] == second
    assert code(await client.get(f"/v1/sources/{video_id}/frames/3")) == (404, "frame_not_kept")


async def test_what_is_older_than_a_streams_retention_is_expired_before_anybody_sweeps(parts, client):
    stream, _ = await parts.stream([0, 300])
    await parts.sources.update_stream(stream.id, retention_hours=0.1)
    told = (await client.post("/v1/questions", json=asked({"stream_id": stream.id}))).json()["coverage"]
    assert [gap["reason"] for gap in told["gaps"]] == ["expired", "expired", "stream_down"]


async def test_metrics_tell_how_much_is_kept(parts, client):
    video_id, _ = await two_hours(parts)
    stream, _ = await parts.stream(range(4))
    await parts.sources.delete_stream(stream.id)  # its memory stays
    assert await parts.timeline.seal(video_id, 0)
    frame = parts.timeline.format.frame_bytes
    sealed = sum(path.stat().st_size for path in parts.uploads.parent.rglob("hours/*/*.safetensors"))
    pictures = sum(path.stat().st_size for path in parts.uploads.parent.rglob("*.jpg"))
    text = (await client.get("/metrics")).text
    for kind, size in (("tokens_redis", 10 * frame), ("tokens_sealed", sealed), ("keyframes", pictures)):
        assert f'tokenline_kept_bytes{{kind="{kind}"}} {float(size)}' in text


# Questions about times whose pictures are gone


async def half_pictured(parts: Parts) -> str:
    """The same video, of whose first hour only the frame tokens are left."""
    video_id, _ = await two_hours(parts)
    await janitor(parts).sweep()
    first = await parts.redis.hget(f"kf:{{{video_id}}}:totals", "size")
    assert (await janitor(parts, retention_max_keyframe_bytes=int(first) - 1).sweep()).keyframes == 6
    return video_id


async def test_text_is_fused_with_the_frames_whose_pictures_are_kept(parts, client):
    video_id = await half_pictured(parts)
    whole = {"video_id": video_id}
    told = (await client.post("/v1/questions", json=asked(whole))).json()
    coverage = told["coverage"]
    assert (coverage["frames_used"], coverage["text_fusion"], coverage["fusion_frames"]) == (12, "sampled", 6)
    assert coverage["gaps"] == []
    assert "Of 12 frames 6 have their pictures still" in coverage["notes"][0]
    assert parts.compressor.fused[-1] == [(video_id, tuple(range(HOUR_SLOTS, HOUR_SLOTS + 6)))]
    urls = {citation["time"]: citation["frame_url"] for citation in told["citations"]}
    assert {time for time, url in urls.items() if url is None} == {time for time in urls if time < HOUR_SLOTS} != set()
    for url in (url for url in urls.values() if url):
        assert (await client.get(url)).status_code == 200

    later = {"video_id": video_id, "start": HOUR_SLOTS, "end": HOUR_SLOTS + 6}
    coverage = (await client.post("/v1/questions", json=asked(later))).json()["coverage"]
    assert (coverage["text_fusion"], coverage["fusion_frames"], coverage["notes"]) == ("exact", 6, [])


async def test_without_any_picture_there_is_no_text_fusion_and_it_is_told(parts, client):
    video_id = await half_pictured(parts)
    early = {"video_id": video_id, "start": 0, "end": 6}
    plain = (await client.post("/v1/questions", json=asked(early, text_fusion="none"))).json()
    assert plain["coverage"]["notes"] == []
    for mode in ("auto", "sampled"):
        told = (await client.post("/v1/questions", json=asked(early, text_fusion=mode))).json()
        assert (told["coverage"]["text_fusion"], told["coverage"]["fusion_frames"]) == ("none", 0)
        assert "Of 6 frames 0 have their pictures still" in told["coverage"]["notes"][0]
        assert told["answer"] == plain["answer"]
    assert parts.compressor.fused == []


async def test_exact_fusion_is_refused_where_pictures_are_missing(parts, client):
    video_id = await half_pictured(parts)
    refused = await client.post("/v1/questions", json=asked({"video_id": video_id}, text_fusion="exact"))
    assert code(refused) == (422, "keyframes_not_kept")
    error = refused.json()["error"]
    assert (error["param"], error["details"]) == ("text_fusion", {"frames": 12, "keyframes": 6})
    later = {"video_id": video_id, "start": HOUR_SLOTS, "end": HOUR_SLOTS + 6}
    told = (await client.post("/v1/questions", json=asked(later, text_fusion="exact"))).json()
    assert told["coverage"]["text_fusion"] == "exact"


async def test_the_answer_over_half_of_the_pictures_is_that_of_these_pictures(parts, client):
    """The frames are read from their tokens, the text is averaged over the pictures that are left."""
    video_id = await half_pictured(parts)
    told = (await client.post("/v1/questions", json=asked({"video_id": video_id}))).json()
    model, prompt = whole_model(parts.checkpoint)
    side = parts.encoder.input_size_px
    pictures = [parts.encoder.decode(keyframe(slot, side)) for slot in range(HOUR_SLOTS, HOUR_SLOTS + 6)]
    ids = prompt.build(QUESTION)
    text = parts.encoder.fuse_text(ids, pictures) / np.float32(6)
    slots = np.array([*range(6), *range(HOUR_SLOTS, HOUR_SLOTS + 6)])
    assert told["answer"] == answered(model, prompt, ids, text, await parts.timeline.read(video_id, slots))


def answered(model, prompt, ids, text, tokens):
    frames = torch.from_numpy(tokens.reshape(-1, tokens.shape[-1]))
    before, tail = model.place_frames(torch.from_numpy(text), torch.tensor(ids), torch.empty(0, text.shape[1]))
    rows = torch.cat((before, frames, tail))[None]
    [made] = model.generate(rows, 12, stop_ids=prompt.stop_ids).tolist()
    return prompt.decode([one for one in made if one not in prompt.stop_ids])


@pytest.mark.parametrize("left", [None, b"", b"\xff\xd8 a part"], ids=["gone", "empty", "damaged"])
async def test_a_picture_that_goes_while_nobody_knows_of_it_is_left_out(parts, client, left):
    stream, base = await parts.stream(range(5))
    for slot in (base + 1, base + 3):
        path = next(parts.uploads.parent.rglob(f"{slot}.jpg"))
        path.unlink() if left is None else path.write_bytes(left)
    told = (await client.post("/v1/questions", json=asked(stream_range(stream, base, base + 5)))).json()["coverage"]
    assert (told["frames_used"], told["text_fusion"], told["fusion_frames"]) == (5, "sampled", 3)
    assert parts.compressor.fused[-1] == [(stream.id, (base, base + 2, base + 4))]


async def test_a_frame_without_its_picture_is_told_from_one_that_is_gone(parts, client):
    video_id = await half_pictured(parts)
    missing = await client.get(f"/v1/sources/{video_id}/frames/3")
    assert code(missing) == (404, "frame_not_kept")
    assert "only its frame token" in missing.json()["error"]["message"]
    found = (await client.post("/v1/search", json={"query": "a van", "sources": [video_id], "top_k": 20})).json()[
        "data"
    ]
    assert {moment["frame_url"] is None for moment in found} == {True, False}
    for moment in found:
        assert (moment["frame_url"] is None) == (moment["time"] < HOUR_SLOTS)


async def test_an_open_hour_whose_first_pictures_are_gone_is_sampled_from_the_others(parts, client):
    stream, base = await parts.stream(range(20))
    await parts.keyframes.expire(stream.id, base + 12)
    told = (await client.post("/v1/questions", json=asked(stream_range(stream, base, base + 20)))).json()["coverage"]
    assert (told["frames_used"], told["text_fusion"], told["fusion_frames"]) == (20, "sampled", 8)
    assert len(parts.compressor.fused) == 1  # it was known beforehand
    shown = await client.get(f"/v1/sources/{stream.id}/frames/{write_stream_time(base + 12)}")
    assert shown.status_code == 200
