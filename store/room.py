"""Room on the disks under the store."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from store.connection import StoreFull


@dataclass(frozen=True, slots=True)
class Room:
    """What must stay free on the disks of some folders; a folder that is not there has none.

    Frames and uploads stop at `spare_bytes`, and not when nothing is left: leases, gaps and erasures still have to be
    written down then, and Redis takes no command at all once it cannot write its file.
    """

    folders: tuple[Path, ...]
    spare_bytes: int

    def check(self) -> None:
        """Raise StoreFull when less is free. Blocks for as long as a folder on a network takes."""
        for folder in self.folders:
            try:
                free = shutil.disk_usage(folder).free
            except OSError:
                continue
            if free < self.spare_bytes:
                raise StoreFull(
                    f"the disk of the store is full: {free >> 20} MiB are free, and the last {self.spare_bytes >> 20} "
                    "MiB (TOKENLINE_STORE__SPARE_BYTES) are kept for leases, gaps and erasures; make room, or shorten "
                    "what streams keep: recording then goes on by itself"
                )
