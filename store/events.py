"""What changed, in the order it happened: a bounded log that any process may read on from where it was."""

import json
import re
import time
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from redis.asyncio import Redis

EventType = Literal["stream.state", "video.status"]
BEFORE_ALL = "0-0"
_LOG = "events"
_KEPT = 10_000  # events, about
_ID = re.compile(r"\d{1,20}-\d{1,20}")


class Event(BaseModel):
    """Something that changed: `id` counts up, `at` is in seconds since the Unix epoch, `facts` are the new state."""

    model_config = ConfigDict(frozen=True)

    id: str
    type: EventType
    source_id: str
    at: float
    facts: dict[str, Any]


class BadEventId(ValueError):
    """An event id that no log has given out."""

    def __str__(self) -> str:
        return "this is no id of an event; leave it out to begin with the next one"


class Events:
    """The log of all sources in Redis. Raises StoreUnavailable.

    It tells of changes; what is true now stands in the registry, also where the log has been cut.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def add(self, kind: EventType, source_id: str, facts: dict[str, Any]) -> None:
        """Append an event."""
        told = json.dumps({"type": kind, "source_id": source_id, "at": time.time(), "facts": facts})
        await self._redis.xadd(_LOG, {"event": told}, maxlen=_KEPT, approximate=True)

    async def newest(self) -> str:
        """Return the id of the last event, or one before all."""
        rows: Any = await self._redis.xrevrange(_LOG, count=1)
        return rows[0][0].decode() if rows else BEFORE_ALL

    async def after(self, event_id: str, limit: int = 100) -> list[Event]:
        """Return the events behind an id, oldest first. Raises BadEventId."""
        rows: Any = await self._redis.xrange(_LOG, f"({_checked(event_id)}", "+", count=limit)
        return [Event(id=number.decode(), **json.loads(fields[b"event"])) for number, fields in rows]

    async def drop(self, source_id: str) -> None:
        """Remove what the log tells of a source."""
        after = BEFORE_ALL
        while events := await self.after(after, limit=1000):
            after = events[-1].id
            if told := [event.id for event in events if event.source_id == source_id]:
                await self._redis.xdel(_LOG, *told)

    async def is_cut(self, event_id: str) -> bool:
        """Tell whether events behind an id are no longer in the log. Raises BadEventId."""
        wanted = _order(_checked(event_id))
        rows: Any = await self._redis.xrange(_LOG, count=1)
        return bool(rows) and _order(BEFORE_ALL) < wanted < _order(rows[0][0].decode())


def _checked(event_id: str) -> str:
    if _ID.fullmatch(event_id) is None or max(_order(event_id)) >= 2**64:
        raise BadEventId(event_id)
    return event_id


def _order(event_id: str) -> tuple[int, int]:
    first, _, second = event_id.partition("-")
    return int(first), int(second)
