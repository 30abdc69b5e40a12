"""The feed of events: what changed of the sources that a caller may see."""

import asyncio
from collections.abc import AsyncGenerator, Set

from qa_service.clock import write_stream_time
from qa_service.keys import Caller
from qa_service.schemas import EventBody
from qa_service.sse import PING, write_event
from store.connection import StoreUnavailable
from store.events import Event, Events, EventType

POLL_S = 0.5
CUT = "events.cut"  # told to a client that was away for longer than the log reaches back


class Feed:
    """Reads the log of events for callers."""

    def __init__(self, events: Events, *, ping_s: float) -> None:
        self._events = events
        self._ping_s = ping_s

    async def follow(self, caller: Caller, types: Set[EventType], last_id: str | None) -> AsyncGenerator[str, None]:
        """Return the written events behind `last_id`, or from now on, for ever. Raises StoreUnavailable, BadEventId.

        A store that is away later on is waited for: nothing is lost, the log is read on from where it was.
        """
        is_cut = last_id is not None and await self._events.is_cut(last_id)
        after = await self._events.newest() if last_id is None else last_id
        return self._written(caller, types, after, is_cut)

    async def _written(
        self, caller: Caller, types: Set[EventType], after: str, is_cut: bool
    ) -> AsyncGenerator[str, None]:
        yield PING  # headers reach the client with it
        if is_cut:
            yield write_event(CUT, '{"object":"event","type":"events.cut"}')
        silent_s = 0.0
        while True:
            try:
                events = await self._events.after(after)
            except StoreUnavailable:
                events = []
            for event in events:
                after = event.id
                if event.type in types and caller.may_see(event.source_id):
                    silent_s = 0.0
                    yield write_event(event.type, _body(event).model_dump_json(exclude_unset=True), event.id)
            if not events:
                await asyncio.sleep(POLL_S)
                silent_s += POLL_S
            if silent_s >= self._ping_s:
                silent_s = 0.0
                yield PING


def _body(event: Event) -> EventBody:
    facts = dict(event.facts)
    if "since" in facts:
        facts["since"] = write_stream_time(facts["since"])
    return EventBody(
        id=event.id,
        object="event",
        type=event.type,
        created_at=write_stream_time(event.at),
        source_id=event.source_id,
        **facts,
    )
