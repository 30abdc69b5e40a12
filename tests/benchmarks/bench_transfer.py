"""Exporting an hour into a portable file and importing it, beside copying that file.

    python -m tests.benchmarks.bench_transfer [--hours 2] [--repeats 3]

Hours are full: 3,600 frames of the published model (D = 4096 in 16 bits, search vectors of 768 numbers), with their
keyframes of 336 x 336 pixels, which are pictures of real films, or without. Both ways go through what serves and what
reads them, in one process, without HTTP: an hour is read from its segment and pack, written into the file, read back,
checked to the last number and picture, written into a segment and a pack, synced, and read back once more. The copy is
written, synced and read back. The middle of the repeats counts; files are in the page cache. `peak_mb` is the most
memory that the process has had, with Python, numpy and the benchmark's own pictures.
"""

import argparse
import asyncio
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from pathlib import Path

import numpy as np

from deploy.portable import PortableReader, PortableWriter
from qa_service.coverage import RangeReader
from qa_service.exports import Exports
from qa_service.imports import Importer
from qa_service.keys import ANYONE
from qa_service.memory_schemas import ImportCompletion, TimelineExport
from qa_service.once import Once
from store.cipher import Cipher
from store.connection import EmbeddedRedis, connect
from store.format import HOUR_SLOTS
from store.idempotency import Idempotency
from store.imports import Imports, NewImport
from store.keyframes import Keyframes
from store.room import Room
from store.segments import Hour, Segments
from store.sources import Sources
from store.timeline import Timeline
from tests.benchmarks.bench_timeline import FORMAT
from tests.benchmarks.film import film

SIDE_PX = 336
PIECE_BYTES = 1 << 16
Row = dict[str, object]


def peak_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


async def pieces(content: bytes) -> AsyncIterator[bytes]:
    for at in range(0, len(content), PIECE_BYTES):
        yield content[at : at + PIECE_BYTES]


def an_hour(hour: int) -> Hour:
    random = np.random.default_rng(hour)
    vectors = random.normal(size=(HOUR_SLOTS, FORMAT.vector_width)).astype(np.float32)
    slots = np.arange(hour * HOUR_SLOTS, (hour + 1) * HOUR_SLOTS)
    return Hour(
        slots,
        random.normal(size=(HOUR_SLOTS, *FORMAT.token_shape)).astype(FORMAT.numpy_dtype),
        vectors / np.linalg.norm(vectors, axis=1, keepdims=True),
        slots * 1000,
    )


def copy_s(source: Path, target: Path) -> float:
    started = time.perf_counter()
    with target.open("wb") as file:
        file.write(source.read_bytes())
        file.flush()
        os.fsync(file.fileno())
    target.read_bytes()
    return time.perf_counter() - started


async def timed(work: Awaitable[None]) -> float:
    started = time.perf_counter()
    await work
    return time.perf_counter() - started


async def measure(server: EmbeddedRedis, folder: Path, hours: int, repeats: int) -> Iterator[Row]:
    root, rows = str(folder / "segments"), list[Row]()
    async with connect(server.url) as redis:
        timeline, keyframes = Timeline(redis, FORMAT, Segments(root)), Keyframes(redis, root)
        sources = Sources(redis, Cipher.open(None, folder))
        imports = Imports(redis, sources)
        end = hours * HOUR_SLOTS
        exports = Exports(RangeReader(timeline, keyframes, sources, live_lag_s=0), timeline, keyframes)
        importer = Importer(
            imports,
            Once(Idempotency(redis)),
            timeline,
            keyframes,
            side_px=SIDE_PX,
            folder=folder,
            room=Room((folder,), 0),
            max_bytes=1 << 40,
            max_hour_bytes=1 << 29,
        )
        video = NewImport(kind="video", name="yard", fps=1, start_slot=0, end_slot=end, duration_s=end)
        source_id = await imports.begin(video, [])
        pictures = film(HOUR_SLOTS, SIDE_PX)
        for hour in range(hours):
            assert await timeline.restore(source_id, an_hour(hour), "")
            first = hour * HOUR_SLOTS
            assert await keyframes.restore(source_id, hour, {first + n: one for n, one in enumerate(pictures)}, "")
        del pictures
        await imports.complete(source_id, end)

        async def export(path: Path, with_pictures: bool) -> None:
            told = await exports.describe(ANYONE, source_id, None, None)
            with PortableWriter(path) as file:
                for hour in told.hours:
                    file.add_hour(hour, "frames", (await exports.frames(ANYONE, source_id, hour, 0, end)).content)
                    if with_pictures:
                        jpegs = await exports.keyframes(ANYONE, source_id, hour, 0, end)
                        file.add_hour(hour, "keyframes", jpegs.content)
                file.finish(told.model_dump(mode="json"))

        async def take(path: Path) -> None:
            with PortableReader(path) as file:
                begun = (await importer.begin(ANYONE, TimelineExport.model_validate(file.contents))).id
                for hour in file.hours:
                    await importer.frames(ANYONE, begun, hour, pieces(file.read_hour(hour, "frames") or b""))
                    if content := file.read_hour(hour, "keyframes"):
                        await importer.keyframes(ANYONE, begun, hour, pieces(content))
            await importer.complete(ANYONE, begun, ImportCompletion(frames=end))

        for case, with_pictures in (("tokens alone", False), ("with pictures", True)):
            path = folder / "yard.tar"
            found: dict[str, list[float]] = {"export": [], "import": [], "copy": []}
            for _ in range(repeats):
                found["export"].append(await timed(export(path, with_pictures)))
                found["import"].append(await timed(take(path)))
                found["copy"].append(copy_s(path, folder / "copy"))
            copied = statistics.median(found["copy"])
            rows += [
                {
                    "benchmark": "portable timelines",
                    "case": f"{way}, {hours} h, {case}",
                    "ratio": statistics.median(found[way]) / copied,
                    "against": f"copying the file of {path.stat().st_size >> 20} MiB",
                    "h_per_minute": 60 * hours / statistics.median(found[way]),
                    "peak_mb": peak_mb(),
                }
                for way in ("export", "import")
            ]
    return iter(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--hours", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, EmbeddedRedis.start(Path(name)) as server:
        for row in asyncio.run(measure(server, Path(name), options.hours, options.repeats)):
            print(json.dumps(row))


if __name__ == "__main__":
    main()
