"""What was erased, told to every process that holds copies of its own."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from redis.asyncio import Redis

from store.connection import StoreUnavailable

logger = logging.getLogger(__name__)

FOLLOW_EVERY_S = 1.0
_LOG = "erasures"
_KEPT_S = 3600.0  # who follows looks every second
_BEFORE_ALL = "0-0"


# KEYS: log. ARGV: source id, where what is too old ends. The first write is one that Redis allows without memory.
_NOTE = """
redis.call('XDEL', KEYS[1], '0-0')
redis.call('XADD', KEYS[1], 'MINID', ARGV[2], '*', 'source_id', ARGV[1])
"""


class Erasures:
    """A log of the sources of which something was erased. Raises StoreUnavailable."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._note = redis.register_script(_NOTE)

    async def note(self, source_id: str) -> None:
        """Tell that an erasure is done: copies that were made before must go."""
        oldest = f"{round((time.time() - _KEPT_S) * 1000)}-0"
        await self._note([_LOG], [source_id, oldest])

    async def follow(self, forget: Callable[[str], Awaitable[None]], every_s: float = FOLLOW_EVERY_S) -> None:
        """Call `forget` for every source of which something is erased from now on, until cancelled."""
        at: str | None = None
        while True:
            try:
                if at is None:
                    newest: Any = await self._redis.xrevrange(_LOG, count=1)
                    at = newest[0][0].decode() if newest else _BEFORE_ALL
                rows: Any = await self._redis.xrange(_LOG, f"({at}", "+")
                for number, fields in rows:
                    await forget(fields[b"source_id"].decode())
                    at = number.decode()
            except StoreUnavailable as error:
                logger.warning("erasures cannot be followed now: %s", error)
            except Exception:  # for as long as the process lives: what it holds must not outlive its erasure
                logger.exception("an erasure was not followed; it is tried again")
            await asyncio.sleep(every_s)
