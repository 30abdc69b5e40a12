"""The whole service in a process of its own, as a user starts it."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tests.untrained import write_untrained_checkpoint

ROOT = Path(__file__).parent.parent
PATIENCE_S, STOP_S = 120, 60


@dataclass
class RunningService:
    """A service that is up: its address, its folder, its process, and the file of what it printed (all, at its end)."""

    url: str
    data_dir: Path
    process: subprocess.Popen[str]
    output: Path
    settings: Mapping[str, str]

    def kill_everything(self) -> None:
        """End every process of it at once, as a machine does that loses its power, but for what the kernel holds."""
        while doomed := processes_of(self.data_dir):  # what the first look missed was being started by another one
            for number in doomed:
                with suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            time.sleep(0.05)
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def start_again(self) -> None:
        """Start it on what it left; its address is another one."""
        with self.output.open("a") as file:
            self.process = start_service(self.data_dir, file, self.settings)
        self.url = _address(self.process, self.output)


@contextmanager
def running_service(folder: Path, settings: Mapping[str, str] | None = None) -> Iterator[RunningService]:
    """Run `tokenline run` on a free port, with loopback cameras allowed, until the block ends.

    Its model is the untrained one: it says something to whatever is seen, and as much as is asked for.
    """
    data_dir, output = folder / "data", folder / "output.txt"
    model = write_untrained_checkpoint(folder / "untrained-model")
    settings = {
        "TOKENLINE_MODEL__CHECKPOINT": str(model),
        "TOKENLINE_MODEL__DTYPE": "float32",
        **(settings or {}),
    }
    with output.open("w") as file:
        process = start_service(data_dir, file, settings)
    service = RunningService("", data_dir, process, output, settings)
    try:
        service.url = _address(process, output)
        yield service
    finally:
        process = service.process
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.stdout is not None and not process.stdout.closed:
            with process.stdout, output.open("a") as file:
                file.write(process.stdout.read())


def start_service(data_dir: Path, errors: IO[str], settings: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start `tokenline run` and return at once; what it prints can be read of it, its errors go to a file."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TOKENLINE_")}
    environment |= {
        "TOKENLINE_STORE__DATA_DIR": str(data_dir),
        "TOKENLINE_SERVE__PORT": "0",
        "TOKENLINE_INGEST__ALLOWED_NETWORKS": '["127.0.0.0/8"]',
        "PYTHONUNBUFFERED": "1",
        **(settings or {}),
    }
    return subprocess.Popen(
        [Path(sys.executable).with_name("tokenline"), "run"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        start_new_session=True,
    )


def wait_until(condition: Callable[[], Any]) -> Any:
    """Return the first value of the condition that is true."""
    deadline = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, "what was waited for did not happen"
        time.sleep(0.2)
    return value


def kill_replica(service: RunningService, deployment: str) -> None:
    """End the one replica of a deployment as the kernel does when memory runs out."""
    [replica] = named(service.data_dir, f"ray::ServeReplica:tokenline:{deployment}")
    os.kill(replica, signal.SIGKILL)


def named(data_dir: Path, title: str) -> list[int]:
    """Return the processes of a service whose command begins so, or holds it as a word."""
    found = processes_of(data_dir)
    return [number for number, command in found.items() if command.startswith(title) or title in command.split()]


def processes_of(data_dir: Path) -> dict[int, str]:
    """Return the processes of the service that was started with a data folder: their numbers and commands."""
    found = with_variable("TOKENLINE_STORE__DATA_DIR", str(data_dir))
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            # The server of Redis writes its title over its environment.
            if (process / "cwd").readlink() == data_dir.resolve() / "redis":
                found[int(process.name)] = _command(process)
    return found


def with_variable(name: str, value: str) -> dict[int, str]:
    """Return the processes that were started with an environment variable: their numbers and commands."""
    wanted, found = f"{name}={value}".encode(), {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            if wanted in (process / "environ").read_bytes().split(b"\0"):
                found[int(process.name)] = _command(process)
    return found


def _command(process: Path) -> str:
    return (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()


def _address(process: subprocess.Popen[str], output: Path) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.match(r"API\s+(http://\S+)/v1", line):
            return found[1]
    raise RuntimeError(f"the service ended with {process.wait()} before it was up:\n{output.read_text()}")
