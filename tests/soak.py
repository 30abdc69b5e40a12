"""Cameras that suffer random faults all the time, read with the settings of production; a verdict at the end.

    python -m tests.soak [--minutes 30] [--cameras 8] [--seed 1] [--kill]

Ends with 0 if no second went untold, no frame came twice, every camera was back within 30 s after each fault, and
neither file descriptors nor memory grew. `--kill` also kills and stops the processes that read. The same seed gives the
same faults, not the same moments: a fault begins when its camera has recovered from the one before.
"""

import argparse
import asyncio
import logging
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from ingest.assignment import Assignment, Camera, CameraReport
from ingest.service import IngestService
from ingest.settings import IngestSettings
from tests.camera_faults import (
    BACK_WITHIN_S,
    PICTURES,
    ChangesDesk,
    ClockSink,
    Fault,
    Resources,
    reading_pids,
    table,
    tally,
    worst_recovery_s,
)
from tests.ingest_parts import LOCAL, SimulatedCamera, free_port, until

GIVEN_UP_S = 60.0
ENDS_WITHIN_S = 420.0  # of the time of the run: waits for all cameras twice, a last fault, and the service's own stop
FDS_A_PROCESS = 8  # of each process that reads more than at the start: cameras may get one each
WARM_S = 180.0  # a process that was there for less has no memory worth comparing
MEMORY_GROWTH_MB = 5.0  # in the last third of a process's life over the second, for its faults were others

_SAMPLE_S = 5.0
_SETTLE_S = 2.0
_CALM_S = (3.0, 15.0)
_KILL_EVERY_S = (40.0, 90.0)


def random_fault(dice: random.Random) -> Fault:
    """Choose what a camera suffers next, and for how long. A wrong password is tried again too seldom for a soak."""
    short, long = dice.uniform(1, 8), dice.uniform(1, 45)
    jump = dice.choice((-60, -10, -3, 4, 30, 300))
    makers: list[Callable[[], Fault]] = [
        lambda: Fault("drop", "drop"),
        lambda: Fault("stall", f"stall:{long:.1f}", long),
        lambda: Fault("hang", "hang", long),
        lambda: Fault("refuse", f"refuse:{long:.1f}", long),
        lambda: Fault("off", "off", long),
        lambda: Fault("reboot", f"restart:{short:.1f}:{dice.choice(('320x180', '640x360', '480x272'))}", short),
        lambda: Fault("freeze", f"freeze:{short:.1f}", short),
        lambda: Fault("black", f"black:{short:.1f}", short),
        lambda: Fault("resize", f"resize:{dice.choice(('320x180', '640x360', '480x272'))}"),
        # There and back: connections that the simulator begins while its times are ahead would wait for them.
        lambda: Fault("jump", f"ptsjump:{jump}", short, undo=f"ptsjump:{-jump}"),
        lambda: Fault("corrupt", f"corrupt:{short:.1f}", short),
    ]
    return dice.choice(makers)()


Sample = Mapping[int, Resources]  # what this process (the first) and those that read hold, by their ids


