"""Work in threads, and callers who are cancelled while it runs."""

import asyncio
import gc
import threading

import pytest

from store.threads import in_thread


class Held:
    """Work that runs until a test lets it end."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.may_end = threading.Event()
        self.begun = threading.Event()
        self._fault = fault

    def __call__(self) -> None:
        self.begun.set()
        assert self.may_end.wait(60)
        if self._fault is not None:
            raise self._fault


async def test_work_in_a_thread_gives_what_it_returns_and_raises():
    assert await in_thread(divmod, 7, 2) == (3, 1)
    assert await in_thread(sorted, [1, 2], reverse=True) == [2, 1]
    with pytest.raises(ZeroDivisionError):
        await in_thread(divmod, 1, 0)


@pytest.mark.parametrize("fault", [None, OSError("the disk is gone")], ids=["it is done", "it fails"])
async def test_who_is_cancelled_waits_for_the_thread_however_often_and_is_cancelled_then(fault):
    told = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    work = Held(fault)
    waiting = asyncio.create_task(in_thread(work))
    assert await asyncio.to_thread(work.begun.wait, 60)
    for _ in range(3):
        waiting.cancel()
        await asyncio.sleep(0.01)
        assert not waiting.done()
    work.may_end.set()
    await asyncio.wait([waiting])
    assert waiting.cancelled()
    del waiting
    gc.collect()
    assert told == []


async def test_a_time_limit_on_work_in_a_thread_is_told_as_one():
    work = Held()
    asyncio.get_running_loop().call_later(0.1, work.may_end.set)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await in_thread(work)
