"""Damaged media by the thousand: every kind of file that is read, damaged by chance and ingested in earnest.

    python -m tests.malformed --files 2000 --seed 1 --at-once 4

reads each file with the whole of ingest (child processes and all), compares what came with what the undamaged file
gives, and prints how the files ended. The exit status is 1 if one hung, lost pictures without a word or ended without
a status, or if the service itself failed. A seed and the number of a file make the same bytes again: `--only 17` reads
just that file and keeps it, `--folder` says where.
"""

import argparse
import asyncio
import logging
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice, product
from pathlib import Path
from random import Random

import av
import numpy as np
from numpy.typing import NDArray

from ingest.assignment import Archive, ArchiveReport, Assignment
from ingest.service import IngestService
from tests.ingest_parts import MemoryDesk, MemorySink, real_clip, settings

REAL = ("bikes", "bigbuckbunny", "carphone_pristine", "carphone_distorted")
LIMIT_S = 60.0  # for one file; ingest itself gives a picture 10 s here
CLIP_RATE = 10

# Files that state neither their length nor where they begin: of one that was cut, nothing tells what is gone.
OPEN_ENDED = frozenset({".ts", ".mpg", ".h264", ".hevc"})

Damage = Callable[[bytes, Random], bytes]


# Files


@dataclass(frozen=True, slots=True)
class Kind:
    """How a clip is encoded."""

    name: str
    codec: str
    pixels: str = "yuv420p"
    container_options: tuple[tuple[str, str], ...] = ()
    codec_options: tuple[tuple[str, str], ...] = ()


_X264 = (("preset", "ultrafast"), ("bf", "2"))
_X265 = (("preset", "ultrafast"), ("x265-params", "log-level=none:keyint=20"))
KINDS = (
    Kind("plain.mp4", "libx264", codec_options=_X264),
    Kind("faststart.mp4", "libx264", container_options=(("movflags", "faststart"),), codec_options=_X264),
    Kind(
        "fragmented.mp4", "libx264", container_options=(("movflags", "frag_keyframe+empty_moov"),), codec_options=_X264
    ),
    Kind("h264.mkv", "libx264", codec_options=_X264),
    Kind("h264.flv", "libx264", codec_options=_X264),
    Kind("h264.ts", "libx264", codec_options=_X264),
    Kind("raw.h264", "libx264", codec_options=_X264),
    Kind("raw.hevc", "libx265", codec_options=_X265),
    Kind("hevc.mp4", "libx265", codec_options=_X265),
    Kind("ten_bit.mkv", "libx265", "yuv420p10le", codec_options=_X265),
    Kind("vp9.webm", "libvpx-vp9", codec_options=(("deadline", "realtime"), ("cpu-used", "8"))),
    Kind("av1.mp4", "libsvtav1", codec_options=(("preset", "12"),)),
    Kind("mjpeg.avi", "mjpeg", "yuvj420p"),
    Kind("mpeg4.avi", "mpeg4"),
    Kind("mpeg2.mpg", "mpeg2video"),
    Kind("mpeg2.ts", "mpeg2video"),
    Kind("sorenson.flv", "flv"),
    Kind("wmv2.asf", "wmv2"),
)


def originals(folder: Path) -> Mapping[str, Path]:
    """Return every undamaged file by name: the real ones, and a real scene encoded in every kind."""
    os.environ.setdefault("SVT_LOG", "0")  # the AV1 encoder talks a lot
    with av.open(str(real_clip("bikes"))) as container:
        images = islice(container.decode(video=0), 0, None, 5)  # ten seconds in five: cuts, and much movement
        pictures = [image.reformat(192, 96, "rgb24").to_ndarray() for image in images]
    found = {f"{name}.mp4": real_clip(name) for name in REAL}
    for kind in KINDS:
        found[kind.name] = _encode(folder / kind.name, kind, pictures)
    return found


