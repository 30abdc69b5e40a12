"""Searching 30 camera-days: recall, time and memory of 8-bit shards beside exact search, and the start of a replica.

    python -m tests.benchmarks.bench_search [--cameras 30] [--days 1] [--queries 40] [--drawn 1800]

Real sealed segments on disk, each of 3,600 frames with vectors of 768 numbers that move as those of cameras do: scenes
of some 40 s that come back to what the place looks like, a slow walk within each, noise, and a few dimensions that are
large in all of them. `pictures` are queries near a stored frame; `texts` lie far from all frames, where neighbours in
rank differ least. `drawn` are clips of the drawn world in the space of the embedded model, searched for phrases that
name a thing and its colour.

"search" is the time of a query over everything on all cores: `Moments.search` with its looks into Redis, beside a flat
float32 index a core, held a gigabyte at a time because all of it would need 8. `recall_20` is the share of the 20 best
frames of exact search that are among the 20 best of the shards; `redis_ms` the part of a query in which Redis is asked
what has changed. "a shard" compares kinds of FAISS indexes on one core, by the 20 best of one shard; ours is the last.
"search memory" counts the bytes of shards against those of float32, and what the process grew by. "search start"
compares the loading of all shards with reading the bytes of their vectors from the same files, in the page cache.
"""

import argparse
import asyncio
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from compressor_service.encoder import Encoder
from compressor_service.settings import CompressorSettings
from compressor_service.training.evaluate import queries as phrases
from compressor_service.training.film import film_keyframes
from compressor_service.training.scene import draw_clip
from deploy.local import EMBEDDED_MODEL
from store.cipher import Cipher
from store.connection import EmbeddedRedis, StoreRedis, connect
from store.format import HOUR_SLOTS, TokenFormat
from store.moments import Moments, Span
from store.sealed import SealedHours
from store.segments import Hour, Segments
from store.settings import StoreSettings
from store.shards import Shard, search_on_this_thread
from store.source import NewStream
from store.sources import Sources
from store.timeline import Timeline
from tests.benchmarks.bench_embedded import resident_mb

FORMAT = TokenFormat(fingerprint="0" * 16, dtype="float16", tokens_per_frame=1, width=2, vector_width=768)
FIRST_HOUR = 480_000
TOP = 20
PIECE_HOURS = 90  # a gigabyte of float32
CORES = os.cpu_count() or 1

Row = dict[str, object]
Vectors = NDArray[np.float32]
Search = Callable[[Vectors, int], tuple[NDArray[np.int64], Vectors]]


def unit(vectors: Vectors) -> Vectors:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def watched(camera: int, hour: int) -> Vectors:
    """Return an hour of a camera (3600, P)."""
    width = FORMAT.vector_width
    common, place = (np.random.default_rng(seed).standard_normal(width, np.float32) for seed in (1, 1000 + camera))
    common[[5, 99, 400]] *= 8
    chance = np.random.default_rng([camera, hour])
    rows = []
    while sum(map(len, rows)) < HOUR_SLOTS:
        seconds = int(chance.geometric(1 / 40))
        scene = common + 0.6 * place + 0.5 * chance.standard_normal(width, np.float32)
        walk = np.cumsum(0.05 * chance.standard_normal((seconds, width), np.float32), axis=0)
        rows.append(scene + walk + 0.1 * chance.standard_normal((seconds, width), np.float32))
    return unit(np.concatenate(rows)[:HOUR_SLOTS]).astype(np.float16).astype(np.float32)


def asked(kind: str, count: int, cameras: int, hours: int) -> Vectors:
    """Return queries (count, P)."""
    chance = np.random.default_rng(7)
    found = []
    for _ in range(count):
        frame = watched(int(chance.integers(cameras)), int(chance.integers(hours)))[chance.integers(HOUR_SLOTS)]
        away = unit(chance.standard_normal(FORMAT.vector_width, np.float32))
        found.append(frame + (0.5 if kind == "pictures" else 4.0) * away)
    return unit(np.array(found))


