"""Archives fetched over HTTP into the upload folder."""

import asyncio
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from threading import Event
from typing import IO
from urllib.parse import urljoin, urlsplit
from uuid import uuid4

import httpx

from ingest.address import AddressPolicy, UnknownHost, resolve_download

MAX_REDIRECTS = 5
SLOWEST_BYTES_PER_S = 20_000  # on average: a server that drips would hold its place for ever
_PASSING = frozenset({httpx.codes.REQUEST_TIMEOUT, httpx.codes.TOO_EARLY, httpx.codes.TOO_MANY_REQUESTS})


class DownloadFailed(ConnectionError):
    """The file could not be fetched; the message says why, without the URL. Trying again helps unless `is_final`."""

    def __init__(self, message: str, *, is_final: bool = False) -> None:
        super().__init__(message)
        self.is_final = is_final


class DownloadTooLarge(ValueError):
    """The file is larger than allowed."""


class NoRoom(OSError):
    """The disk has no room for the file."""

    def __init__(self) -> None:
        super().__init__(
            "there is no room on the disk of the service for the file; add the video again when there is some"
        )


class Downloader:
    """Fetches one file. Every address, also of a redirect, is checked, and exactly the checked one is connected to.

    `spare_bytes` of the disk stay free.
    """

    def __init__(self, policy: AddressPolicy, *, max_bytes: int, spare_bytes: int, timeout_s: float) -> None:
        self._policy = policy
        self._max_bytes = max_bytes
        self._spare_bytes = spare_bytes
        self._timeout_s = timeout_s

    def fetch(self, url: str, target: Path, halt: Event) -> bool:
        """Write the file to `target`, whole or not at all; False when halted. Blocks, outside of any event loop.

        Raises BadUrl, DownloadFailed, DownloadTooLarge, NoRoom, OSError when the disk refuses otherwise.
        """
        # A name of its own: the thread of a former owner may still be at its last chunk of the same file.
        part = target.with_name(f"{target.name}.{uuid4().hex}.part")
        try:
            with part.open("wb") as file:
                is_whole = asyncio.run(self._receive(url, file, target.parent, halt))
            if is_whole:
                part.replace(target)
            return is_whole
        except UnknownHost as error:  # name servers have bad moments
            raise DownloadFailed(str(error)) from None
        except (httpx.TimeoutException, TimeoutError):
            raise DownloadFailed("the server of the file sent nothing for too long") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise DownloadFailed(f"the file could not be fetched: {type(error).__name__}") from None
        finally:
            part.unlink(missing_ok=True)

    async def _receive(self, url: str, file: IO[bytes], folder: Path, halt: Event) -> bool:
        # Proxies from the environment would resolve names themselves, past the check.
        client = httpx.AsyncClient(trust_env=False, follow_redirects=False, timeout=self._timeout_s)
        async with client, self._response(client, url) as response:
            began, size = time.monotonic(), 0
            self._check_room(folder, int(response.headers.get("content-length", "0")))
            async for chunk in response.aiter_bytes():  # as they come: a slow server must not hide the halt
                if halt.is_set():
                    return False
                size += len(chunk)
                self._check_size(size)
                if time.monotonic() - began > self._timeout_s + size / SLOWEST_BYTES_PER_S:
                    raise DownloadFailed(f"the server of the file sends less than {SLOWEST_BYTES_PER_S} bytes a second")
                self._check_room(folder, len(chunk))
                file.write(chunk)
        return True

    @asynccontextmanager
    async def _response(self, client: httpx.AsyncClient, url: str) -> AsyncIterator[httpx.Response]:
        for _ in range(MAX_REDIRECTS + 1):
            request = self._request(client, url)
            async with asyncio.timeout(self._timeout_s):  # for all headers together: httpx only times every single read
                response = await client.send(request, stream=True)
            try:
                if response.is_redirect:
                    url = urljoin(url, response.headers.get("location", ""))
                    continue
                if response.status_code != httpx.codes.OK:
                    raise DownloadFailed(
                        f"the server of the file answered {response.status_code}",
                        is_final=response.is_client_error and response.status_code not in _PASSING,
                    )
                self._check_size(int(response.headers.get("content-length", "0")))
                yield response
                return
            finally:
                await response.aclose()
        raise DownloadFailed(f"the file was redirected more than {MAX_REDIRECTS} times", is_final=True)

    def _request(self, client: httpx.AsyncClient, url: str) -> httpx.Request:
        """Return a request that goes to the checked address but names the host, to server and certificate alike."""
        address = resolve_download(url, self._policy)
        host = urlsplit(url).hostname or ""
        named = httpx.URL(url)
        return client.build_request(
            "GET",
            named.copy_with(host=address),
            headers={"Host": named.netloc.decode("ascii"), "Accept-Encoding": "identity"},
            extensions={"sni_hostname": host},
        )

    def _check_room(self, folder: Path, size: int) -> None:
        if shutil.disk_usage(folder).free - size < self._spare_bytes:
            raise NoRoom

    def _check_size(self, size: int) -> None:
        if size > self._max_bytes:
            raise DownloadTooLarge(
                f"the file has more than {self._max_bytes} bytes; TOKENLINE_INGEST__MAX_DOWNLOAD_BYTES sets the limit"
            )
