"""Bringing a recorded file in at one frame a second against what the ffmpeg program needs to pick the same pictures.

    python -m tests.benchmarks.bench_ingest [--seconds 300] [--size-px 336]

The files are 1080p30 H.264 with B-frames, real films scaled up and repeated. Their keyframes come every 30 pictures, on
the very seconds that are wanted; every 45, so that half of them are of no use; or every 250. Costs are CPU seconds,
user and system, of everything: ours is the ingest service with its process for the file, from the claim to the report
`ready`, the JPEG of every keyframe included; ffmpeg, on one thread, throws its pictures away.
"""

import argparse
import asyncio
import json
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from ingest.assignment import Archive, ArchiveReport, Assignment
from ingest.service import IngestService
from ingest.settings import IngestSettings
from tests.benchmarks.film import scene
from tests.ingest_parts import MemoryDesk, MemorySink, until

ENCODED_S = 75  # 2,250 pictures: whole groups of each length


def make_clip(ffmpeg: str, folder: Path, seconds: int, group: int) -> Path:
    """Scale real films to 1080p30, and repeat what came of it, without encoding it again, for so many seconds."""
    listed, once, clip = folder / "films.txt", folder / f"once-{group}.mp4", folder / f"clip-{group}.mp4"
    films = [scene("bigbuckbunny"), scene("bikes")]
    parts = []
    for number, film in enumerate(films):
        parts.append(folder / f"part-{number}.mp4")
        scaling = ["-an", "-vf", "scale=1920:1080,fps=30,format=yuv420p", "-preset", "ultrafast", "-crf", "10"]
        subprocess.run([*quiet(ffmpeg), "-y", "-i", film, *scaling, parts[-1]], check=True)
    listed.write_text("".join(f"file {part.name}\n" for part in parts))
    encoding = ["-c:v", "libx264", "-preset", "faster", "-crf", "23", "-sc_threshold", "0"]
    groups = ["-g", str(group), "-keyint_min", str(group), "-t", str(ENCODED_S)]
    looped = ["-stream_loop", "-1", "-f", "concat", "-i", listed]
    subprocess.run([*quiet(ffmpeg), *looped, *encoding, *groups, once], check=True)
    subprocess.run(
        [*quiet(ffmpeg), "-stream_loop", "-1", "-i", once, "-c", "copy", "-t", str(seconds), clip], check=True
    )
    return clip


def quiet(ffmpeg: str) -> list[str]:
    return [ffmpeg, "-nostdin", "-v", "error"]


def cpu_s() -> float:
    """Return the CPU seconds of this process and of all that it has waited for."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


async def bring_in(clip: Path, size_px: int) -> int:
    """Let the ingest service read a file, and return how many keyframes came."""
    desk = MemoryDesk(Assignment("vid_clip", 1, 1.0, Archive(path=clip.name)))
    sink = MemorySink(size_px)
    service = IngestService(IngestSettings(), desk, sink, clip.parent)
    await service.start()
    await until(lambda: desk.released, within_s=3600)
    await service.stop()
    report = desk.last("vid_clip")
    assert isinstance(report, ArchiveReport)
    assert (report.status, report.damage) == ("ready", None)
    return len(sink.frames)


def run_ffmpeg(ffmpeg: str, clip: Path, size_px: int) -> None:
    filters = f"fps=1,scale={size_px}:{size_px}"
    subprocess.run([*quiet(ffmpeg), "-threads", "1", "-i", clip, "-vf", filters, "-f", "null", "-"], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=300, help="length of the files")
    parser.add_argument("--size-px", type=int, default=336, help="side of a keyframe")
    options = parser.parse_args()
    ffmpeg = shutil.which("ffmpeg")
    if ffmpeg is None:
        print("skipped: there is no ffmpeg program to compare with", file=sys.stderr)
        return
    for group in (30, 45, 250):
        with tempfile.TemporaryDirectory() as folder:
            clip = make_clip(ffmpeg, Path(folder), options.seconds, group)
            marks = [cpu_s()]
            run_ffmpeg(ffmpeg, clip, options.size_px)
            marks.append(cpu_s())
            keyframes = asyncio.run(bring_in(clip, options.size_px))
            marks.append(cpu_s())
        theirs, ours = marks[1] - marks[0], marks[2] - marks[1]
        row = {
            "benchmark": "ingest of a file",
            "case": f"{options.seconds} s of 1080p30 H.264, a keyframe every {group} pictures: {keyframes} keyframes",
            "ratio": ours / theirs,
            "against": f"ffmpeg -threads 1 -vf fps=1,scale={options.size_px}:{options.size_px} -f null",
            "cpu_s": ours,
            "ffmpeg_cpu_s": theirs,
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
