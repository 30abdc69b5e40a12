"""The whole service in a process of its own, as a user starts it."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
START_S, STOP_S = 300, 60


@dataclass(frozen=True, slots=True)
class RunningService:
    """A service that is up: its address, its folder, its process, and the file of what it printed."""

    url: str
    data_dir: Path
    process: subprocess.Popen[str]
    output: Path


@contextmanager
def running_service(folder: Path, settings: Mapping[str, str] | None = None) -> Iterator[RunningService]:
    """Run `tokenline run` on a free port, with loopback cameras allowed, until the block ends."""
    data_dir, output = folder / "data", folder / "output.txt"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TOKENLINE_")}
    environment |= {
        "TOKENLINE_STORE__DATA_DIR": str(data_dir),
        "TOKENLINE_SERVE__PORT": "0",
        "TOKENLINE_INGEST__ALLOWED_NETWORKS": '["127.0.0.0/8"]',
        "PYTHONUNBUFFERED": "1",
        **(settings or {}),
    }
    with output.open("w") as file:
        process = subprocess.Popen(
            [Path(sys.executable).with_name("tokenline"), "run"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            start_new_session=True,
        )
    try:
        yield RunningService(_address(process, output), data_dir, process, output)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def kill_replica(service: RunningService, deployment: str) -> None:
    """End the one replica of a deployment as the kernel does when memory runs out."""
    mine = f"TOKENLINE_STORE__DATA_DIR={service.data_dir}".encode()
    replicas = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            is_one = (process / "cmdline").read_bytes().startswith(f"ray::ServeReplica:tokenline:{deployment}".encode())
            if is_one and mine in (process / "environ").read_bytes():
                replicas.append(int(process.name))
    [replica] = replicas
    os.kill(replica, signal.SIGKILL)


def _address(process: subprocess.Popen[str], output: Path) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.match(r"API\s+(http://\S+)/v1", line):
            return found[1]
    raise RuntimeError(f"the service ended with {process.wait()} before it was up:\n{output.read_text()}")
