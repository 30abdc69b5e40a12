"""Everything that cameras do wrong, done by a real one: no second goes untold, none comes twice, and it comes back."""

import asyncio
import gc
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from ingest.camera import CameraSession
from ingest.camera_worker import CameraWorker
from ingest.clock import STAMPS_JUMPED
from ingest.feed import CameraFeed
from ingest.frame import Frame
from ingest.reading import START_SPACING_S
from tests.camera_faults import (
    BACK_WITHIN_S,
    Fault,
    FaultReport,
    Seen,
    reading_pids,
    suffer,
    table,
    tally,
    worst_recovery_s,
)
from tests.ingest_parts import MemoryDesk, MemorySink, free_port, need_simulator, settings, simulated_camera, until
from tests.test_ingest_service import camera, running

pytestmark = pytest.mark.alone

AT_ONCE = 5  # so that what starts at once does not make the pictures late
CLOCK_TOLERANCE_S = 0.5  # of pictures that are timed by their arrival, at ten a second

RECORDERS, CHANNELS = 4, 16

SILENT = "the camera sent nothing for too long"
ENDED = "the camera ended the connection"
CLOSED = "connection refused"

FAULTS = (
    Fault("it drops the connection", "drop", told=ENDED),
    Fault("it drops a connection whose pictures come by UDP", "drop", told=ENDED, udp=True),
    Fault("it stalls for a moment", "stall:2", 2.0),
    Fault("it stalls for long", "stall:6", 6.0, told=SILENT),
    Fault("it stalls while its pictures come by UDP", "stall:6", 6.0, told=SILENT, udp=True),
    Fault("it stalls while its sound goes on", "stall:6", 6.0, told=SILENT, options=("--audio",)),
    Fault("it hangs for a moment", "hang", 2.0),
    Fault("it hangs for long", "hang", 6.0, told=SILENT),
    Fault("its port is closed and opened again", "refuse:3", 3.0, told=CLOSED),
    Fault("its power is cut and comes back", "off", 3.0, told=CLOSED),
    Fault("it reboots and sends another size", "restart:2:640x360", 2.0, told=CLOSED),
    Fault("it is given another password and then the right one", "lock", 3.0, told="refused the user name"),
    Fault("its picture freezes", "freeze:5", 5.0, told="frozen", stops_clock=True),
    Fault("its picture is black", "black:3", 3.0, told="black"),
    Fault("its picture changes size", "resize:640x360"),
    Fault("its time stamps jump far ahead", "ptsjump:50", told=STAMPS_JUMPED),
    Fault("its time stamps jump a little ahead", "ptsjump:4", told=STAMPS_JUMPED),
    Fault("its time stamps jump a little back", "ptsjump:-3", told=STAMPS_JUMPED),
    Fault("its time stamps fall back to its start and stand there", "ptsjump:-20", 4.0, told="stamps"),
    Fault("its pictures are damaged", "corrupt:3", 3.0, stops_clock=True),
)


async def suffer_all(folder: Path) -> dict[Fault, FaultReport]:
    """Let a camera a fault suffer, a few side by side, each with a service of its own."""
    turn = asyncio.Semaphore(AT_ONCE)
    how = settings(frozen_s=3.0, auth_retry_s=1.0, tick_s=0.2)

    async def one(fault: Fault) -> FaultReport:
        async with turn:
            return await suffer(fault, how, folder)

    reports = await asyncio.gather(*map(one, FAULTS))
    return dict(zip(FAULTS, reports, strict=True))


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Mapping[Fault, FaultReport]:
    need_simulator()
    found = asyncio.run(suffer_all(tmp_path_factory.mktemp("uploads")))
    print(f"\n{table([report.row() for report in found.values()])}")
    return found


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_camera_is_read_on_and_every_second_is_told_when(reports, fault):
    report = reports[fault]
    assert (report.tally.undeclared, report.tally.needless, report.tally.duplicates) == (0, 0, 0), report
    assert report.tally.lost == report.tally.declared
    assert report.tally.clock_error_s < CLOCK_TOLERANCE_S
    assert report.recovery_s < BACK_WITHIN_S
    assert report.after.fds <= report.before.fds
    if fault.told is None:
        assert {state for state, _ in report.words} <= {"online", "degraded"}
    else:
        assert any(fault.told in (reason or "") for _, reason in report.words), report.words