@dataclass
class SoakedCamera:
    """One camera and what it went through.

    `ends` are the ends of its faults, `recoveries` how long it took to come back from each (seconds, and what the fault
    did), `lost` the faults that it did not come back from.
    """

    source_id: str
    simulator: SimulatedCamera
    dice: random.Random
    faults: list[str] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    recoveries: list[tuple[float, str]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    async def suffer(self, sink: ClockSink, until_s: float) -> None:
        """One fault after the other until a time; returns when the last is over."""
        while True:
            await asyncio.sleep(self.dice.uniform(*_CALM_S))
            if time.time() >= until_s:
                return
            fault = random_fault(self.dice)
            self.faults.append(fault.does)
            self.ends.append(await fault.happen_to(self.simulator))
            try:
                await until(lambda: sink.last_s(self.source_id) > self.ends[-1], GIVEN_UP_S)
            except AssertionError:  # for the verdict; meanwhile the next fault may bring it back
                self.lost.append(fault.does)
            else:
                self.recoveries.append((time.time() - self.ends[-1], fault.does))


class Soak:
    """One run. `failures` says what is wrong after it."""

    def __init__(self, minutes: float, cameras: int, seed: int, *, kills: bool) -> None:
        self._seconds = minutes * 60
        self._kills = kills
        self._dice = random.Random(seed)
        self._cameras = [
            SoakedCamera(f"str_{number}", SimulatedCamera(free_port()), random.Random(f"{seed} {number}"))
            for number in range(cameras)
        ]
        self._sink = ClockSink()
        self._desk = ChangesDesk(
            *(Assignment(one.source_id, 1, 1.0, Camera(one.simulator.url)) for one in self._cameras)
        )
        self._killed: list[float] = []
        self._samples: list[Sample] = []
        self._calm: list[Sample] = []
        self._end_s = 0.0

    async def run(self, folder: Path) -> None:
        """Raises TimeoutError if the end does not come."""
        settings = IngestSettings(allowed_networks=LOCAL)
        service = IngestService(settings, self._desk, self._sink, folder)
        async with asyncio.timeout(self._seconds + ENDS_WITHIN_S), AsyncExitStack() as stack:
            for one in self._cameras:
                stack.callback(one.simulator.end)
                await asyncio.to_thread(one.simulator.start, *PICTURES)
            stack.push_async_callback(service.stop)
            await service.start()
            await self._calm_down(service)
            until_s = time.time() + self._seconds
            async with asyncio.TaskGroup() as group:
                watch = group.create_task(self._watch(service))
                async with asyncio.TaskGroup() as troubles:
                    for one in self._cameras:
                        troubles.create_task(one.suffer(self._sink, until_s))
                    if self._kills:
                        troubles.create_task(self._kill(service, until_s))
                watch.cancel()
            await self._calm_down(service)
            self._end_s = time.time()
            service.check_health()

    def table(self) -> str:
        """One line a camera."""
        return table([self._row(one) for one in self._cameras])

    def failures(self) -> list[str]:
        """Everything that should not be, at the end."""
        found = [*self._seconds_wrong(), *self._growth()]
        for one in self._cameras:
            if (silent_s := self._end_s - self._sink.last_s(one.source_id)) > BACK_WITHIN_S:
                found.append(f"{one.source_id} had been silent for {silent_s:.0f} s at the end: {one.faults}")
        return found

    def _seconds_wrong(self) -> list[str]:
        found = []
        for one in self._cameras:
            seen = self._sink.seen.get(one.source_id, [])
            if not seen:
                found.append(f"{one.source_id} never sent a frame")
                continue
            came = tally(seen, self._desk.missing_slots(one.source_id))
            if came.undeclared or came.needless or came.duplicates:
                found.append(
                    f"{one.source_id}: {came.undeclared} seconds untold, {came.needless} told missing that came, "
                    f"{came.duplicates} frames twice"
                )
            if (worst_s := self._worst_s(one)) > BACK_WITHIN_S:
                found.append(f"{one.source_id} was back only {worst_s:.0f} s after a fault had ended: {one.faults}")
            if one.lost:
                found.append(f"{one.source_id} was not back {GIVEN_UP_S:.0f} s after {one.lost}")
        return found

    def _growth(self) -> list[str]:
        before, after = self._calm
        found = []
        allowed = FDS_A_PROCESS * max(0, len(after) - len(before))
        if _fds(after) > _fds(before) + allowed:
            found.append(f"file descriptors grew from {_fds(before)} to {_fds(after)}")
        for pid, (_, second, last) in self._memory_mb().items():
            if last > second + MEMORY_GROWTH_MB:
                found.append(f"process {pid} grew from {second:.0f} to {last:.0f} MB in the last third of its life")
        return found

    def resources(self) -> str:
        """What was held at the beginning and the end, and the memory of processes in the thirds of their lives."""
        before, after = self._calm
        lines = [
            f"file descriptors {_fds(before)} -> {_fds(after)}, processes {len(before)} -> {len(after)}, "
            f"{len(self._killed)} of them killed"
        ]
        for pid, thirds in self._memory_mb().items():
            who = "this process" if pid == os.getpid() else f"process {pid}, which reads,"
            lines.append(f"{who} held {', '.join(f'{one:.0f}' for one in thirds)} MB in the thirds of its life")
        return "\n".join(lines)

    def _memory_mb(self) -> dict[int, list[float]]:
        """Return of every process that was there for long the median RSS in each third of that time."""
        lives: dict[int, list[float]] = {}
        for sample in self._samples:
            for pid, held in sample.items():
                lives.setdefault(pid, []).append(held.rss_mb)
        thirds = {}
        for pid, life in lives.items():
            if len(life) * _SAMPLE_S >= WARM_S:
                length = len(life) // 3
                thirds[pid] = [median(life[number * length :][:length]) for number in range(3)]
        return thirds

    def _worst_s(self, one: SoakedCamera) -> float:
        return worst_recovery_s(self._sink.seen.get(one.source_id, []), [*one.ends, *self._killed])

    def _row(self, one: SoakedCamera) -> Mapping[str, str]:
        seen = self._sink.seen.get(one.source_id, [])
        came = tally(seen, self._desk.missing_slots(one.source_id)) if seen else None
        return {
            "camera": one.source_id,
            "faults": str(len(one.faults)),
            "connections": str(len(one.simulator.times("connect"))),
            "frames": str(came.frames if came else 0),
            "lost": str(came.lost if came else 0),
            "declared": str(came.declared if came else 0),
            "undeclared": str(came.undeclared if came else 0),
            "twice": str(came.duplicates if came else 0),
            "slowest recovery s": f"{self._worst_s(one):.1f}",
            "after": max(one.recoveries, default=(0.0, ""))[1],
        }

    async def _watch(self, service: IngestService) -> None:
        began = next_line = time.time()
        while True:
            sample = _sample(service)
            self._samples.append(sample)
            if time.time() >= next_line:
                next_line += 60
                frames = sum(map(len, self._sink.seen.values()))
                faults = sum(len(one.faults) for one in self._cameras)
                memory = " + ".join(f"{held.rss_mb:.0f}" for held in sample.values())
                print(
                    f"minute {(time.time() - began) / 60:.0f}: {frames} frames, {faults} faults, {_fds(sample)} file "
                    f"descriptors, {memory} MB, {len(self._seconds_wrong())} failures",
                    flush=True,
                )
            await asyncio.sleep(_SAMPLE_S)

    async def _kill(self, service: IngestService, until_s: float) -> None:
        while True:
            await asyncio.sleep(self._dice.uniform(*_KILL_EVERY_S))
            if time.time() >= until_s:
                return
            if pids := reading_pids(service):
                os.kill(self._dice.choice(pids), self._dice.choice((signal.SIGKILL, signal.SIGSTOP)))
                self._killed.append(time.time())

    async def _calm_down(self, service: IngestService) -> None:
        """Wait until all cameras are read, and note what that takes."""

        def are_online() -> bool:
            reports = [self._desk.last(one.source_id) for one in self._cameras]
            return all(isinstance(one, CameraReport) and one.state in ("online", "degraded") for one in reports)

        with suppress(AssertionError):  # the verdict shows it
            await until(are_online, GIVEN_UP_S)
        await asyncio.sleep(_SETTLE_S)
        self._calm.append(_sample(service))


def _sample(service: IngestService) -> Sample:
    sample = {}
    for pid in (os.getpid(), *reading_pids(service)):
        with suppress(OSError):  # it ended just now
            sample[pid] = Resources.of([pid])
    return sample


def _fds(sample: Sample) -> int:
    return sum(held.fds for held in sample.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--cameras", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kill", action="store_true", help="kill and stop the processes that read as well")
    options = parser.parse_args()
    logging.basicConfig(level=logging.CRITICAL)  # what cameras suffer is no news here
    soak = Soak(options.minutes, options.cameras, options.seed, kills=options.kill)
    try:
        with tempfile.TemporaryDirectory() as folder:
            asyncio.run(soak.run(Path(folder)))
    finally:
        print(soak.table())
    failures = soak.failures()
    print(soak.resources(), *(f"FAILED: {failure}" for failure in failures), sep="\n")
    if failures:
        sys.exit(1)
    print("passed: no second untold, none twice, every camera back in time, nothing grew")


if __name__ == "__main__":
    main()
