"""Makes a real simulated camera suffer one fault while ingest reads it, and reports what came of it.

The simulator burns a clock into its pictures: so every frame says for itself which second it shows.
"""

import asyncio
import io
import signal
import time
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from ingest.assignment import ArchiveReport, Assignment, Camera, CameraReport
from ingest.frame import Frame, Receipt
from ingest.service import IngestService
from ingest.settings import IngestSettings
from tests.camera_sim import read_clock
from tests.ingest_parts import MemoryDesk, SimulatedCamera, free_port, until

CLOCK_SIZE_PX = 336
PICTURES = ("--fps", "10", "--gop", "10")
BACK_WITHIN_S = 30.0
USER, PASSWORD = "admin", "pass" + "word"

_BEFORE_S, _AFTER_S = 1.5, 2.5  # of good pictures around a fault
_PATIENCE_S = 60.0
_SETTLING_S = 1.0  # around a fault that stops the clock in the pictures


@dataclass(frozen=True, slots=True)
class Fault:
    """What a camera suffers, for `lasts_s` seconds.

    `does` is a line for the simulator, or what is done to its process: `hang` stops it, `off` ends it and `lock` puts
    one with another password in its place; all three end with the fault, and `undo` is a line that ends another.
    `told` is part of the reason that is reported meanwhile, None if nobody need notice. Pictures of a fault that
    `stops_clock` do not show when they were taken.
    """

    name: str
    does: str
    lasts_s: float = 0.0
    told: str | None = None
    stops_clock: bool = False
    udp: bool = False
    options: tuple[str, ...] = ()
    undo: str | None = None

    async def happen_to(self, camera: SimulatedCamera) -> float:
        """Begin, last and end; return the unix time of the end."""
        options, began = (*PICTURES, *self.options), time.time()
        match self.does:
            case "hang":
                camera.send_signal(signal.SIGSTOP)
                await asyncio.sleep(self.lasts_s)
                ended = time.time()
                camera.send_signal(signal.SIGCONT)
                return ended
            case "off":
                camera.end()
                await asyncio.sleep(self.lasts_s)
                await asyncio.to_thread(camera.start, *options)
            case "lock":
                camera.end()
                await asyncio.to_thread(camera.start, *options, "--user", USER, "--password", "another")
                await asyncio.sleep(self.lasts_s)
                camera.end()
                await asyncio.to_thread(camera.start, *options)
            case line:
                boots = len(camera.times("ready"))
                camera.suffer(line)
                await asyncio.sleep(self.lasts_s)
                if self.undo is not None:
                    camera.suffer(self.undo)
                    return time.time()
                if not line.startswith("restart"):
                    return began + self.lasts_s
                await until(lambda: len(camera.times("ready")) > boots)
        return camera.times("ready")[-1]


@dataclass(frozen=True, slots=True)
class Seen:
    """A frame that arrived: its slot, its capture time, the time that its picture shows, and when it came."""

    slot: int
    time_s: float
    shown_s: float | None
    arrived_s: float


class ClockSink:
    """A FrameSink that reads the clock in every picture and keeps no picture."""

    def __init__(self) -> None:
        self.seen: dict[str, list[Seen]] = {}

    def last_s(self, source_id: str) -> float:
        """Return when the newest frame of a camera was taken, for one may still come after a fault; 0 before any."""
        seen = self.seen.get(source_id)
        return seen[-1].time_s if seen else 0.0

    async def input_size_px(self) -> int:
        return CLOCK_SIZE_PX

    async def put(self, frames: Sequence[Frame]) -> Receipt:
        now = time.time()
        for frame in frames:
            clock = read_clock(np.asarray(Image.open(io.BytesIO(frame.keyframe)).convert("L")))
            one = Seen(frame.slot, frame.time_ms / 1000, None if clock is None else clock[1], now)
            self.seen.setdefault(frame.source_id, []).append(one)
        return Receipt()


class ChangesDesk(MemoryDesk):
    """A desk that remembers of a camera only the reports that say something new."""

    async def report(self, source_id: str, epoch: int, report: CameraReport | ArchiveReport) -> None:
        before = self.last(source_id)
        if before is not None and _words(before) == _words(report):
            self.reports[source_id].pop()
        await super().report(source_id, epoch, report)

    def words(self, source_id: str) -> list[tuple[str, str | None]]:
        """Return the states and reasons that were reported, in order."""
        return [_words(report) for report in self.reports.get(source_id, [])]


@dataclass(frozen=True, slots=True)
class Tally:
    """What came of the seconds between the first and the last frame of a camera.

    `lost` have no frame, `declared` were told to be missing; `undeclared` are lost and were not told, `needless` were
    told though a frame came. `duplicates` counts frames whose slot is not behind that of the frame before them.
    `clock_error_s` is the farthest that a frame's time lies from the clock it shows.
    """

    frames: int
    lost: int
    declared: int
    undeclared: int
    needless: int
    duplicates: int
    clock_error_s: float


