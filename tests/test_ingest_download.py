"""Fetching archives from a real HTTP server, with its redirects, lies and failures."""

import shutil
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event

import pytest

from ingest.address import AddressPolicy, BadUrl
from ingest.download import Downloader, DownloadFailed, DownloadTooLarge, NoRoom
from tests.ingest_parts import LOCAL
from tests.small_disk import small_disk

CONTENT = bytes(range(256)) * 1000


class Files(BaseHTTPRequestHandler):
    """Answers by path: /clip, /redirect?TARGET, /loop, /endless, /cut, /slow, /often, /busy; else not found."""

    protocol_version = "HTTP/1.1"
    asked: list[tuple[str, str]]
    go_on: Event  # lets /slow come to its end

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers.get("Host", "")))
        path, _, query = self.path.partition("?")
        if path == "/clip":
            self._answer(200, {"Content-Length": str(len(CONTENT))}, CONTENT)
        elif path == "/redirect":
            self._answer(302, {"Location": query, "Content-Length": "0"})
        elif path == "/loop":
            self._answer(302, {"Location": "/loop", "Content-Length": "0"})
        elif path == "/endless":
            self._answer(200, {"Connection": "close"}, CONTENT * 8)
        elif path == "/cut":
            self._answer(200, {"Content-Length": str(2 * len(CONTENT)), "Connection": "close"}, CONTENT)
        elif path == "/slow":
            self._answer(200, {"Content-Length": str(len(CONTENT))}, CONTENT[:1000])
            self.go_on.wait(20)
            self.wfile.write(CONTENT[1000:])
        elif path == "/often":
            self._answer(429, {"Content-Length": "0"})
        elif path == "/busy":
            self._answer(503, {"Content-Length": "0"})
        else:
            self._answer(404, {"Content-Length": "0"})

    def _answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.close_connection = headers.get("Connection") == "close"
        try:
            self.wfile.write(body)
        except ConnectionError:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class Server:
    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.go_on = Event()
        handler = type("Handler", (Files,), {"asked": self.asked, "go_on": self.go_on})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.go_on.set()
    server.http.shutdown()
    thread.join()
    server.http.server_close()


def downloader(networks: tuple[str, ...] = LOCAL, max_bytes: int = 10**6, spare_bytes: int = 0) -> Downloader:
    return Downloader(AddressPolicy(networks), max_bytes=max_bytes, spare_bytes=spare_bytes, timeout_s=5)


@pytest.mark.parametrize("path", ["/clip", "/endless"])  # told before it comes, and found out while it does
def test_a_file_that_does_not_fit_the_disk_is_refused_and_leaves_nothing(server, tmp_path, path):
    with small_disk(tmp_path / "disk", 2**20) as disk:
        spare_bytes = shutil.disk_usage(disk).free - len(CONTENT) // 2
        with pytest.raises(NoRoom, match="add the video again"):
            downloader(spare_bytes=spare_bytes).fetch(server.url + path, disk / "clip", Event())
        assert list(disk.iterdir()) == []


def test_a_file_arrives_whole(server, tmp_path):
    assert downloader().fetch(f"{server.url}/clip", tmp_path / "clip", Event())
    assert (tmp_path / "clip").read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["clip"]


def test_the_host_is_named_though_the_checked_address_is_connected_to(server, tmp_path):
    url = f"http://localhost:{server.port}/clip"
    downloader(("127.0.0.0/8", "::1/128")).fetch(url, tmp_path / "clip", Event())
    assert server.asked == [("/clip", f"localhost:{server.port}")]


def test_a_redirect_is_followed_to_an_address_that_is_allowed(server, tmp_path):
    assert downloader().fetch(f"{server.url}/redirect?/clip", tmp_path / "clip", Event())
    assert (tmp_path / "clip").read_bytes() == CONTENT


@pytest.mark.parametrize(
    "target", ["http://169.254.169.254/latest/meta-data", "http://10.0.0.1/x", "file:///etc/passwd", "ftp://8.8.8.8/x"]
)
def test_a_redirect_to_where_nobody_may_go_is_refused(server, tmp_path, target):
    with pytest.raises(BadUrl):
        downloader().fetch(f"{server.url}/redirect?{target}", tmp_path / "clip", Event())
    assert list(tmp_path.iterdir()) == []


def test_a_private_server_is_not_even_asked(server, tmp_path):
    with pytest.raises(BadUrl, match="ALLOWED_NETWORKS"):
        downloader(networks=()).fetch(f"{server.url}/clip", tmp_path / "clip", Event())
    assert server.asked == []


@pytest.mark.parametrize("path", ["/clip", "/endless"])
def test_a_file_over_the_limit_is_given_up_whether_announced_or_not(server, tmp_path, path):
    with pytest.raises(DownloadTooLarge, match="MAX_DOWNLOAD_BYTES"):
        downloader(max_bytes=1000).fetch(server.url + path, tmp_path / "clip", Event())
    assert list(tmp_path.iterdir()) == []


PATHS = [("/nothing", True), ("/loop", True), ("/busy", False), ("/often", False), ("/cut", False)]


@pytest.mark.parametrize(("path", "is_final"), PATHS)
def test_what_goes_wrong_is_told_and_whether_to_try_again(server, tmp_path, path, is_final):
    with pytest.raises(DownloadFailed) as caught:
        downloader().fetch(server.url + path, tmp_path / "clip", Event())
    assert caught.value.is_final is is_final
    assert "127.0.0.1" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_not_there_is_worth_another_try(server, tmp_path):
    with pytest.raises(DownloadFailed) as caught:
        downloader().fetch("http://127.0.0.1:9/clip", tmp_path / "clip", Event())
    assert caught.value.is_final is False


def test_a_halted_download_leaves_nothing(server, tmp_path):
    halt = Event()
    halt.set()
    assert downloader().fetch(f"{server.url}/clip", tmp_path / "clip", halt) is False
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_host_is_worth_another_try(tmp_path):
    with pytest.raises(DownloadFailed, match="does not resolve") as caught:
        downloader().fetch("http://nowhere.invalid/clip", tmp_path / "clip", Event())
    assert caught.value.is_final is False


def test_an_owner_that_lost_a_download_does_not_disturb_the_next_one(server, tmp_path):
    halt = Event()
    former = threading.Thread(target=downloader().fetch, args=(f"{server.url}/slow", tmp_path / "clip", halt))
    former.start()
    deadline = time.monotonic() + 10
    while not any(path.stat().st_size for path in tmp_path.iterdir()) and not server.asked:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    halt.set()
    loader = threading.Thread(target=downloader().fetch, args=(f"{server.url}/clip", tmp_path / "clip", Event()))
    loader.start()
    loader.join()
    server.go_on.set()
    former.join()
    assert (tmp_path / "clip").read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["clip"]
