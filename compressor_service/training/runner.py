"""Runs the stages of a training one after the other; whatever stops it, the same command goes on.

A resumed training ends as an uninterrupted one does, on a CPU bit for bit: a snapshot holds all that the next step
depends on, and the recipe may not change in between.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from pydantic import BaseModel

from compressor_service.training.ahead import batches
from compressor_service.training.curves import HOW_TO_DRAW, can_draw, draw_curves
from compressor_service.training.journal import Journal, Line, Smoothed, read_journal
from compressor_service.training.progress import Progress, Speed
from compressor_service.training.run_folder import CannotTrain, RunFolder, Snapshot

_LINES = 500  # in the journal of a stage, about
_LONGEST_SPAN = 50  # steps that a smoothed value stands for
_GO_ON = "the same command goes on from there"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)

BatchT = TypeVar("BatchT")


class Stopped(Exception):
    """Training was asked to stop and has kept all it did; the message says how far it is."""


class Stage(Protocol[BatchT]):
    """A part of a training.

    Its batches and steps depend on its settings, its state and torch's global generator alone, which is seeded when
    the stage begins and kept with its state.
    """

    @property
    def name(self) -> str: ...

    @property
    def steps(self) -> int: ...

    @property
    def prefetch(self) -> bool:
        """Whether `batch` is a picklable function of the number alone, so that other processes may draw ahead."""

    @property
    def batch(self) -> Callable[[int], BatchT]:
        """Draws the batch of a step; each number once, in order, unless `prefetch`."""

    def step(self, number: int, batch: BatchT) -> dict[str, float]:
        """Take the step of a number from 0; returns losses and accuracies for curves, nan where there is none."""

    def state(self) -> dict[str, Any]:
        """Return everything the next step depends on: tensors, numbers, texts, and lists and dicts of these."""

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a state; its tensors are on the CPU."""

    def finish(self, folder: Path) -> None:
        """Write what later stages and the checkpoint need; may happen twice, from the same state."""


@dataclass(frozen=True, slots=True)
class StagePlan:
    """A stage to come."""

    name: str
    make: Callable[[Path], Stage[Any]]  # called with the run's folder, where earlier stages have written
    weight: float = 1.0  # the time it takes, compared with the other stages: for the estimate of the time left


def run(
    plans: Sequence[StagePlan],
    folder: Path,
    *,
    recipe: BaseModel,
    seed: int,
    workers: int = 0,
    snapshot_s: float = 60.0,
    on_progress: Callable[[Progress], None] = lambda now: None,
    on_note: Callable[[str], None] = lambda text: None,
) -> None:
    """Train in `folder`, from wherever an earlier run of the same `recipe` left it.

    SIGINT and SIGTERM end it after the step under way: Stopped. A second one ends it at once.
    """
    if len({plan.name for plan in plans}) < len(plans):
        raise ValueError(f"stages share a name: {', '.join(plan.name for plan in plans)}")
    kept = RunFolder(folder)
    with kept.opened(recipe, seed), _stop_requested() as stop_requested:
        if not can_draw():
            on_note(HOW_TO_DRAW)
        training = _Training(
            plans=plans,
            kept=kept,
            seed=seed,
            workers=workers,
            snapshot_s=snapshot_s,
            begun_s=time.monotonic() - kept.seconds(),
            stop_requested=stop_requested,
            on_progress=on_progress,
            on_note=on_note,
        )
        for number, plan in enumerate(plans, start=1):
            if plan.name not in kept.finished():
                training.train(number, plan)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Training:
    plans: Sequence[StagePlan]
    kept: RunFolder
    seed: int
    workers: int
    snapshot_s: float
    begun_s: float  # by the monotonic clock, had it never been interrupted
    stop_requested: Callable[[], bool]
    on_progress: Callable[[Progress], None]
    on_note: Callable[[str], None]

    def train(self, number: int, plan: StagePlan) -> None:
        """Train a stage from its snapshot, or from the beginning, to its end."""
        if self.stop_requested():
            raise Stopped(f"stopped before stage {number} of {len(self.plans)}, {plan.name}; {_GO_ON}")
        torch.manual_seed(self.seed)
        stage = plan.make(self.kept.path)
        if stage.name != plan.name:
            raise ValueError(f"stage {plan.name} was planned and {stage.name} was made")
        try:
            _StageRun(self, number, stage).take_steps()
        except Stopped:
            self._draw_curves()
            raise
        self._draw_curves()
        stage.finish(self.kept.path)
        self.kept.mark_finished(stage.name, self.seconds())

    def seconds(self) -> float:
        """Return how long the training has taken, all that led here."""
        return round(time.monotonic() - self.begun_s, 3)

    def left_s(self, number: int, part: float, stage_left_s: float) -> float:
        """Estimate the time left after a part of a stage: later ones take what their weights say."""
        weights = [plan.weight for plan in self.plans]
        done = sum(weights[: number - 1]) + weights[number - 1] * part
        return stage_left_s + sum(weights[number:]) * self.seconds() / done

    def _draw_curves(self) -> None:
        if not can_draw():
            return
        try:
            draw_curves(read_journal(self.kept.journal), self.kept.curves)
        except OSError as error:
            self.on_note(f"no curves: {error}")


