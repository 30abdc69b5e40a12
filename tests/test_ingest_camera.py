"""One connection to a real RTSP server: pictures in their slots, and a name for everything that goes wrong."""

import socket
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.util import find_spec
from threading import Event

import pytest

from ingest.address import BadUrl
from ingest.assignment import Camera
from ingest.camera import (
    CameraAuthFailed,
    CameraEnded,
    CameraFault,
    CameraPathNotFound,
    CameraSession,
    CameraTimeout,
    CameraUnreachable,
    Picture,
)
from ingest.sample_camera import SampleCamera, SampleCameraFailed
from ingest.sampler import Sampler
from tests.camera_sim import read_clock
from tests.ingest_parts import free_port, real_clip, settings, simulated_camera

pytestmark = pytest.mark.alone

PASSWORD = "p@s:s/w#r d%41"
SECRET = "wr0ng-" + "s3cret"  # in two parts, so that no source line of a traceback shows it whole


def session(camera: Camera, *, fps: float = 1.0, halt: Event | None = None, **changes: object) -> CameraSession:
    return CameraSession(camera, Sampler(fps), settings(**changes), halt or Event(), lambda: None)


def pictures(camera: Camera, count: int, **options: object) -> list[Picture]:
    with closing(session(camera, **options).pictures()) as found:
        return [next(found) for _ in range(count)]


def shown_clock(picture: Picture) -> float:
    clock = read_clock(picture.image.reformat(336, 336, "gray").to_ndarray())
    assert clock is not None
    return clock[1]


@pytest.mark.parametrize("options", [("--gop", "12"), ("--gop", "250", "--bframes", "2"), ("--codec", "mjpeg")])
def test_pictures_lie_in_their_slots_by_the_clock_they_show(options):
    with simulated_camera(*options) as camera:
        found = pictures(Camera(camera.url), 5)
    assert [picture.slot for picture in found] == list(range(found[0].slot, found[0].slot + 5))
    # The first second may still be timed by its arrival; then the camera's own clock is known.
    assert all(abs(picture.time_s - shown_clock(picture)) < 0.5 for picture in found[2:])
    assert all(int(picture.time_s) == picture.slot for picture in found)


def test_several_frames_a_second_come_from_a_stream_of_more():
    with simulated_camera("--gop", "25") as camera:
        found = pictures(Camera(camera.url), 20, fps=10.0)
    assert [picture.slot for picture in found] == sorted({picture.slot for picture in found})
    assert found[-1].slot - found[0].slot <= 22


def test_udp_is_read_as_well():
    with simulated_camera() as camera:
        assert len(pictures(Camera(camera.url, transport="udp"), 2)) == 2


@pytest.mark.parametrize("auth", ["basic", "digest"])
def test_a_password_of_odd_characters_opens_the_stream(auth):
    with simulated_camera("--user", "us@r", "--password", PASSWORD, "--auth", auth) as camera:
        assert pictures(Camera(camera.url, "us@r", PASSWORD), 1)


def test_a_wrong_password_is_named_and_never_shown():
    with (
        simulated_camera("--user", "admin", "--password", PASSWORD) as camera,
        pytest.raises(CameraAuthFailed) as caught,
    ):
        pictures(Camera(camera.url, "admin", SECRET), 1)
    assert_silent(caught.value, SECRET)


def assert_silent(error: BaseException, secret: str) -> None:
    """Neither the error nor its whole traceback may hold the secret or the address."""
    assert error.__context__ is None
    told = "".join(traceback.format_exception(error)) + repr(error)
    assert secret not in told
    assert "rtsp://" not in repr(error)


def test_a_wrong_path_is_named():
    with simulated_camera() as camera, pytest.raises(CameraPathNotFound):
        pictures(Camera(camera.url + "/nothing"), 1)


def test_a_closed_port_is_named():
    with pytest.raises(CameraUnreachable, match="refused") as caught:
        pictures(Camera(f"rtsp://127.0.0.1:{free_port()}/cam", "admin", SECRET), 1)
    assert_silent(caught.value, SECRET)


