"""Passwords of cameras through one whole run of the service: they may be in memory, and nowhere else.

The run has everything that could make it talk: cameras that take, refuse and drop a password, looks at cameras,
requests that are refused, a new password, processes that die, and the end of the service.
"""

import contextlib
import json
import os
import re
import signal
import threading
from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, quote_plus

import httpx
import pytest
from cryptography.fernet import Fernet

from store.cipher import KEY_FILE
from tests.ingest_parts import free_port, simulated_camera
from tests.service import RunningService, processes_of, running_service, wait_until

pytestmark = pytest.mark.alone

USER = "adm1n-marked"
RIGHT, WRONG, LATER, LOOKED, MISSENT = (
    f"{word}/m@rked pass#w%rd" for word in ("right", "wrong", "later", "look", "bad")
)


@dataclass
class Run:
    """What the service said and left behind: texts and files by where they were found."""

    told: dict[str, str] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    processes: set[bytes] = field(default_factory=set)
    key: Path = Path()
    states: list[str] = field(default_factory=list)

    def places_of(self, spelling: str) -> list[str]:
        """Return every place that holds a text."""
        as_bytes = spelling.encode()
        places = [name for name, text in self.told.items() if spelling in text]
        places += [str(path) for path in self.files if as_bytes in path.read_bytes()]
        return places + ["a process"] * any(as_bytes in one for one in self.processes)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run()
    with running_service(tmp_path_factory.mktemp("service")) as service:
        with watched(service, run), httpx.Client(base_url=service.url, timeout=120) as client:
            live(service, client, run)
        session = session_of(service)
    run.key = service.data_dir / KEY_FILE  # what the end of the service wrote counts as well
    written = [service.output, *service.data_dir.rglob("*"), *session.rglob("*")]
    run.files = [path for path in written if path.is_file() and path != run.key]
    return run


def live(service: RunningService, client: httpx.Client, run: Run) -> None:
    """Do to the service what may make it speak of a password."""

    def tell(name: str, response: httpx.Response) -> httpx.Response:
        run.told[f"{len(run.told)} {name}"] = f"{response.headers} {response.text}"
        return response

    def post(name: str, body: object) -> httpx.Response:
        return tell(name, client.post("/v1/streams", json=body))

    def reached(path: str, state: str) -> None:
        wait_until(lambda: client.get(path).json()["state"] == state)
        tell(state, client.get(path))
        tell(f"health when {state}", client.get(f"{path}/health"))
        run.states.append(state)

    with (
        simulated_camera("--user", USER, "--password", RIGHT, "--gop", "10") as basic,
        simulated_camera("--user", USER, "--password", RIGHT, "--auth", "digest", "--gop", "10") as digest,
    ):
        paths = {}
        for name, url, password in (
            ("taken", basic.url, RIGHT),
            ("digest", digest.url, RIGHT),
            ("refused", basic.url + "?again", WRONG),
            ("gone", f"rtsp://127.0.0.1:{free_port()}/cam", WRONG),
        ):
            made = post(name, {"name": name, "url": url, "username": USER, "password": password})
            paths[name] = f"/v1/streams/{made.json()['id']}"
        reached(paths["taken"], "online")
        reached(paths["digest"], "online")
        reached(paths["refused"], "auth_failed")
        reached(paths["gone"], "reconnecting")

        for url, password in ((basic.url, RIGHT), (basic.url, LOOKED), (digest.url, LOOKED), (f"{basic.url}/x", RIGHT)):
            body = {"url": url, "username": USER, "password": password}
            tell("look", client.post("/v1/streams/probe", json=body))
        for body in (
            {"name": "a", "url": basic.url, "username": USER, "password": MISSENT, "fps": -1},
            {"name": "a", "url": basic.url, "username": USER, "password": [MISSENT]},
            {"name": "a", "url": basic.url, "passwort": MISSENT},
            {"name": "a", "url": f"rtsp://{USER}:{quote(MISSENT, safe='')}@127.0.0.1/cam"},
            {"name": "a", "url": "rtsp://10.0.0.1/cam", "username": USER, "password": MISSENT},
            {"name": "taken", "url": basic.url + "?b", "username": USER, "password": MISSENT},
        ):
            assert post("refusal", body).status_code in (409, 422)
        tell("broken", client.post("/v1/streams", content=json.dumps({"password": MISSENT})[:-1]))

        basic.suffer("drop")
        digest.suffer("restart:1")
        wait_until(lambda: client.get(f"{paths['taken']}/health").json()["reconnects_1h"] > 0)
        for pid in reading_processes(service):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSEGV)
        reached(paths["taken"], "online")
        reached(paths["digest"], "online")

        tell("patch", client.patch(paths["taken"], json={"password": LATER}))
        reached(paths["taken"], "auth_failed")
        tell("refused patch", client.patch(paths["taken"], json={"password": MISSENT, "fps": -1}))
        tell("patch back", client.patch(paths["taken"], json={"password": RIGHT}))
        reached(paths["taken"], "online")

        tell("deleted", client.delete(paths["refused"]))
        for path in ("/v1/streams", "/metrics", "/openapi.json", "/v1/health/ready", "/v1/health/live", "/v1/models"):
            tell(path, client.get(path))


