"""Work for one thing after the other, of which a bad one does not stop the rest."""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

from redis.asyncio import Redis

from store.connection import StoreFull, StoreUnavailable
from store.hour_files import HourFileDamaged

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
T = TypeVar("T")


class Stopped(RuntimeError):
    """Somebody else goes on with the work."""


async def _go_on() -> None:
    pass


class Rounds:
    """Acts on many things; counts those that were `left_out`, for that failed, and those `postponed` for lack of time.

    `go_on` is called before each of them, and may raise Stopped.
    """

    def __init__(self, redis: Redis, go_on: Callable[[], Awaitable[None]] = _go_on) -> None:
        self._redis = redis
        self._go_on = go_on
        self.left_out = 0
        self.postponed = 0

    async def for_each(
        self,
        items: Iterable[Item],
        act: Callable[[Item], Awaitable[T]],
        name: Callable[[Item], str],
        *,
        at_once: int = 1,
        patience_s: float | None = None,
    ) -> list[T]:
        """Act on every item, on so many at once, and return what came of those that were not left out.

        None is begun any more when the patience ends. Raises Stopped, StoreUnavailable without Redis, and StoreFull:
        the next one would fare no better.
        """
        done: list[T] = []
        left = iter(items)
        ends_at = time.monotonic() + (math.inf if patience_s is None else patience_s)
        failed = False

        async def work() -> None:
            nonlocal failed
            for item in left:
                try:
                    await self._go_on()
                    await self._act(item, act, name, done)
                except BaseException:
                    failed = True
                    raise
                if failed or time.monotonic() > ends_at:
                    return

        workers = [asyncio.create_task(work()) for _ in range(at_once)]
        try:
            # All of them, though one fails: what a thread writes goes on, and nobody would clean up behind it.
            await asyncio.wait(workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        for worker in workers:
            worker.result()
        self.postponed += sum(1 for _ in left)
        return done

    async def _act(
        self, item: Item, act: Callable[[Item], Awaitable[T]], name: Callable[[Item], str], done: list[T]
    ) -> None:
        try:
            done.append(await act(item))
        except (StoreFull, Stopped):
            raise
        except (StoreUnavailable, HourFileDamaged) as error:
            await self._redis.ping()
            logger.error("%s is left for later: %s", name(item), error)
            self.left_out += 1
        except Exception:
            logger.exception("%s is left for later", name(item))
            self.left_out += 1
