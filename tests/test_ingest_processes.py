"""The processes that read: what dies or hangs in one of them is started again, and no second goes unaccounted for."""

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ingest.assignment import ArchiveReport, Assignment, Camera
from ingest.child import Child, ChildDied, Line
from ingest.exchange import Request, Setup
from ingest.reading_process import ReadingProcesses
from tests.ingest_parts import MemoryDesk, MemorySink, encode, number_of, settings, simulated_camera, steady, until
from tests.test_ingest_service import archive, camera, running

pytestmark = pytest.mark.alone

SECRET = "cam3ra-" + "s3cret"


def reading_pids(parent: int | None = None) -> set[int]:
    """The reading processes that a process has, this one by default."""
    return {pid for pid, mother in _reading() if mother == (os.getpid() if parent is None else parent)}


def _reading() -> list[tuple[int, int]]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"ingest.reading" in (folder / "cmdline").read_bytes():
                found.append((int(folder.name), int((folder / "stat").read_text().rpartition(")")[2].split()[1])))
    return found


def assert_every_second_is_accounted_for(desk: MemoryDesk, sink: MemorySink, source_id: str) -> None:
    slots, missing = sink.slots(source_id), desk.missing_slots(source_id)
    assert slots == sorted(set(slots))
    assert set(slots) | set(missing) >= set(range(slots[0], slots[-1] + 1))
    assert not set(slots) & set(missing)


async def test_cameras_share_a_process_and_files_have_one_each(tmp_path):
    encode(tmp_path / "clip.mp4", steady(3))
    with simulated_camera("--count", "3") as cam:
        cameras = [camera(f"{cam.url}{number}", f"str_{number}") for number in range(3)]
        desk, sink = MemoryDesk(*cameras, archive("clip.mp4", "vid_1"), archive("clip.mp4", "vid_2")), MemorySink()
        sink.gate.clear()
        async with running(desk, sink, tmp_path, cameras_per_process=2):
            await until(lambda: len(reading_pids()) == 4)
            sink.gate.set()
            await until(lambda: {"vid_1", "vid_2"} <= desk.released.keys())
            await until(lambda: len(reading_pids()) == 2)
            await until(lambda: all(desk.states(one.source_id)[-1:] == ["online"] for one in cameras))
    assert reading_pids() == set()


async def test_a_process_that_dies_is_started_again_and_the_other_group_does_not_notice(tmp_path, caplog):
    with simulated_camera("--count", "2", "--gop", "10") as cam:
        desk = MemoryDesk(camera(f"{cam.url}0", "str_a"), camera(f"{cam.url}1", "str_b"))
        sink = MemorySink()
        async with running(desk, sink, tmp_path, cameras_per_process=1):
            await until(lambda: len(sink.slots("str_a")) >= 2 and len(sink.slots("str_b")) >= 2)
            before = len(sink.slots("str_a")), len(sink.slots("str_b"))
            first = min(reading_pids())
            os.kill(first, signal.SIGSEGV)
            await until(lambda: "reconnecting" in desk.states("str_a") + desk.states("str_b"))
            hit = "str_a" if "reconnecting" in desk.states("str_a") else "str_b"
            await until(lambda: len(sink.slots("str_a")) >= before[0] + 4 and len(sink.slots("str_b")) >= before[1] + 4)
            other = "str_b" if hit == "str_a" else "str_a"
    assert "SIGSEGV" in {report.reason for report in desk.reports[hit] if report.reason}.pop()
    assert set(desk.states(other)) <= {"connecting", "online"}
    assert desk.missing_slots(other) == []
    assert_every_second_is_accounted_for(desk, sink, hit)
    assert f"the process that reads {hit} was ended by SIGSEGV" in caplog.text


