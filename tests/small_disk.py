"""A disk that is soon full: a real file system of a few megabytes in memory, where this process may mount one."""

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

FILLER = "filler"
_STEP_BYTES = 4096


class CannotMount(Exception):
    """This process may not mount a file system."""


@contextmanager
def mounted(folder: Path, size_bytes: int) -> Iterator[Path]:
    """Mount a small disk at a folder for as long as the block lasts. Raises CannotMount."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CannotMount(getattr(error, "stderr", "") or str(error)) from None
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, capture_output=True)


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    """The same in a test, which is skipped where mounting is not permitted."""
    with ExitStack() as stack:
        try:
            disk = stack.enter_context(mounted(folder, size_bytes))
        except CannotMount as error:
            pytest.skip(f"a small file system cannot be mounted here: {error}")
        yield disk


def fill(disk: Path, leave_bytes: int = 0) -> None:
    """Let something else take the room of a disk, but for so many bytes; `make_room` undoes it."""
    with (disk / FILLER).open("ab", buffering=0) as file:
        while (free := _free(disk) - leave_bytes) > 0:
            try:
                file.write(bytes(max(_STEP_BYTES, free)))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                return


def make_room(disk: Path) -> None:
    (disk / FILLER).unlink()


def _free(disk: Path) -> int:
    told = os.statvfs(disk)
    return told.f_bavail * told.f_frsize