def test_frames_that_are_given_up_are_told_though_the_process_that_read_them_is_gone():
    feed = CameraFeed(camera("rtsp://127.0.0.1:9/cam"), queue_frames=5)
    feed.shed([Frame("str_cam", slot, slot * 1000, b"", 3) for slot in (7, 8)])
    feed.take_shed()  # on its way to the process ...
    feed.interrupt("was ended by SIGKILL")  # ... which is no more
    assert [(gap.start_slot, gap.end_slot, gap.reason) for gap in feed.take_missing()] == [
        (7, 8, "shed"),
        (8, 9, "shed"),
    ]


async def test_nothing_is_kept_of_connections_that_ended():
    worker = CameraWorker(camera(f"rtsp://127.0.0.1:{free_port()}/cam"), settings(backoff_max_s=0.1), 64)
    gc.collect()
    gc.disable()  # it would only come after many connections, and decoders of many cameras would wait for it
    try:
        worker.start()
        await until(lambda: worker.news(time.time()).reconnects_1h >= 5)
        sessions = sum(type(one) is CameraSession for one in gc.get_objects())
    finally:
        gc.enable()
        worker.stop()
        worker.join(2.0)
    assert sessions <= 1  # that of the next try


async def test_many_cameras_opened_at_once_come_online_without_a_stampede(tmp_path):
    how = settings(max_sources=RECORDERS * CHANNELS, tick_s=0.5, report_s=2.0, open_timeout_s=10.0, read_timeout_s=5.0)
    with ExitStack() as stack:
        small = ("--count", str(CHANNELS), "--size", "160x96", "--fps", "2", "--gop", "2")
        recorders = [stack.enter_context(simulated_camera(*small)) for _ in range(RECORDERS)]
        urls = [f"{recorder.url}{channel}" for recorder in recorders for channel in range(CHANNELS)]
        cameras = [camera(url, f"str_{number}") for number, url in enumerate(urls)]
        desk, sink = MemoryDesk(*cameras), MemorySink()
        async with running(desk, sink, tmp_path, **how.model_dump()) as service:
            await until(lambda: all(desk.states(one.source_id)[-1:] == ["online"] for one in cameras), BACK_WITHIN_S)
            sockets = [_sockets(pid) for pid in reading_pids(service)]
        connected = [moment for recorder in recorders for moment in recorder.times("connect")]
    share = how.cameras_per_process
    assert len(connected) == len(cameras)
    assert len(sockets) == len(cameras) / share
    assert max(sockets) <= 3 * share + 2  # the relay has three a camera; and the line to the parent, twice
    # A process begins with one camera and goes on with the next; only the processes start side by side.
    assert max(connected) - min(connected) > 0.8 * (share - 1) * START_SPACING_S
    at_once = Counter(int(moment / START_SPACING_S) for moment in connected)
    assert max(at_once.values()) <= 3 * len(sockets)


def _sockets(pid: int) -> int:
    return sum(str(fd.readlink()).startswith("socket:") for fd in Path(f"/proc/{pid}/fd").iterdir())


def test_a_tally_finds_what_went_untold_what_was_told_in_vain_and_what_came_twice():
    found = tally([_seen(slot) for slot in (1, 2, 5, 5, 6)], missing=[3, 6, 9])
    assert (found.lost, found.declared, found.undeclared, found.needless, found.duplicates) == (2, 2, 1, 1, 1)


def test_a_recovery_counts_from_the_last_fault_and_a_silence_without_any_counts_whole():
    assert worst_recovery_s([_seen(0), _seen(1), _seen(20), _seen(21)], ends=[5, 12]) == 8
    assert worst_recovery_s([_seen(0), _seen(1), _seen(20), _seen(21)], ends=[30]) == 19


def _seen(second: int) -> Seen:
    return Seen(slot=second, time_s=float(second), shown_s=None, arrived_s=float(second))
