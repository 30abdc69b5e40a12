"""What an hour costs in Redis and in a segment, and how fast both are read, beside a plain file of the same bytes.

    python -m tests.benchmarks.bench_sealing [--hours 1 3 24] [--repeats 7]

The frames are those of the published model: D = 4096 in 16 bits, 8,192 bytes, search vectors of 768 numbers. Read
in turns: the whole range by `Timeline.read` while its hours are hot, then while they are sealed, then by a replica that
has read it before, and the tokens' bytes from one plain file into one array. All files are in the page cache, and
every array takes fresh pages from the system, whatever its size: else the allocator gives some of them pages that are
warm. The middle of the repeats counts. Sealing is compared with writing a file of the tokens' bytes, syncing it and
reading it back, and packing with the same of as many keyframes of 45 KB, which lie there as a file each. The bytes of a
frame are those of tokens, presence and times; `with_vectors` counts the search vectors as well, and nothing counts the
keyframes.
"""

import argparse
import asyncio
import ctypes
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from store.connection import EmbeddedRedis, StoreRedis, connect
from store.format import BLOCK_SLOTS, HOUR_SLOTS
from store.keyframes import Keyframes
from store.leases import Leases
from store.segments import Segments
from store.timeline import Timeline
from store.token_cache import TokenCache
from tests.benchmarks.bench_timeline import FORMAT, SOURCE, fill

KEYFRAME_BYTES = 45_000
MOST_PACKED_HOURS = 3
_M_MMAP_THRESHOLD = -3  # of mallopt(3)
Row = dict[str, object]


def plain_write_s(content: bytes, path: Path) -> float:
    started = time.perf_counter()
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    path.read_bytes()
    return time.perf_counter() - started


async def used_bytes(redis: StoreRedis) -> int:
    return int((await redis.info("memory"))["used_memory_dataset"])


async def pack_s(redis: StoreRedis, folder: Path, hours: int) -> tuple[list[float], list[float]]:
    """Return how long packing takes, by hours, and how long writing as many bytes does."""
    keyframes, chance = Keyframes(redis, str(folder / "segments")), np.random.default_rng(0)
    jpegs = [chance.integers(0, 256, KEYFRAME_BYTES, np.uint8).tobytes() for _ in range(BLOCK_SLOTS)]
    packed, written = [], []
    for hour in range(hours):
        first = hour * HOUR_SLOTS
        for block in range(first, first + HOUR_SLOTS, BLOCK_SLOTS):
            await keyframes.put_many({(SOURCE, block + place): jpeg for place, jpeg in enumerate(jpegs)})
        written.append(plain_write_s(b"".join(jpegs) * (HOUR_SLOTS // BLOCK_SLOTS), folder / "written"))
        started = time.perf_counter()
        assert await keyframes.pack(SOURCE, hour)
        packed.append(time.perf_counter() - started)
    return packed, written


async def measure(server: EmbeddedRedis, folder: Path, hours: int, repeats: int) -> Iterator[Row]:
    wanted = np.arange(hours * HOUR_SLOTS)
    plain = folder / "plain"
    async with connect(server.url) as redis:
        await redis.flushall()
        timeline = Timeline(redis, FORMAT, Segments(str(folder / "segments")))
        epoch = await Leases(redis).acquire(SOURCE, "bench", 36000)
        assert epoch is not None
        empty = await used_bytes(redis)
        await fill(timeline, epoch, range(len(wanted)))
        redis_bytes = await used_bytes(redis) - empty
        plain.write_bytes((await timeline.read(SOURCE, wanted)).tobytes())

        async def turn(reader: Timeline | TokenCache = timeline) -> tuple[float, float]:
            started = time.perf_counter()
            bare = np.fromfile(plain, np.uint8)
            between = time.perf_counter()
            tokens = await reader.read(SOURCE, wanted)
            ended = time.perf_counter()
            assert np.array_equal(tokens.view(np.uint8).reshape(-1), bare)
            return ended - between, between - started

        hot = [await turn() for _ in range(repeats)]
        seal_s, write_s = [], []
        for hour in range(hours):
            content = plain.read_bytes()[: HOUR_SLOTS * FORMAT.token_bytes]
            write_s.append(plain_write_s(content, folder / "written"))
            started = time.perf_counter()
            assert await timeline.seal(SOURCE, hour)
            seal_s.append(time.perf_counter() - started)
        sealed = [await turn() for _ in range(repeats)]
        cache = TokenCache(timeline, 2 * plain.stat().st_size)
        await cache.read(SOURCE, wanted)
        again = [await turn(cache) for _ in range(repeats)]
        packing_s, plain_s = await pack_s(redis, folder, hours if hours <= MOST_PACKED_HOURS else 0)
    disk_bytes = sum(path.stat().st_size for path in (folder / "segments").rglob(f"{FORMAT.fingerprint}-*.safetensors"))
    rows: list[Row] = [
        {
            "benchmark": "timeline read against a file",
            "case": f"{hours} h, {name}",
            "ratio": statistics.median(ours for ours, _ in turns) / statistics.median(bare for _, bare in turns),
            "against": "one plain file of the tokens",
            "repeats": repeats,
        }
        for name, turns in (("hot", hot), ("sealed", sealed), ("again by a replica", again))
    ]
    rows.append(
        {
            "benchmark": "sealing",
            "case": f"an hour, middle of {hours}",
            "ratio": statistics.median(seal_s) / statistics.median(write_s),
            "against": "writing, syncing and reading back the tokens alone",
        }
    )
    if packing_s:
        rows.append(
            {
                "benchmark": "sealing",
                "case": f"the keyframes of an hour, middle of {len(packing_s)}",
                "ratio": statistics.median(packing_s) / statistics.median(plain_s),
                "against": "writing, syncing and reading back the keyframes as one file",
            }
        )
    vectors = FORMAT.vector_bytes
    for name, total in (("Redis", redis_bytes), ("segments", disk_bytes)):
        rows.append(
            {
                "benchmark": "bytes of a frame",
                "case": f"{hours} h in {name}",
                "ratio": (total / len(wanted) - vectors) / FORMAT.token_bytes,
                "against": f"{FORMAT.token_bytes} bytes",
                "bytes": round(total / len(wanted) - vectors),
                "with_vectors": round(total / len(wanted)),
            }
        )
    return iter(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--hours", type=int, nargs="+", default=[1, 3, 24])
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)
    for hours in options.hours:
        with tempfile.TemporaryDirectory() as name, EmbeddedRedis.start(Path(name)) as server:
            for row in asyncio.run(measure(server, Path(name), hours, options.repeats)):
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
