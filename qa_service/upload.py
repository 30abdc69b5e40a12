"""A multipart upload straight from the socket to its place on disk, counted while it arrives."""

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from qa_service.errors import FileTooLarge, InvalidJson, StorageFull, ValidationFailed
from store.connection import NO_ROOM, StoreFull
from store.room import Room

MAX_FIELD_BYTES = 4096
MAX_FIELDS = 16
WRITE_BYTES = 1 << 20  # bytes that are gathered before a thread writes them


@dataclass(slots=True)
class Upload:
    """What a form held: the file's name at the sender, its digest and size, and the other fields as text."""

    filename: str | None = None
    sha256: str = ""
    size_bytes: int = 0
    fields: dict[str, str] = field(default_factory=dict)


async def receive_form(
    content_type: str, chunks: AsyncIterator[bytes], target: Path, max_bytes: int, room: Room
) -> Upload:
    """Write the form's part `file` to `target` and return what else it held.

    Raises FileTooLarge as soon as more than `max_bytes` have come, InvalidJson for what is no form, ValidationFailed
    for a form without a file, StorageFull for a full disk. The caller removes `target` if anything is raised.
    """
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise InvalidJson("Send the video as multipart/form-data with a part named `file`, or JSON with `url`.")
    form = _Form(boundary)
    total = 0
    try:
        with _full_disk_named(), await asyncio.to_thread(target.open, "wb") as file:
            async for chunk in chunks:
                total += len(chunk)
                if total > max_bytes + MAX_FIELD_BYTES * MAX_FIELDS:
                    raise _too_large(max_bytes)
                form.feed(chunk)
                if form.size_bytes > max_bytes:
                    raise _too_large(max_bytes)
                if len(form.pending) >= WRITE_BYTES:
                    await asyncio.to_thread(_write, file, form, room)
            await asyncio.to_thread(_write, file, form, room)
    except FormParserError:
        raise InvalidJson("The multipart form is malformed.") from None
    if not form.complete:
        raise InvalidJson("The multipart form ends early.")
    if not form.has_file:
        raise ValidationFailed("The form has no part named `file` with a file name.", param="file")
    return Upload(form.filename, form.digest.hexdigest(), form.size_bytes, form.fields)


async def receive_body(chunks: AsyncIterator[bytes], target: Path, max_bytes: int, room: Room) -> int:
    """Write a body to `target` as it comes and return its size.

    Raises FileTooLarge as soon as more than `max_bytes` have come, StorageFull for a full disk. The caller removes
    `target`, whatever is raised.
    """
    total = 0
    with _full_disk_named(), await asyncio.to_thread(target.open, "wb") as file:
        async for chunk in chunks:
            total += len(chunk)
            if total > max_bytes:
                raise FileTooLarge(f"The body has more than {max_bytes} bytes.", details={"max_bytes": max_bytes})
            await asyncio.to_thread(room.check)
            await asyncio.to_thread(file.write, chunk)
    return total


@contextmanager
def _full_disk_named() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, StoreFull) or error.errno in NO_ROOM:
            raise StorageFull(
                "There is no room for the upload now; tell the operator, and send it again when there is.",
                retry_after_s=60,
            ) from error
        raise


def _too_large(max_bytes: int) -> FileTooLarge:
    return FileTooLarge(f"The file has more than {max_bytes} bytes.", param="file", details={"max_bytes": max_bytes})


def _write(file: IO[bytes], form: "_Form", room: Room) -> None:
    room.check()
    form.digest.update(form.pending)
    file.write(form.pending)
    form.pending.clear()


class _Form:
    """Follows the parser through the parts of one form."""

    def __init__(self, boundary: bytes) -> None:
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.has_file = False
        self.complete = False
        self.size_bytes = 0
        self.pending = bytearray()
        self.digest = hashlib.sha256()
        self._headers: dict[bytes, bytes] = {}
        self._header_name = self._header_value = b""
        self._name = ""
        self._text: bytearray | None = None
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._on_part_begin,
                "on_header_field": self._on_header_field,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_part_data": self._on_part_data,
                "on_part_end": self._on_part_end,
                "on_end": self._on_end,
            },
        )

    def feed(self, chunk: bytes) -> None:
        self._parser.write(chunk)

    def _on_part_begin(self) -> None:
        self._headers = {}
        self._text = None

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[self._header_name.lower()] = self._header_value
        self._header_name = self._header_value = b""

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        if self._name == "file":
            if self.has_file:
                raise ValidationFailed("Send one file a request.", param="file")
            self.has_file = True
            self.filename = clean_filename(options)
        elif len(self.fields) >= MAX_FIELDS:
            raise ValidationFailed(f"A form has at most {MAX_FIELDS} fields.")
        else:
            self._text = bytearray()

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._text is None:
            self.size_bytes += end - start
            self.pending += data[start:end]
        else:
            self._text += data[start:end]
            if len(self._text) > MAX_FIELD_BYTES:
                raise ValidationFailed(f"A field has at most {MAX_FIELD_BYTES} bytes.", param=self._name)

    def _on_part_end(self) -> None:
        if self._text is None:
            return
        try:
            self.fields[self._name] = self._text.decode()
        except UnicodeDecodeError:
            raise ValidationFailed("Fields are UTF-8 text.", param=self._name) from None

    def _on_end(self) -> None:
        self.complete = True


def clean_filename(options: Mapping[bytes, bytes]) -> str | None:
    """Return the last part of the sender's file name: a label to show, never a path to open."""
    name = options.get(b"filename", b"").decode("utf-8", "replace")
    name = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", "", re.split(r"[/\\]", name)[-1]).strip()
    return name[:200] or None