def test_an_unknown_host_is_named():
    with pytest.raises(CameraUnreachable, match="does not resolve"):
        pictures(Camera("rtsp://no-such-camera.invalid/cam"), 1)


def test_a_private_address_is_refused_before_anything_connects():
    with listener() as (port, accepted), pytest.raises(BadUrl):
        pictures(Camera(f"rtsp://127.0.0.1:{port}/cam"), 1, allowed_networks=())
    assert accepted == []


@contextmanager
def listener(answer: bytes = b"", host: str = "127.0.0.1") -> Iterator[tuple[int, list[socket.socket]]]:
    """A server that accepts everybody and says `answer`, or nothing at all."""
    accepted: list[socket.socket] = []
    with socket.create_server((host, 0)) as server:

        def serve() -> None:
            try:
                while True:
                    accepted.append(server.accept()[0])
                    accepted[-1].sendall(answer)
            except OSError:
                return

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server.getsockname()[1], accepted
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in accepted:
                connection.close()


@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-OpenSSH_9.2\r\n" * 100, b"HTTP/1.1 200 OK\r\n\r\n"])
def test_a_server_that_is_no_camera_is_given_up(answer):
    with listener(answer) as (port, _), pytest.raises(CameraFault) as caught:
        pictures(Camera(f"rtsp://127.0.0.1:{port}/cam", "admin", SECRET), 1, open_timeout_s=1.0)
    assert_silent(caught.value, SECRET)


def test_the_end_of_a_live_stream_is_a_fault():
    with simulated_camera() as camera, closing(session(Camera(camera.url)).pictures()) as found:
        next(found)
        camera.suffer("drop")
        with pytest.raises(CameraEnded):
            list(found)


def test_a_camera_that_falls_silent_is_given_up():
    with (
        simulated_camera("--audio") as camera,
        closing(session(Camera(camera.url), read_timeout_s=1.0).pictures()) as found,
    ):
        next(found)
        camera.suffer("stall")
        started = time.monotonic()
        with pytest.raises(CameraTimeout):
            list(found)
    assert time.monotonic() - started < 6


def test_a_halted_session_ends_without_a_fault():
    halt = Event()
    with simulated_camera() as camera:
        for _ in session(Camera(camera.url), halt=halt).pictures():
            halt.set()


def test_a_new_picture_size_inside_the_session_is_followed():
    sizes = set()
    with simulated_camera("--gop", "10") as camera, closing(session(Camera(camera.url)).pictures()) as found:
        for picture in found:
            sizes.add((picture.image.width, picture.image.height))
            if len(sizes) == 1:
                camera.suffer("resize:640x360")
            else:
                break
    assert sizes == {(320, 180), (640, 360)}


def test_a_jump_of_the_camera_time_does_not_reach_the_frames():
    with simulated_camera("--gop", "10") as camera, closing(session(Camera(camera.url)).pictures()) as found:
        before = [next(found) for _ in range(2)]
        camera.suffer("ptsjump:50")
        after = [next(found) for _ in range(3)]
    assert all(abs(picture.time_s - time.time()) < 6 for picture in before + after)


needs_toolkit = pytest.mark.skipif(
    find_spec("aio_rtsp_toolkit") is None, reason="the extra `demo`, which plays files as cameras, is not installed"
)


@needs_toolkit
def test_the_sample_camera_plays_a_real_file_round_and_round():
    with SampleCamera(real_clip("carphone_pristine")) as camera:  # lasts four seconds
        found = pictures(Camera(camera.url), 6)
    assert [picture.slot for picture in found] == list(range(found[0].slot, found[0].slot + 6))


@needs_toolkit
def test_the_sample_camera_says_what_it_cannot_play(tmp_path):
    (tmp_path / "notes.txt").write_text("no video")
    with pytest.raises(SampleCameraFailed, match=r"notes\.txt"), SampleCamera(tmp_path / "notes.txt"):
        pass
