"""Bringing a recorded file in at one frame a second against what the ffmpeg program needs to pick the same pictures.

    python -m tests.benchmarks.bench_ingest [--seconds 600] [--size-px 336]

The file is 1080p30 H.264 with B-frames, a real film scaled up and repeated. Costs are CPU seconds, user and system:
ours is decoding, squashing and the JPEG of every keyframe; ffmpeg's `-vf fps=1,scale` throws its pictures away.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from threading import Event

from ingest.archive import ArchiveReader
from ingest.keyframe import KeyframeMaker
from tests.benchmarks.film import scene


def make_clip(ffmpeg: str, folder: Path, seconds: int) -> Path:
    """Scale a real clip to 1080p30 and repeat it, without encoding it again, for so many seconds."""
    once, clip = folder / "once.mp4", folder / "clip.mp4"
    quiet = [ffmpeg, "-nostdin", "-v", "error"]
    encoding = ["-c:v", "libx264", "-preset", "faster", "-crf", "23", "-g", "250"]
    subprocess.run(
        [*quiet, "-i", scene("bigbuckbunny"), "-an", "-vf", "scale=1920:1080,fps=30", *encoding, once], check=True
    )
    subprocess.run([*quiet, "-stream_loop", "-1", "-i", once, "-c", "copy", "-t", str(seconds), clip], check=True)
    return clip


def cpu_s(who: int) -> float:
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def run_ours(clip: Path, size_px: int) -> tuple[float, int]:
    """Return CPU seconds and keyframes."""
    before = cpu_s(resource.RUSAGE_SELF)
    reader = ArchiveReader(clip, fps=1.0, last_slot=None, max_pixels=10**8)
    maker = KeyframeMaker(size_px)
    keyframes = [maker.make(picture.image) for picture in reader.pictures(Event())]
    return cpu_s(resource.RUSAGE_SELF) - before, len(keyframes)


def run_ffmpeg(ffmpeg: str, clip: Path, size_px: int) -> float:
    """Return CPU seconds."""
    before = cpu_s(resource.RUSAGE_CHILDREN)
    filters = f"fps=1,scale={size_px}:{size_px}"
    command = [ffmpeg, "-nostdin", "-v", "error", "-i", str(clip), "-vf", filters, "-f", "null", "-"]
    subprocess.run(command, check=True)
    return cpu_s(resource.RUSAGE_CHILDREN) - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=600, help="length of the file")
    parser.add_argument("--size-px", type=int, default=336, help="side of a keyframe")
    options = parser.parse_args()
    ffmpeg = shutil.which("ffmpeg")
    if ffmpeg is None:
        print("skipped: there is no ffmpeg program to compare with", file=sys.stderr)
        return
    with tempfile.TemporaryDirectory() as folder:
        clip = make_clip(ffmpeg, Path(folder), options.seconds)
        theirs = run_ffmpeg(ffmpeg, clip, options.size_px)
        ours, keyframes = run_ours(clip, options.size_px)
    row = {
        "benchmark": "ingest of a file",
        "case": f"{options.seconds} s of 1080p30 H.264, {keyframes} keyframes",
        "ratio": ours / theirs,
        "against": f"ffmpeg -vf fps=1,scale={options.size_px}:{options.size_px} -f null",
        "cpu_s": ours,
        "ffmpeg_cpu_s": theirs,
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
