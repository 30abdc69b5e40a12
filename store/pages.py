"""Pages of long lists, in an order that Redis keeps."""

import base64
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from redis.asyncio import Redis

Item = TypeVar("Item")
PAGE_LIMIT = 1000


class BadCursor(ValueError):
    """A cursor that no list has given out."""

    def __str__(self) -> str:
        return "the cursor is not one that this list returned; start without one"


@dataclass(frozen=True, slots=True)
class Page(Generic[Item]):
    """A part of a list in order of creation; `next_cursor` is None on the last one."""

    items: tuple[Item, ...]
    next_cursor: str | None


class Cursor:
    """The position of a list's last item, as text that invites nobody to compute with it."""

    @staticmethod
    def write(position: int) -> str:
        return base64.urlsafe_b64encode(f"after:{position}".encode()).decode().rstrip("=")

    @staticmethod
    def read(cursor: str | None) -> int:
        if cursor is None:
            return 0
        try:
            text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        except ValueError:
            raise BadCursor(cursor) from None
        found = re.fullmatch(rb"after:(\d{1,15})", text)
        if found is None:
            raise BadCursor(cursor)
        return int(found[1])


async def read_page(
    redis: Redis,
    order: str,
    choose: Callable[[Sequence[str]], Awaitable[list[Item | None]]],
    cursor: str | None,
    limit: int,
    visible: frozenset[str] | None,
) -> Page[Item]:
    """Walk the order after the cursor until `limit` chosen items and the proof of a next one are found. BadCursor."""
    limit = min(max(limit, 1), PAGE_LIMIT)
    position = Cursor.read(cursor)
    items: list[Item] = []
    last = position
    while True:
        rows: list[Any] = await redis.zrangebyscore(
            order, f"({position}", "+inf", start=0, num=max(limit, 100), withscores=True
        )
        if not rows:
            return Page(tuple(items), None)
        position = int(rows[-1][1])
        seen = [(row[0].decode(), int(row[1])) for row in rows]
        seen = [row for row in seen if visible is None or row[0] in visible]
        for item, (_, number) in zip(await choose([row[0] for row in seen]), seen, strict=True):
            if item is None:
                continue
            if len(items) == limit:
                return Page(tuple(items), Cursor.write(last))
            items.append(item)
            last = number