class Site:
    """Cameras whose hours are sealed."""

    def __init__(self, redis: StoreRedis, folder: Path, cameras: int, hours: int) -> None:
        self.root = folder / "segments"
        self.sources = Sources(redis, Cipher.open(None, folder))
        self.timeline = Timeline(redis, FORMAT, Segments(str(self.root)))
        self._sealed = SealedHours(redis, FORMAT)
        self.cameras, self.hours = cameras, hours
        self.ids: list[str] = []

    async def write(self) -> None:
        segments = Segments(str(self.root))
        for camera in range(self.cameras):
            source = await self.sources.create_stream(NewStream(name=f"{camera}", url=f"rtsp://host/{camera}"))
            self.ids.append(source.id)
            for hour in range(self.hours):
                slots = (FIRST_HOUR + hour) * HOUR_SLOTS + np.arange(HOUR_SLOTS)
                tokens = np.zeros((HOUR_SLOTS, *FORMAT.token_shape), FORMAT.numpy_dtype)
                rows = Hour(slots, tokens, watched(camera, hour), slots * 1000)
                manifest = await segments.write(source.id, FORMAT, FIRST_HOUR + hour, 1, rows)
                assert await self._sealed.adopt(source.id, manifest, None)

    async def vectors(self, camera: int, hour: int) -> Vectors:
        first = (FIRST_HOUR + hour) * HOUR_SLOTS
        return await self.timeline.vectors(self.ids[camera], np.arange(first, first + HOUR_SLOTS))

    def read_s(self) -> float:
        """Return how long it takes to read the bytes of all vectors."""
        size, began = HOUR_SLOTS * FORMAT.vector_bytes, time.perf_counter()
        for path in self.root.rglob("*.safetensors"):
            with path.open("rb", buffering=0) as file:
                file.read(size)
        return time.perf_counter() - began


class Best:
    """The best frames of each query so far: scores and places (Q, TOP)."""

    def __init__(self, count: int) -> None:
        self.scores = np.full((count, TOP), -np.inf, np.float32)
        self.places = np.full((count, TOP), -1, np.int64)

    def add(self, query: int, places: NDArray[np.int64], scores: Vectors) -> None:
        every = np.concatenate([self.scores[query], scores])
        best = np.argsort(-every, kind="stable")[:TOP]
        self.scores[query] = every[best]
        self.places[query] = np.concatenate([self.places[query], places])[best]

    def recall(self, exact: "Best") -> float:
        """Return which share of the exact ones is here."""
        pairs = zip(self.places, exact.places, strict=True)
        return statistics.mean(len(set(mine.tolist()) & set(truth.tolist())) / TOP for mine, truth in pairs)


