"""The whole service while its parts are killed: everything goes on by itself, and what is missing is told."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.ingest_parts import encode, simulated_camera, steady
from tests.service import RunningService, running_service
from tests.test_store_connection import server_pid

PATIENCE_S = 120
LEASES = {"TOKENLINE_INGEST__LEASE_S": "4", "TOKENLINE_INGEST__RENEW_S": "1"}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with running_service(tmp_path_factory.mktemp("service"), LEASES) as service:
        yield service


@pytest.fixture(scope="module")
def client(service: RunningService) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, timeout=60) as client:
        yield client


def kill(service: RunningService, deployment: str) -> None:
    """End the one replica of a deployment as the kernel does when memory runs out."""
    mine = f"TOKENLINE_STORE__DATA_DIR={service.data_dir}".encode()
    replicas = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            title = (process / "cmdline").read_bytes()
            is_one = title.startswith(b"ray::ServeReplica:tokenline:" + deployment.encode())
            if is_one and mine in (process / "environ").read_bytes():
                replicas.append(int(process.name))
        except OSError:
            continue
    [replica] = replicas
    os.kill(replica, signal.SIGKILL)


def wait_until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, "what was waited for did not happen"
        time.sleep(0.2)
    return value


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
            lambda: kill(service, "compressor"),
            lambda: kill(service, "ingest"),
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
