"""The whole service runs with another model than saw what is kept, and looks at it, though it is killed."""

import asyncio
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from store.connection import EmbeddedRedis, connect
from store.source import Video
from tests.recompute_parts import Place, load
from tests.service import kill_replica, running_service, wait_until
from tests.untrained import write_untrained_checkpoint

pytestmark = pytest.mark.alone

FRAMES = 600


def test_a_new_model_remembers_what_the_old_one_saw(tmp_path):
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    before = load(write_untrained_checkpoint(tmp_path / "old-model"))
    with EmbeddedRedis.start(data_dir) as server:

        async def remember() -> Video:
            async with connect(server.url) as redis:
                return await Place(redis, data_dir).video(before, range(FRAMES))

        made = asyncio.run(remember()).id
    other = {"TOKENLINE_MODEL__CHECKPOINT": str(write_untrained_checkpoint(tmp_path / "new-model", seed=1))}
    with running_service(tmp_path, other) as service, httpx.Client(base_url=service.url, timeout=60) as client:
        wait_until(lambda: client.get("/v1/models").is_success)
        assert client.get("/v1/models").json()["data"][0]["fingerprint"] != before.format.fingerprint
        assert frames(client, made) == 0
        job = client.post("/v1/recomputations", json={}).json()["id"]
        kill_replica(service, "janitor")
        shown = wait_until(
            lambda: (body := client.get(f"/v1/recomputations/{job}").json())["status"] == "done" and body
        )
        assert (shown["frames"], shown["done"], shown["unreadable"]) == (FRAMES, FRAMES, 0)
        assert frames(client, made) == FRAMES
        asked = {"question": "what is there?", "sources": [{"video_id": made, "start": 0, "end": 50}]}
        answer = client.post("/v1/questions", json=asked | {"max_output_tokens": 4}).json()
        assert answer["coverage"]["frames_used"] == 50
        command = [Path(sys.executable).with_name("tokenline"), "recompute", made, "--wait", "--url", service.url]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "done" in told


def frames(client: httpx.Client, source_id: str) -> int:
    shown = client.get(f"/v1/sources/{source_id}/timeline", params={"resolution_s": 3600}).json()
    return sum(bucket["frames"] for bucket in shown["buckets"])