class FlatIndexes:
    """Exact search of some hours: one index a core, each on a thread of its own."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(CORES, initializer=search_on_this_thread)
        self._indexes = [faiss.IndexFlatIP(FORMAT.vector_width) for _ in range(CORES)]
        self._places: list[list[NDArray[np.int64]]] = [[] for _ in range(CORES)]

    def add(self, places: NDArray[np.int64], vectors: Vectors) -> None:
        """Add frames to the index that has the fewest."""
        core = min(range(CORES), key=lambda one: self._indexes[one].ntotal)
        self._indexes[core].add(vectors)
        self._places[core].append(places)

    def search(self, query: Vectors) -> list[tuple[Vectors, NDArray[np.int64]]]:
        """Return scores and rows of the best frames of each index."""
        return list(self._pool.map(lambda index: index.search(query[None], TOP), self._indexes))

    def best(self, query: Vectors) -> tuple[NDArray[np.int64], Vectors]:
        """Return places and scores of the best frames of all indexes."""
        found = list(zip(self._places, self.search(query), strict=True))
        places = [np.concatenate(added)[rows[0]] for added, (_, rows) in found]
        return np.concatenate(places), np.concatenate([scores[0] for _, (scores, _) in found])


def spent_ms(act: Callable[[], object], repeats: int = 3) -> float:
    spent = []
    for _ in range(repeats):
        began = time.perf_counter()
        act()
        spent.append(1000 * (time.perf_counter() - began))
    return min(spent)


@dataclass
class Turn:
    """What one query took, in milliseconds."""

    ours_ms: float = 0.0
    redis_ms: float = 0.0
    exact_ms: float = 0.0


async def compare(site: Site, moments: Moments, queries: Vectors) -> tuple[list[Turn], float]:
    """Return what each query took, and the recall of the shards."""
    exact, ours, turns = Best(len(queries)), Best(len(queries)), [Turn() for _ in queries]
    spans = [Span(source_id, 0, 1 << 40) for source_id in site.ids]
    every = [(camera, hour) for camera in range(site.cameras) for hour in range(site.hours)]
    firsts = range(0, len(every), PIECE_HOURS)
    for piece, first in enumerate(firsts):
        flat = FlatIndexes()
        for at, (camera, hour) in enumerate(every[first : first + PIECE_HOURS], first):
            vectors = await site.vectors(camera, hour)
            places = np.arange(HOUR_SLOTS) + at * HOUR_SLOTS
            shard = Shard.in_bytes(places, vectors)
            for place, query in enumerate(queries):
                ours.add(place, *shard.best(query, TOP))
            flat.add(places, vectors)
        for place, (query, turn) in enumerate(zip(queries, turns, strict=True)):
            turn.exact_ms += spent_ms(partial(flat.search, query), 2)
            exact.add(place, *flat.best(query))
            if place % len(firsts) == piece:  # in turns: whatever else the machine does meets both
                began = time.perf_counter()
                found = await moments.search(query, spans, top_k=10)
                turn.ours_ms = 1000 * (time.perf_counter() - began)
                assert not found.partial
                assert len(found.moments) == 10
                began = time.perf_counter()
                await site.timeline.hour_marks(site.ids)
                turn.redis_ms = 1000 * (time.perf_counter() - began)
    return turns, ours.recall(exact)


async def measure(cameras: int, days: int, count: int) -> None:
    case, hours = f"{cameras * days} camera-days", 24 * days
    with tempfile.TemporaryDirectory() as name, EmbeddedRedis.start(Path(name)) as server:
        async with connect(server.url) as redis:
            site = Site(redis, Path(name), cameras, hours)
            await site.write()
            site.read_s()  # into the page cache
            read_s, before_mb = site.read_s(), resident_mb()
            moments = Moments(site.timeline, StoreSettings())
            began = time.perf_counter()
            await moments.loader(site.sources).load()
            load_s = time.perf_counter() - began
            grown_mb = resident_mb() - before_mb
            for kind in ("pictures", "texts"):
                turns, recall = await compare(site, moments, asked(kind, count, cameras, hours))
                ours_ms, exact_ms, redis_ms = (
                    statistics.median(getattr(turn, name) for turn in turns)
                    for name in ("ours_ms", "exact_ms", "redis_ms")
                )
                show(
                    "search",
                    f"{case}, {kind}",
                    ours_ms / exact_ms,
                    "flat float32, an index a core",
                    recall_20=recall,
                    ms=ours_ms,
                    exact_ms=exact_ms,
                    redis_ms=redis_ms,
                )
            frames = cameras * hours * HOUR_SLOTS
            show(
                "search memory",
                case,
                moments.nbytes / (frames * FORMAT.vector_width * 4),
                "float32 numbers",
                shards_mb=moments.nbytes / 2**20,
                process_grew_mb=grown_mb,
            )
            show("search start", case, load_s / read_s, "reading the bytes", seconds=load_s, camera_days=cameras * days)


def measure_kinds(hours: int = 24) -> None:
    """Compare kinds of indexes of one shard on one core."""
    search_on_this_thread()
    shards = [watched(0, hour) for hour in range(hours)]
    queries = asked("pictures", 20, 1, hours)
    exact = Best(len(queries))
    slots = np.arange(HOUR_SLOTS)

    def faiss_kind(kind: int | None) -> list[Search]:
        searches = []
        for vectors in shards:
            metric = faiss.METRIC_INNER_PRODUCT
            width = FORMAT.vector_width
            index = faiss.IndexFlatIP(width) if kind is None else faiss.IndexScalarQuantizer(width, kind, metric)
            index.train(vectors)
            index.add(vectors)

            def search(query: Vectors, count: int, index: faiss.Index = index) -> tuple[NDArray[np.int64], Vectors]:
                scores, places = index.search(query[None], count)
                return places[0], scores[0]

            searches.append(search)
        return searches

    kinds = {
        "float32": faiss_kind(None),
        "fp16": faiss_kind(faiss.ScalarQuantizer.QT_fp16),
        "8bit": faiss_kind(faiss.ScalarQuantizer.QT_8bit),
        "8bit_uniform": faiss_kind(faiss.ScalarQuantizer.QT_8bit_uniform),
        "8bit on our grid": [Shard.in_bytes(slots, vectors).best for vectors in shards],
    }
    best = {name: exact if name == "float32" else Best(len(queries)) for name in kinds}
    ms = dict.fromkeys(kinds, float("inf"))
    for name, searches in kinds.items():
        for place, query in enumerate(queries):
            for hour, search in enumerate(searches):
                places, scores = search(query, TOP)
                best[name].add(place, places + hour * HOUR_SLOTS, scores)
    for _ in range(15):  # in turns: whatever else the machine does meets all of them
        for name, searches in kinds.items():
            ms[name] = min(ms[name], spent_ms(partial(_all, searches, queries[0]), 1) / hours)
    for name in kinds:
        show("a shard", name, ms[name] / ms["float32"], "float32", recall_20=best[name].recall(exact), ms=ms[name])


def _all(searches: Sequence[Search], query: Vectors) -> None:
    for search in searches:
        search(query, TOP)


def measure_drawn(frames: int) -> None:
    """Search the clips of the drawn world for what people type."""
    encoder = Encoder.load(EMBEDDED_MODEL, "float32", CompressorSettings())
    vectors = np.concatenate(
        [encoder.encode([encoder.decode(one) for one in some])[1] for some in drawn_minutes(frames)]
    )
    vectors = vectors.astype(np.float16).astype(np.float32)
    shard = Shard.in_bytes(np.arange(len(vectors)), vectors)
    queries = encoder.embed_text([phrase.text for phrase in phrases()])
    ours, exact = Best(len(queries)), Best(len(queries))
    for place, query in enumerate(queries):
        ours.add(place, *shard.best(query, TOP))
        exact.add(place, np.arange(len(vectors)), vectors @ query)
    flat = faiss.IndexFlatIP(vectors.shape[1])
    flat.add(vectors)
    search_on_this_thread()
    exact_ms = spent_ms(lambda: flat.search(queries[:1], TOP), 99)
    ms = spent_ms(lambda: shard.best(queries[0], TOP), 99)
    case = f"{len(vectors)} drawn frames, texts"
    show("search", case, ms / exact_ms, "flat float32", recall_20=ours.recall(exact), ms=ms, exact_ms=exact_ms)


def drawn_minutes(frames: int) -> Iterator[Sequence[bytes]]:
    for minute in range(frames // 60):
        files = []
        for picture in film_keyframes(draw_clip(np.random.default_rng(minute), slots=60)):
            file = io.BytesIO()
            Image.fromarray(picture).save(file, "JPEG", quality=95, subsampling=0)
            files.append(file.getvalue())
        yield files


def show(benchmark: str, case: str, ratio: float, against: str, **more: float) -> None:
    row: Row = {"benchmark": benchmark, "case": case, "ratio": ratio, "against": against, **more}
    print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cameras", type=int, default=30)
    parser.add_argument("--days", type=int, default=1)
    parser.add_argument("--queries", type=int, default=40)
    parser.add_argument("--drawn", type=int, default=HOUR_SLOTS // 2, help="Frames of the drawn world, 0 for none.")
    options = parser.parse_args()
    asyncio.run(measure(options.cameras, options.days, options.queries))
    measure_kinds()
    if options.drawn:
        measure_drawn(options.drawn)


if __name__ == "__main__":
    main()
