"""The whole service while its parts are killed: everything goes on by itself, and what is missing is told."""

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from tests.ingest_parts import encode, real_clip, simulated_camera, steady
from tests.service import RunningService, kill_replica, running_service, wait_until
from tests.service_crashes import SETTINGS, crash
from tests.small_disk import CannotMount, fill, make_room, mounted
from tests.test_store_connection import server_pid

pytestmark = pytest.mark.alone

DISK_BYTES, SPARE_BYTES = 96 * 2**20, 8 * 2**20
QUICK = {**SETTINGS, "TOKENLINE_STORE__SPARE_BYTES": str(SPARE_BYTES)}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    folder = tmp_path_factory.mktemp("service")
    with ExitStack() as stack:
        with suppress(CannotMount):  # then the test that needs it is skipped
            stack.enter_context(mounted(folder / "data", DISK_BYTES))
        yield stack.enter_context(running_service(folder, QUICK))


@pytest.fixture(scope="module")
def client(service: RunningService) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, timeout=60) as client:
        yield client


def timeline(client: httpx.Client, source_id: str) -> dict[str, Any]:
    response = client.get(f"/v1/sources/{source_id}/timeline", params={"resolution_s": 3600})
    return response.json() if response.is_success else {"buckets": [], "gaps": []}


def frames(client: httpx.Client, source_id: str) -> int:
    return sum(bucket["frames"] for bucket in timeline(client, source_id)["buckets"])


def video(client: httpx.Client, video_id: str) -> dict[str, Any]:
    body: dict[str, Any] = client.get(f"/v1/videos/{video_id}").json()
    return body


def test_a_camera_and_a_video_outlive_compressor_ingest_and_redis(service, client, tmp_path):
    clip = encode(tmp_path / "clip.mp4", steady(60))
    with simulated_camera("--gop", "25") as cam:
        stream = client.post("/v1/streams?wait=30", json={"name": "door", "url": cam.url}).json()["id"]
        with clip.open("rb") as file:
            made = client.post("/v1/videos", files={"file": ("clip.mp4", file)}, data={"fps": "10"}).json()["id"]
        for killing in (
            lambda: kill_replica(service, "compressor"),
            lambda: kill_replica(service, "ingest"),
            lambda: os.kill(server_pid(service.data_dir), signal.SIGKILL),
        ):
            wait_until(lambda: video(client, made).get("progress", 0) > 0)
            before = frames(client, stream)
            killing()
            wait_until(lambda before=before: frames(client, stream) >= before + 3)
        done = wait_until(lambda: (body := video(client, made)).get("status") in ("ready", "failed") and body)
        assert done["status"] == "ready", done
        assert frames(client, made) == 600
        gaps = timeline(client, stream)["gaps"]
    assert {gap["reason"] for gap in gaps} <= {"stream_down", "not_registered"}  # between two owners, before the first
    assert client.get("/v1/health/ready").status_code == 200


def reasons(client: httpx.Client, stream: str) -> set[str]:
    """Return why frames of the last hour are missing, up to now and not only up to the newest frame."""
    now = datetime.now(UTC)
    span = {"start": (now - timedelta(hours=1)).isoformat(), "end": now.isoformat(), "resolution_s": 3600}
    return {gap["reason"] for gap in client.get(f"/v1/sources/{stream}/timeline", params=span).json()["gaps"]}


def readiness(client: httpx.Client) -> dict[str, Any]:
    body: dict[str, Any] = client.get("/v1/health/ready").json()
    return body


def ask(client: httpx.Client, stream: str) -> int:
    """Ask about all that is kept of a stream, and return how many frames the answer rests on."""
    question = {"question": "What happens?", "sources": [{"stream_id": stream}], "max_output_tokens": 4, "stride": 10}
    answer = client.post("/v1/questions", json=question)
    assert answer.status_code == 200, answer.text
    return int(answer.json()["coverage"]["frames_used"])


def test_a_disk_that_is_full_pauses_what_is_recorded_says_so_and_costs_nothing_that_was_kept(service, client):
    if not service.data_dir.is_mount():
        pytest.skip("a small file system cannot be mounted here")
    with simulated_camera("--gop", "10") as cam:
        registration = {"name": "gate", "url": cam.url, "fps": 10}
        stream = client.post("/v1/streams?wait=30", json=registration).json()["id"]

        def health() -> dict[str, Any]:
            body: dict[str, Any] = client.get(f"/v1/streams/{stream}/health").json()
            return body

        wait_until(lambda: frames(client, stream) >= 30)
        fill(service.data_dir, leave_bytes=SPARE_BYTES // 2)
        wait_until(lambda: "store_full" in reasons(client, stream))
        told, kept = readiness(client), frames(client, stream)
        assert (told["status"], told["parts"]["segments"], told["parts"]["redis"]) == ("unavailable", "full", "ok")
        assert "TOKENLINE_STORE__SPARE_BYTES" in told["advice"]["segments"]
        assert health()["state"] == "degraded"
        assert "make room" in health()["reason"]
        with real_clip("bikes").open("rb") as file:
            refused = client.post("/v1/videos", files={"file": ("clip.mp4", file)})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
        assert ask(client, stream) > 0

        fill(service.data_dir)  # by somebody who spares nothing: now Redis refuses as well
        wait_until(lambda: readiness(client)["parts"]["redis"] == "full")
        assert frames(client, stream) == kept
        assert ask(client, stream) > 0

        make_room(service.data_dir)
        wait_until(lambda: frames(client, stream) >= kept + 30)
        assert readiness(client) == {"status": "ok", "parts": dict.fromkeys(told["parts"], "ok"), "advice": {}}
        wait_until(lambda: "room" not in (health()["reason"] or ""))
    assert list(service.data_dir.rglob("*.tmp")) == []


def test_under_load_nothing_is_lost_when_who_seals_is_killed_or_all_of_it(service, tmp_path):
    """The short form of `make crashes`; last, because the service is another one afterwards."""
    assert crash(service, ("janitor", "everything"), 1, tmp_path).wrong == []
