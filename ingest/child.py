"""Child processes for media that nobody vouches for: what hangs, crashes or eats memory there harms nobody else.

What they are told goes through a socket, never by the command line, which every user of the machine can read and which
may not hold a password. What they say is JSON and bytes: a process that a file has taken over must have no means but
words.
"""

import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

START_S = 15.0  # for Python and its imports on a busy machine

_LENGTHS = struct.Struct("!II")
_LONGEST_WORDS = 8 * 2**20
_LONGEST_BYTES = 512 * 2**20


class ChildDied(RuntimeError):
    """The process ended, or what it says is no message; the text tells how, as what follows "the process"."""


class Child:
    """A process that runs `python -m module arguments` and answers messages.

    Use it as a context: at its end the process is killed, whatever it does.
    """

    def __init__(self, module: str, *arguments: str) -> None:
        here = str(Path(__file__).parent.parent)  # Python finds the package as we did, installed or not
        paths = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
        ours, theirs = socket.socketpair()
        with theirs:
            self._line = Line(ours)
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # FFmpeg may tell it the address with the password
                env={**os.environ, "PYTHONPATH": paths},
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        """End the process; safe on any thread."""
        self._process.kill()

    def ask(self, words: bytes, patience_s: float) -> tuple[bytes, bytes]:
        """Send a message and return the words and the bytes of the answer. Blocks.

        Raises TimeoutError after `patience_s`, and ChildDied.
        """
        deadline = time.monotonic() + patience_s
        try:
            self._line.send(words, deadline=deadline)
            answer = self._line.receive(deadline)
        except TimeoutError:
            raise
        except OSError:  # it ended before it had read everything
            answer = None
        if answer is None:
            raise ChildDied(self._how_it_ended())
        return answer

    def _how_it_ended(self) -> str:
        self._process.kill()  # if it is there, it said what is no message
        code = self._process.wait()
        if code >= 0:
            return f"ended with code {code}"
        return f"was ended by {signal.Signals(-code).name}" if -code in set(signal.Signals) else "was ended by a signal"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        self._line.close()


class Line:
    """Messages over a socket: words (JSON) and bytes, each preceded by its length."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def send(self, words: bytes, bulk: bytes = b"", *, deadline: float | None = None) -> None:
        """Send a message until a deadline (monotonic). Raises TimeoutError and OSError."""
        self._patience(deadline)
        self._connection.sendall(_LENGTHS.pack(len(words), len(bulk)) + words)
        if bulk:
            self._patience(deadline)
            self._connection.sendall(bulk)

    def receive(self, deadline: float | None = None) -> tuple[bytes, bytes] | None:
        """Return the next message; None if the other side is gone or sends none. Raises TimeoutError and OSError."""
        lengths = self._exactly(_LENGTHS.size, deadline)
        if lengths is None:
            return None
        words, bulk = _LENGTHS.unpack(lengths)
        if words > _LONGEST_WORDS or bulk > _LONGEST_BYTES:
            return None
        both = self._exactly(words + bulk, deadline)
        return None if both is None else (both[:words], both[words:])

    def close(self) -> None:
        self._connection.close()

    def _exactly(self, size: int, deadline: float | None) -> bytes | None:
        parts = []
        while size:
            self._patience(deadline)
            part = self._connection.recv(min(size, 2**20))
            if not part:
                return None
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _patience(self, deadline: float | None) -> None:
        if deadline is None:
            return
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        self._connection.settimeout(left_s)


def become_child(memory_bytes: int, cpu_s: int | None = None) -> Line:
    """Limit this process for good, its memory and the time it may compute, and return the line to who started it."""
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would hold the password
    if cpu_s is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for whoever started us
    return Line(socket.socket(fileno=os.dup(sys.stdin.fileno())))
