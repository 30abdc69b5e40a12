"""A relay between FFmpeg and a camera, inside of the process that reads it.

FFmpeg follows a camera's redirect to wherever it leads, takes the password along and has no option against that. So
FFmpeg connects to the relay, and the relay to the address that was checked and no other. Until the stream plays, it
passes on only answers that it has understood: none that redirects, and none that names another source of UDP packets.
A stream that plays is not led away any more (measured), and its bytes pass unseen.
"""

import re
import select
import socket
import ssl
import time
from contextlib import suppress
from threading import Thread
from types import TracebackType
from typing import Self
from urllib.parse import quote, urlsplit

from ingest.address import CAMERA_PORTS

_LOOPBACK = "127.0.0.1"
_LONGEST_HEAD = 2**16
_LONGEST_BODY = 2**20
_CHUNK = 2**18
_CHUNKS_AT_ONCE = 16  # before the other side has its turn
_PARTING_S = 0.5  # for the last words of FFmpeg

# Waking up for every packet would cost as much as reading it, and no second needs to be known so soon. Not at once:
# what waited while the stream was opened must come in one go, for only so it is known to have waited.
_PAUSE_S = 0.04
_PAUSES_AFTER_S = 5.0

_STATUS = re.compile(rb"RTSP/\d\.\d ([1-9]\d\d)(?: .*)?")
_REQUEST = re.compile(rb"[A-Z_]+ \S+ RTSP/\d\.\d")
_LENGTH = re.compile(rb"content-length:[ \t]*(\d{1,9})[ \t]*", re.IGNORECASE)
_HEAD_END = re.compile(rb"\r?\n\r?\n")
_CONTROL = re.compile(rb"[^\t\x20-\x7e\x80-\xff]")


class Redirects(ConnectionError):
    """The camera sends its readers to another address."""


class NotRtsp(ConnectionError):
    """What answers does not speak RTSP."""


class Relay:
    """One connection to a camera, for one reader on this machine. A context: at its end both are closed."""

    def __init__(self, url: str, address: str, timeout_s: float) -> None:
        """Connect to a camera at a checked numeric address. Blocks. Raises OSError."""
        self.error: Redirects | NotRtsp | None = None  # why the relay ended the connection
        self._url = urlsplit(url)
        self._timeout_s = timeout_s
        self._answers = Answers(address)
        self._camera = self._connected(address)
        self._pending = self._camera.pending if isinstance(self._camera, ssl.SSLSocket) else lambda: 0
        self._camera.setblocking(False)
        self._door = socket.create_server((_LOOPBACK, 0))
        self._port = self._door.getsockname()[1]
        self._thread = Thread(target=self._run, name="relay", daemon=True)
        self._thread.start()

    def reader_url(self, username: str | None, password: str | None) -> str:
        """Return what FFmpeg is to open: never log it, nor any text of an error that came of it."""
        place = f"{_LOOPBACK}:{self._port}"
        if username is not None or password is not None:
            place = f"{quote(username or '', safe='')}:{quote(password or '', safe='')}@{place}"
        return self._url._replace(scheme="rtsp", netloc=place).geturl()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with suppress(OSError):
            self._door.shutdown(socket.SHUT_RDWR)  # if nobody came
        self._thread.join(_PARTING_S)
        with suppress(OSError):
            self._camera.shutdown(socket.SHUT_RDWR)
        self._thread.join(_PARTING_S)

    def _connected(self, address: str) -> socket.socket:
        url = self._url
        plain = socket.create_connection((address, url.port or CAMERA_PORTS[url.scheme]), self._timeout_s)
        if url.scheme != "rtsps":
            return plain
        # Cameras sign their certificates themselves: TLS keeps listeners out here, it does not tell who answers.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        try:
            return context.wrap_socket(plain, server_hostname=url.hostname)
        except OSError:
            plain.close()
            raise

    def _run(self) -> None:
        with suppress(OSError), self._camera:
            with self._door:
                self._door.settimeout(self._timeout_s)
                reader, _ = self._door.accept()
            with reader:
                try:
                    self._pass(reader)
                except (Redirects, NotRtsp) as error:
                    self.error = error  # before FFmpeg sees the end

    def _pass(self, reader: socket.socket) -> None:
        """Pass on what both sides say until one of them ends. Raises Redirects, NotRtsp and OSError."""
        played_at: float | None = None
        buffer = memoryview(bytearray(_CHUNK))
        while True:
            ready = [self._camera] if self._pending() else select.select([self._camera, reader], [], [])[0]
            if reader in ready:
                request = reader.recv(_CHUNK)
                if not request:
                    return
                if played_at is None and request.startswith(b"PLAY "):
                    played_at = time.monotonic()
                    reader.sendall(self._answers.rest())
                self._tell_camera(request)
            if self._camera in ready and not self._pass_answers(reader, buffer, is_checked=played_at is None):
                return
            if played_at is not None and time.monotonic() - played_at > _PAUSES_AFTER_S:
                time.sleep(_PAUSE_S)

    def _pass_answers(self, reader: socket.socket, buffer: memoryview, *, is_checked: bool) -> bool:
        """Pass on what the camera has said; False at its end."""
        for _ in range(_CHUNKS_AT_ONCE):
            try:
                size = self._camera.recv_into(buffer)
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                break
            if not size:
                return False
            reader.sendall(self._answers.feed(bytes(buffer[:size])) if is_checked else buffer[:size])
        return True

    def _tell_camera(self, request: bytes) -> None:
        self._camera.settimeout(self._timeout_s)
        self._camera.sendall(request)
        self._camera.setblocking(False)


