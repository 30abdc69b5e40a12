"""Processes of the store, killed at random moments under load; then everything acknowledged is looked for.

    python -m tests.crashes [--rounds 200] [--seed 1]

A writer appends frames, a sealer looks for lost files as the janitor does and moves full hours into segments, an eraser
erases ranges and a reader reads, each in a process of its own. Every round kills one of them, or Redis, or all at once,
with SIGKILL at a random moment, and starts it again. The writer writes down what was acknowledged, the eraser what it
was told to erase and what was acknowledged. Ends with 0 if every acknowledged frame is read back bit for bit unless its
erasure had begun, no erased frame is found, presence claims nothing that cannot be read, and every segment that counts
is whole.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from store.cipher import Cipher
from store.connection import EmbeddedRedis, StoreRedis, StoreUnavailable, connect
from store.format import HOUR_SLOTS, TokenFormat
from store.gaps import Gap
from store.hot import Entry
from store.keyframes import Keyframes
from store.leases import Leases
from store.memory import Memory
from store.recovery import Recovery
from store.rounds import Rounds
from store.segments import Segments
from store.source import NewStream, Stream
from store.sources import Sources
from store.timeline import StaleEpoch, Timeline
from tests.test_store_connection import server_pid

FORMAT = TokenFormat(fingerprint="0123456789abcdef", dtype="float16", tokens_per_frame=1, width=64, vector_width=8)
SOURCE = "str_crash"
STEP = 20  # every slot of so many is written: many hours pass in little time, and their blocks have holes
BATCH = 60
LEASE_S = 1.0
GETS_ON_WITHIN_S = 60.0
ROLES = ("write", "seal", "erase", "read")
ROOT = Path(__file__).parent.parent
_PAUSE_S = 0.01


def entry(slot: int) -> Entry:
    """A frame that can be made again from its slot."""
    chance = np.random.default_rng(slot)
    tokens = chance.integers(0, 2**16, FORMAT.token_shape, np.uint16).view(np.float16)
    vector = chance.standard_normal(FORMAT.vector_width).astype(np.float32)
    return Entry(slot, slot * 1000 + 7, tokens, vector / np.linalg.norm(vector))


def keyframe(slot: int) -> bytes:
    return b"keyframe %d" % slot


@dataclass
class Place:
    """Where everything is kept, and the log of one process."""

    url: str
    root: str
    log: Path

    def timeline(self, redis: StoreRedis) -> Timeline:
        return Timeline(redis, FORMAT, Segments(self.root))

    def memory(self, redis: StoreRedis) -> Memory:
        return Memory(redis, Segments(self.root), Keyframes(redis, self.root))

    def sources(self, redis: StoreRedis) -> Sources:
        return Sources(redis, Cipher.open(None, self.log.parent))

    def recovery(self, redis: StoreRedis) -> Recovery:
        return Recovery(redis, self.sources(redis), self.memory(redis), self.root, Rounds(redis))

    def note(self, *facts: object) -> None:
        """Write a line that a kill of this process leaves whole."""
        line = json.dumps(facts).encode() + b"\n"
        descriptor = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, line)
        os.close(descriptor)

    def notes(self) -> list[list[object]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []


async def write(place: Place, redis: StoreRedis) -> None:
    """Append frames behind the last acknowledged one, as their owner."""
    timeline, keyframes, leases = place.timeline(redis), Keyframes(redis, place.root), Leases(redis)
    noted = [int(str(last)) for _, last in place.notes()]
    slot = max(noted, default=-STEP) + STEP
    epoch: int | None = None
    while True:
        if epoch is None:
            epoch = await leases.acquire(SOURCE, f"writer-{os.getpid()}", LEASE_S)
            await asyncio.sleep(_PAUSE_S)
            continue
        slots = [slot + STEP * number for number in range(BATCH)]
        try:
            await keyframes.put_many({(SOURCE, one): keyframe(one) for one in slots})
            await timeline.append(SOURCE, epoch, [entry(one) for one in slots])
        except StaleEpoch:
            epoch = None
            continue
        place.note(slots[0], slots[-1])
        slot = slots[-1] + STEP
        await leases.renew(f"writer-{os.getpid()}", {SOURCE: epoch}, LEASE_S)
        await asyncio.sleep(_PAUSE_S)


async def seal(place: Place, redis: StoreRedis) -> None:
    """Seal every hour again and again, also the one that is still written: so seals and writes meet often."""
    timeline, keyframes, recovery = place.timeline(redis), Keyframes(redis, place.root), place.recovery(redis)
    await recovery.begin()
    while True:
        await recovery.go_on()
        for hour in await timeline.hot_hours(SOURCE):
            await timeline.seal(SOURCE, hour)
        for hour in await keyframes.loose_hours(SOURCE):
            await keyframes.pack(SOURCE, hour)
        await asyncio.sleep(_PAUSE_S)


async def erase(place: Place, redis: StoreRedis) -> None:
    """Erase a part of what is there, now and then, and once more what a crash may have left half erased."""
    timeline, memory, chance = place.timeline(redis), place.memory(redis), random.Random(os.getpid())
    begun = [note for note in place.notes() if note[0] == "begin"]
    done = [note[1:] for note in place.notes() if note[0] == "done"]
    for _, start, end in [note for note in begun if note[1:] not in done]:
        await memory.erase(SOURCE, int(str(start)), int(str(end)))
        place.note("done", start, end)
    while True:
        await asyncio.sleep(chance.uniform(0.05, 0.3))
        extent = await timeline.extent(SOURCE)
        if extent is None:
            continue
        start = chance.randint(extent[0], extent[1])
        end = min(start + chance.randint(1, 2 * HOUR_SLOTS), extent[1] - HOUR_SLOTS)
        if start < end:
            place.note("begin", start, end)
            gap = Gap(start_slot=start, end_slot=end, reason="erased")
            await place.sources(redis).add_gaps(SOURCE, None, [gap])
            await memory.erase(SOURCE, start, end)
            place.note("done", start, end)


async def read(place: Place, redis: StoreRedis) -> None:
    """Read ranges; a frame that is not what was written ends the run."""
    timeline, chance = place.timeline(redis), random.Random(os.getpid())
    while True:
        extent = await timeline.extent(SOURCE)
        if extent is None:
            continue
        start = chance.randint(extent[0], extent[1])
        slots = await timeline.slots(SOURCE, start, start + 3 * HOUR_SLOTS)
        with suppress(LookupError):  # erased meanwhile
            tokens = await timeline.read(SOURCE, slots)
            if any(row.tobytes() != entry(int(slot)).tokens.tobytes() for slot, row in zip(slots, tokens, strict=True)):
                place.note("wrong bytes", int(slots[0]), int(slots[-1]))
        await asyncio.sleep(_PAUSE_S)


async def play(role: str, place: Place) -> None:
    """Do a role's work until killed; a server that is away for a moment is waited for."""
    work = {"write": write, "seal": seal, "erase": erase, "read": read}[role]
    while True:
        try:
            async with connect(place.url) as redis:
                await work(place, redis)
        except StoreUnavailable:
            await asyncio.sleep(0.05)


