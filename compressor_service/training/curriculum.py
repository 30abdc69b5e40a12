"""What to ask next: families of questions open one after the other, and what is not yet known is asked more."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

_FLOOR = 0.08  # of the share of a family that is always right: so that it stays known
_MEMORY = 0.985  # of the running accuracy, a question


class Curriculum:
    """Opens the next family when the open ones are answered right by `bar` at least, one with another."""

    def __init__(self, families: Sequence[str], *, opened: int | None = None, bar: float = 1.0) -> None:
        """Open the first `opened` families; all if None, and then there is no bar to pass."""
        self._families = tuple(families)
        self._bar = bar
        self._opened = len(self._families) if opened is None else opened
        self._right = dict.fromkeys(families, 0.0)

    @property
    def families(self) -> tuple[str, ...]:
        """The open ones."""
        return self._families[: self._opened]

    @property
    def complete(self) -> bool:
        return self._opened == len(self._families)

    @property
    def right(self) -> float:
        """The mean running accuracy over all families, those that are closed counted as wrong."""
        return sum(self._right.values()) / len(self._right)

    def shares(self) -> NDArray[np.float64]:
        """How often each open family should be asked; they sum to 1."""
        weights = np.array([_FLOOR + 1 - self._right[family] for family in self.families])
        return weights / weights.sum()

    def learn(self, answered: Iterable[tuple[str, bool]]) -> None:
        """Count answers, and open the next family if it is time."""
        for family, right in answered:
            self._right[family] += (1 - _MEMORY) * (right - self._right[family])
        if not self.complete and sum(self._right.values()) > self._bar * self._opened:
            self._opened += 1

    def state(self) -> dict[str, object]:
        return {"opened": self._opened, "right": dict(self._right)}

    def restore(self, state: dict[str, object]) -> None:
        opened, right = state["opened"], state["right"]
        assert isinstance(opened, int)
        assert isinstance(right, dict)
        self._opened, self._right = opened, dict(right)