async def test_a_process_that_hangs_is_replaced_and_its_seconds_are_told(tmp_path):
    with simulated_camera("--gop", "10") as cam:
        desk, sink = MemoryDesk(camera(cam.url)), MemorySink()
        async with running(desk, sink, tmp_path, process_timeout_s=2.0):
            await until(lambda: len(sink.frames) >= 2)
            (pid,) = reading_pids()
            os.kill(pid, signal.SIGSTOP)
            count = len(sink.frames)
            await until(lambda: len(sink.frames) >= count + 2)
            assert pid not in reading_pids()
    assert "reconnecting" in desk.states("str_cam")
    assert desk.missing_slots("str_cam")
    assert {gap.reason for gap in desk.gaps["str_cam"]} == {"stream_down"}
    assert_every_second_is_accounted_for(desk, sink, "str_cam")


async def test_stopping_does_not_wait_for_a_process_that_hangs(tmp_path):
    with simulated_camera() as cam:
        async with running(MemoryDesk(camera(cam.url)), MemorySink(), tmp_path) as service:
            await until(reading_pids)
            for pid in reading_pids():
                os.kill(pid, signal.SIGSTOP)
            started = time.monotonic()
            await service.stop()
            assert time.monotonic() - started < 2
    await until(lambda: not reading_pids())


async def test_cameras_whose_process_crashes_twice_get_one_each(tmp_path, caplog):
    with simulated_camera("--count", "3", "--gop", "10") as cam:
        cameras = [camera(f"{cam.url}{number}", f"str_{number}") for number in range(3)]
        desk, sink = MemoryDesk(*cameras), MemorySink()
        async with running(desk, sink, tmp_path):
            for crash in range(2):
                await until(lambda: len(reading_pids()) == 1)
                await until(lambda crash=crash: all(len(sink.slots(one.source_id)) > crash for one in cameras))
                os.kill(reading_pids().pop(), signal.SIGKILL)
                await until(lambda crash=crash: caplog.text.count("it is started again") > crash)
            await until(lambda: len(reading_pids()) == 3)
            counts = {one.source_id: len(sink.slots(one.source_id)) for one in cameras}
            await until(lambda: all(len(sink.slots(name)) >= count + 2 for name, count in counts.items()))
    for one in cameras:
        assert_every_second_is_accounted_for(desk, sink, one.source_id)


async def test_a_file_whose_process_dies_goes_on_at_the_second_it_reached(tmp_path):
    encode(tmp_path / "clip.mp4", steady(60))
    desk, sink = MemoryDesk(archive("clip.mp4")), MemorySink()
    async with running(desk, sink, tmp_path, queue_frames=4, batch_frames=2):
        await until(lambda: len(sink.frames) >= 6)
        os.kill(reading_pids().pop(), signal.SIGKILL)
        await until(lambda: desk.released)
    assert [frame.slot for frame in sink.frames] == list(range(60))
    assert [number_of(frame.keyframe) for frame in sink.frames] == list(range(0, 1500, 25))
    assert desk.last("vid_clip").status == "ready"


async def test_a_file_that_kills_its_process_every_time_fails_and_keeps_what_was_read(tmp_path):
    encode(tmp_path / "clip.mp4", steady(60))
    desk, sink = MemoryDesk(archive("clip.mp4")), MemorySink()
    async with running(desk, sink, tmp_path, queue_frames=4, batch_frames=2, tick_s=0.01):
        await until(lambda: len(sink.frames) >= 6)
        sink.gate.clear()  # so that no more frames come in between
        for _ in range(5):
            await until(lambda: reading_pids() or desk.released)
            for pid in reading_pids():
                os.kill(pid, signal.SIGKILL)
            await until(lambda: not reading_pids() or desk.released)
        sink.gate.set()
        await until(lambda: desk.released)
    report = desk.last("vid_clip")
    assert isinstance(report, ArchiveReport)
    assert report.status == "failed"
    assert report.error is not None
    assert "was ended by SIGKILL" in report.error
    assert len(sink.frames) >= 6


async def test_a_file_that_asks_for_too_much_memory_fails_with_the_setting_to_raise(tmp_path):
    encode(tmp_path / "clip.mp4", steady(2))
    desk = MemoryDesk(archive("clip.mp4"))
    async with running(desk, MemorySink(), tmp_path, max_decoder_bytes=60 * 2**20):
        await until(lambda: desk.released)
    assert desk.last("vid_clip").status == "failed"


