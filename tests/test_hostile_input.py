"""Input that means harm is refused by name, and nothing that it names is asked, opened or waited for."""

import gzip
import io
import itertools
import socket
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import av
import httpx
import pytest

from ingest.address import AddressPolicy
from ingest.assignment import Archive, ArchiveReport, Assignment, Camera
from ingest.download import Downloader
from qa_service.settings import ApiSettings
from tests.ingest_parts import MemoryDesk, MemorySink, encode, real_clip, simulated_camera, steady, until
from tests.qa_http import Service, serving
from tests.test_ingest_camera import listener
from tests.test_ingest_service import running

pytestmark = pytest.mark.alone

PATIENCE_S = 30  # a refusal that takes longer has waited for somebody


@pytest.fixture(scope="module")
def service(redis_url: str, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The REST surface as it comes: only public addresses may be read (and 203.0.113.0/24, which leads nowhere)."""
    folder = tmp_path_factory.mktemp("service")
    with serving(redis_url, checkpoint, folder, ApiSettings(), allowed_networks=()) as service:
        yield service


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, timeout=PATIENCE_S) as client:
        yield client


def refusal(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


# Addresses. {port} listens on this machine and must not hear a word.

SCHEMES = {
    "a local file": "file:///etc/passwd",
    "a local file with a host": "file://127.0.0.1/etc/passwd",
    "a path": "/etc/passwd",
    "a relative path": "../../etc/passwd",
    "local files joined": "concat:/etc/passwd|/etc/hostname",
    "local files joined by a list": "concatf:/etc/passwd",
    "a part of a local file": "subfile,,start,0,end,100,,:/etc/passwd",
    "an encrypted local file": "crypto:/etc/passwd",
    "a cached local file": "cache:file:///etc/passwd",
    "a read-ahead of another scheme": "async:http://127.0.0.1:{port}/clip.mp4",
    "a port to be opened": "tcp://127.0.0.1:{port}?listen=1",
    "a connection to anything": "tcp://127.0.0.1:{port}",
    "a UDP port to be opened": "udp://127.0.0.1:{port}",
    "an RTP port to be opened": "rtp://127.0.0.1:{port}",
    "standard input": "pipe:0",
    "a file descriptor": "fd:0",
    "a socket of this machine": "unix:/var/run/docker.sock",
    "data in the address": "data:video/mp4;base64,AAAA",
    "a file server": "ftp://127.0.0.1:{port}/clip.mp4",
    "gopher, which says whatever is wanted": "gopher://127.0.0.1:{port}/_GET",
    "a playlist": "hls+http://127.0.0.1:{port}/list.m3u8",
    "another streaming server": "rtmp://127.0.0.1:{port}/live",
    "a pipe of FFmpeg filters": "lavfi:movie=/etc/passwd",
    "a scheme with a line break": "rt\nsp://127.0.0.1:{port}/",
    "no scheme": "//127.0.0.1:{port}/",
    "nothing": "",
}

INSIDE = {
    "loopback": "127.0.0.1",
    "loopback, another one": "127.8.8.8",
    "loopback as one number": "2130706433",
    "loopback as one hexadecimal number": "0x7f000001",
    "loopback in octal": "0177.0.0.1",
    "loopback in mixed notations": "0x7f.0.0.01",
    "loopback in short": "127.1",
    "loopback with a dot at its end": "127.0.0.1.",
    "loopback in wide digits": "\uff11\uff12\uff17.0.0.1",
    "loopback in circled digits": "①②⑦.0.0.1",
    "loopback in IPv6": "[::1]",
    "loopback in IPv6, in full": "[0:0:0:0:0:0:0:1]",
    "loopback in IPv6 with a zone": "[::1%25lo]",
    "loopback mapped into IPv6": "[::ffff:127.0.0.1]",
    "loopback mapped into IPv6, in hexadecimal": "[::ffff:7f00:1]",
    "loopback compatible with IPv6": "[::127.0.0.1]",
    "loopback translated": "[::ffff:0:127.0.0.1]",
    "loopback behind NAT64": "[64:ff9b::7f00:1]",
    "loopback behind a local NAT64": "[64:ff9b:1::7f00:1]",
    "loopback behind 6to4": "[2002:7f00:1::]",
    "loopback behind Teredo": "[2001:0:7f00:1::]",
    "loopback by name": "localhost",
    "loopback by name with a dot": "localhost.",
    "loopback by name in capitals": "LOCALHOST",
    "this host": "0.0.0.0",
    "this host in short": "0",
    "this host in IPv6": "[::]",
    "a private network": "10.0.0.1",
    "another private network": "172.31.255.1",
    "a home network": "192.168.0.1",
    "a private network in IPv6": "[fd00::1]",
    "a site's own network": "[fec0::1]",
    "the provider's network": "100.64.0.1",
    "the metadata of a cloud": "169.254.169.254",
    "the metadata of a cloud as one number": "2852039166",
    "the metadata of a cloud in IPv6": "[fd00:ec2::254]",
    "the metadata of a cloud mapped into IPv6": "[::ffff:169.254.169.254]",
    "the link": "[fe80::1]",
    "the link with a zone": "[fe80::1%25lo]",
    "a group": "224.0.0.1",
    "a group in IPv6": "[ff02::1]",
    "everybody": "255.255.255.255",
    "the future": "240.0.0.1",
    "a benchmark network": "198.18.0.1",
    "a documentation network": "[2001:db8::1]",
    "credentials that look like a public host": "8.8.8.8@127.0.0.1",
    "credentials with a port that look like a public host": "8.8.8.8:80@127.0.0.1",
    "a backslash between two hosts": "8.8.8.8\\@127.0.0.1",
    "a line break": "8.8.8.8\r\nHost: 127.0.0.1",
    "a blank": "127.0.0.1 .example",
    "no host": "",
}

# What the refusal of an address tells to do.
ADVICE = (
    "must start with",
    "TOKENLINE_INGEST__ALLOWED_NETWORKS",
    "check its spelling",
    "percent-encode",
    "write it as",
    "fields username and password",
)


def ask_everywhere(client: httpx.Client, camera: str, video: str) -> list[httpx.Response]:
    return [
        client.post("/v1/streams", json={"name": "hostile", "url": camera}),
        client.post("/v1/streams/probe", json={"url": camera}),
        client.post("/v1/videos", json={"name": "hostile", "url": video}),
    ]


@pytest.mark.parametrize("url", SCHEMES.values(), ids=SCHEMES.keys())
def test_what_is_no_address_of_a_camera_or_a_web_server_is_refused(client, url):
    with listener() as (port, accepted):
        named = url.format(port=port)
        for response in ask_everywhere(client, named, named):
            assert refusal(response) in ((422, "bad_url"), (422, "validation_failed"))
            if url:
                assert any(advice in response.text for advice in ADVICE), response.text
    assert accepted == []
    assert_nothing_is_registered(client)


@pytest.mark.parametrize("host", INSIDE.values(), ids=INSIDE.keys())
def test_an_address_inside_is_refused_however_it_is_written(client, host):
    with listener() as (port, accepted):
        place = f"{host}:{port}" if host else ""
        for response in ask_everywhere(client, f"rtsp://{place}/cam", f"http://{place}/clip.mp4"):
            assert refusal(response) == (422, "bad_url")
            assert any(advice in response.text for advice in ADVICE), response.text
    assert accepted == []
    assert_nothing_is_registered(client)


def test_a_camera_is_no_web_server_and_a_video_no_camera(client):
    with listener() as (port, accepted):
        responses = ask_everywhere(client, f"http://127.0.0.1:{port}/", f"rtsp://127.0.0.1:{port}/")
        assert {refusal(response) for response in responses} == {(422, "bad_url")}
    assert accepted == []


NAMES = {
    "a name that leads inside": ["127.0.0.1"],
    "a name that leads inside and outside": ["203.0.113.7", "10.0.0.1"],
    "a name that leads inside by IPv6": ["203.0.113.7", "::1"],
    "a name that leads inside by an address in an address": ["::ffff:169.254.169.254"],
}


@pytest.mark.parametrize("addresses", NAMES.values(), ids=NAMES.keys())
def test_a_name_is_refused_if_one_of_its_addresses_is_inside(client, monkeypatch, addresses):
    names(monkeypatch, "cam.example", itertools.repeat(addresses))
    with listener() as (port, accepted):
        place = f"cam.example:{port}"
        for response in ask_everywhere(client, f"rtsp://{place}/cam", f"http://{place}/clip.mp4"):
            assert refusal(response) == (422, "bad_url")
            assert "TOKENLINE_INGEST__ALLOWED_NETWORKS" in response.text
    assert accepted == []


def names(monkeypatch: pytest.MonkeyPatch, name: str, answers: Iterator[list[str]]) -> list[str]:
    """Let a name resolve to one answer after the other; returns the list that every look-up of it is added to."""
    resolve, asked = socket.getaddrinfo, []

    def getaddrinfo(host, port, *arguments, **options):
        if host not in (name, name.encode()):
            return resolve(host, port, *arguments, **options)
        asked.append(name)
        found = next(answers)
        return [entry for one in found for entry in resolve(one, port, type=socket.SOCK_STREAM)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


def test_the_address_that_was_checked_is_the_one_that_is_fetched_from(tmp_path, monkeypatch):
    clip = real_clip("carphone_distorted").read_bytes()
    with answering(body(clip)) as port, listener(host="127.0.0.2") as (_, accepted):
        asked = names(monkeypatch, "clips.example", iter([["127.0.0.1"], ["127.0.0.2"]]))
        loader = Downloader(AddressPolicy(("127.0.0.1/32",)), max_bytes=10**6, spare_bytes=0, timeout_s=5)
        assert loader.fetch(f"http://clips.example:{port}/clip.mp4", tmp_path / "clip.mp4", Event())
        assert len(asked) == 1  # a second answer is never asked for, so it cannot be another
    assert (tmp_path / "clip.mp4").read_bytes() == clip
    assert accepted == []


def test_the_address_that_was_checked_is_the_one_that_the_camera_is_read_from(monkeypatch):
    from tests.test_ingest_camera import pictures

    with simulated_camera() as camera:
        asked = names(monkeypatch, "cam.example", iter([["127.0.0.1"], ["10.0.0.1"]]))
        # FFmpeg has name look-ups of its own, and to those this name is unknown: it was given the address.
        assert pictures(Camera(camera.url.replace("127.0.0.1", "cam.example")), 1)
    assert len(asked) == 1


def assert_nothing_is_registered(client: httpx.Client) -> None:
    assert client.get("/v1/streams").json()["data"] == []
    assert client.get("/v1/videos").json()["data"] == []


# Uploads. A folder with a real video lies beside them: nothing of it may come out.


def playlist(port: int) -> bytes:
    head = b"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n"
    return head + b"http://127.0.0.1:%d/segment.ts\n#EXT-X-ENDLIST\n" % port


def local_playlist(port: int) -> bytes:
    return playlist(port).replace(b"http://127.0.0.1:%d/segment.ts" % port, b"file:///etc/passwd")


def ffconcat(port: int) -> bytes:
    return b"ffconcat version 1.0\nfile neighbour.ts\nfile http://127.0.0.1:%d/clip.ts\n" % port


def session_description(port: int) -> bytes:
    return (
        b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nc=IN IP4 127.0.0.1\r\nt=0 0\r\n"
        b"m=video %d RTP/AVP 96\r\na=rtpmap:96 H264/90000\r\n" % port
    )


def dash(port: int) -> bytes:
    return (
        b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
        b'mediaPresentationDuration="PT5S"><Period><AdaptationSet mimeType="video/mp4"><Representation id="1" '
        b'bandwidth="1"><BaseURL>http://127.0.0.1:%d/clip.mp4</BaseURL></Representation></AdaptationSet></Period></MPD>'
    ) % port


def redirecting_movie(port: int) -> bytes:
    """A QuickTime movie that holds nothing but the address of another one."""
    address = b"http://127.0.0.1:%d/clip.mov\0" % port
    reference = box(b"rdrf", bytes(4) + b"url " + len(address).to_bytes(4, "big") + address)
    return box(b"ftyp", b"qt  " + bytes(4)) + box(b"moov", box(b"rmra", box(b"rmda", reference)))


def box(kind: bytes, content: bytes) -> bytes:
    return (8 + len(content)).to_bytes(4, "big") + kind + content


def zipped(_: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("clip.mp4", bytes(50_000_000))
    return file.getvalue()


DISGUISED: dict[str, Callable[[int], bytes]] = {
    "a playlist that names a web server": playlist,
    "a playlist that names a local file": local_playlist,
    "a list of files": ffconcat,
    "a session description that opens a port": session_description,
    "a DASH manifest": dash,
    "a movie that sends the reader elsewhere": redirecting_movie,
    "a gzip bomb": lambda _: gzip.compress(bytes(50_000_000)),
    "a zip bomb": zipped,
    "a camera's address": lambda port: b"rtsp://127.0.0.1:%d/cam\n" % port,
    "a Windows playlist": lambda port: (
        b'<asx version="3.0"><entry><ref href="http://127.0.0.1:%d/"/></entry></asx>' % port
    ),
    "a web page": lambda port: b'<html><video src="http://127.0.0.1:%d/clip.mp4"></html>' % port,
    "a drawing that names a file": lambda port: b'<svg><image href="http://127.0.0.1:%d/x.png"/></svg>' % port,
    "nothing but zeros": lambda _: bytes(1_000_000),
}


@pytest.mark.parametrize("name", ["clip.mp4", "clip.m3u8", "clip.ts"])
@pytest.mark.parametrize("content", DISGUISED.values(), ids=DISGUISED.keys())
def test_an_upload_that_is_no_plain_video_is_refused_and_leads_nowhere(service, client, name, content):
    neighbour = service.parts.uploads / "neighbour.ts"
    service.parts.uploads.mkdir(exist_ok=True)
    encode(neighbour, steady(1))
    try:
        with listener() as (port, accepted):
            assert_refused(client, name, content(port))
        assert accepted == []
    finally:
        neighbour.unlink()
    assert list(service.parts.uploads.iterdir()) == []


def assert_refused(client: httpx.Client, name: str, content: bytes) -> str:
    started = time.monotonic()
    response = client.post("/v1/videos", files={"file": (name, content, "video/mp4")})
    assert refusal(response) == (415, "unsupported_media")
    assert "Send one video file" in response.text
    assert time.monotonic() - started < PATIENCE_S
    assert_nothing_is_registered(client)
    return str(response.json()["error"]["message"])


# Bombs


def states_enormous_pictures(folder: Path) -> bytes:
    """Raw pictures: nothing but the header says how large they are."""
    data = encode(folder / "clip.avi", steady(1), codec="rawvideo").read_bytes()
    size = data.index(b"strf") + 12
    return data[:size] + (12_000).to_bytes(4, "little") * 2 + data[size + 8 :]


def holds_enormous_pictures(folder: Path) -> bytes:
    """Pictures that state another size than their container does."""
    data = encode(folder / "clip.avi", steady(1), codec="mjpeg", pix_fmt="yuvj420p").read_bytes()
    parts = data.split(b"\xff\xc0\x00\x11\x08")
    return b"\xff\xc0\x00\x11\x08".join([parts[0], *(b"\xff\xdc\xff\xdc" + part[4:] for part in parts[1:])])


def states_years(folder: Path) -> bytes:
    return encode(folder / "clip.mkv", [0.0, 1.0, 1e8]).read_bytes()


def has_hundreds_of_streams(folder: Path) -> bytes:
    path = folder / "clip.mp4"
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("mpeg4", rate=25) for _ in range(300)]
        for stream in streams:
            stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        for stream in streams:
            container.mux(stream.encode(av.VideoFrame(16, 16, "yuv420p")))
            container.mux(stream.encode(None))
    return path.read_bytes()


BOMBS = {
    "a file that states enormous pictures": (states_enormous_pictures, "pixels"),
    "a file whose pictures are enormous": (holds_enormous_pictures, "no picture"),
    "a file that states years": (states_years, "s of video"),
    "a file of hundreds of streams": (has_hundreds_of_streams, "TOKENLINE_INGEST__MAX_STREAMS"),
}


@pytest.mark.parametrize(("bomb", "told"), BOMBS.values(), ids=BOMBS.keys())
def test_a_bomb_is_refused_before_it_goes_off(client, tmp_path, bomb, told):
    assert told in assert_refused(client, "clip.mp4", bomb(tmp_path))


# Addresses that were fine when they were registered, and what answers there is not


@contextmanager
def answering(say: Callable[[socket.socket], None]) -> Iterator[int]:
    """A server that answers every connection in its own way; yields its port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        threads = []

        def talk(connection: socket.socket) -> None:
            with connection:
                try:
                    connection.recv(65536)
                    say(connection)
                except OSError:
                    return

        def serve() -> None:
            try:
                while True:
                    threads.append(threading.Thread(target=talk, args=(server.accept()[0],)))
                    threads[-1].start()
            except OSError:
                return

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            server.shutdown(socket.SHUT_RDWR)
            for one in (thread, *threads):
                one.join(PATIENCE_S)


def body(content: bytes, headers: bytes = b"") -> Callable[[socket.socket], None]:
    head = b"HTTP/1.1 200 OK\r\n%sContent-Length: %d\r\n\r\n" % (headers, len(content))
    return lambda connection: connection.sendall(head + content)


def redirect(location: str) -> Callable[[socket.socket], None]:
    answer = f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()
    return lambda connection: connection.sendall(answer)


def without_end(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        connection.sendall(bytes(65536))


def drop_by_drop(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        connection.sendall(b"\0")
        time.sleep(0.05)


def header_without_end(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nX-Long: ")
    while True:
        connection.sendall(b"x")
        time.sleep(0.05)


FETCHED = {
    "an endless file": (without_end, "TOKENLINE_INGEST__MAX_DOWNLOAD_BYTES"),
    "a file that comes drop by drop": (drop_by_drop, "less than 20000 bytes a second"),
    "a header that never ends": (header_without_end, "sent nothing for too long"),
    "a small file that unpacks to a large one": (
        body(gzip.compress(bytes(50_000_000)), b"Content-Encoding: gzip\r\n"),
        "TOKENLINE_INGEST__MAX_DOWNLOAD_BYTES",
    ),
    "a redirect to the metadata of a cloud": (redirect("http://169.254.169.254/latest"), "not public"),
    "a redirect to a private network": (redirect("http://10.0.0.1/clip.mp4"), "not public"),
    "a redirect to loopback in disguise": (redirect("http://[::ffff:127.0.0.9]/clip.mp4"), "not public"),
    "a redirect to a local file": (redirect("file:///etc/passwd"), "must start with http"),
    "a redirect to itself": (redirect("/again"), "redirected more than"),
}


@pytest.mark.parametrize(("answer", "told"), FETCHED.values(), ids=FETCHED.keys())
async def test_a_file_that_is_fetched_from_a_hostile_server_fails_and_says_why(tmp_path, answer, told):
    with answering(answer) as port:
        report = await fetched(f"http://127.0.0.1:{port}/clip.mp4", tmp_path)
    assert told in (report.error or "")
    assert list(tmp_path.iterdir()) == []


async def fetched(url: str, folder: Path) -> ArchiveReport:
    """Let ingest fetch and read a video, and return its last report, that of a failure."""
    desk, sink = MemoryDesk(Assignment("vid_clip", 1, 1.0, Archive(url=url))), MemorySink()
    limits = {"max_download_bytes": 10**6, "download_timeout_s": 1.0, "allowed_networks": ("127.0.0.1/32",)}
    async with running(desk, sink, folder, **limits):
        await until(lambda: desk.released, PATIENCE_S)
    report = desk.last("vid_clip")
    assert isinstance(report, ArchiveReport)
    assert report.status == "failed"
    assert sink.frames == []
    return report


async def test_a_redirect_to_a_neighbour_that_may_not_be_read_is_not_followed(tmp_path):
    with listener(host="127.0.0.2") as (inside, accepted), answering(redirect(f"http://127.0.0.2:{inside}/")) as port:
        report = await fetched(f"http://127.0.0.1:{port}/clip.mp4", tmp_path)
    assert "127.0.0.2" in (report.error or "")
    assert accepted == []


@pytest.mark.parametrize("content", DISGUISED.values(), ids=DISGUISED.keys())
async def test_what_is_fetched_and_is_no_plain_video_fails_and_leads_nowhere(tmp_path, content):
    with listener() as (inside, accepted):
        hostile = content(inside)
        with answering(body(hostile, b"Content-Type: video/mp4\r\n")) as port:
            report = await fetched(f"http://127.0.0.1:{port}/clip.mp4", tmp_path)
    assert "video" in (report.error or "")
    assert accepted == []
    assert list(tmp_path.iterdir()) == []
