"""How long to wait before trying again, and how often something happened of late."""

import random
from collections import deque


class Backoff:
    """Waits that double up to a limit, spread at random so that many clients do not knock together."""

    def __init__(self, shortest_s: float, longest_s: float) -> None:
        self._shortest_s = shortest_s
        self._longest_s = longest_s
        self._tries = 0

    def next_s(self) -> float:
        """Return the next wait: the doubled one times 0.5 to 1.5, never more than the limit."""
        wait_s = self._shortest_s * 2 ** min(self._tries, 32)
        self._tries += 1
        return min(self._longest_s, min(self._longest_s, wait_s) * random.uniform(0.5, 1.5))

    def reset(self) -> None:
        """Begin again with the shortest wait."""
        self._tries = 0


class HourCount:
    """Counts events of the last hour, by the minute."""

    def __init__(self) -> None:
        self._minutes: deque[tuple[int, int]] = deque()

    def add(self, now: float, count: int = 1) -> None:
        minute = int(now // 60)
        if self._minutes and self._minutes[-1][0] == minute:
            count += self._minutes.pop()[1]
        self._minutes.append((minute, count))
        self._forget(now)

    def total(self, now: float) -> int:
        self._forget(now)
        return sum(count for _, count in self._minutes)

    def _forget(self, now: float) -> None:
        while self._minutes and self._minutes[0][0] <= now // 60 - 60:
            self._minutes.popleft()