class Answers:
    """Takes apart what a camera says before it plays, and writes it again in one form that leaves no two readings."""

    def __init__(self, address: str) -> None:
        self._source = b";source=" + address.encode()
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """Add what came and return what may be passed on. Raises Redirects and NotRtsp."""
        self._held += data
        passed = []
        while part := self._next():
            passed.append(part)
        return b"".join(passed)

    def rest(self) -> bytes:
        """Remove and return what is held back."""
        held, self._held = self._held, b""
        return held

    def _next(self) -> bytes:
        """Remove the next message or packet and return it; nothing if it is not whole yet."""
        held = self._held
        if held[:1] == b"$":  # a packet between the messages, RFC 2326 section 10.12
            size = 4 + int.from_bytes(held[2:4], "big")
            return self._cut(size) if len(held) >= max(4, size) else b""
        first, newline, _ = held[:_LONGEST_HEAD].partition(b"\n")
        if newline:
            _check_first(first.removesuffix(b"\r"))
        end = _HEAD_END.search(held[:_LONGEST_HEAD])
        if end is None:
            if len(held) >= _LONGEST_HEAD:
                raise NotRtsp
            return b""
        lines = re.split(rb"\r?\n", held[: end.start()])
        size = end.end() + _body_size(lines)
        if len(held) < size:
            return b""
        head = b"".join(self._pinned(line) + b"\r\n" for line in lines)
        return head + b"\r\n" + self._cut(size)[end.end() :]

    def _pinned(self, line: bytes) -> bytes:
        """Let UDP have no other end than the camera: of several that are named, the last one counts."""
        return line.partition(b",")[0] + self._source if line.lower().startswith(b"transport:") else line

    def _cut(self, size: int) -> bytes:
        part, self._held = self._held[:size], self._held[size:]
        return part


def _check_first(line: bytes) -> None:
    status = _STATUS.fullmatch(line)
    if status is not None and status[1].startswith(b"3"):
        raise Redirects
    if status is None and _REQUEST.fullmatch(line) is None:
        raise NotRtsp


def _body_size(lines: list[bytes]) -> int:
    """Return the size of what follows these lines, if FFmpeg must read them as we do. Raises NotRtsp."""
    if any(_CONTROL.search(line) or line.startswith(b"$") for line in lines):
        raise NotRtsp
    stated = [line for line in lines if line.lower().startswith(b"content-length")]
    if not stated:
        return 0
    length = _LENGTH.fullmatch(stated[0])
    if length is None or len(stated) > 1 or int(length[1]) > _LONGEST_BODY:
        raise NotRtsp
    return int(length[1])