def worst_recovery_s(seen: Sequence[Seen], ends: Iterable[float]) -> float:
    """Return the longest time from the end of a disturbance to the next frame, however many ended before it came.

    A silence without any is a disturbance of its own that nobody knows the end of: all of it counts.
    """
    moments = sorted(ends)
    worst_s = 0.0
    for before, after in pairwise(one.arrived_s for one in seen):
        ended = bisect_right(moments, after)
        since = moments[ended - 1] if ended else before
        worst_s = max(worst_s, after - max(before, since))
    return worst_s


def tally(seen: Sequence[Seen], missing: Iterable[int], blind: Sequence[tuple[float, float]] = ()) -> Tally:
    """Compare frames with the slots declared missing; pictures taken in a `blind` time show no right clock."""
    slots = [one.slot for one in seen]
    arrived, expected = set(slots), set(range(slots[0], slots[-1] + 1))
    lost, declared = expected - arrived, set(missing) & expected
    errors = [
        abs(one.time_s - one.shown_s)
        for one in seen
        if one.shown_s is not None and not any(start <= one.time_s <= end for start, end in blind)
    ]
    return Tally(
        frames=len(slots),
        lost=len(lost),
        declared=len(declared),
        undeclared=len(lost - declared),
        needless=len(declared & arrived),
        duplicates=sum(after <= before for before, after in pairwise(slots)),
        clock_error_s=max(errors, default=0.0),
    )


@dataclass(frozen=True, slots=True)
class Resources:
    """What processes hold: how many they are, their file descriptors, and their memory (RSS)."""

    processes: int
    fds: int
    rss_mb: float

    @classmethod
    def of(cls, pids: Sequence[int]) -> "Resources":
        folders = [Path(f"/proc/{pid}") for pid in pids]
        pages = sum(int((folder / "statm").read_text().split()[1]) for folder in folders)
        return cls(len(pids), sum(len(list((folder / "fd").iterdir())) for folder in folders), pages * 4096 / 2**20)


@dataclass(frozen=True, slots=True)
class FaultReport:
    """What one fault did to one camera: `recovery_s` runs from its end to the first new frame.

    `connections` were made since it began; `words` are the states and reasons told since then. `before` and `after`
    are what the process that reads the camera held while it was online.
    """

    fault: Fault
    tally: Tally
    recovery_s: float
    connections: int
    words: tuple[tuple[str, str | None], ...]
    before: Resources
    after: Resources

    def row(self) -> Mapping[str, str]:
        """What `table` shows."""
        tally = self.tally
        return {
            "fault": self.fault.name,
            "frames": str(tally.frames),
            "lost": str(tally.lost),
            "declared": str(tally.declared),
            "undeclared": str(tally.undeclared),
            "twice": str(tally.duplicates),
            "clock error s": f"{tally.clock_error_s:.2f}",
            "recovery s": f"{self.recovery_s:.1f}",
            "connections": str(self.connections),
            "fds": f"{self.before.fds} -> {self.after.fds}",
            "RSS MB": f"{self.before.rss_mb:.0f} -> {self.after.rss_mb:.0f}",
        }


def reading_pids(service: IngestService) -> list[int]:
    """The processes that read for one service, among those of others."""
    return service._processes.pids


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return rows of the same columns as text."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


async def suffer(fault: Fault, how: IngestSettings, folder: Path) -> FaultReport:
    """Read a camera of its own with a service of its own, let it suffer, and wait until it has recovered."""
    name = "str_cam"
    camera = SimulatedCamera(free_port())
    media = Camera(camera.url, USER, PASSWORD, "udp" if fault.udp else "tcp")
    desk, sink = ChangesDesk(Assignment(name, 1, 1.0, media)), ClockSink()
    service = IngestService(how, desk, sink, folder)

    def frames_since(moment: float) -> list[Seen]:
        return [one for one in sink.seen.get(name, []) if one.time_s > moment]

    async with AsyncExitStack() as stack:
        stack.callback(camera.end)
        await asyncio.to_thread(camera.start, *PICTURES, *fault.options)
        stack.push_async_callback(service.stop)
        await service.start()
        await until(lambda: sink.seen, _PATIENCE_S)
        await asyncio.sleep(_BEFORE_S)
        before, connections = Resources.of(reading_pids(service)), len(camera.times("connect"))
        said, began = len(desk.words(name)), time.time()
        ended = await fault.happen_to(camera)
        await until(lambda: frames_since(ended), _PATIENCE_S)
        recovery_s = frames_since(ended)[0].arrived_s - ended
        await asyncio.sleep(_AFTER_S)
        after = Resources.of(reading_pids(service))
        service.check_health()
    blind = [(began - _SETTLING_S, ended + _SETTLING_S)] if fault.stops_clock else []
    return FaultReport(
        fault=fault,
        tally=tally(sink.seen[name], desk.missing_slots(name), blind),
        recovery_s=recovery_s,
        connections=len(camera.times("connect")) - connections,
        words=tuple(desk.words(name)[said - 1 :]),
        before=before,
        after=after,
    )


def _words(report: CameraReport | ArchiveReport) -> tuple[str, str | None]:
    return (report.state, report.reason) if isinstance(report, CameraReport) else (report.status, report.error)
