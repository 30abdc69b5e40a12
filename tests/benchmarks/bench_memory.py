"""Memory of the whole service at rest, by process, against an empty Ray Serve application of as many replicas.

    python -m tests.benchmarks.bench_memory [--rest 20]

Memory is PSS: pages that several processes share are counted once in all. The service runs as `tokenline run` starts
it, on the small embedded model; the empty application has the same Ray options, and replicas that do nothing.
"""

import argparse
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx

from deploy.local import free_port
from tests.service import ROOT, START_S, STOP_S, running_service

DEPLOYMENTS = ("api", "ingest", "compressor", "search", "qa", "janitor")
_REPLICA = re.compile(r"ray::ServeReplica:[^:]*:(\w+)")
_EMPTY_APPLICATION = f"""
import logging, signal, sys
import ray
from ray import serve

ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
serve.start(http_options={{"host": "127.0.0.1", "port": int(sys.argv[1])}}, logging_config={{"log_level": "WARNING"}})

class Idle:
    def __init__(self, *parts): pass

names = {DEPLOYMENTS!r}
options = {{"num_cpus": 0.1}}
parts = [serve.deployment(Idle, name=name, ray_actor_options=options).bind() for name in names[1:]]
serve.run(serve.deployment(Idle, name=names[0], ray_actor_options=options).bind(*parts), name="empty")
print("up", flush=True)
signal.sigwait({{signal.SIGTERM}})
ray.shutdown()
"""


def tree(root: int) -> list[int]:
    """Return the process and everything that descends from it."""
    children: dict[int, list[int]] = defaultdict(list)
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                after_name = (folder / "stat").read_text().rpartition(")")[2]
            except OSError:  # it ended meanwhile
                continue
            children[int(after_name.split()[1])].append(int(folder.name))
    found = [root]
    for one in found:
        found += children[one]
    return found


def memory_mb(root: int) -> dict[str, float]:
    """Return megabytes of PSS by what the processes of a tree are for."""
    held: dict[str, float] = defaultdict(float)
    for process in tree(root):
        folder = Path(f"/proc/{process}")
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            rollup = (folder / "smaps_rollup").read_text()
        except OSError:
            continue
        if found := re.search(r"^Pss:\s+(\d+) kB", rollup, re.MULTILINE):
            held[role(command, driver=process == root)] += int(found[1]) * 1024 / 1e6
    return dict(held)


def role(command: str, *, driver: bool) -> str:
    """Say what a process is for by its command line."""
    if driver:
        return "command"
    if found := _REPLICA.match(command):
        return f"replica {found[1]}"
    if re.search(r"redis-server|valkey", command):
        return "redis"
    return "ray"


@contextmanager
def empty_application() -> Iterator[int]:
    """Run an application of as many replicas that do nothing, and yield its process id."""
    process = subprocess.Popen(
        [sys.executable, "-c", _EMPTY_APPLICATION, str(free_port("127.0.0.1", 0))],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    try:
        if process.stdout.readline() != "up\n":
            raise SystemExit("the empty application did not come up")
        yield process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=STOP_S)


def wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + START_S
    while httpx.get(f"{url}/v1/health/ready", timeout=30).status_code != 200:
        if time.monotonic() > deadline:
            raise SystemExit("the service did not become ready")
        time.sleep(1)


def rows(ours: Mapping[str, float], empty: Mapping[str, float], rest_s: int) -> list[dict[str, object]]:
    idle = sum(mb for name, mb in empty.items() if name.startswith("replica")) / len(DEPLOYMENTS)
    pairs: list[tuple[str, float, str, float | None]] = [
        ("whole service", sum(ours.values()), "the whole empty application", sum(empty.values()))
    ]
    for name, mb in sorted(ours.items()):
        against = ("a replica that does nothing", idle) if name.startswith("replica") else ("the same", empty.get(name))
        pairs.append((name, mb, *against))
    return [
        {
            "benchmark": "memory at rest",
            "case": name,
            "ratio": None if theirs is None else mb / theirs,
            "against": "nothing there" if theirs is None else against,
            "mb": mb,
            "against_mb": theirs,
            "rested": f"{rest_s} s",
        }
        for name, mb, against, theirs in pairs
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rest", type=int, default=20, help="seconds between ready and measuring")
    rest_s = parser.parse_args().rest
    with tempfile.TemporaryDirectory() as folder, running_service(Path(folder)) as service:
        wait_until_ready(service.url)
        time.sleep(rest_s)
        ours = memory_mb(service.process.pid)
    with empty_application() as process:
        time.sleep(rest_s)
        empty = memory_mb(process)
    for row in rows(ours, empty, rest_s):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
