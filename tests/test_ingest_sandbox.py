"""A first look in a process of its own: the same facts as here, and whatever happens there stays there."""

import io
import os
import threading
import time
from pathlib import Path

import av
import pytest
from PIL import Image

from ingest.address import BadUrl
from ingest.archive import ArchiveLimits, UnsupportedMedia, probe
from ingest.assignment import Camera
from ingest.camera import CameraAuthFailed, CameraPathNotFound, CameraTimeout, CameraUnreachable
from ingest.sandbox import Sandbox
from tests.ingest_parts import free_port, real_clip, settings, simulated_camera
from tests.test_ingest_camera import assert_silent, listener

pytestmark = pytest.mark.alone

PASSWORD = "p@s:s/w#r d%41"
SECRET = "wr0ng-" + "s3cret"  # in two parts, so that no source line of a traceback shows it whole


@pytest.mark.parametrize("name", ["bikes", "carphone_pristine"])
def test_a_file_looks_the_same_in_a_process_of_its_own(name):
    assert Sandbox(settings()).archive(real_clip(name)) == probe(real_clip(name), ArchiveLimits())


def test_what_is_no_video_is_refused_as_it_is_here(tmp_path):
    path = tmp_path / "notes.mp4"
    path.write_text("no video")
    with pytest.raises(UnsupportedMedia) as here:
        probe(path, ArchiveLimits())
    with pytest.raises(UnsupportedMedia) as there:
        Sandbox(settings()).archive(path)
    assert str(there.value) == str(here.value)


def test_a_file_that_keeps_the_decoder_busy_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("ingest.sandbox.START_S", 5.0)
    os.mkfifo(tmp_path / "endless.mp4")  # opening it waits for a writer who never comes
    started = time.monotonic()
    with pytest.raises(UnsupportedMedia, match="within 1 s"):
        Sandbox(settings(look_timeout_s=1.0)).archive(tmp_path / "endless.mp4")
    assert time.monotonic() - started < 20


def test_a_file_that_asks_for_too_much_memory_is_refused(tmp_path):
    with av.open(str(tmp_path / "huge.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 8000, 4000, "yuv420p"
        container.mux(stream.encode(av.VideoFrame(8000, 4000, "yuv420p")))
        container.mux(stream.encode(None))
    assert Sandbox(settings()).archive(tmp_path / "huge.mp4").width == 8000
    with pytest.raises(UnsupportedMedia, match="memory"):
        Sandbox(settings(max_decoder_bytes=120 * 2**20)).archive(tmp_path / "huge.mp4")


@pytest.mark.parametrize("auth", ["basic", "digest"])
def test_a_camera_tells_what_it_sends(auth):
    with simulated_camera("--user", "us@r", "--password", PASSWORD, "--auth", auth, "--fps", "12") as camera:
        facts = Sandbox(settings()).camera(Camera(camera.url, "us@r", PASSWORD))
    assert (facts.codec, facts.width, facts.height) == ("h264", 320, 180)
    assert facts.fps == pytest.approx(12, abs=2)
    assert facts.first_frame_ms > 0
    with Image.open(io.BytesIO(facts.snapshot)) as picture:
        assert (picture.format, picture.size) == ("JPEG", (320, 180))


def test_a_wrong_password_is_named_and_never_shown():
    with (
        simulated_camera("--user", "admin", "--password", PASSWORD) as camera,
        pytest.raises(CameraAuthFailed) as caught,
    ):
        Sandbox(settings()).camera(Camera(camera.url, "admin", SECRET))
    assert_silent(caught.value, SECRET)


def test_a_wrong_path_a_closed_port_and_a_private_address_are_named():
    look = Sandbox(settings()).camera
    with simulated_camera() as camera, pytest.raises(CameraPathNotFound):
        look(Camera(camera.url + "/nothing"))
    with pytest.raises(CameraUnreachable, match="refused"):
        look(Camera(f"rtsp://127.0.0.1:{free_port()}/cam"))
    with listener() as (port, accepted), pytest.raises(BadUrl):
        Sandbox(settings(allowed_networks=())).camera(Camera(f"rtsp://127.0.0.1:{port}/cam"))
    assert accepted == []


def test_the_password_of_a_silent_camera_stands_in_no_command_line_and_in_no_error(monkeypatch):
    monkeypatch.setattr("ingest.sandbox.START_S", 5.0)
    lines: set[bytes] = set()
    with listener() as (port, _):
        found: list[BaseException] = []

        def look() -> None:
            try:
                Sandbox(settings(open_timeout_s=1.0)).camera(Camera(f"rtsp://127.0.0.1:{port}/cam", "admin", SECRET))
            except (CameraTimeout, CameraUnreachable) as error:
                found.append(error)

        looking = threading.Thread(target=look)
        looking.start()
        while looking.is_alive():
            lines |= set(command_lines())
            time.sleep(0.02)
        looking.join()
    assert any(b"ingest.sandbox" in line for line in lines)
    assert not any(SECRET.encode() in line for line in lines)
    assert len(found) == 1
    assert_silent(found[0], SECRET)


def command_lines() -> list[bytes]:
    """The command lines and environments of all processes that can be read."""
    told = []
    for process in Path("/proc").glob("[0-9]*"):
        for name in ("cmdline", "environ"):
            try:
                told.append((process / name).read_bytes())
            except OSError:
                continue
    return told