class _StageRun:
    """A stage under way."""

    def __init__(self, training: _Training, number: int, stage: Stage[Any]) -> None:
        self._training, self._number, self._stage = training, number, stage
        self._kept = training.kept
        self._smoothed = Smoothed(span=max(1, min(_LONGEST_SPAN, stage.steps // 20)))
        self._line_steps = max(1, stage.steps // _LINES)
        self._speed = Speed()
        self._done = 0
        self._snapshot_at_s: float | None = None
        if (snapshot := self._kept.snapshot()) is not None:
            self._restore(snapshot)

    def take_steps(self) -> None:
        """Take the steps that are left; Stopped if that is asked for in between."""
        reached = {name: math.inf for name in self._kept.finished()} | {self._stage.name: self._done}
        numbers = range(self._done, self._stage.steps)
        workers = self._training.workers if self._stage.prefetch else 0
        with (
            Journal(self._kept.journal, reached) as journal,
            closing(batches(self._stage.batch, numbers, workers=workers)) as drawn,
        ):
            for number, batch in zip(numbers, drawn, strict=True):
                self._smoothed.add(self._stage.step(number, batch))
                self._done = number + 1
                self._tell(journal)
                stopping = self._training.stop_requested()
                if stopping or self._snapshot_is_due():
                    journal.sync()
                    self._take_snapshot()
                if stopping:
                    raise Stopped(
                        f"stopped after step {self._done} of {self._stage.steps} of {self._stage.name}, "
                        f"stage {self._number} of {len(self._training.plans)}; {_GO_ON}"
                    )

    def _restore(self, snapshot: Snapshot) -> None:
        if snapshot.stage != self._stage.name:
            raise CannotTrain(f"{self._kept.path} is in the middle of {snapshot.stage}, not of {self._stage.name}")
        self._stage.restore(snapshot.state)
        self._smoothed.restore(snapshot.smoothed)
        self._done = snapshot.step
        torch.set_rng_state(snapshot.generators["cpu"])
        if snapshot.generators["cuda"]:
            torch.cuda.set_rng_state_all(snapshot.generators["cuda"])
        self._training.on_note(f"{snapshot.stage} goes on after step {snapshot.step} of {self._stage.steps}")

    def _tell(self, journal: Journal) -> None:
        stage, done, values = self._stage, self._done, self._smoothed.values
        if done % self._line_steps == 0 or done == stage.steps:
            journal.write(Line(stage=stage.name, step=done, seconds=self._training.seconds(), values=values))
        speed = self._speed.step()
        stage_left_s = (stage.steps - done) / speed
        self._training.on_progress(
            Progress(
                stage=stage.name,
                number=self._number,
                stages=len(self._training.plans),
                step=done,
                steps=stage.steps,
                values=values,
                steps_per_s=speed,
                stage_left_s=stage_left_s,
                left_s=self._training.left_s(self._number, done / stage.steps, stage_left_s),
            )
        )

    def _snapshot_is_due(self) -> bool:
        at_s = self._snapshot_at_s
        return at_s is None or time.monotonic() >= at_s or self._done == self._stage.steps

    def _take_snapshot(self) -> None:
        snapshot = Snapshot(
            stage=self._stage.name,
            step=self._done,
            seconds=self._training.seconds(),
            state=self._stage.state(),
            smoothed=self._smoothed.state(),
            generators=_generators(),
        )
        self._kept.take(snapshot)
        if self._snapshot_at_s is None:
            self._kept.snapshot()  # one that cannot be read again is found now, not when it is needed
        self._snapshot_at_s = time.monotonic() + self._training.snapshot_s


def _generators() -> dict[str, Any]:
    used_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if used_cuda else []}


@contextmanager
def _stop_requested() -> Iterator[Callable[[], bool]]:
    """Note SIGINT and SIGTERM instead of dying of them, once."""
    asked: list[int] = []

    def ask(number: int, _: object) -> None:
        asked.append(number)
        reset()

    def reset() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, ask) for number in _SIGNALS}
    try:
        yield lambda: bool(asked)
    finally:
        reset()
