"""Work in threads that whoever started it does not leave behind."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


async def in_thread(
    work: Callable[_Arguments, _Result], *args: _Arguments.args, **kwargs: _Arguments.kwargs
) -> _Result:
    """Run work in a thread and return what it returned, or raise what it raised.

    Nobody can stop a thread. So who is cancelled meanwhile, however often, still waits for it to end and raises
    CancelledError only then: the lock, room or file that the work has is not another's while the thread runs.
    """
    running = asyncio.get_running_loop().run_in_executor(None, partial(work, *args, **kwargs))
    cancelled = False
    while not running.done():
        try:
            await asyncio.wait([running])
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        running.exception()  # taken, so that asyncio does not complain of one that nobody waits for
        raise asyncio.CancelledError
    return running.result()