def _encode(path: Path, kind: Kind, pictures: Sequence[NDArray[np.uint8]]) -> Path:
    rate = 25 if kind.codec == "mpeg2video" else CLIP_RATE  # MPEG-2 knows no ten pictures a second
    with av.open(str(path), "w", options=dict(kind.container_options)) as container:
        stream = container.add_stream(kind.codec, rate=rate)
        stream.height, stream.width, _ = pictures[0].shape
        stream.pix_fmt = kind.pixels
        stream.codec_context.thread_count = 1  # so that the same file comes out again
        stream.codec_context.options = {"g": "20", **dict(kind.codec_options)}
        repeats = rate // CLIP_RATE
        for number, picture in enumerate(one for one in pictures for _ in range(repeats)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=kind.pixels)
            frame.pts, frame.time_base = number, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


# Damage


def few_flips(data: bytes, chance: Random) -> bytes:
    return _flipped(data, chance, chance.randint(1, 10), len(data))


def many_flips(data: bytes, chance: Random) -> bytes:
    return _flipped(data, chance, max(20, len(data) // chance.randint(100, 5000)), len(data))


def flips_in_the_head(data: bytes, chance: Random) -> bytes:
    return _flipped(data, chance, chance.randint(1, 20), min(len(data), 2048))


def flips_in_the_tail(data: bytes, chance: Random) -> bytes:  # where a plain mp4 has its index
    return _flipped(data[::-1], chance, chance.randint(1, 20), min(len(data), 4096))[::-1]


def cut_front(data: bytes, chance: Random) -> bytes:
    return data[chance.randrange(1, len(data) // 2) :]


def cut_end(data: bytes, chance: Random) -> bytes:
    return data[: chance.randrange(len(data) // 10, len(data))]


def cut_middle(data: bytes, chance: Random) -> bytes:
    start, size = _block(data, chance)
    return data[:start] + data[start + size :]


def cut_to_the_head(data: bytes, chance: Random) -> bytes:
    return data[: chance.choice((0, 1, 16, 100, 500, 1000, 2000, 4000))]


def zeroed_block(data: bytes, chance: Random) -> bytes:
    start, size = _block(data, chance)
    return data[:start] + bytes(size) + data[start + size :]


def noisy_block(data: bytes, chance: Random) -> bytes:
    start, size = _block(data, chance)
    return data[:start] + chance.randbytes(size) + data[start + size :]


def duplicated_block(data: bytes, chance: Random) -> bytes:
    start, size = _block(data, chance)
    return data[: start + size] + data[start:]


def swapped_blocks(data: bytes, chance: Random) -> bytes:
    size = max(1, len(data) // chance.randint(8, 200))
    first, second = sorted((chance.randrange(len(data) - 2 * size + 1), chance.randrange(len(data) - size + 1)))
    second = max(second, first + size)
    return (
        data[:first]
        + data[second : second + size]
        + data[first + size : second]
        + data[first : first + size]
        + data[second + size :]
    )


DAMAGES: tuple[Damage, ...] = (
    few_flips,
    many_flips,
    flips_in_the_head,
    flips_in_the_tail,
    cut_front,
    cut_end,
    cut_middle,
    cut_to_the_head,
    zeroed_block,
    noisy_block,
    duplicated_block,
    swapped_blocks,
)


def _block(data: bytes, chance: Random) -> tuple[int, int]:
    size = max(1, len(data) // chance.randint(4, 200))
    return chance.randrange(len(data) - size + 1), size


def _flipped(data: bytes, chance: Random, count: int, within: int) -> bytes:
    changed = bytearray(data)
    for _ in range(count):
        changed[chance.randrange(within)] ^= 1 << chance.randrange(8)
    return bytes(changed)


@dataclass(frozen=True, slots=True)
class Case:
    """One damaged file: what it was, and what was done to it."""

    number: int
    original: str
    damage: Damage
    seed: int

    @property
    def source_id(self) -> str:
        return f"vid_{self.number}"

    @property
    def told(self) -> str:
        return f"{self.number:5d} {self.original:22} {self.damage.__name__}"

    def write(self, sources: Mapping[str, Path], folder: Path) -> Path:
        chance = Random(f"{self.seed}:{self.number}")
        path = folder / f"{self.number}{Path(self.original).suffix}"
        path.write_bytes(self.damage(sources[self.original].read_bytes(), chance))
        return path


def cases(names: Sequence[str], files: int, seed: int) -> list[Case]:
    """Return damaged files of all kinds and damages alike, in an order by chance."""
    pairs = list(product(names, DAMAGES))
    Random(seed).shuffle(pairs)
    return [Case(number, *pairs[number % len(pairs)], seed) for number in range(files)]


# Reading them


@dataclass(frozen=True, slots=True)
class Ending:
    """What became of a file: its last report, its keyframes by slot, and the slots that were told missing."""

    report: ArchiveReport | None
    keyframes: Mapping[int, bytes]
    missing: frozenset[int]
    deaths: tuple[str, ...]
    seconds: float


class Errors(logging.Handler):
    """Sorts what ingest logs as errors: processes that died, by file, and faults of ingest itself."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.deaths: dict[str, list[str]] = {}
        self.faults: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith("the process that reads "):
            source_id, _, how = message.removeprefix("the process that reads ").partition(" ")
            self.deaths.setdefault(source_id, []).append(how.partition(";")[0])
        else:
            self.faults.append(message)


@contextmanager
def errors_of_ingest() -> Iterator[Errors]:
    errors, logger = Errors(), logging.getLogger("ingest")
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(errors)
    try:
        yield errors
    finally:
        logger.removeHandler(errors)
        logger.propagate = propagates


async def endings(
    files: Sequence[tuple[str, Path]], folder: Path, at_once: int, errors: Errors
) -> AsyncIterator[tuple[str, Ending]]:
    """Ingest files of a folder, `at_once` side by side, and yield how each ended."""
    for start in range(0, len(files), 8 * at_once):
        some = files[start : start + 8 * at_once]
        desk, sink = MemoryDesk(), MemorySink()
        desk.open = [Assignment(name, 1, 1.0, Archive(path=path.name)) for name, path in some]
        impatient = settings(archives_at_once=at_once, look_timeout_s=10.0)
        service = IngestService(impatient, desk, sink, folder)
        await service.start()
        try:
            began = await _watch(desk, [name for name, _ in some])
            service.check_health()
        finally:
            await service.stop()
        for name, _ in some:
            report = desk.last(name)
            assert report is None or isinstance(report, ArchiveReport)
            yield (
                name,
                Ending(
                    report=report,
                    keyframes={frame.slot: frame.keyframe for frame in sink.frames if frame.source_id == name},
                    missing=frozenset(desk.missing_slots(name)),
                    deaths=tuple(errors.deaths.get(name, ())),
                    seconds=began[name],
                ),
            )


async def _watch(desk: MemoryDesk, names: Sequence[str]) -> dict[str, float]:
    """Wait until the files are over or overdue; return how long each took."""
    began: dict[str, float] = {}
    took: dict[str, float] = {}
    while len(took) < len(names):
        waiting = {one.source_id for one in desk.open}
        now = time.monotonic()
        for name in names:
            if name not in waiting:
                since_s = now - began.setdefault(name, now)
                if name in desk.released or since_s > LIMIT_S:
                    took.setdefault(name, since_s)
        await asyncio.sleep(0.02)
    return took


# Judging them


def verdict(path: Path, ending: Ending, whole: Ending) -> str:
    """Say in a word how a damaged file ended; those in DEFECTS must not happen."""
    report = ending.report
    if report is None or report.status == "processing":
        return "hung"
    if report.status == "failed":
        if not report.error:
            return "no reason"
        return "unforeseen" if report.error.startswith("reading failed with") else "failed"
    if report.damage is not None:
        return "damage told"
    if whole.keyframes.keys() - ending.keyframes.keys() - ending.missing:
        return "shorter" if is_open_ended(path) else "lost in silence"
    return "whole" if ending.keyframes == whole.keyframes else "other pixels"


def is_open_ended(path: Path) -> bool:
    """Tell whether a file is of such a kind; an AVI without the first bytes of its header is a row of JPEGs."""
    with path.open("rb") as file:
        head = file.read(12)
    is_headless = path.suffix == ".avi" and (head[:4], head[8:]) != (b"RIFF", b"AVI ")
    return is_headless or path.suffix in OPEN_ENDED


VERDICTS = {
    "whole": "ready: every picture is that of the undamaged file, bit for bit",
    "other pixels": "ready: every slot has a picture, some differ; the codec has no checksum and saw no error",
    "shorter": "ready: the file holds less and states no length (ts, mpg, raw): nothing in it tells what is gone",
    "damage told": "ready with `damage`",
    "failed": "failed with a reason",
    "unforeseen": "failed with an exception that nobody foresaw",
    "lost in silence": "ready though slots were lost that neither came nor were told",
    "no reason": "failed without a reason",
    "hung": f"not over within {LIMIT_S:g} s",
}
DEFECTS = frozenset({"unforeseen", "lost in silence", "no reason", "hung"})


@dataclass(frozen=True, slots=True)
class Judged:
    case: Case
    ending: Ending
    verdict: str


async def run(wanted: Sequence[Case], sources: Mapping[str, Path], at_once: int, errors: Errors) -> list[Judged]:
    """Ingest the undamaged files and then the cases; nothing stays on disk."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        names = sorted({case.original for case in wanted})
        plain = [(one, folder / one) for one in names]
        for one, path in plain:
            path.write_bytes(sources[one].read_bytes())
        whole = {one: ending async for one, ending in endings(plain, folder, at_once, errors)}
        for one, ending in whole.items():
            report = ending.report
            if report is None or report.status != "ready" or report.damage is not None or not ending.keyframes:
                raise RuntimeError(f"the undamaged {one} cannot be read: {report}")
        judged = []
        for start in range(0, len(wanted), 8 * at_once):
            some = wanted[start : start + 8 * at_once]
            files = [(case.source_id, case.write(sources, folder)) for case in some]
            ends = {one: ending async for one, ending in endings(files, folder, at_once, errors)}
            for case, (one, path) in zip(some, files, strict=True):
                judged.append(Judged(case, ends[one], verdict(path, ends[one], whole[case.original])))
                path.unlink()
        return judged


def report(judged: Sequence[Judged], errors: Errors, took_s: float) -> str:
    """Return the table of how the files ended, and every file that ended as none may."""
    counts = Counter(one.verdict for one in judged)
    lines = [f"{counts[name]:6d}  {name:16} {meaning}" for name, meaning in VERDICTS.items()]
    died = Counter(how for one in judged for how in one.ending.deaths)
    lines += [f"{count:6d}  process died     {how}" for how, count in died.most_common()]
    lines += [f"{len(errors.faults):6d}  errors logged by ingest itself"]
    lines += [f"        {fault}" for fault in errors.faults[:20]]
    slowest = max(judged, key=lambda one: one.ending.seconds)
    lines += [f"{len(judged)} files in {took_s:.0f} s; slowest {slowest.ending.seconds:.1f} s: {slowest.case.told}"]
    for one in judged:
        if one.verdict in DEFECTS or one.ending.deaths:
            told = one.ending.report.error if one.ending.report else None
            lines += [f"{one.verdict}: {one.case.told} {', '.join(one.ending.deaths)} {told or ''}".rstrip()]
    reasons = Counter(one.ending.report.error for one in judged if one.ending.report and one.ending.report.error)
    lines += ["reasons of failure:", *(f"{count:6d}  {reason}" for reason, count in reasons.most_common(20))]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--at-once", type=int, default=4, help="files read side by side")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of single files: read these and keep them")
    parser.add_argument("--first", type=int, default=0, help="number of the file to begin with")
    parser.add_argument("--folder", type=Path, default=Path("malformed"), help="where --only keeps its files")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as made, errors_of_ingest() as errors:
        sources = originals(Path(made))
        wanted = cases(list(sources), options.files, options.seed)[options.first :]
        if options.only:
            wanted = [case for case in wanted if case.number in options.only]
            options.folder.mkdir(exist_ok=True)
            for case in wanted:
                print(case.write(sources, options.folder))
        judged = asyncio.run(run(wanted, sources, options.at_once, errors))
        print(report(judged, errors, time.monotonic() - started))
    return 1 if errors.faults or any(one.verdict in DEFECTS for one in judged) else 0


if __name__ == "__main__":
    sys.exit(main())
