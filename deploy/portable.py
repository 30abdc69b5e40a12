"""The portable timeline: a plain tar that any tool opens.

`timeline.json` says what it is, and comes last: a file without it is cut off. Before it come, for each hour that has
frames, `hours/<hour>/frames.safetensors` and, with pictures, `hours/<hour>/keyframes.safetensors`.
"""

import io
import json
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

from deploy.bodies import HourPart

VERSION = 1
MAX_HOUR_BYTES = 1 << 30
MAX_CONTENTS_BYTES = 1 << 24
_CONTENTS = "timeline.json"
# What tarfile raises for a file that is none, the last two when names are nested or claim to be endless.
_NO_TAR = (tarfile.TarError, ValueError, OverflowError, EOFError, RecursionError, MemoryError)
_HOUR = re.compile(r"hours/(0|[1-9][0-9]{0,12})/(frames|keyframes)\.safetensors")


class BadPortable(ValueError):
    """The file is no portable timeline, or not all of one."""


class PortableWriter:
    """Writes a portable timeline. A context manager: the file is there when it is left without an error, else not."""

    def __init__(self, path: Path) -> None:
        if not path.name or path.is_dir():
            raise IsADirectoryError(f"{path} is a directory: name the file to be written")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {path.parent}")
        self._path = path
        self._draft = path.with_name(f".{path.name}.{uuid4().hex[:8]}.part")

    def __enter__(self) -> Self:
        self._tar = tarfile.open(self._draft, "x:", format=tarfile.PAX_FORMAT)  # closed below
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._tar.close()
            if error is None:
                self._draft.replace(self._path)
        finally:
            self._draft.unlink(missing_ok=True)

    def add_hour(self, hour: int, part: HourPart, content: bytes) -> None:
        """Add what was exported of an hour."""
        self._add(f"hours/{hour}/{part}.safetensors", content)

    def finish(self, contents: Mapping[str, Any]) -> None:
        """Say what all of it is."""
        self._add(_CONTENTS, json.dumps(contents, indent=1, ensure_ascii=False).encode())

    def _add(self, name: str, content: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        self._tar.addfile(member, io.BytesIO(content))


class PortableReader:
    """Reads a portable timeline that anyone may have made. A context manager. Raises BadPortable and OSError."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._members: dict[str, tarfile.TarInfo] = {}
        self.contents: dict[str, Any] = {}
        self.hours: list[int] = []

    def __enter__(self) -> Self:
        try:
            self._tar = tarfile.open(self._path, "r:")  # not compressed: nothing unfolds into more
        except _NO_TAR:
            raise BadPortable(f"{self._path} is no portable timeline, or it is cut off") from None
        try:
            self._list()
            self._describe()
        except BaseException:
            self._tar.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tar.close()

    def read_hour(self, hour: int, part: HourPart) -> bytes | None:
        """Return what the file holds of an hour, None if that is nothing."""
        member = self._members.get(f"hours/{hour}/{part}.safetensors")
        return None if member is None else self._content(member, MAX_HOUR_BYTES)

    def _list(self) -> None:
        try:
            members = self._tar.getmembers()
        except _NO_TAR:
            raise BadPortable(f"{self._path} is cut off or damaged: export it again") from None
        for member in members:
            if member.isdir():
                continue
            if member.name != _CONTENTS and _HOUR.fullmatch(member.name) is None:
                raise BadPortable(f"{self._path} is no portable timeline: it holds {member.name[:80]!r}")
            if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
                raise BadPortable(f"{self._path}: {member.name} is no plain file")
            if member.name in self._members:
                raise BadPortable(f"{self._path} holds {member.name} twice")
            self._members[member.name] = member

    def _describe(self) -> None:
        if _CONTENTS not in self._members:
            raise BadPortable(f"{self._path} is no portable timeline, or it is cut off: it has no {_CONTENTS}")
        try:
            contents = json.loads(self._content(self._members[_CONTENTS], MAX_CONTENTS_BYTES))
            version, hours = contents["version"], contents["hours"]
            json.dumps(contents, ensure_ascii=False, allow_nan=False).encode()  # or no request could hold them
        except (ValueError, KeyError, TypeError, RecursionError):
            raise BadPortable(f"{self._path}: its {_CONTENTS} cannot be read") from None
        if version != VERSION:
            raise BadPortable(f"{self._path} has version {str(version)[:20]}; this program reads version {VERSION}")
        held = {int(found[1]) for name in self._members if (found := _HOUR.fullmatch(name))}
        with_frames = {hour for hour in held if f"hours/{hour}/frames.safetensors" in self._members}
        if not isinstance(hours, list) or held != with_frames or sorted(held) != hours:
            raise BadPortable(f"{self._path} does not hold the hours that its {_CONTENTS} names: export it again")
        self.contents, self.hours = contents, hours

    def _content(self, member: tarfile.TarInfo, max_bytes: int) -> bytes:
        if member.size > max_bytes:
            raise BadPortable(f"{self._path}: {member.name} has more than {max_bytes} bytes")
        file = self._tar.extractfile(member)
        content = b"" if file is None else file.read()
        if len(content) != member.size:
            raise BadPortable(f"{self._path} is cut off: export it again")
        return content
