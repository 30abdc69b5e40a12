"""What a training keeps on disk, so that it can go on after whatever stopped it.

`recipe.json` says what is trained and with what; `snapshot.pt` is the stage under way; `finished.json` names the
stages that are done. Each is written whole or not at all.
"""

import fcntl
import io
import json
import os
import pickle
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel

_LEAST_FREE_BYTES = 10**9
_SHOWN_DIFFERENCES = 5


class CannotTrain(RuntimeError):
    """Training cannot begin or go on; the message says why and what to change."""


class Snapshot(NamedTuple):
    """A stage under way, and everything its next step depends on."""

    stage: str
    step: int  # steps done
    seconds: float  # of the whole training until here
    state: dict[str, Any]  # of the stage
    smoothed: dict[str, Any]
    generators: dict[str, Any]  # torch's own


class RunFolder:
    """The folder of one training."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.journal = path / "journal.jsonl"
        self.curves = path / "curves"
        self._recipe = path / "recipe.json"
        self._snapshot = path / "snapshot.pt"
        self._finished = path / "finished.json"

    @contextmanager
    def opened(self, recipe: BaseModel, seed: int) -> Iterator[None]:
        """Make the folder or go on with it, as the only process; CannotTrain if that is not possible."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            free_bytes = shutil.disk_usage(self.path).free
            lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise CannotTrain(f"cannot write to {self.path}: {error.strerror}") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise CannotTrain(f"another process is training in {self.path}") from error
            if free_bytes < _LEAST_FREE_BYTES:
                raise CannotTrain(
                    f"{self.path} has {free_bytes / 1e6:.0f} MB free, too few: {_LEAST_FREE_BYTES / 1e6:.0f} are wanted"
                )
            self._check(_described(recipe, seed))
            yield

    def finished(self) -> dict[str, float]:
        """Return the stages that are done, and how many seconds the training had taken by the end of each."""
        if not self._finished.exists():
            return {}
        found: dict[str, float] = json.loads(self._finished.read_text())
        return found

    def mark_finished(self, stage: str, seconds: float) -> None:
        _write(self._finished, json.dumps(self.finished() | {stage: seconds}, indent=1).encode())
        self._snapshot.unlink(missing_ok=True)

    def seconds(self) -> float:
        """Return how long the training has taken so far."""
        snapshot = self.snapshot()
        return max(self.finished().values(), default=0.0) if snapshot is None else snapshot.seconds

    def take(self, snapshot: Snapshot) -> None:
        # Into memory first: torch's own writer hides why a file could not be written.
        buffer = io.BytesIO()
        torch.save(snapshot._asdict(), buffer)
        _write(self._snapshot, buffer.getbuffer())

    def snapshot(self) -> Snapshot | None:
        """Return the stage under way, with tensors on the CPU; None if none has begun."""
        if not self._snapshot.exists():
            return None
        try:
            snapshot = Snapshot(**torch.load(self._snapshot, map_location="cpu", weights_only=True))
        except (RuntimeError, TypeError, EOFError, pickle.UnpicklingError) as error:
            raise CannotTrain(f"{self._snapshot} cannot be read: {error}") from error
        return None if snapshot.stage in self.finished() else snapshot  # the one of a stage just marked

    def _check(self, now: dict[str, Any]) -> None:
        if not self._recipe.exists():
            _write(self._recipe, json.dumps(now, indent=1).encode())
            return
        before, after = _flat(json.loads(self._recipe.read_text())), _flat(now)
        differing = [
            f"{name} was {before.get(name, 'not there')} and is {after.get(name, 'not there')}"
            for name in dict.fromkeys([*before, *after])
            if before.get(name) != after.get(name)
        ]
        if differing:
            raise CannotTrain(
                f"{self.path} was begun with another recipe: {'; '.join(differing[:_SHOWN_DIFFERENCES])}. "
                "Go on with the same, or train in another folder"
            )


def _described(recipe: BaseModel, seed: int) -> dict[str, Any]:
    """Describe all that the bits of the result depend on."""
    return {
        "recipe": recipe.model_dump(mode="json"),
        "seed": seed,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "numpy": np.__version__,
        "platform": f"{platform.system()} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
    }


def _flat(value: object, name: str = "") -> dict[str, str]:
    if isinstance(value, Mapping) and value:
        return {key: leaf for part, inner in value.items() for key, leaf in _flat(inner, f"{name}.{part}").items()}
    return {name.removeprefix("."): json.dumps(value)}


def _write(path: Path, content: bytes | memoryview) -> None:
    """Replace the file at `path` with one that is whole on the disk."""
    fresh = path.with_name(f"{path.name}.new")
    try:
        with fresh.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise CannotTrain(f"cannot write {path}: {error.strerror}; what was there before is kept") from error