def test_reading_processes_end_with_whoever_started_them(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from tests.test_ingest_processes import start_reading;"
        "start_reading(sys.argv[1], Path(sys.argv[2])); print('ready', flush=True); time.sleep(60)"
    )
    with simulated_camera() as cam:
        mother = subprocess.Popen([sys.executable, "-c", program, cam.url, str(tmp_path)], stdout=subprocess.PIPE)
        with mother:
            assert mother.stdout is not None
            assert mother.stdout.readline() == b"ready\n"
            children = reading_pids(mother.pid)
            assert len(children) == 1
            mother.kill()
        deadline = time.monotonic() + 10
        while any(Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(Path(f"/proc/{pid}").exists() for pid in children)


def start_reading(url: str, folder: Path) -> None:
    processes = ReadingProcesses(settings(), folder)
    processes.open(camera(url), 64)
    while not processes.pids:
        time.sleep(0.01)


def test_the_password_of_a_camera_is_in_no_command_line_and_no_environment(tmp_path):
    with simulated_camera("--user", "admin", "--password", SECRET) as cam:
        processes = ReadingProcesses(settings(), tmp_path)
        feed = processes.open(Assignment("str_cam", 1, 1.0, Camera(cam.url, "admin", SECRET)), 64)
        try:
            while not feed.take(1):
                time.sleep(0.05)
            (pid,) = processes.pids
            for name in ("cmdline", "environ", "status"):
                assert SECRET.encode() not in Path(f"/proc/{pid}/{name}").read_bytes()
        finally:
            processes.shut()


@pytest.mark.parametrize("said", [b"", b"{", b'{"sources": {"str_cam": 5}}', b'{"sources": {"str_other": {}}}'])
async def test_a_process_that_talks_nonsense_is_replaced(tmp_path, monkeypatch, caplog, said):
    class Possessed(Child):
        def ask(self, words: bytes, patience_s: float) -> tuple[bytes, bytes]:
            answer = super().ask(words, patience_s)
            return answer if b"size_px" in words else (said, b"")

    monkeypatch.setattr("ingest.reading_process.Child", Possessed)
    desk = MemoryDesk(camera("rtsp://127.0.0.1:9/cam"))
    async with running(desk, MemorySink(), tmp_path):
        await until(lambda: caplog.text.count("said what cannot be understood; it is started again") >= 2)


def test_requests_and_setups_survive_the_wire_password_included():
    assignments = (
        Assignment("str_cam", 1, 1.0, Camera("rtsp://10.0.0.1/cam", "admin", SECRET, "udp"), last_slot=7),
        archive("clip.mp4"),
    )
    request = Request(open=assignments, close=("str_old",), take={"str_cam": 3}, shed={"str_cam": (1, 2)})
    assert Request.model_validate_json(request.model_dump_json()) == request
    setup = Setup(settings=settings(), size_px=336, upload_dir="/somewhere", spare_bytes=0)
    assert Setup.model_validate_json(setup.model_dump_json()) == setup


def test_a_line_refuses_what_is_no_message_and_keeps_its_deadline():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        line, other = Line(ours), Line(theirs)
        other.send(json.dumps({"a": 1}).encode(), b"bytes")
        assert line.receive(time.monotonic() + 5) == (b'{"a": 1}', b"bytes")
        with pytest.raises(TimeoutError):
            line.receive(time.monotonic() + 0.1)
        theirs.sendall(b"\xff" * 64)  # a message of gigabytes
        assert line.receive(time.monotonic() + 5) is None


def test_a_child_that_cannot_start_says_how_it_ended():
    with Child("no.such.module") as child, pytest.raises(ChildDied, match="ended with code 1"):
        child.ask(b"{}", 20)


@pytest.fixture(autouse=True)
def told(caplog):
    caplog.set_level(logging.INFO)
