"""Reading a range of the timeline against moving the same bytes over a bare socket.

    python -m tests.benchmarks.bench_timeline [--frames 10800] [--repeats 15]

Both read from the same server in turns: `Timeline.read` with presence checks into one array, and hand-written RESP that
asks for the same blocks with MGET and receives them straight into one buffer. The middle of the repeats counts.
"""

import argparse
import asyncio
import json
import socket
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from store.connection import EmbeddedRedis, connect
from store.format import BLOCK_SLOTS, TokenFormat
from store.hot import BLOCKS_PER_READ, Entry
from store.leases import Leases
from store.segments import Segments
from store.timeline import Timeline

SEGMENTS = Segments("memory://segments")  # where nothing is sealed

FORMAT = TokenFormat(fingerprint="0" * 16, dtype="float16", tokens_per_frame=1, width=4096, vector_width=768)
SOURCE = "str_bench"


class RawReader:
    """The least that can be done: one socket, one buffer, no presence, no names for errors."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)

    def read(self, blocks: range) -> NDArray[np.uint8]:
        size = BLOCK_SLOTS * FORMAT.token_bytes
        target = np.empty(len(blocks) * size, np.uint8)
        view = memoryview(target.data)
        at = 0
        for first in range(0, len(blocks), BLOCKS_PER_READ):
            some = blocks[first : first + BLOCKS_PER_READ]
            names = [f"tl:{{{SOURCE}}}:{FORMAT.fingerprint}:t:{block}".encode() for block in some]
            parts = [b"MGET", *names]
            self._socket.sendall(b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(p), p) for p in parts))
            self._line()
            for _ in some:
                assert self._line() == b"$%d" % size
                end = at + size
                while at < end:
                    at += self._socket.recv_into(view[at:end])
                self._line()
        return target

    def _line(self) -> bytes:
        line = b""
        while not line.endswith(b"\r\n"):
            line += self._socket.recv(1)
        return line[:-2]

    def close(self) -> None:
        self._socket.close()


async def fill(timeline: Timeline, epoch: int, slots: range) -> None:
    rng = np.random.default_rng(0)
    for first in range(slots.start, slots.stop, BLOCK_SLOTS):
        tokens = rng.standard_normal((BLOCK_SLOTS, *FORMAT.token_shape)).astype(np.float16)
        vector = np.full(FORMAT.vector_width, FORMAT.vector_width**-0.5, np.float32)
        entries = [Entry(first + row, (first + row) * 1000, tokens[row], vector) for row in range(BLOCK_SLOTS)]
        await timeline.append(SOURCE, epoch, entries)


async def measure(server: EmbeddedRedis, frames: int, repeats: int) -> dict[str, object]:
    slots = range(0, frames // BLOCK_SLOTS * BLOCK_SLOTS)
    wanted = np.arange(slots.start, slots.stop)
    blocks = range(len(slots) // BLOCK_SLOTS)
    raw = RawReader(server.url.removeprefix("unix://"))
    ours_s, raw_s = [], []
    async with connect(server.url) as redis:
        timeline = Timeline(redis, FORMAT, SEGMENTS)
        epoch = await Leases(redis).acquire(SOURCE, "bench", 3600)
        assert epoch is not None
        await fill(timeline, epoch, slots)
        for _ in range(repeats):
            started = time.perf_counter()
            bare = raw.read(blocks)
            between = time.perf_counter()
            tokens = await timeline.read(SOURCE, wanted)
            ended = time.perf_counter()
            raw_s.append(between - started)
            ours_s.append(ended - between)
            assert np.array_equal(tokens.view(np.uint8).reshape(-1), bare)
    raw.close()
    return {
        "benchmark": "timeline read",
        "case": f"{len(slots)} frames of {FORMAT.token_bytes} bytes",
        "ratio": statistics.median(ours_s) / statistics.median(raw_s),
        "against": "the same bytes over a raw socket",
        "repeats": repeats,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--frames", type=int, default=10_800)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, EmbeddedRedis.start(Path(folder)) as server:
        print(json.dumps(asyncio.run(measure(server, options.frames, options.repeats))))


if __name__ == "__main__":
    main()
