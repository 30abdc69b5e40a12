"""The device that a model runs on: one piece of work at a time, and live frames before everything that can wait."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

import torch

from store.finish import finish

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class Device:
    """Runs work in threads, each piece alone: it takes the whole device, until its thread ends."""

    def __init__(self) -> None:
        self._one = asyncio.Lock()
        self._wanted = 0  # pieces of work that run or wait, those for idle times left out
        self._idle = asyncio.Event()
        self._idle.set()
        self._failure: RuntimeError | None = None

    async def run(
        self, work: Callable[_Arguments, _Result], *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> _Result:
        """Run one piece of work when its turn comes."""
        self._wanted += 1
        self._idle.clear()
        try:
            async with self._one:
                return await finish(asyncio.to_thread(self._watched, partial(work, *args, **kwargs)))
        finally:
            self._wanted -= 1
            if self._wanted == 0:
                self._idle.set()

    async def run_when_idle(
        self, work: Callable[_Arguments, _Result], *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> _Result:
        """Run one piece of work once nothing else runs or waits; what comes meanwhile waits for this piece alone."""
        while True:
            await self._idle.wait()
            async with self._one:
                if self._idle.is_set():
                    return await finish(asyncio.to_thread(self._watched, partial(work, *args, **kwargs)))

    def check_health(self) -> None:
        """Raise the error after which no work can be trusted, if there was one."""
        if self._failure is not None:
            raise self._failure

    def _watched(self, work: Callable[[], _Result]) -> _Result:
        try:
            return work()
        except torch.AcceleratorError as error:
            self._failure = error
            raise
