"""Server-sent events: answers, and the form of all events."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from qa_service.errors import is_known, tell
from qa_service.schemas import Answer, AnswerCitations, AnswerCreated, AnswerDelta, AnswerEvent

logger = logging.getLogger(__name__)

PING = ": ping\n\n"
DONE = "data: [DONE]\n\n"
_NAMES: dict[type[AnswerEvent], str] = {
    AnswerCreated: "answer.created",
    AnswerDelta: "answer.delta",
    AnswerCitations: "answer.citations",
    Answer: "answer.completed",
}


class EventStream(StreamingResponse):
    """A response of events that ends its source when the client goes away."""

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # From version 2.4 on Starlette trusts `send` to raise when the client is gone. Not every server does,
        # so the disconnect message is listened for, whatever the server says it can.
        listening: Scope = {**scope, "asgi": {**scope.get("asgi", {}), "spec_version": "2.3"}}
        try:
            await super().__call__(listening, receive, send)
        finally:
            await self._events.aclose()


async def write_events(
    first: AnswerEvent, rest: AsyncGenerator[AnswerEvent, None], *, request_id: str, ping_s: float
) -> AsyncGenerator[str, None]:
    """Yield the events of one answer, a comment in every pause of `ping_s`, and at last `[DONE]`.

    Closing it, or cancelling the task that reads it, closes `rest`.
    """
    waiting: asyncio.Task[AnswerEvent] | None = None
    try:
        yield write_event(_NAMES[type(first)], first.model_dump_json())
        while True:
            waiting = waiting or asyncio.create_task(_next(rest))
            await asyncio.wait({waiting}, timeout=ping_s)
            if not waiting.done():
                yield PING
                continue
            try:
                event = waiting.result()
            except StopAsyncIteration:
                break
            finally:
                waiting = None
            yield write_event(_NAMES[type(event)], event.model_dump_json())
        yield DONE
    except Exception as error:
        if not is_known(error):
            logger.exception("%s: answering failed", request_id)
        yield write_event("error", json.dumps(tell(error, request_id).body))
        yield DONE
    finally:
        if waiting is not None:
            waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration):
                await waiting
        await rest.aclose()


async def _next(events: AsyncGenerator[AnswerEvent, None]) -> AnswerEvent:
    return await anext(events)


def write_event(name: str, data: str, event_id: str | None = None) -> str:
    """Write one event; `event_id` is what a client that lost its connection goes on from."""
    return ("" if event_id is None else f"id: {event_id}\n") + f"event: {name}\ndata: {data}\n\n"