@contextlib.contextmanager
def watched(service: RunningService, run: Run) -> Iterator[None]:
    """Meanwhile, listen to the events, and look at what the process list shows of every process of the service."""
    over = threading.Event()
    heard: list[str] = []

    def listen() -> None:
        with (
            contextlib.suppress(httpx.HTTPError),
            httpx.stream("GET", f"{service.url}/v1/events", timeout=httpx.Timeout(5, read=2)) as response,
        ):
            for text in response.iter_text():
                heard.append(text)
                if over.is_set():
                    return

    def listen_on() -> None:
        while not over.is_set():
            listen()

    def look() -> None:
        while not over.wait(0.1):
            for pid in processes_of(service.data_dir):
                for name in ("cmdline", "environ", "comm"):
                    with contextlib.suppress(OSError):
                        run.processes.add(Path(f"/proc/{pid}/{name}").read_bytes())

    threads = [threading.Thread(target=listen_on), threading.Thread(target=look)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()
        run.told["events"] = "".join(heard)


def reading_processes(service: RunningService) -> list[int]:
    return [pid for pid, command in processes_of(service.data_dir).items() if "ingest.reading" in command]


def session_of(service: RunningService) -> Path:
    """The folder that Ray writes its logs into."""
    for command in processes_of(service.data_dir).values():
        if found := re.search(r"--session[-_]dir=(\S+)", command):
            return Path(found[1])
    raise AssertionError("Ray is not running")


def spellings(password: str) -> Sequence[str]:
    """A password as it is, and as addresses, headers, JSON and programs write it."""
    pair = b64encode(f"{USER}:{password}".encode()).decode().rstrip("=")
    return (
        password,
        quote(password),
        quote(password, safe=""),
        quote_plus(password),
        json.dumps(password)[1:-1].replace("/", "\\/"),
        pair[:-1],  # the last sign depends on what follows
        b64encode(password.encode()).decode().rstrip("=")[:-1],
        password.encode().hex(),
    )


def test_the_run_did_what_passwords_are_needed_for(run):
    assert run.states == [
        "online",
        "online",
        "auth_failed",
        "reconnecting",
        "online",
        "online",
        "auth_failed",
        "online",
    ]
    looks = [text for name, text in run.told.items() if name.endswith(" look")]
    assert ["snapshot" in text for text in looks] == [True, False, False, False]
    assert "auth_failed" in run.told["events"]
    assert any(b"ingest.reading" in one for one in run.processes)
    assert any(b"ingest.sandbox" in one for one in run.processes)
    names = {path.name for path in run.files}
    assert any(name.endswith(".aof") for name in names), names
    assert any("ingest" in name and name.endswith(".log") for name in names), names


@pytest.mark.parametrize(
    "password", [RIGHT, WRONG, LATER, LOOKED, MISSENT], ids=lambda password: password.split("/")[0]
)
def test_a_password_is_in_no_response_event_metric_log_file_or_process_list(run, password):
    assert {spelling: run.places_of(spelling) for spelling in spellings(password) if run.places_of(spelling)} == {}


def test_the_hunt_finds_what_is_there(run):
    """A hunt that finds nothing must be able to find something: the user name is no secret."""
    assert {"events"} & set(run.told)
    assert run.places_of(USER)
    assert any(path.endswith(".aof") for path in run.places_of(USER))


def test_passwords_at_rest_need_the_key_that_only_its_owner_may_read(run):
    assert run.key.stat().st_mode & 0o777 == 0o600
    kept = {
        token
        for path in run.files
        if path.suffix == ".aof"
        for token in re.findall(rb"gAAAAA[\w=-]{20,}", path.read_bytes())
    }
    key = run.key.read_bytes()
    assert {Fernet(key).decrypt(token).decode() for token in kept} >= {RIGHT, LATER}
    assert run.places_of(key.decode()) == []
