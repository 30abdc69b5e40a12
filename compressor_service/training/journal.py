"""The journal of a training: one line every few steps, from which curves are drawn."""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError


class Line(BaseModel):
    """What was told after `step` steps of a stage: smoothed losses and accuracies."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    step: int
    seconds: float  # of the whole training until here; what was lost between a snapshot and a kill does not count
    values: dict[str, float]


class Journal:
    """Writes lines behind those that a resumed training still stands on; later ones are cut off."""

    def __init__(self, path: Path, reached: Mapping[str, float]) -> None:
        """`reached`: the steps done of each stage that has begun."""
        path.touch()
        kept = _kept_bytes(path, reached)
        self._file = path.open("r+b")
        self._file.truncate(kept)
        self._file.seek(kept)

    def write(self, line: Line) -> None:
        self._file.write(line.model_dump_json().encode() + b"\n")
        self._file.flush()

    def sync(self) -> None:
        """Bring the lines to the disk itself: a snapshot must not know of more steps than the journal."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def read_journal(path: Path) -> list[Line]:
    """Read the lines, but for one at the end that a kill has torn."""
    with path.open("rb") as file:
        return list(_lines(file))


def _lines(file: Iterator[bytes]) -> Iterator[Line]:
    for row in file:
        try:
            yield Line.model_validate_json(row)
        except ValidationError:
            return


def _kept_bytes(path: Path, reached: Mapping[str, float]) -> int:
    kept = 0
    with path.open("rb") as file:
        rows = file.readlines()
    for row, line in zip(rows, _lines(iter(rows)), strict=False):
        if line.step > reached.get(line.stage, 0) or not row.endswith(b"\n"):
            break
        kept += len(row)
    return kept


class Smoothed:
    """Running means of what steps tell, over about `span` steps."""

    def __init__(self, span: int) -> None:
        self._span = span
        self._means: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, told: Mapping[str, float]) -> None:
        """Take in what a step told; what could not be measured (nan) is left out."""
        for name, value in told.items():
            if math.isfinite(value):
                count = min(self._counts.get(name, 0) + 1, self._span)
                mean = self._means.get(name, 0.0)
                self._counts[name], self._means[name] = count, mean + (value - mean) / count

    @property
    def values(self) -> dict[str, float]:
        return {name: float(f"{mean:.6g}") for name, mean in self._means.items()}

    def state(self) -> dict[str, Any]:
        return {"means": dict(self._means), "counts": dict(self._counts)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._means, self._counts = dict(state["means"]), dict(state["counts"])
