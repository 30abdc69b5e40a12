"""One real run of the whole service: real cameras, real files, real HTTP, every deployment on Ray Serve."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from compressor_service import preprocess
from compressor_service.llava_mini import LlavaMini
from compressor_service.llava_mini.prompt import Prompt
from deploy.bodies import Range
from deploy.client import Client
from deploy.transfer import export_timeline, import_timeline
from ingest.sample_camera import SampleCamera
from tests.ingest_parts import free_port, real_clip
from tests.service import (
    PATIENCE_S,
    RunningService,
    kill_replica,
    processes_of,
    running_service,
    start_service,
    wait_until,
)

pytestmark = pytest.mark.alone

PASSWORD = "s3cret/p@ss w#rd"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with running_service(tmp_path_factory.mktemp("service")) as service:
        yield service


@pytest.fixture(scope="module")
def client(service: RunningService) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def street(client: httpx.Client) -> Iterator[str]:
    """The id of a stream that has brought at least twelve frames of a real clip."""
    with SampleCamera(real_clip("bikes")) as camera:
        made = client.post("/v1/streams?wait=30", json={"name": "street", "url": camera.url}).json()
        assert made["state"] == "online", made
        wait_until(lambda: frames_of(client, made["id"]) >= 12)
        yield made["id"]


@pytest.fixture(scope="module")
def bikes(client: httpx.Client) -> str:
    """The id of an uploaded real video of ten seconds."""
    with real_clip("bikes").open("rb") as file:
        made = client.post("/v1/videos", files={"file": ("bikes.mp4", file, "video/mp4")})
    assert made.status_code == 202, made.text
    return finished(client, made.json()["id"])["id"]


def frames_of(client: httpx.Client, source_id: str) -> int:
    timeline = client.get(f"/v1/sources/{source_id}/timeline", params={"resolution_s": 3600}).json()
    return sum(bucket["frames"] for bucket in timeline["buckets"])


def finished(client: httpx.Client, video_id: str) -> dict[str, Any]:
    def video() -> dict[str, Any] | None:
        body: dict[str, Any] = client.get(f"/v1/videos/{video_id}").json()
        return body if body["status"] in ("ready", "failed") else None

    return wait_until(video)


def ask(client: httpx.Client, source: dict[str, Any], **more: Any) -> httpx.Response:
    body = {"question": "What happens here?", "sources": [source], "max_output_tokens": 12} | more
    return client.post("/v1/questions", json=body)


def error_of(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def events_of(response: httpx.Response) -> Iterator[tuple[str, Any]]:
    name = ""
    for line in response.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            data = line.removeprefix("data: ")
            yield name, data if data == "[DONE]" else json.loads(data)


def offline(service: RunningService, question: str, pictures: list[bytes], tokens: int) -> tuple[str, int]:
    """Answer from the pictures alone, with the whole model in this process."""
    folder = service.data_dir.parent / "untrained-model"
    model, prompt = LlavaMini.from_pretrained(folder), Prompt.from_pretrained(folder)
    ids = torch.tensor([prompt.build(question)])
    size, ratio = model.config.image_size, model.config.resolution_ratio
    pixels = torch.stack([preprocess.pixels(one, image_size=size, ratio=ratio) for one in pictures])[None]
    [made] = model.generate(model.inputs_embeds(ids, pixels), tokens, stop_ids=prompt.stop_ids).tolist()
    kept = [one for one in made if one not in prompt.stop_ids]
    return prompt.decode(kept), len(kept)


# The whole way of a picture


def test_every_part_is_ready_and_the_model_says_that_it_is_untrained(client):
    ready = client.get("/v1/health/ready")
    assert (ready.status_code, set(ready.json()["parts"])) == (200, {"redis", "segments", "compressor", "qa", "ingest"})
    assert client.get("/v1/health/live").status_code == 200
    [model] = client.get("/v1/models").json()["data"]
    assert model["untrained"]
    assert "no meaning" in model["note"]
    assert (model["tokens_per_frame"], len(model["fingerprint"])) == (1, 16)


def test_an_exact_answer_about_a_video_is_the_offline_models_id_for_id(service, client, bikes):
    answer = ask(client, {"video_id": bikes, "start": 2, "end": 8}, text_fusion="exact").json()
    pictures = [client.get(f"/v1/sources/{bikes}/frames/{second}").content for second in range(2, 8)]
    text, tokens = offline(service, "What happens here?", pictures, 12)
    assert (answer["answer"], answer["usage"]["completion_tokens"]) == (text, tokens)
    assert answer["coverage"] == {
        "slots_expected": 6,
        "frames_used": 6,
        "stride": 1,
        "text_fusion": "exact",
        "fusion_frames": 6,
        "partial": False,
        "gaps": [],
        "notes": [],
    }


def test_a_video_and_a_camera_come_back_from_files_and_answer_the_same(service, client, bikes, street, tmp_path):
    end = datetime.now(UTC) - timedelta(seconds=8)
    ranges = [Range(source_id=bikes), Range(source_id=street, end=end)]
    with Client(service.url) as portable:
        for wanted in ranges:
            held = export_timeline(portable, wanted, tmp_path / "held.tar")
            copy = import_timeline(portable, tmp_path / "held.tar", name="a copy")
            asked = held.range(copy.id).body()
            theirs, ours = (
                ask(client, asked | {name: source_id for name in asked if name.endswith("_id")}).json()
                for source_id in (wanted.source_id, copy.id)
            )
            assert copy.frames == ours["coverage"]["frames_used"] > 0
            assert (theirs["answer"], theirs["coverage"]["frames_used"]) == (ours["answer"], copy.frames)


def test_an_exact_answer_about_a_camera_is_the_offline_models_id_for_id(service, client, street):
    timeline = client.get(f"/v1/sources/{street}/timeline", params={"resolution_s": 1}).json()
    kept = [bucket["start"] for bucket in timeline["buckets"] if bucket["frames"]][:8]
    end = datetime.fromisoformat(kept[-1]) + timedelta(seconds=1)
    source = {"stream_id": street, "start": kept[0], "end": end.isoformat()}
    answer = ask(client, source, text_fusion="exact").json()
    pictures = [client.get(f"/v1/sources/{street}/frames/{time}").content for time in kept]
    text, tokens = offline(service, "What happens here?", pictures, 12)
    assert (answer["answer"], answer["usage"]["completion_tokens"]) == (text, tokens)
    assert answer["coverage"]["frames_used"] == len(kept)


def test_citations_lie_inside_the_frames_used_and_show_their_picture(client, bikes):
    answer = ask(client, {"video_id": bikes, "start": 3, "end": 9}).json()
    assert answer["citations"]
    for citation in answer["citations"]:
        assert 3 <= citation["time"] < 9
        picture = client.get(citation["frame_url"])
        assert (picture.status_code, picture.headers["content-type"]) == (200, "image/jpeg")
        assert 0 <= float(picture.headers["x-frame-time"]) - citation["time"] < 1


def test_an_answer_streams_as_events_and_says_at_the_end_what_it_rests_on(client, bikes):
    body = {"question": "What happens?", "sources": [{"video_id": bikes, "start": 0, "end": 9}], "stream": True}
    with client.stream("POST", "/v1/questions", json=body | {"max_output_tokens": 8}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = list(events_of(response))
    names = [name for name, _ in events]
    assert names[0] == "answer.created"
    assert names.count("answer.delta") >= 1
    assert events[-1][1] == "[DONE]"
    completed = next(data for name, data in events if name == "answer.completed")
    assert completed["coverage"]["frames_used"] == 9
    assert completed["usage"]["prompt_tokens_details"]["video_tokens"] == 9


def test_a_client_that_goes_away_ends_the_generation(client, bikes):
    def cancelled() -> float:
        lines = client.get("/metrics").text.splitlines()
        return next((float(one.split()[-1]) for one in lines if '_total{event="answers_cancelled"}' in one), 0.0)

    before = cancelled()
    body = {"question": "Go on and on?", "sources": [{"video_id": bikes, "start": 0, "end": 9}], "stream": True}
    with client.stream("POST", "/v1/questions", json=body | {"max_output_tokens": 1024}) as response:
        next(event for event in events_of(response) if event[0] == "answer.delta")
    wait_until(lambda: cancelled() > before)


def test_one_question_may_span_a_camera_and_a_video(client, street, bikes):
    now = datetime.now(UTC)
    live = {"stream_id": street, "start": (now - timedelta(minutes=5)).isoformat(), "end": now.isoformat()}
    answer = client.post(
        "/v1/questions",
        json={
            "question": "Which is which?",
            "sources": [live, {"video_id": bikes, "start": 0, "end": 5}],
            "max_output_tokens": 4,
        },
    ).json()
    assert answer["coverage"]["frames_used"] >= 12 + 5
    reasons = {gap["reason"] for gap in answer["coverage"]["gaps"] if gap["source_id"] == street}
    assert "not_registered" in reasons


def test_search_finds_moments_of_the_sources_asked(client, street, bikes):
    found = client.post("/v1/search", json={"query": "a bike", "sources": [bikes], "top_k": 3}).json()["data"]
    assert found
    assert {one["source_id"] for one in found} == {bikes}
    assert all(0 <= one["start"] <= one["time"] < one["end"] <= 11 for one in found)


def test_the_command_line_lists_and_asks(service, street, bikes):
    def tokenline(*arguments: str) -> str:
        command = [Path(sys.executable).with_name("tokenline"), *arguments, "--url", service.url]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout

    assert street in tokenline("streams", "list")
    answered = tokenline("ask", "What happens?", "--video", f"{bikes}@0..9", "--max-output-tokens", "4")
    assert "coverage: 9 of 9 slots" in answered


# Deleting


def test_a_deleted_camera_stops_and_its_memory_stays_until_it_is_purged(client):
    with SampleCamera(real_clip("carphone_pristine")) as camera:
        made = client.post("/v1/streams?wait=30", json={"name": "short", "url": camera.url}).json()
        assert made["state"] == "online"
        assert client.delete(f"/v1/streams/{made['id']}").json()["deleted"]
        assert error_of(client.get(f"/v1/streams/{made['id']}")) == (404, "stream_not_found")
        assert frames_of(client, made["id"]) >= 1
        again = client.post("/v1/streams?wait=30", json={"name": "short", "url": camera.url}).json()
        assert again["state"] == "online"
        purged = client.delete(f"/v1/streams/{again['id']}", params={"purge": "true"}).json()
        assert purged["purged_frames"] >= 1
        assert client.get(f"/v1/sources/{again['id']}/timeline").status_code == 404


# Bad input


def test_a_camera_is_looked_at_before_it_is_registered(client):
    with SampleCamera(real_clip("bikes")) as camera:
        seen = client.post("/v1/streams/probe", json={"url": camera.url}).json()
    assert (seen["codec"], seen["width"], seen["height"]) == ("h264", 640, 272)
    gone = client.post("/v1/streams/probe", json={"url": camera.url, "username": "u", "password": PASSWORD})
    assert (gone.status_code, gone.json()["error"]["code"]) == (502, "rtsp_unreachable")
    assert PASSWORD not in gone.text


def test_a_camera_that_nobody_serves_is_tried_again_and_says_when(client):
    made = client.post("/v1/streams", json={"name": "nobody", "url": f"rtsp://127.0.0.1:{free_port()}/x"})
    assert made.status_code == 201
    path = f"/v1/streams/{made.json()['id']}"

    def retrying() -> dict[str, Any] | None:
        health: dict[str, Any] = client.get(f"{path}/health").json()
        return health if health["next_retry_at"] else None

    health = wait_until(retrying)
    assert health["state"] == "reconnecting"
    assert health["reason"]
    client.delete(path)


def test_a_text_file_named_mp4_is_unsupported_media(client):
    files = {"file": ("film.mp4", b"this is no film\n" * 100, "video/mp4")}
    assert error_of(client.post("/v1/videos", files=files)) == (415, "unsupported_media")


def test_a_truncated_file_is_refused_or_remembered_as_far_as_it_goes(client):
    whole = real_clip("bigbuckbunny").read_bytes()
    made = client.post("/v1/videos", files={"file": ("cut.mp4", whole[: len(whole) * 2 // 3], "video/mp4")})
    if made.status_code == 415:  # the index of this file stands at its end
        assert error_of(made) == (415, "unsupported_media")
        return
    video = finished(client, made.json()["id"])
    assert video["status"] == "ready"
    assert 0 < frames_of(client, video["id"]) < 6


def test_an_empty_range_tells_the_nearest_frames(client, street):
    source = {"stream_id": street, "start": "2020-01-01T00:00:00Z", "end": "2020-01-01T01:00:00Z"}
    response = ask(client, source)
    assert error_of(response) == (422, "empty_range")
    assert "not_registered" in json.dumps(response.json()["error"]["details"])


def test_an_inverted_range_names_the_field(client, bikes):
    response = ask(client, {"video_id": bikes, "start": 8, "end": 2})
    assert error_of(response) == (422, "bad_time_range")
    assert response.json()["error"]["param"] == "sources[0].end"


def test_a_question_of_a_hundred_thousand_characters_is_refused(client, bikes):
    response = ask(client, {"video_id": bikes, "start": 0, "end": 5}, question="why " * 25_000)
    assert error_of(response) == (422, "validation_failed")


def test_unknown_sources_and_broken_json_have_their_codes(client):
    assert error_of(ask(client, {"video_id": "vid_000000000000", "start": 0, "end": 5})) == (404, "video_not_found")
    assert error_of(client.get("/v1/streams/str_000000000000")) == (404, "stream_not_found")
    broken = client.post("/v1/questions", content=b"{", headers={"content-type": "application/json"})
    assert error_of(broken) == (400, "invalid_json")


def test_a_camera_beyond_the_allowed_networks_is_refused(client):
    response = client.post("/v1/streams", json={"name": "meta", "url": "rtsp://169.254.169.254/latest"})
    assert error_of(response) == (422, "bad_url")


# Lost replicas: last, since what is lost has to be started again


def test_an_answer_whose_model_dies_ends_in_an_error_and_later_ones_are_answered(service, client, bikes):
    body = {"question": "Go on?", "sources": [{"video_id": bikes}], "max_output_tokens": 1024, "stream": True}
    with client.stream("POST", "/v1/questions", json=body) as response:
        events = events_of(response)
        next(event for event in events if event[0] == "answer.delta")
        kill_replica(service, "qa")
        *_, (name, error), (_, done) = events
    assert (name, error["error"]["code"], done) == ("error", "scaling_up", "[DONE]")

    def answered() -> bool:
        again = ask(client, {"video_id": bikes})
        if again.status_code == 200:
            return True
        assert error_of(again) in {(503, "scaling_up"), (503, "model_loading")}
        assert int(again.headers["retry-after"]) > 0
        return False

    wait_until(answered)


def test_a_start_that_is_interrupted_twice_ends_quietly_and_leaves_nothing(tmp_path):
    output = tmp_path / "output.txt"
    with output.open("w") as file:
        process = start_service(tmp_path / "data", file)
    assert process.stdout is not None
    wait_until(lambda: any("raylet" in command for command in processes_of(tmp_path / "data").values()))
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE_S) == 130
    assert (process.stdout.read(), output.read_text()) == ("", "")
    process.stdout.close()
    wait_until(lambda: not processes_of(tmp_path / "data"))
