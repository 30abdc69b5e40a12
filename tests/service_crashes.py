"""The whole service, as `tokenline run` starts it, killed at random moments under load; then its memory is looked at.

    python -m tests.service_crashes [--rounds 24] [--seed 1]

A camera is recorded and files are uploaded; past hours are written through the store, so that the janitor seals all
the time; questions, searches and erasures are asked. Every round kills with SIGKILL at a random moment: Redis, the
replica that reads, a process that decodes, the replicas that compress, seal or answer, or every process of it, which is
then started again on the same folder. After each round the service has to record, seal and answer again without a hand,
and everything that was in memory just before the kill has to be there, bit for bit, unless it was erased; what Redis
had acknowledged in the last two seconds before it was killed may be gone, and is counted.
"""

import argparse
import asyncio
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np

from store.connection import StoreRedis, StoreUnavailable, connect
from store.format import HOUR_SLOTS, TokenFormat
from store.hot import Entry
from store.keyframes import Keyframes
from store.keys import formats_key
from store.leases import Leases
from store.segments import Segments
from store.timeline import StaleEpoch, Timeline
from tests.ingest_parts import encode, simulated_camera, steady
from tests.service import RunningService, kill_replica, named, processes_of, running_service
from tests.test_store_connection import server_pid

KINDS = ("redis", "ingest", "decoder", "compressor", "janitor", "janitor", "qa", "everything")
SETTINGS: Mapping[str, str] = {
    "TOKENLINE_INGEST__LEASE_S": "4",
    "TOKENLINE_INGEST__RENEW_S": "1",
    "TOKENLINE_STORE__JANITOR_INTERVAL_S": "0.2",
    "TOKENLINE_STORE__SEAL_SETTLE_S": "1",
}
BACK_WITHIN_S = 180.0
WINDOW_S = 2.0  # for which a slow disk may hold up the append-only file
STEP, BATCH, HOURS_AGO = 20, 60, 5000
CLIP_S = 8
LEASE_S = 10.0  # of who writes past hours
SETTLE_S = 5.0  # frames on their way come to their end
_PAUSE_S, _TAKES_S = 0.05, 30.0
T = TypeVar("T")
Kept = Mapping[int, bytes]  # tokens by slot


def entry(format: TokenFormat, slot: int) -> Entry:
    """A frame that can be made again from its slot."""
    chance = np.random.default_rng(slot)
    tokens = chance.integers(0, 256, format.token_bytes, np.uint8).view(format.numpy_dtype)
    vector = chance.standard_normal(format.vector_width).astype(np.float32)
    return Entry(slot, slot * 1000 + 7, tokens.reshape(format.token_shape), vector / np.linalg.norm(vector))


def picture(slot: int) -> bytes:
    return b"keyframe %d" % slot