def start_playing(role: str, place: Place) -> subprocess.Popen[bytes]:
    """Let a role be played in a process of its own."""
    command = [sys.executable, "-m", "tests.crashes", "--play", role, place.url, place.root, str(place.log)]
    return subprocess.Popen(command, cwd=ROOT)


@dataclass
class Crashes:
    """One run in a folder."""

    folder: Path
    seed: int
    kills: dict[str, int] = field(default_factory=dict)
    acknowledged: int = 0
    told: str = ""

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)
        self._playing: dict[str, subprocess.Popen[bytes]] = {}

    def place(self, role: str) -> Place:
        return Place(self._url, str(self.folder / "segments"), self.folder / f"{role}.log")

    def run(self, rounds: int) -> list[str]:
        """Kill and start again, and return what is wrong at the end."""
        with ExitStack() as stack:
            server = stack.enter_context(EmbeddedRedis.start(self.folder))
            self._url = server.url
            asyncio.run(self._register())
            stack.callback(self._end)
            self._start(ROLES)
            for number in range(rounds):
                if not self._gets_on():
                    return [f"nothing is acknowledged any more in round {number}"]
                time.sleep(self._chance.uniform(0.0, 0.5))
                died = [role for role, process in self._playing.items() if process.poll() is not None]
                if died:
                    return [f"{role} ended by itself in round {number}" for role in died]
                self._kill(self._chance.choice((*ROLES, "redis", "seal", "everything")))
            time.sleep(1.0)
            self._end()
            return asyncio.run(self._verdict())

    async def _register(self) -> None:
        async with connect(self._url) as redis:
            new = NewStream(name="crash", url="rtsp://camera/crash", enabled=False).model_dump(exclude={"password"})
            stream = Stream(id=SOURCE, has_password=False, created_at=0, **new)
            assert await self.place("write").sources(redis).restore(stream)

    def _gets_on(self) -> bool:
        """Wait for the next acknowledgement: on a busy machine processes would die before they have done anything."""
        log, deadline = self.place("write").log, time.monotonic() + GETS_ON_WITHIN_S
        known = log.stat().st_size if log.exists() else 0
        while not log.exists() or log.stat().st_size == known:
            if time.monotonic() > deadline:
                return False
            time.sleep(_PAUSE_S)
        return True

    def _kill(self, whom: str) -> None:
        self.kills[whom] = self.kills.get(whom, 0) + 1
        roles = ROLES if whom == "everything" else (whom,) if whom in ROLES else ()
        for role in roles:
            self._playing[role].kill()
        if whom in ("redis", "everything"):
            with suppress(AssertionError, ProcessLookupError):  # it is being started again just now
                os.kill(server_pid(self.folder), signal.SIGKILL)
        for role in roles:
            self._playing.pop(role).wait()
        self._start(roles)

    def _start(self, roles: tuple[str, ...]) -> None:
        for role in roles:
            self._playing[role] = start_playing(role, self.place(role))

    def _end(self) -> None:
        for process in self._playing.values():
            process.kill()
            process.wait()
        self._playing.clear()

    async def _verdict(self) -> list[str]:
        acknowledged = {slot for first, last in self._ranges("write") for slot in range(first, last + 1, STEP)}
        begun = {slot for start, end in self._ranges("erase", "begin") for slot in range(start, end)}
        erased = {slot for start, end in self._ranges("erase", "done") for slot in range(start, end)}
        place, wrong = self.place("read"), [f"the reader found {note}" for note in self.place("read").notes()]
        async with connect(self._url) as redis:
            timeline, keyframes = place.timeline(redis), Keyframes(redis, place.root)
            present = (await timeline.slots(SOURCE, 0, 10**12)).tolist()
            if lost := sorted(acknowledged - begun - set(present)):
                wrong.append(f"{len(lost)} acknowledged frames are lost, the first is {lost[0]}")
            if back := sorted(erased & set(present) & acknowledged):
                wrong.append(f"{len(back)} erased frames are there, the first is {back[0]}")
            tokens = await timeline.read(SOURCE, np.array(present))
            times, vectors = (
                await timeline.times(SOURCE, np.array(present)),
                await timeline.vectors(SOURCE, np.array(present)),
            )
            for slot, row, time_ms, vector in zip(present, tokens, times, vectors, strict=True):
                expected = entry(slot)
                is_right = row.tobytes() == expected.tokens.tobytes() and time_ms == expected.time_ms
                if not (is_right and np.allclose(vector, expected.vector, atol=1e-3)):
                    wrong.append(f"slot {slot} is not what was written")
            if await keyframes.get_many(SOURCE, present) != [keyframe(slot) for slot in present]:
                wrong.append("keyframes are not what was written")
            if await timeline.count(SOURCE) != len(present):
                wrong.append(f"the count is {await timeline.count(SOURCE)}, but {len(present)} frames are there")
            segments = Segments(place.root)
            sealed = await timeline.sealed(SOURCE)
            for manifest in sealed:
                _, found = await segments.check(SOURCE, manifest.hour, manifest.file)
                if found != manifest:
                    wrong.append(f"hour {manifest.hour} is not what its manifest says")
        self.acknowledged = len(acknowledged)
        self.told = (
            f"{len(acknowledged)} frames acknowledged, {len(begun & acknowledged)} erased, {len(sealed)} hours sealed"
        )
        return wrong

    def _ranges(self, role: str, kind: str | None = None) -> Iterator[tuple[int, int]]:
        for note in self.place(role).notes():
            if kind is None or note[0] == kind:
                start, end = note[-2:]
                yield int(str(start)), int(str(end))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--play", nargs=4, metavar=("ROLE", "URL", "ROOT", "LOG"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.play:
        role, url, root, log = options.play
        asyncio.run(play(role, Place(url, root, Path(log))))
        return
    with tempfile.TemporaryDirectory() as folder:
        crashes = Crashes(Path(folder), options.seed)
        wrong = crashes.run(options.rounds)
    print(f"{options.rounds} kills: {crashes.kills}; {crashes.told}")
    for one in wrong:
        print(f"FAILED: {one}")
    if wrong:
        sys.exit(1)
    print("passed: nothing acknowledged is lost, nothing erased is there, every segment is whole")


if __name__ == "__main__":
    main()
