"""What reading a live camera at one frame a second costs, beside plain decoding and an ffmpeg process a camera.

    python -m tests.benchmarks.bench_cameras [--seconds 30] [--cameras 4]

The cameras are RTSP streams of a real film, encoded once and passed on as it is by GStreamer's server, at 25 pictures a
second. With a keyframe a second (`gop 25`) ours decodes keyframes alone; with one in four seconds (`gop 100`) it has to
decode every picture. All three read the same cameras at the same time: ours is the ingest service, its reading process
and the JPEG of every keyframe included; plain decoding is PyAV in a process of its own, every picture and no JPEG;
ffmpeg is a process a camera with `-vf fps=1,scale=336:336`, its pictures thrown away.

`cpu_percent` is of one core for one camera, from /proc, `cameras_a_core` what follows from it. `ratio` is ours against
the row's other.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import av

from ingest.assignment import Assignment, Camera
from ingest.service import IngestService
from ingest.settings import IngestSettings
from tests.benchmarks.film import scene
from tests.ingest_parts import LOCAL, MemoryDesk, MemorySink, simulated_camera, until

_TICKS = os.sysconf("SC_CLK_TCK")


def make_clip(ffmpeg: str, folder: Path, height: int, group: int) -> Path:
    """Encode ten seconds of a real film as a camera would: no B-frames, 25 pictures a second."""
    clip = folder / "camera.mp4"
    rate = {720: "2M", 1080: "4M"}[height]
    encoding = ["-c:v", "libx264", "-preset", "veryfast", "-bf", "0", "-b:v", rate, "-sc_threshold", "0"]
    groups = ["-g", str(group), "-keyint_min", str(group)]
    scaling = ["-an", "-vf", f"scale={height * 16 // 9}:{height},fps=25,format=yuv420p"]
    source = ["-stream_loop", "-1", "-i", scene("bikes"), "-t", "20"]
    subprocess.run([ffmpeg, "-nostdin", "-v", "error", *source, *scaling, *encoding, *groups, clip], check=True)
    return clip


def decode_all(url: str) -> None:
    """Read a camera the plain way."""
    with av.open(url, format="rtsp", options={"rtsp_transport": "tcp"}, timeout=(10, 5)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for _ in container.decode(stream):
            pass


def cpu_s(pids: Iterable[int]) -> float:
    fields = (Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids)
    return sum(int(field[11]) + int(field[12]) for field in fields) / _TICKS


def children() -> set[int]:
    """Return the processes that this one has started."""
    return {int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


async def measure(ffmpeg: str, urls: list[str], seconds: float, folder: Path) -> dict[str, float]:
    """Return the CPU seconds that each way took of a number of seconds."""
    before = children()
    desk = MemoryDesk(*(Assignment(f"str_{number}", 1, 1.0, Camera(url)) for number, url in enumerate(urls)))
    service = IngestService(IngestSettings(allowed_networks=LOCAL), desk, MemorySink(336), folder)
    await service.start()
    await until(lambda: all(desk.states(f"str_{number}")[-1:] == ["online"] for number in range(len(urls))), 60)
    ours = children() - before
    plain = [multiprocessing.Process(target=decode_all, args=(url,), daemon=True) for url in urls]
    for process in plain:
        process.start()
    command = [ffmpeg, "-nostdin", "-v", "error", "-rtsp_transport", "tcp", "-threads", "1"]
    sink = ["-vf", "fps=1,scale=336:336", "-f", "null", "-"]
    programs = [await asyncio.create_subprocess_exec(*command, "-i", url, *sink) for url in urls]
    ways = {
        "ours": {os.getpid(), *ours},
        "plain decoding": {process.pid for process in plain if process.pid is not None},
        "ffmpeg": {program.pid for program in programs},
    }
    await asyncio.sleep(10)  # connected, and four keyframes of the longest groups seen
    start = {way: cpu_s(pids) for way, pids in ways.items()}
    await asyncio.sleep(seconds)
    spent = {way: cpu_s(pids) - start[way] for way, pids in ways.items()}
    for process in plain:
        process.kill()
    for program in programs:
        program.kill()
        await program.wait()
    await service.stop()
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=30, help="length of a measurement")
    parser.add_argument("--cameras", type=int, default=4, help="cameras of each kind")
    options = parser.parse_args()
    ffmpeg = shutil.which("ffmpeg")
    if ffmpeg is None:
        print("skipped: there is no ffmpeg program to compare with", file=sys.stderr)
        return
    for height, group in ((720, 25), (720, 100), (1080, 25), (1080, 100)):
        with tempfile.TemporaryDirectory() as name:
            clip = make_clip(ffmpeg, Path(name), height, group)
            with simulated_camera("--file", str(clip), "--copy", "--count", str(options.cameras)) as camera:
                time.sleep(1)
                urls = [f"{camera.url}{number}" for number in range(options.cameras)]
                spent = asyncio.run(measure(ffmpeg, urls, options.seconds, Path(name)))
        percent = {way: 100 * used / options.seconds / options.cameras for way, used in spent.items()}
        for other in ("plain decoding", "ffmpeg"):
            row = {
                "benchmark": "live cameras",
                "case": f"{options.cameras} cameras, {height}p25, gop {group}",
                "ratio": percent["ours"] / percent[other],
                "against": other,
                "cpu_percent": percent["ours"],
                "against_cpu_percent": percent[other],
                "cameras_a_core": 100 / percent["ours"],
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
