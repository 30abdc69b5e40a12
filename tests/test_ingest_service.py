"""The service over real cameras and files, with a desk and a sink in memory."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from ingest.archive_worker import ArchiveWorker
from ingest.assignment import Archive, ArchiveReport, Assignment, Camera, CameraReport
from ingest.camera_worker import CameraWorker
from ingest.clock import STAMPS_JUMPED, STAMPS_STAND
from ingest.frame import Frame
from ingest.service import IngestService, IngestUnhealthy
from tests.ingest_parts import (
    MemoryDesk,
    MemorySink,
    encode,
    free_port,
    number_of,
    settings,
    simulated_camera,
    steady,
    until,
)

pytestmark = pytest.mark.alone

SECRET = "wr0ng-" + "s3cret"


@asynccontextmanager
async def running(desk: MemoryDesk, sink: MemorySink, folder: Path, **changes: object) -> AsyncIterator[IngestService]:
    service = IngestService(settings(**changes), desk, sink, folder)
    await service.start()
    try:
        yield service
        service.check_health()
    finally:
        await service.stop()


def camera(url: str, source_id: str = "str_cam", **changes: object) -> Assignment:
    return Assignment(source_id, 3, 1.0, Camera(url), **changes)


def archive(name: str, source_id: str = "vid_clip", fps: float = 1.0, **changes: object) -> Assignment:
    return Assignment(source_id, 7, fps, Archive(path=name), **changes)


def told(desk: MemoryDesk, caplog: pytest.LogCaptureFixture) -> str:
    return repr(desk.reports) + caplog.text


async def test_a_camera_comes_online_and_its_frames_arrive_in_order(tmp_path):
    sink = MemorySink(size_px=336)
    with simulated_camera() as cam:
        desk = MemoryDesk(camera(cam.url))
        async with running(desk, sink, tmp_path, max_sources=16) as service:
            await until(lambda: len(sink.frames) >= 3)
            await until(lambda: desk.states("str_cam")[-1:] == ["online"])
            assert service.stats() == {"owned": 1, "room": 15}
            report = desk.last("str_cam")
    assert desk.released == {"str_cam": 3}
    slots = sink.slots("str_cam")
    assert slots == list(range(slots[0], slots[0] + len(slots)))
    assert all(frame.time_ms // 1000 == frame.slot and frame.epoch == 3 for frame in sink.frames)
    assert desk.states("str_cam")[0] == "connecting"
    assert isinstance(report, CameraReport)
    assert report.last_frame_at is not None
    assert report.lag_s is not None
    assert report.lag_s < 5
    assert 1 <= report.frames_1h <= len(slots)
    assert report.reconnects_1h == report.dropped_frames == 0


async def test_a_wrong_password_is_reported_and_never_told(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    with simulated_camera("--user", "admin", "--password", "right") as cam:
        desk = MemoryDesk(Assignment("str_cam", 1, 1.0, Camera(cam.url, "admin", SECRET)))
        async with running(desk, MemorySink(), tmp_path):
            await until(lambda: "auth_failed" in desk.states("str_cam"))
            report = desk.last("str_cam")
            assert isinstance(report, CameraReport)
            assert report.reason == "the camera refused the user name or the password"
            assert report.next_retry_at is not None
            assert report.next_retry_at - time.time() > 30  # cameras lock accounts
    assert SECRET not in told(desk, caplog) + repr(Camera(cam.url, "admin", SECRET))


async def test_an_unreachable_camera_is_tried_again_and_again(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    desk = MemoryDesk(Assignment("str_cam", 1, 1.0, Camera(f"rtsp://127.0.0.1:{free_port()}/cam", "admin", SECRET)))

    def retries() -> int:
        report = desk.last("str_cam")
        return report.reconnects_1h if isinstance(report, CameraReport) and report.next_retry_at else 0

    async with running(desk, MemorySink(), tmp_path, backoff_max_s=0.2):
        await until(lambda: retries() >= 3)
    assert set(desk.states("str_cam")) <= {"connecting", "reconnecting"}
    assert SECRET not in told(desk, caplog)
    assert "str_cam reconnecting: connection refused" in caplog.text


async def test_a_camera_that_drops_out_comes_back_by_itself_and_every_second_is_accounted_for(tmp_path):
    sink = MemorySink()
    with simulated_camera("--gop", "10") as cam:
        desk = MemoryDesk(camera(cam.url))
        async with running(desk, sink, tmp_path):
            await until(lambda: len(sink.frames) >= 2)
            before = len(sink.frames)
            cam.suffer("restart:2.5:640x360")
            await until(lambda: "reconnecting" in desk.states("str_cam"))
            await until(lambda: len(sink.frames) >= before + 2)
            await until(lambda: desk.states("str_cam")[-1] == "online")
    slots, missing = sink.slots("str_cam"), desk.missing_slots("str_cam")
    assert len(missing) >= 2
    assert sorted(slots + missing) == list(range(slots[0], slots[-1] + 1))  # nothing twice, nothing forgotten
    assert {gap.reason for gap in desk.gaps["str_cam"]} == {"stream_down"}


async def test_work_taken_over_says_what_was_missed_meanwhile(tmp_path):
    sink = MemorySink()
    last = int(time.time()) - 100
    with simulated_camera() as cam:
        desk = MemoryDesk(camera(cam.url, last_slot=last))
        async with running(desk, sink, tmp_path):
            await until(lambda: desk.missing_slots("str_cam"))
    assert desk.missing_slots("str_cam") == list(range(last + 1, sink.slots("str_cam")[0]))


async def test_a_last_slot_in_the_future_does_not_hold_a_camera_up(tmp_path):
    sink = MemorySink()
    with simulated_camera() as cam:
        async with running(MemoryDesk(camera(cam.url, last_slot=int(time.time()) + 10**6)), sink, tmp_path):
            await until(lambda: sink.frames)
    assert abs(sink.frames[0].slot - time.time()) < 10


async def test_a_sink_that_is_away_costs_the_oldest_frames_and_they_are_counted(tmp_path):
    sink = MemorySink()
    with simulated_camera("--gop", "5") as cam:
        desk = MemoryDesk(Assignment("str_cam", 3, 10.0, Camera(cam.url)))
        async with running(desk, sink, tmp_path, queue_frames=5):
            await until(lambda: len(sink.frames) >= 3)
            sink.is_away = True
            await until(lambda: len(desk.missing_slots("str_cam")) >= 4)
            sink.is_away = False
            length = len(sink.frames)
            await until(lambda: len(sink.frames) >= length + 8)
            await until(lambda: desk.states("str_cam")[-1] == "degraded")
            report = desk.last("str_cam")
    assert isinstance(report, CameraReport)
    assert report.dropped_frames >= 4
    assert report.reason is not None
    assert "shed" in report.reason
    shed = {
        slot for gap in desk.gaps["str_cam"] if gap.reason == "shed" for slot in range(gap.start_slot, gap.end_slot)
    }
    slots = sink.slots("str_cam")
    assert slots == sorted(set(slots))
    assert not shed & set(slots)
    assert shed | set(slots) >= set(range(slots[0], slots[-1] + 1)) - set(desk.missing_slots("str_cam"))


async def test_a_sink_without_room_is_asked_seldom_named_to_the_camera_and_in_the_gaps_and_taken_up_again(
    tmp_path, monkeypatch, caplog
):
    def told() -> tuple[str, str]:
        report = desk.last("str_cam")
        return ("", "") if not isinstance(report, CameraReport) else (report.state, report.reason or "")

    monkeypatch.setattr("ingest.service.FULL_RETRY_S", 1.0)
    sink = MemorySink()
    with simulated_camera("--gop", "5") as cam:
        desk = MemoryDesk(Assignment("str_cam", 3, 10.0, Camera(cam.url)))
        async with running(desk, sink, tmp_path, queue_frames=5):
            await until(lambda: len(sink.frames) >= 3)
            sink.is_full, began = True, time.monotonic()
            await until(lambda: len(desk.missing_slots("str_cam")) >= 10)
            assert sink.refusals <= time.monotonic() - began + 1
            assert told() == ("degraded", "frames are not kept: the disk is full; make room")
            sink.is_full = False
            length = len(sink.frames)
            await until(lambda: len(sink.frames) >= length + 8)
            await until(lambda: "room" not in told()[1])
    slots, reasons = sink.slots("str_cam"), {gap.reason for gap in desk.gaps["str_cam"]}
    assert slots == sorted(set(slots))
    assert "store_full" in reasons
    assert "shed" not in reasons
    absent = set(range(slots[0], slots[-1] + 1)) - set(slots)
    assert absent <= set(desk.missing_slots("str_cam"))
    assert sum("the disk is full" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize(("fault", "reason"), [("freeze", "frozen"), ("black", "black")])
async def test_a_camera_that_shows_nothing_live_is_degraded_until_it_does(tmp_path, fault, reason):
    def told() -> tuple[str, str]:
        report = desk.last("str_cam")
        return ("", "") if not isinstance(report, CameraReport) else (report.state, report.reason or "")

    with simulated_camera("--gop", "12") as cam:
        desk, sink = MemoryDesk(camera(cam.url)), MemorySink(size_px=336)
        async with running(desk, sink, tmp_path, frozen_s=4.0):
            await until(lambda: told()[0] == "online")
            cam.suffer(fault)
            await until(lambda: told()[0] == "degraded" and reason in told()[1])
            kept = len(sink.frames)
            await until(lambda: len(sink.frames) >= kept + 2)  # what it shows is remembered all the same
            cam.suffer("clear")
            await until(lambda: told()[0] == "online")


@pytest.mark.parametrize(("seconds", "reason"), [("50", STAMPS_JUMPED), ("-20", STAMPS_STAND)])
async def test_a_camera_whose_times_jump_is_read_on_and_says_so(tmp_path, seconds, reason):
    with simulated_camera("--gop", "12") as cam:
        desk, sink = MemoryDesk(camera(cam.url)), MemorySink(size_px=336)
        async with running(desk, sink, tmp_path):
            await until(lambda: len(sink.frames) >= 2)
            cam.suffer(f"ptsjump:{seconds}")  # to before its start: then they stand at 0
            await until(lambda: reason in {report.reason for report in desk.reports["str_cam"]})
            kept = len(sink.frames)
            await until(lambda: len(sink.frames) >= kept + 3)
            report = desk.last("str_cam")
    slots = sink.slots("str_cam")
    assert slots == sorted(set(slots))
    assert sorted([*slots, *desk.missing_slots("str_cam")]) == list(range(slots[0], slots[-1] + 1))
    assert all(abs(frame.time_ms / 1000 - time.time()) < 60 for frame in sink.frames)
    assert isinstance(report, CameraReport)
    assert report.clock in ("camera", "arrival")


async def test_stopping_is_quick_even_while_a_camera_stalls(tmp_path):
    sink = MemorySink()
    with simulated_camera() as cam:
        async with running(MemoryDesk(camera(cam.url)), sink, tmp_path, read_timeout_s=20.0) as service:
            await until(lambda: sink.frames)
            cam.suffer("stall")
            started = time.monotonic()
            await service.stop()
            assert time.monotonic() - started < 2


async def test_a_lost_lease_stops_its_worker(tmp_path):
    sink = MemorySink()
    with simulated_camera() as cam:
        desk = MemoryDesk(camera(cam.url))
        async with running(desk, sink, tmp_path) as service:
            await until(lambda: sink.frames)
            desk.taken_away = {"str_cam"}
            await until(lambda: service.stats()["owned"] == 0)
    assert desk.released == {}


async def test_a_source_that_the_sink_refuses_is_given_up_and_the_others_go_on(tmp_path):
    encode(tmp_path / "long.mp4", steady(30))
    desk = MemoryDesk(archive("long.mp4", "vid_lost", last_slot=0), archive("long.mp4", "vid_kept"))
    sink = MemorySink()
    sink.refused = frozenset({"vid_lost"})
    async with running(desk, sink, tmp_path, queue_frames=3) as service:
        await until(lambda: desk.last("vid_kept") and desk.last("vid_kept").status == "ready")
        assert service.stats()["owned"] == 0
    assert sink.slots("vid_kept") == list(range(30))
    assert desk.released == {"vid_kept": 7}


async def test_a_file_is_ready_when_its_last_frame_is_durable(tmp_path):
    encode(tmp_path / "clip.mp4", steady(12))
    desk, sink = MemoryDesk(archive("clip.mp4")), MemorySink()
    sink.gate.clear()
    async with running(desk, sink, tmp_path, batch_frames=4, queue_frames=20):
        await until(lambda: len(desk.reports.get("vid_clip", [])) >= 3)
        assert desk.last("vid_clip").status == "processing"
        sink.gate.set()
        await until(lambda: desk.last("vid_clip").status == "ready")
        await until(lambda: desk.released == {"vid_clip": 7})
    report = desk.last("vid_clip")
    assert isinstance(report, ArchiveReport)
    assert (report.progress, report.error) == (1.0, None)
    assert report.duration_s == pytest.approx(12.0)
    assert [(frame.slot, frame.time_ms, number_of(frame.keyframe)) for frame in sink.frames] == [
        (slot, slot * 1000, slot * 25) for slot in range(12)
    ]
    assert max(sink.batches) <= 4
    progress = [report.progress for report in desk.reports["vid_clip"]]
    assert progress == sorted(progress)


async def test_a_file_goes_on_where_its_last_owner_stopped(tmp_path):
    encode(tmp_path / "clip.mp4", steady(10))
    desk, sink = MemoryDesk(archive("clip.mp4", last_slot=6)), MemorySink()
    async with running(desk, sink, tmp_path):
        await until(lambda: desk.released)
    assert sink.slots("vid_clip") == [7, 8, 9]


async def test_a_cut_file_is_ready_with_its_end_reported_missing(tmp_path):
    path = encode(tmp_path / "cut.mkv", steady(20))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    desk, sink = MemoryDesk(archive("cut.mkv")), MemorySink()
    async with running(desk, sink, tmp_path):
        await until(lambda: desk.released)
    assert desk.last("vid_clip").status == "ready"
    assert sorted(sink.slots("vid_clip") + desk.missing_slots("vid_clip")) == list(range(20))
    assert {gap.reason for gap in desk.gaps["vid_clip"]} == {"decode_error"}


async def test_trouble_is_told_once_and_not_at_every_try(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    encode(tmp_path / "clip.mp4", steady(2))
    desk, sink = MemoryDesk(archive("clip.mp4")), MemorySink()
    desk.is_away = True
    async with running(desk, sink, tmp_path):
        await until(lambda: desk.refusals >= 5)
        desk.is_away = False
        await until(lambda: "claiming succeeds again" in caplog.text and desk.released)
    assert caplog.text.count("claiming fails") == 1


@pytest.mark.parametrize("name", ["text.mp4", "gone.mp4", "../outside.mp4"])
async def test_a_file_that_cannot_be_read_fails_with_the_reason(tmp_path, name):
    folder = tmp_path / "uploads"
    folder.mkdir()
    (folder / "text.mp4").write_text("no video at all")
    encode(tmp_path / "outside.mp4", steady(1))
    desk = MemoryDesk(archive(name))
    async with running(desk, MemorySink(), folder):
        await until(lambda: desk.released)
    report = desk.last("vid_clip")
    assert isinstance(report, ArchiveReport)
    assert report.status == "failed"
    assert report.error is not None
    assert report.error.startswith("the file")
    assert str(tmp_path) not in report.error


async def test_a_download_from_a_private_address_fails_with_advice(tmp_path):
    desk = MemoryDesk(Assignment("vid_clip", 1, 1.0, Archive(url="http://127.0.0.1:9/clip.mp4")))
    async with running(desk, MemorySink(), tmp_path, allowed_networks=()):
        await until(lambda: desk.released)
    assert "TOKENLINE_INGEST__ALLOWED_NETWORKS" in desk.last("vid_clip").error


async def test_a_downloaded_file_is_read_and_then_removed(tmp_path):
    source = encode(tmp_path / "clip.mp4", steady(3))
    content = source.read_bytes()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(content) + content)
        await writer.drain()
        writer.close()

    folder = tmp_path / "uploads"
    folder.mkdir()
    sink = MemorySink()
    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        desk = MemoryDesk(Assignment("vid_clip", 1, 1.0, Archive(url=f"http://127.0.0.1:{port}/clip.mp4")))
        async with running(desk, sink, folder):
            await until(lambda: desk.released)
    assert desk.last("vid_clip").status == "ready"
    assert sink.slots("vid_clip") == [0, 1, 2]
    assert list(folder.iterdir()) == []


async def test_no_more_sources_are_claimed_than_there_is_room_for(tmp_path):
    encode(tmp_path / "clip.mp4", steady(2))
    desk, sink = MemoryDesk(*(archive("clip.mp4", f"vid_{number}") for number in range(5))), MemorySink()
    sink.gate.clear()
    async with running(desk, sink, tmp_path, max_sources=2) as service:
        await until(lambda: service.stats() == {"owned": 2, "room": 0})
        assert len(desk.open) == 3
        sink.gate.set()
        await until(lambda: len(desk.released) == 5)


async def test_a_desk_and_a_sink_that_come_late_or_go_away_are_waited_for(tmp_path):
    encode(tmp_path / "clip.mp4", steady(40))
    desk, sink = MemoryDesk(archive("clip.mp4")), MemorySink()
    desk.is_away = sink.is_away = True
    async with running(desk, sink, tmp_path, batch_frames=4) as service:
        await asyncio.sleep(0)
        desk.is_away = False
        assert service.stats()["owned"] == 0
        sink.is_away = False
        await until(lambda: len(sink.frames) >= 4)
        desk.is_away = True
        await until(lambda: len(sink.frames) == 40)
        desk.is_away = False
        await until(lambda: desk.released)
    assert sink.slots("vid_clip") == list(range(40))
    assert desk.last("vid_clip").status == "ready"


async def test_a_sink_that_cannot_stand_a_file_fails_it_instead_of_blocking_all(tmp_path, caplog):
    class Choking(MemorySink):
        async def put(self, frames):
            if any(frame.source_id == "vid_bad" for frame in frames):
                raise RuntimeError("cannot digest")
            return await super().put(frames)

    encode(tmp_path / "clip.mp4", steady(2))
    desk, sink = MemoryDesk(archive("clip.mp4", "vid_bad"), archive("clip.mp4", "vid_good")), Choking()
    async with running(desk, sink, tmp_path):
        await until(lambda: {"vid_bad", "vid_good"} <= desk.released.keys())
    assert desk.last("vid_bad").status == "failed"
    assert desk.last("vid_good").status == "ready"
    assert "cannot digest" in caplog.text


async def test_a_service_whose_loops_have_ended_is_unhealthy(tmp_path):
    service = IngestService(settings(), MemoryDesk(), MemorySink(), tmp_path)
    await service.start()
    service.check_health()
    tasks = [task for task in asyncio.all_tasks() if task.get_name() == "ingest-frames"]
    tasks[0].cancel()
    await asyncio.wait(tasks)
    with pytest.raises(IngestUnhealthy, match="ingest-frames"):
        service.check_health()
    await service.stop()


async def test_a_hanging_reading_thread_is_replaced(tmp_path):
    with simulated_camera() as cam:
        worker = CameraWorker(camera(cam.url), settings(open_timeout_s=0.2, read_timeout_s=0.2), 64)
        worker.start()
        frames: list[Frame] = []
        await until(lambda: frames.extend(worker.take(9)) or frames)
        worker.supervise(time.monotonic() + 60)  # a minute in which FFmpeg has not come back
        assert worker.news(time.time()).state == "reconnecting"
        count = len(frames)
        await until(lambda: frames.extend(worker.take(9)) or len(frames) >= count + 2)
        await until(lambda: worker.stuck_threads == 0)  # it was not stuck in truth, and has ended
        worker.stop()
        worker.join(5)
    slots = [frame.slot for frame in frames]
    assert slots == sorted(set(slots))


async def test_an_archive_waits_for_room_instead_of_dropping(tmp_path):
    encode(tmp_path / "clip.mp4", steady(20))
    worker = ArchiveWorker(archive("clip.mp4"), settings(queue_frames=2), 64, tmp_path, 0)
    worker.start()
    frames: list[Frame] = []
    while len(frames) < 20:
        taken = worker.take(8)
        assert len(taken) <= 2
        frames += taken
        await asyncio.sleep(0.001)
    await until(lambda: worker.news(time.time()).is_read)
    worker.join(5)
    assert [frame.slot for frame in frames] == list(range(20))
