"""How a training shows how far it is: bars on a terminal, now and then a line elsewhere."""

import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

_SPEED_STEPS = 100  # of which the speed is the mean
_LINE_EVERY_S = 30.0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a training is, told after every step."""

    stage: str
    number: int  # of the stage, from 1
    stages: int
    step: int  # steps done
    steps: int
    values: Mapping[str, float]  # losses and accuracies, smoothed
    steps_per_s: float
    stage_left_s: float
    left_s: float  # of the whole training, as the stages are weighed

    def __str__(self) -> str:
        return (
            f"stage {self.number}/{self.stages} {self.stage}: step {self.step}/{self.steps}, {_shown(self.values)}, "
            f"{self.times()}"
        )

    def times(self) -> str:
        return f"{self.steps_per_s:.3g}/s, {_time(self.stage_left_s)} left, {_time(self.left_s)} in all"


class Speed:
    """Steps a second, of the last steps."""

    def __init__(self) -> None:
        self._times_s = deque([time.monotonic()], maxlen=_SPEED_STEPS + 1)

    def step(self) -> float:
        """Count a step; returns the speed."""
        self._times_s.append(time.monotonic())
        return (len(self._times_s) - 1) / max(self._times_s[-1] - self._times_s[0], 1e-9)


class _Bars(Bars):
    """A bar for each stage, and below them what the last one told."""

    values = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield Text(self.values, style="dim", no_wrap=True, overflow="ellipsis")


class Display:
    """Shows a training on standard error, which leaves standard output to results."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, soft_wrap=True, highlight=False)
        self._bars = _Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TextColumn("{task.fields[times]}"),
            console=self._console,
            refresh_per_second=2,
            disable=not self._console.is_terminal,
        )
        self._task: tuple[str, TaskID] | None = None
        self._next_line_s = 0.0

    def progress(self, now: Progress) -> None:
        """Show a step."""
        if self._console.is_terminal:
            self._bars.values = _shown(now.values)
            self._bars.update(self._bar(now), completed=now.step, times=now.times())
        elif time.monotonic() >= self._next_line_s or now.step == now.steps:
            self._next_line_s = time.monotonic() + _LINE_EVERY_S
            self.note(str(now))

    def note(self, text: str) -> None:
        """Show a line that stays."""
        self._console.print(text, markup=False)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def _bar(self, now: Progress) -> TaskID:
        if self._task is None or self._task[0] != now.stage:
            name = f"stage {now.number}/{now.stages} {now.stage}"
            self._task = now.stage, self._bars.add_task(name, total=now.steps, times="")
        return self._task[1]


def _shown(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in values.items())


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
