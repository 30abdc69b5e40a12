"""Work that is waited for until it ends: what it holds is not free before."""

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


async def finish(work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` does. Who is cancelled meanwhile, however often, learns of it when the work has ended.

    Nobody can stop a thread: who gave room up for one that still runs would have two of them in it.
    """
    running = asyncio.create_task(work)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        while not running.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([running])
        if not running.cancelled():
            running.exception()  # else it would be logged: nobody is there to be told
        raise
    finally:
        del running  # an error knows this frame: what it holds would not go before garbage is collected
