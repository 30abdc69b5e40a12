"""The whole service while its parts are killed: everything goes on by itself, and what is missing is told."""

import os
import signal
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.ingest_parts import encode, simulated_camera, steady
from tests.service import RunningService, kill_replica, running_service, wait_until
from tests.test_store_connection import server_pid

LEASES = {"TOKENLINE_INGEST__LEASE_S": "4", "TOKENLINE_INGEST__RENEW_S": "1"}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with running_service(tmp_path_factory.mktemp("service"), LEASES) as service:
        yield service


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
    clip = encode(tmp_path / "clip.mp4", steady(100))
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
        assert frames(client, made) == 1000
        gaps = timeline(client, stream)["gaps"]
    assert {gap["reason"] for gap in gaps} <= {"stream_down", "not_registered"}  # between two owners, before the first
    assert client.get("/v1/health/ready").status_code == 200
