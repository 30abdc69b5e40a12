"""What ingest and a reading process say to each other: one request and one reply every tick, as JSON.

The bytes of a reply are the keyframes of its frames, one behind the other.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt

from ingest.assignment import Assignment, CameraState, Missing
from ingest.settings import IngestSettings

_SHORT = 1000


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Setup(_Message):
    """The first message: what holds for all sources.

    `upload_dir` is the folder of recorded files, `spare_bytes` of its disk stay free.
    """

    settings: IngestSettings
    size_px: int
    upload_dir: str
    spare_bytes: NonNegativeInt


class Request(_Message):
    """Begin and end to read sources, hand over at most so many frames of each, and count those given up."""

    open: tuple[Assignment, ...] = ()
    close: tuple[str, ...] = ()
    take: Mapping[str, int] = {}
    shed: Mapping[str, tuple[int, ...]] = {}


class CameraNews(_Message):
    """How the connection to a camera is doing. The fields are those of CameraReport."""

    kind: Literal["camera"] = "camera"
    state: CameraState
    reason: str | None = Field(max_length=_SHORT)
    since: float
    reconnects_1h: NonNegativeInt
    dropped_frames: NonNegativeInt
    next_retry_at: float | None
    clock: Literal["camera", "arrival"]


class ArchiveNews(_Message):
    """How far a file is read: `is_read` says that no more frames will come, `error` that and why it failed.

    `is_cut` tells whether it holds less than the duration that it states.
    """

    kind: Literal["archive"] = "archive"
    is_read: bool
    duration_s: NonNegativeFloat | None
    held_s: NonNegativeFloat | None
    is_cut: bool
    damaged: NonNegativeInt
    error: str | None = Field(max_length=_SHORT)


class FrameHead(_Message):
    """A frame without its keyframe, which has `size` bytes."""

    slot: NonNegativeInt
    time_ms: int
    size: NonNegativeInt


class SourceNews(_Message):
    """What is new of one source."""

    frames: tuple[FrameHead, ...]
    missing: tuple[Missing, ...]
    news: CameraNews | ArchiveNews = Field(discriminator="kind")


class Reply(_Message):
    """What is new of every source, and what is to be logged: level and text."""

    sources: Mapping[str, SourceNews] = {}
    log: Sequence[tuple[int, str]] = ()