@dataclass
class Load:
    """What goes on all the time: hours written, files uploaded, questions, searches and erasures asked."""

    service: RunningService
    camera: str
    past: str
    clip: bytes
    acknowledged: dict[int, float] = field(default_factory=dict)  # slots of past hours, and when
    erasures: list[tuple[int, int]] = field(default_factory=list)  # begun ones of past hours
    videos: list[str] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._halt = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(work,)) for work in (self.write, self.ask, self.add)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._halt.set()
        for thread in self._threads:
            thread.join()

    def _run(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        while not self._halt.is_set():
            try:
                asyncio.run(work())
            except (StoreUnavailable, httpx.TransportError, AssertionError):  # away, or just being started
                self._halt.wait(_PAUSE_S)
            except Exception as error:
                self.wrong.append(f"{work.__name__} ended with {error!r}")
                return

    async def write(self) -> None:
        """Append frames behind the last acknowledged one."""
        async with connect(redis_url(self.service)) as redis:
            keyframes, leases = Keyframes(redis, str(self.service.data_dir / "segments")), Leases(redis)
            timeline = await self.timeline(redis)
            owner, epoch = f"writer-{time.monotonic()}", None
            slot = max(self.acknowledged, default=(int(time.time()) // HOUR_SLOTS - HOURS_AGO) * HOUR_SLOTS) + STEP
            while not self._halt.is_set():
                epoch = epoch or await leases.acquire(self.past, owner, LEASE_S)
                if epoch is None:
                    await asyncio.sleep(_PAUSE_S)
                    continue
                slots = [slot + STEP * number for number in range(BATCH)]
                try:
                    await keyframes.put_many({(self.past, one): picture(one) for one in slots})
                    await timeline.append(self.past, epoch, [entry(timeline.format, one) for one in slots])
                except StaleEpoch:
                    epoch = None
                    continue
                self.acknowledged |= dict.fromkeys(slots, time.time())
                slot = slots[-1] + STEP
                await leases.renew(owner, {self.past: epoch}, LEASE_S)
                await asyncio.sleep(_PAUSE_S)

    async def ask(self) -> None:
        """Ask about the camera, search it, and erase past hours."""
        chance = random.Random(len(self.erasures))
        async with httpx.AsyncClient(base_url=self.service.url, timeout=_TAKES_S) as client:
            while not self._halt.is_set():
                start = (datetime.now(UTC) - timedelta(seconds=30)).isoformat()
                sources = [{"stream_id": self.camera, "start": start}]
                body = {"question": "What happens?", "sources": sources, "max_output_tokens": 4, "stride": 10}
                await self._asked(client.post("/v1/questions", json=body), "question")
                await self._asked(client.post("/v1/search", json={"query": "a car", "sources": sources}), "search")
                if self.acknowledged:
                    first = chance.choice(list(self.acknowledged)[-20 * BATCH :])
                    span = (first, first + chance.randint(1, HOUR_SLOTS // 4))
                    self.erasures.append(span)
                    path = f"/v1/sources/{self.past}/memory"
                    await self._asked(client.delete(path, params=ends(*span)), "erasure")
                await asyncio.sleep(10 * _PAUSE_S)

    async def add(self) -> None:
        """Upload files, one when the one before is read."""
        async with httpx.AsyncClient(base_url=self.service.url, timeout=_TAKES_S) as client:
            while not self._halt.is_set():
                made = await self._asked(client.post("/v1/videos", files={"file": ("clip.mp4", self.clip)}), "upload")
                if made.status_code == 202:
                    self.videos.append(made.json()["id"])
                    while not await self._is_read(client, self.videos[-1]):
                        if self._halt.wait(_PAUSE_S):
                            return
                self._halt.wait(20 * _PAUSE_S)

    async def _is_read(self, client: httpx.AsyncClient, video: str) -> bool:
        response = await client.get(f"/v1/videos/{video}")
        status = response.json().get("status")
        if status == "failed":
            self.wrong.append(f"{video} failed: {response.text}")
        return status in ("ready", "failed")

    async def _asked(self, request: Coroutine[Any, Any, httpx.Response], what: str) -> httpx.Response:
        response = await request
        self.statuses[f"{what} {response.status_code}"] += 1
        if response.status_code == 500 or (response.status_code == 200 and "error" in response.json()):
            self.wrong.append(f"a {what} was answered {response.status_code}: {response.text[:300]}")
        return response

    async def timeline(self, redis: StoreRedis) -> Timeline:
        """Return the timeline of the model that looks at the camera."""
        formats: Any = await redis.hgetall(formats_key(self.camera))
        assert formats, "the camera has no frame yet"
        [raw] = formats.values()
        segments = Segments(str(self.service.data_dir / "segments"))
        return Timeline(redis, TokenFormat.model_validate_json(raw), segments)


def ends(start_s: float, end_s: float) -> dict[str, str]:
    """Return a range as the API is asked for it."""
    return {
        "start": datetime.fromtimestamp(start_s, UTC).isoformat(),
        "end": datetime.fromtimestamp(end_s, UTC).isoformat(),
    }


def redis_url(service: RunningService) -> str:
    """Return the address of the service's own server, as the shell that keeps it alive was told."""
    words = [command.split() for command in processes_of(service.data_dir).values() if "tokenline-redis" in command]
    assert words, "the service is not up"
    return f"unix://{words[0][words[0].index('--unixsocket') + 1]}"


class ServiceCrashes:
    """Kills a service that is up, and looks. `wrong` says what should not be."""

    def __init__(self, service: RunningService, load: Load, seed: int) -> None:
        self.service = service
        self.load = load
        self.kills: Counter[str] = Counter()
        self.slowest: dict[str, float] = {}
        self.in_window = 0
        self.wrong: list[str] = []
        self._chance = random.Random(seed)

    def round(self, kind: str) -> None:
        """Kill, wait until everything goes on again, and compare."""
        time.sleep(self._chance.uniform(0.5, 3.0))
        sources = (self.load.camera, self.load.past, *self.load.videos[-3:])
        before, killed_at = self._store(lambda redis: self._look(redis, sources)), time.time()
        self.kills[kind] += 1
        self._kill(kind)
        began = time.monotonic()
        self._wait_until_back(kind)
        self.slowest[kind] = max(self.slowest.get(kind, 0.0), time.monotonic() - began)
        after = self._store(lambda redis: self._look(redis, sources))
        self._compare(kind, before, after, killed_at)

    def verdict(self) -> list[str]:
        """Stop the camera, read everything once more, and return all that is wrong."""
        url = f"{self.service.url}/v1/streams/{self.load.camera}"
        assert httpx.patch(url, json={"enabled": False}, timeout=_TAKES_S).status_code == 200
        time.sleep(SETTLE_S)
        self.wrong += self._store(self._read_everything)
        self._require_gaps()
        return [*self.wrong, *self.load.wrong]

    def _kill(self, kind: str) -> None:
        service = self.service
        with suppress(ValueError, AssertionError, ProcessLookupError):  # it is being started again just now
            if kind == "everything":
                service.kill_everything()
                service.start_again()
            elif kind == "redis":
                os.kill(server_pid(service.data_dir), signal.SIGKILL)
            elif kind == "decoder":
                os.kill(self._chance.choice(named(service.data_dir, "ingest.reading") or [0]) or 2**22, signal.SIGKILL)
            else:
                kill_replica(service, kind)

    def _wait_until_back(self, kind: str) -> None:
        """Wait until frames are recorded, hours written and sealed, and questions answered, that began after a kill."""
        since, deadline = time.time(), time.monotonic() + BACK_WITHIN_S
        sealed, left = None, {"camera", "past", "sealed", "question", "ready"}
        while left:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{sorted(left)} did not come back after a kill of {kind}: {self.load.wrong}")
            with suppress(StoreUnavailable, AssertionError, httpx.TransportError):
                seen = self._store(self._newest)
                sealed = seen["sealed"] if sealed is None else sealed
                is_back = {
                    "camera": seen["camera"] > since,
                    "past": max(self.load.acknowledged.values(), default=0) > since,
                    "sealed": seen["sealed"] > sealed,
                    "question": self._answers(),
                    "ready": httpx.get(f"{self.service.url}/v1/health/ready", timeout=_TAKES_S).status_code == 200,
                }
                left = {name for name, back in is_back.items() if not back}
            time.sleep(_PAUSE_S)

    def _answers(self) -> bool:
        start = (datetime.now(UTC) - timedelta(seconds=60)).isoformat()
        body = {
            "question": "What happens?",
            "sources": [{"stream_id": self.load.camera, "start": start}],
            "max_output_tokens": 4,
            "stride": 10,
        }
        return httpx.post(f"{self.service.url}/v1/questions", json=body, timeout=_TAKES_S).status_code == 200

    def _compare(self, kind: str, before: Mapping[str, Kept], after: Mapping[str, Kept], killed_at: float) -> None:
        for source, seen in before.items():
            gone = set(seen) - set(after[source])
            gone -= self._may_be_erased(source)
            if kind in ("redis", "everything"):
                late = {slot for slot in gone if self._written_at(source, slot) > killed_at - WINDOW_S}
                self.in_window += len(late)
                gone -= late
            if gone:
                self.wrong.append(f"{len(gone)} frames of {source} are lost after a kill of {kind}: {sorted(gone)[:5]}")
            for slot in seen.keys() & after[source].keys():
                if seen[slot] != after[source][slot]:
                    self.wrong.append(f"slot {slot} of {source} is another one after a kill of {kind}")

    def _may_be_erased(self, source: str) -> set[int]:
        """Return the slots of begun erasures.

        The picture alone may be gone, too: the erasure came between it and its token, for who writes past hours is not
        stopped by one.
        """
        if source != self.load.past:
            return set()
        return {slot for start, end in self.load.erasures for slot in range(start, end)}

    def _written_at(self, source: str, slot: int) -> float:
        if source == self.load.past:
            return self.load.acknowledged.get(slot, 0.0)
        return slot / 10 + 1 if source == self.load.camera else 0.0

    async def _newest(self, redis: StoreRedis) -> dict[str, float]:
        timeline = await self.load.timeline(redis)
        extent = await timeline.extent(self.load.camera)
        return {
            "camera": 0.0 if extent is None else extent[1] / 10,
            "sealed": max((float(one.hour) for one in await timeline.sealed(self.load.past)), default=0.0),
        }

    async def _look(self, redis: StoreRedis, sources: Sequence[str]) -> dict[str, Kept]:
        """Read the tokens of everything that presence claims: that fails if a frame cannot be read."""
        timeline, seen = await self.load.timeline(redis), {}
        for source in sources:
            for _ in range(10):
                slots = await timeline.slots(source, 0, 10**12)
                with suppress(LookupError):  # erased meanwhile
                    tokens = await timeline.read(source, slots)
                    break
            else:
                raise RuntimeError(f"presence of {source} claims frames that cannot be read")
            seen[source] = {int(slot): row.tobytes() for slot, row in zip(slots, tokens, strict=True)}
        return seen

    async def _read_everything(self, redis: StoreRedis) -> list[str]:
        """Compare all of it with what was written; nothing else may be going on."""
        root, wrong = str(self.service.data_dir / "segments"), []
        timeline, keyframes, segments = await self.load.timeline(redis), Keyframes(redis, root), Segments(root)
        for source in (self.load.camera, self.load.past, *self.load.videos):
            slots = await timeline.slots(source, 0, 10**12)
            tokens, times = await timeline.read(source, slots), await timeline.times(source, slots)
            await timeline.vectors(source, slots)
            pictures = await keyframes.find(source, slots.tolist())
            if bare := sorted(set(slots.tolist()) - set(pictures) - self._may_be_erased(source)):
                wrong.append(f"{len(bare)} frames of {source} have lost their pictures, the first is {bare[0]}")
            if await timeline.count(source) != len(slots):
                wrong.append(f"the count of {source} is {await timeline.count(source)}, but {len(slots)} are there")
            for manifest in await timeline.sealed(source):
                _, found = await segments.check(source, manifest.hour, manifest.file)
                if found != manifest:
                    wrong.append(f"hour {manifest.hour} of {source} is not what its manifest says")
            if source == self.load.past:
                for slot, row, at in zip(slots.tolist(), tokens, times, strict=True):
                    expected, jpeg = entry(timeline.format, slot), pictures.get(slot, picture(slot))
                    if row.tobytes() != expected.tokens.tobytes() or at != expected.time_ms or jpeg != picture(slot):
                        wrong.append(f"slot {slot} of {source} is not what was written")
            elif source in self.load.videos[:-1] and slots.tolist() != list(range(CLIP_S)):
                wrong.append(f"{source} was read, but has {slots.tolist()}")
        return wrong

    def _require_gaps(self) -> None:
        """Require a gap with a reason for every second of the camera that is not there."""
        seen = self._store(lambda redis: self._look(redis, [self.load.camera]))
        slots = np.array(sorted(seen[self.load.camera]))
        path = f"{self.service.url}/v1/sources/{self.load.camera}/timeline"
        span = ends(slots[0] / 10, (slots[-1] + 1) / 10)
        told = httpx.get(path, params={**span, "resolution_s": 3600}, timeout=_TAKES_S).json()
        absent = set(range(slots[0], slots[-1] + 1)) - set(slots.tolist())
        for gap in told["gaps"]:
            low, high = (round(datetime.fromisoformat(gap[end]).timestamp() * 10) for end in ("start", "end"))
            absent -= set(range(low, high))
        if absent:
            self.wrong.append(f"{len(absent)} slots of the camera are missing without a word: {sorted(absent)[:5]}")

    def _store(self, work: Callable[[StoreRedis], Coroutine[Any, Any, T]]) -> T:
        """Do something with the store from outside; repeated while it is away."""

        async def connected() -> T:
            async with connect(redis_url(self.service)) as redis:
                return await work(redis)

        deadline = time.monotonic() + BACK_WITHIN_S
        while True:
            try:
                return asyncio.run(connected())
            except (StoreUnavailable, AssertionError, OSError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(_PAUSE_S)


def crash(service: RunningService, kinds: tuple[str, ...], seed: int, folder: Path) -> ServiceCrashes:
    """Put a service under load, kill what is named, one after the other, and return what came of it."""
    clip = encode(folder / "clip.mp4", steady(CLIP_S)).read_bytes()
    with simulated_camera("--gop", "10") as camera, httpx.Client(base_url=service.url, timeout=60) as client:
        made = [
            client.post("/v1/streams", json=body).json()["id"]
            for body in (
                {"name": "gate under load", "url": camera.url, "fps": 10},
                {"name": "past", "url": "rtsp://127.0.0.1/past", "enabled": False, "retention": {"hours": 80_000}},
            )
        ]
        load = Load(service, made[0], made[1], clip)
        crashes = ServiceCrashes(service, load, seed)
        load.start()
        try:
            crashes._wait_until_back("nothing")
            for number, kind in enumerate(kinds):
                crashes.round(kind)
                print(f"{number + 1}: {kind}, back after at most {crashes.slowest[kind]:.0f} s", flush=True)
        finally:
            load.stop()
        crashes.wrong = crashes.verdict()
    return crashes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    kinds: list[str] = []
    while len(kinds) < options.rounds:  # each of them, in another order every time
        kinds += chance.sample(KINDS, len(KINDS))
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        service = stack.enter_context(running_service(folder, SETTINGS))
        crashes = crash(service, tuple(kinds[: options.rounds]), options.seed, folder)
    load = crashes.load
    print(f"{options.rounds} kills: {dict(crashes.kills)}; seconds until all went on, at most: {crashes.slowest}")
    print(f"{len(load.acknowledged)} frames of past hours, {len(load.videos)} files; {dict(load.statuses)}")
    print(f"{crashes.in_window} frames inside the window of the append-only file were lost")
    for one in crashes.wrong:
        print(f"FAILED: {one}")
    if crashes.wrong:
        sys.exit(1)
    print("passed: what was in memory is there, what presence claims can be read, every segment is whole")


if __name__ == "__main__":
    main()
