"""FFmpeg reads cameras through a relay: whatever a camera answers, nobody but the camera is talked to."""

import datetime
import socket
import ssl
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from ingest.assignment import Camera
from ingest.camera import CameraFault, CameraRedirects, CameraUnreachable
from ingest.relay import Answers, NotRtsp, Redirects
from tests.ingest_parts import simulated_camera
from tests.service import wait_until
from tests.test_ingest_camera import PASSWORD, assert_silent, listener, pictures

pytestmark = pytest.mark.alone

CAMERA_HOST, NEIGHBOUR_HOST = "127.0.0.1", "127.0.0.2"
ONLY_THE_CAMERA = {"allowed_networks": (f"{CAMERA_HOST}/32",), "open_timeout_s": 2.0, "read_timeout_s": 0.5}

SDP = (
    b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nc=IN IP4 0.0.0.0\r\nt=0 0\r\nm=video 0 RTP/AVP 96\r\n"
    b"a=rtpmap:96 H264/90000\r\na=control:track1\r\n"
)

Answer = Callable[[bytes], bytes]


def says(status: str, *headers: str, body: bytes = b"") -> Answer:
    """An answer that carries the number of the request it answers."""

    def answer(request: bytes) -> bytes:
        number = next(line for line in request.split(b"\r\n") if line.lower().startswith(b"cseq:"))
        lines = [f"RTSP/1.0 {status}".encode(), number, *(header.encode() for header in headers)]
        if body:
            lines.append(b"Content-Length: %d" % len(body))
        return b"\r\n".join(lines) + b"\r\n\r\n" + body

    return answer


def setup(*parts: str) -> Answer:
    return says("200 OK", "Session: 1", ";".join(("Transport: RTP/AVP/TCP", "unicast", "interleaved=0-1", *parts)))


FINE: Mapping[str, Answer] = {
    "OPTIONS": says("200 OK", "Public: DESCRIBE, SETUP, PLAY"),
    "DESCRIBE": says("200 OK", "Content-Type: application/sdp", body=SDP),
    "SETUP": setup(),
    "PLAY": says("200 OK", "Session: 1"),
}


