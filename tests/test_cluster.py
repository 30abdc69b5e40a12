"""A Ray cluster of two nodes on this machine, deployed to as an operator deploys: `ray start`, `serve deploy`."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml

from ingest.sample_camera import SampleCamera
from store.connection import EmbeddedRedis
from tests.ingest_parts import free_port, real_clip
from tests.service import with_variable

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
PATIENCE_S = 180


@dataclass(frozen=True, slots=True)
class TwoNodes:
    """A cluster with the service on it: where its API and Ray's dashboard are."""

    api: httpx.Client
    dashboard: httpx.Client

    def nodes_of(self, deployment: str) -> list[str]:
        """Return the id of the node of every running replica of a deployment."""
        applications = self.dashboard.get("/api/serve/applications/").json()["applications"]
        replicas = applications["tokenline"]["deployments"][deployment]["replicas"]
        return [replica["node_id"] for replica in replicas if replica["state"] == "RUNNING"]


@contextmanager
def ray_node(environment: dict[str, str], log: Path, *arguments: str) -> Iterator[None]:
    """Run `ray start` in the foreground; the node is killed with the block: to end in order takes it half a minute."""
    with log.open("w") as output:
        command = [BIN / "ray", "start", "--block", "--num-cpus=4", "--object-store-memory=200000000", *arguments]
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        yield
    finally:
        while doomed := with_variable("RAY_AUTH_TOKEN", environment["RAY_AUTH_TOKEN"]):
            for number in doomed:
                with suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            time.sleep(0.05)
        process.wait()


def serve_config(folder: Path, redis_url: str, checkpoint: Path, port: int) -> Path:
    """Write deploy/serve.yaml for two small nodes: cameras are read on the one, questions answered on the other."""
    config = yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text())
    config["http_options"] |= {"host": "127.0.0.1", "port": port}
    config["proxy_location"] = "HeadOnly"
    reading, answering = {"reading": 0.01}, {"answering": 0.01}
    small = {"cpus": 0.1, "min_replicas": 1, "max_replicas": 2}
    config["applications"][0]["args"] = {
        "store": {"redis_url": redis_url, "data_dir": str(folder / "data")},
        "model": {"checkpoint": str(checkpoint), "dtype": "float32"},
        "ingest": {"allowed_networks": ["127.0.0.0/8"]},
        "serve": {
            "api": small,
            "ingest": small | {"resources": reading, "target_sources": 3},
            "compressor": small | {"resources": reading},
            "search": small | {"resources": answering},
            "qa": small | {"resources": answering},
            "janitor": {"cpus": 0.1},
        },
    }
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def wait_for(client: httpx.Client, path: str) -> httpx.Response:
    deadline, last = time.monotonic() + PATIENCE_S, "nothing"
    while time.monotonic() < deadline:
        try:
            response = client.get(path)
            last = response.text
            if response.is_success:
                return response
        except httpx.TransportError as error:
            last = repr(error)
        time.sleep(0.5)
    raise AssertionError(f"{path} did not come: {last}")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Iterator[TwoNodes]:
    folder = tmp_path_factory.mktemp("cluster")
    gcs, dashboard, port = free_port(), free_port(), free_port()
    token = secrets.token_hex(32)
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(ROOT),
    }
    short = Path(
        f"/tmp/tokenline-ray-{secrets.token_hex(4)}"
    )  # Ray's sockets lie below it, and their paths must be short
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, short, ignore_errors=True)
        redis = stack.enter_context(EmbeddedRedis.start(folder / "redis"))
        head = [
            "--head",
            f"--port={gcs}",
            f"--dashboard-port={dashboard}",
            "--dashboard-agent-listen-port=0",
            "--dashboard-agent-grpc-port=0",
            "--metrics-export-port=0",
            f"--ray-client-server-port={free_port()}",
            f"--temp-dir={short}",
        ]
        stack.enter_context(ray_node(environment, folder / "head.log", *head, '--resources={"reading": 1}'))
        bearer = {"Authorization": f"Bearer {token}"}
        ray_api = stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{dashboard}", headers=bearer))
        wait_for(ray_api, "/api/version")
        stack.enter_context(
            ray_node(environment, folder / "worker.log", f"--address=127.0.0.1:{gcs}", '--resources={"answering": 1}')
        )
        config = serve_config(folder, redis.url, checkpoint, port)
        deployed = subprocess.run(
            [BIN / "serve", "deploy", config, "--address", f"http://127.0.0.1:{dashboard}"],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert deployed.returncode == 0, deployed.stderr
        api = stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60))
        wait_for(api, "/v1/health/ready")
        yield TwoNodes(api, ray_api)


def test_a_camera_read_on_one_node_is_asked_about_on_another(cluster):
    with SampleCamera(real_clip("bikes")) as camera:
        made = cluster.api.post("/v1/streams?wait=30", json={"name": "street", "url": camera.url}).json()
        assert made["state"] == "online", made
        body = {"question": "What happens?", "sources": [{"stream_id": made["id"]}], "max_output_tokens": 6}
        answer = cluster.api.post("/v1/questions", json=body).json()
    assert answer["coverage"]["frames_used"] >= 1, answer
    assert answer["answer"].strip()
    [reading], [answering] = cluster.nodes_of("ingest"), cluster.nodes_of("qa")
    assert cluster.nodes_of("compressor") == [reading]
    assert reading != answering


def test_more_cameras_than_one_replica_should_read_start_another(cluster):
    for number in range(4):
        url = f"rtsp://127.0.0.1:{free_port()}/nobody"
        assert cluster.api.post("/v1/streams", json={"name": f"camera {number}", "url": url}).status_code == 201
    deadline = time.monotonic() + PATIENCE_S
    while len(cluster.nodes_of("ingest")) < 2:
        assert time.monotonic() < deadline, "no second replica came"
        time.sleep(0.5)
    assert set(cluster.nodes_of("ingest")) == set(cluster.nodes_of("compressor"))
