"""The REST surface over real HTTP, on real parts in a thread of this process."""

import asyncio
import socket
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from qa_service.settings import ApiSettings
from store.connection import connect
from tests.ingest_parts import LOCAL
from tests.qa_parts import Parts, open_parts

DEADLINE_S = 60


class Service:
    """The REST surface on a port of this machine; `do` runs something beside it, in its event loop."""

    def __init__(self, url: str, parts: Parts, loop: asyncio.AbstractEventLoop) -> None:
        self.url = url
        self.parts = parts
        self._loop = loop

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(DEADLINE_S)


@contextmanager
def serving(
    redis_url: str, checkpoint: Path, folder: Path, api: ApiSettings, allowed_networks: tuple[str, ...] = LOCAL
) -> Iterator[Service]:
    up: Future[tuple[Service, uvicorn.Server]] = Future()

    async def serve() -> None:
        async with connect(redis_url) as redis:
            await redis.flushdb()
            async with open_parts(redis, checkpoint, folder, api=api, allowed_networks=allowed_networks) as parts:
                listening = socket.create_server(("127.0.0.1", 0))  # connections wait in its queue until it is served
                url = f"http://127.0.0.1:{listening.getsockname()[1]}"
                server = uvicorn.Server(uvicorn.Config(parts.api, log_level="error", ws="none", lifespan="off"))
                up.set_result((Service(url, parts, asyncio.get_running_loop()), server))
                await server.serve(sockets=[listening])

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            if not up.done():
                up.set_exception(error)
            raise

    thread = threading.Thread(target=run)
    thread.start()
    service, server = up.result(DEADLINE_S)
    try:
        yield service
    finally:
        server.should_exit = True
        thread.join(DEADLINE_S)