@contextmanager
def camera_that_answers(answers: Mapping[str, Answer]) -> Iterator[tuple[str, list[str]]]:
    """A camera of few words: yields its URL and the methods it was asked for."""
    asked: list[str] = []

    def talk(connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as lines:
            request = b""
            while line := lines.readline():
                request += line
                if line == b"\r\n":
                    method = request.split(b" ", 1)[0].decode()
                    asked.append(method)
                    connection.sendall(answers.get(method, says("501 Not Implemented"))(request))
                    request = b""

    def serve() -> None:
        while True:
            try:
                talk(server.accept()[0])
            except ConnectionError:
                continue
            except OSError:
                return

    with socket.create_server((CAMERA_HOST, 0)) as server:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield f"rtsp://{CAMERA_HOST}:{server.getsockname()[1]}/cam", asked
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join(5)


def port_of(url: str) -> int:
    port = urlsplit(url).port
    assert port is not None
    return port


def to(port: int) -> str:
    return f"Location: rtsp://{NEIGHBOUR_HOST}:{port}/inside"


@pytest.mark.parametrize("method", FINE)
@pytest.mark.parametrize("status", ["301 Moved Permanently", "302 Found", "305 Use Proxy", "399 Other"])
def test_a_camera_that_redirects_to_a_neighbour_is_not_followed(method, status):
    with (
        listener(host=NEIGHBOUR_HOST) as (inside, accepted),
        camera_that_answers({**FINE, method: says(status, to(inside))}) as (url, asked),
        pytest.raises(CameraFault) as caught,
    ):
        pictures(Camera(url, "admin", PASSWORD), 1, **ONLY_THE_CAMERA)
    assert accepted == []
    assert method in asked
    if method != "PLAY":  # which FFmpeg takes for an error like any other
        assert isinstance(caught.value, CameraRedirects)
    assert_silent(caught.value, PASSWORD)


def test_a_camera_that_has_been_told_the_password_cannot_send_it_on():
    def describe(request: bytes) -> bytes:
        token = b64encode(f"admin:{PASSWORD}".encode())
        if b"Authorization: Basic " + token in request:
            return says("302 Found", to(inside))(request)
        return says("401 Unauthorized", 'WWW-Authenticate: Basic realm="camera"')(request)

    with (
        listener(host=NEIGHBOUR_HOST) as (inside, accepted),
        camera_that_answers({**FINE, "DESCRIBE": describe}) as (url, asked),
        pytest.raises(CameraRedirects),
    ):
        pictures(Camera(url, "admin", PASSWORD), 1, **ONLY_THE_CAMERA)
    assert asked == ["OPTIONS", "DESCRIBE", "DESCRIBE"]
    assert accepted == []


DISGUISES = {
    "lines without carriage returns": lambda text: text.replace(b"\r\n", b"\n"),
    "a carriage return that FFmpeg skips": lambda text: text.replace(b"RTSP/1.0 302", b"RTSP/1.0 3\r02"),
    "two blanks before the status": lambda text: text.replace(b"RTSP/1.0 302", b"RTSP/1.0  302"),
    "a tab before the status": lambda text: text.replace(b"RTSP/1.0 302", b"RTSP/1.0\t302"),
    "a blank before the version": lambda text: b" " + text,
    "a status with leading zeros": lambda text: text.replace(b"302", b"00302"),
    "a status with letters behind it": lambda text: text.replace(b"302", b"302OK"),
    "an odd version": lambda text: text.replace(b"RTSP/1.0", b"RTSP/"),
    "a packet before it": lambda text: b"$\0\0\4abcd" + text,
    "an empty packet before it": lambda text: b"$\0\0\0" + text,
    "an empty line before it": lambda text: b"\r\n" + text,
    "a request before it": lambda text: b"OPTIONS * RTSP/1.0\r\nCSeq: 1\r\n\r\n" + text,
    "an answer before it whose end is unclear": lambda text: (
        b"RTSP/1.0 200 OK\r\nCSeq: 99\r\nContent-Length: %d\r\nContent-Length: 0\r\n\r\n" % len(text) + text
    ),
    "an answer before it whose length is odd": lambda text: (
        b"RTSP/1.0 200 OK\r\nCSeq: 99\r\nContent-Length: -%d\r\n\r\n" % len(text) + text
    ),
    "a packet inside of its head": lambda text: text.replace(b"\r\nLocation", b"\r\n$\0\0\1x\r\nLocation"),
}


@pytest.mark.parametrize("disguise", DISGUISES.values(), ids=DISGUISES.keys())
def test_a_redirect_in_disguise_is_not_followed(disguise):
    with (
        listener(host=NEIGHBOUR_HOST) as (inside, accepted),
        camera_that_answers({**FINE, "DESCRIBE": lambda request: disguise(says("302 Found", to(inside))(request))}) as (
            url,
            _,
        ),
        pytest.raises((CameraRedirects, CameraUnreachable)),
    ):
        pictures(Camera(url), 1, **ONLY_THE_CAMERA)
    assert accepted == []


def test_udp_packets_go_to_the_camera_whomever_it_names():
    with socket.socket(type=socket.SOCK_DGRAM) as neighbour, socket.socket(type=socket.SOCK_DGRAM) as camera:
        neighbour.bind((NEIGHBOUR_HOST, 0))
        port = neighbour.getsockname()[1]
        camera.bind((CAMERA_HOST, port))
        named = f"Transport: RTP/AVP;unicast;client_port={{}};source={NEIGHBOUR_HOST};server_port={port}-{port + 1}"

        def answer(request: bytes) -> bytes:
            ports = request.split(b"client_port=")[1].split(b"\r\n")[0].decode()
            return says("200 OK", "Session: 1", named.format(ports))(request)

        with (
            camera_that_answers({**FINE, "SETUP": answer}) as (url, asked),
            pytest.raises(CameraFault),
        ):
            pictures(Camera(url, transport="udp"), 1, **ONLY_THE_CAMERA)
        assert "PLAY" in asked
        assert heard(camera)  # FFmpeg opens the way through firewalls
        assert not heard(neighbour)


def heard(listening: socket.socket) -> bool:
    listening.settimeout(0.2)
    try:
        return bool(listening.recv(2000))
    except TimeoutError:
        return False


@contextmanager
def behind_tls(port: int, folder: Path) -> Iterator[int]:
    """A port that speaks TLS, with a certificate of its own, before one that does not."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(self_signed(folder))

    def copy(source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                target.sendall(data)
        except OSError:
            pass
        finally:
            target.close()

    def serve() -> None:
        while True:
            try:
                plain = server.accept()[0]
            except OSError:
                return
            try:
                outside, inside = (
                    context.wrap_socket(plain, server_side=True),
                    socket.create_connection((CAMERA_HOST, port)),
                )
            except OSError:
                continue
            for ends in ((outside, inside), (inside, outside)):
                threading.Thread(target=copy, args=ends, daemon=True).start()

    with socket.create_server((CAMERA_HOST, 0)) as server:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join(5)


def self_signed(folder: Path) -> Path:
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "camera")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address(CAMERA_HOST))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = folder / "camera.pem"
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    return path


def test_a_camera_behind_tls_is_read_at_full_rate(tmp_path):
    with (
        simulated_camera("--user", "admin", "--password", PASSWORD) as camera,
        behind_tls(port_of(camera.url), tmp_path) as port,
    ):
        found = pictures(Camera(f"rtsps://{CAMERA_HOST}:{port}/cam", "admin", PASSWORD), 60, fps=10.0)
    assert found[-1].slot - found[0].slot <= 65


def test_a_redirect_behind_tls_is_not_followed_either(tmp_path):
    with (
        listener(host=NEIGHBOUR_HOST) as (inside, accepted),
        camera_that_answers({**FINE, "DESCRIBE": says("302 Found", to(inside))}) as (url, _),
        behind_tls(port_of(url), tmp_path) as port,
        pytest.raises(CameraRedirects),
    ):
        pictures(Camera(f"rtsps://{CAMERA_HOST}:{port}/cam", "admin", PASSWORD), 1, **ONLY_THE_CAMERA)
    assert accepted == []


def test_a_camera_without_tls_is_named():
    with simulated_camera() as camera, pytest.raises(CameraUnreachable, match="TLS"):
        pictures(Camera(camera.url.replace("rtsp:", "rtsps:"), "admin", PASSWORD), 1, open_timeout_s=2.0)


def test_the_end_of_a_reader_ends_the_session_of_the_camera():
    with simulated_camera() as camera:
        pictures(Camera(camera.url), 1)
        wait_until(lambda: camera.times("teardown"))  # it is told of by another process


def test_no_thread_and_no_socket_is_left_behind():
    with camera_that_answers(FINE) as (url, _):
        before = descriptors()
        for _ in range(2):
            with pytest.raises(CameraFault):
                pictures(Camera(url), 1, **ONLY_THE_CAMERA)
        assert not [thread for thread in threading.enumerate() if thread.name == "relay"]
        wait_until(lambda: descriptors() == before)  # the camera, which is of this process, closes its side last


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


# The parser alone

WHOLE = (
    says("200 OK", "Content-Type: application/sdp", body=SDP)(b"CSeq: 1\r\n")
    + b"$\x01\x00\x05hello"
    + b"GET_PARAMETER * RTSP/1.0\r\nCSeq: 7\r\n\r\n"
    + says("404 Not Found")(b"CSeq: 2\r\n")
)


def test_answers_that_come_byte_by_byte_are_passed_on_like_those_that_come_at_once():
    answers = Answers(CAMERA_HOST)
    assert Answers(CAMERA_HOST).feed(WHOLE) == WHOLE
    assert b"".join(answers.feed(bytes([byte])) for byte in WHOLE) == WHOLE


def test_of_several_transports_only_the_first_is_passed_on_and_its_source_is_the_camera():
    said = b"RTSP/1.0 200 OK\r\ntransport: RTP/AVP;source=10.0.0.1;a=b,RTP/AVP;source=10.0.0.2\r\n\r\n"
    passed = Answers("192.0.2.7").feed(said)
    assert passed == b"RTSP/1.0 200 OK\r\ntransport: RTP/AVP;source=10.0.0.1;a=b;source=192.0.2.7\r\n\r\n"


def test_a_redirect_is_told_before_its_headers_are_there():
    with pytest.raises(Redirects):
        Answers(CAMERA_HOST).feed(b"RTSP/1.0 302 Found\r\n")


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 200 OK\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"x" * 2**17,
        b"RTSP/1.0 200 OK\r\n" + b"X: y\r\n" * 2**15,
        b"RTSP/1.0 200 OK\r\nContent-Length: 99999999\r\n\r\n",
        b"RTSP/1.0 200 OK\r\nX: \0\r\n\r\n",
    ],
)
def test_what_is_no_rtsp_is_refused_before_it_fills_the_memory(said):
    with pytest.raises(NotRtsp):
        Answers(CAMERA_HOST).feed(said)
