"""Work in a thread is waited for until it ends, whoever is cancelled meanwhile."""

import asyncio
import threading

import pytest

from store.finish import finish


async def test_what_work_returns_or_raises_is_handed_on():
    assert await finish(asyncio.to_thread(lambda: 3)) == 3
    with pytest.raises(ZeroDivisionError):
        await finish(asyncio.to_thread(lambda: 1 // 0))


@pytest.mark.parametrize("fails", [False, True])
async def test_who_is_cancelled_more_than_once_waits_until_the_thread_has_ended(fails, caplog):
    begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        assert may_end.wait(60)
        ended.set()
        assert not fails

    waiting = asyncio.create_task(finish(asyncio.to_thread(work)))
    assert await asyncio.to_thread(begun.wait, 60)
    for _ in range(3):
        waiting.cancel()
        await asyncio.sleep(0.01)
        assert not waiting.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert ended.is_set()
    assert caplog.records == []


async def test_a_time_limit_holds_once_the_work_has_ended():
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await finish(asyncio.sleep(0.05))
