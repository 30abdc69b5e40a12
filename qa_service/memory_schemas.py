"""The bodies about what is remembered of sources: timelines, receipts, exports, imports and recomputations."""

from typing import Literal, Self

from pydantic import (
    Field,
    PositiveInt,
    model_validator,
)
from pydantic_core import PydanticCustomError

from qa_service import clock
from qa_service.schemas import (
    Body,
    Fps,
    GapBody,
    Labels,
    Name,
    Slot,
    SourceOrRange,
    Time,
    VideoTime,
    WrittenTime,
    example_config,
)
from store.format import TokenFormat
from store.gaps import Gap

MAX_LISTED = 100_000  # hours, and gaps, of one export: some 8 MB of JSON


class TimelineBucket(Body):
    start: Time
    frames: int = Field(description="Frames that are remembered of the bucket.")
    slots: int = Field(description="Frames that a source without gaps would have.")


class ErasedCounts(Body):
    """What was erased, by where it was."""

    redis_frames: int = Field(description="Frame tokens with their search vectors in Redis, of all models.")
    sealed_frames: int = Field(description="The same in segments; files are rewritten without them or removed.")
    keyframes: int = Field(description="Pictures.")


class ErasureReceipt(Body):
    """Proof of an erasure: what was asked for, and what is gone."""

    id: str
    object: Literal["erasure"] = "erasure"
    source_id: str
    start: Time | None = Field(description="Null: from the first frame.")
    end: Time | None = Field(description="Null: to the last frame.")
    erased: ErasedCounts
    caches_within_s: float = Field(description="Copies in the memory of answering replicas are gone so soon.")
    redis_log_rewritten: bool = Field(
        description="Whether Redis writes its append-only file anew, in the background. If false, that file or a "
        "snapshot may hold erased bytes until it is written anew: run BGREWRITEAOF or BGSAVE."
    )
    completed_at: str


class TimelineBody(Body):
    """What is remembered of a source."""

    object: Literal["timeline"] = "timeline"
    source_id: str
    start: Time
    end: Time
    fps: float
    resolution_s: float
    buckets: list[TimelineBucket]
    gaps: list[GapBody]


class TimelineExport(Body):
    """What the slots [start_slot, end_slot) of a source are, but for the frames themselves. It names no camera.

    Slot n begins n / `fps` seconds after the start of a video, or after the beginning of 1970 (UTC) for a stream.
    """

    object: Literal["timeline.export"] = "timeline.export"
    version: Literal[1] = 1
    kind: Literal["stream", "video"]
    name: Name
    fps: Fps
    labels: Labels
    recorded_at: WrittenTime | None = Field(description="When the recording of a video began.")
    duration_s: VideoTime | None = Field(description="Length of a video.")
    start_slot: Slot
    end_slot: Slot
    format: TokenFormat = Field(description="The model that made the tokens, and how they are laid out.")
    hours: list[Slot] = Field(
        max_length=MAX_LISTED,
        description="The hours that have frames; hour n holds 3,600 slots from n * 3,600 on.",
    )
    gaps: list[Gap] = Field(
        max_length=MAX_LISTED, description="Why slots are absent; those among them that have a frame are there."
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.end_slot <= self.start_slot:
            raise PydanticCustomError("export_range", "`end_slot` lies behind `start_slot`.")
        try:
            clock.check_video_time(self.end_slot / self.fps)
        except ValueError:
            raise PydanticCustomError("export_range", "`end_slot` lies after all dates.") from None
        if any(gap.start_slot < self.start_slot or gap.end_slot > self.end_slot for gap in self.gaps):
            raise PydanticCustomError("export_range", "Gaps lie within `start_slot` and `end_slot`.")
        if (self.duration_s is None) == (self.kind == "video"):
            raise PydanticCustomError("export_duration", "A video has a `duration_s`, a stream has none.")
        if self.duration_s is not None and int(self.duration_s * self.fps) > self.end_slot:
            raise PydanticCustomError("export_duration", "`duration_s` ends before the slot `end_slot` does.")
        return self


class ImportBody(Body):
    """An import that has begun: its source is seen by nobody before it is completed."""

    id: str = Field(description="That of the source that it becomes.")
    object: Literal["import"] = "import"
    expires_in_s: int = Field(description="It is given up, and what came is erased, when nothing comes for so long.")


class ImportedHour(Body):
    """What is kept of an hour that came."""

    object: Literal["import.hour"] = "import.hour"
    frames: int = Field(description="Frames, or keyframes.")


class ImportCompletion(Body):
    """What is known to have been sent."""

    frames: PositiveInt = Field(description="Frames of all hours; it is refused if not as many are kept.")


class ImportDone(Body):
    """A source that is there, whole."""

    id: str
    object: Literal["import"] = "import"
    kind: Literal["stream", "video"]
    frames: int


class ImportAbandoned(Body):
    id: str
    deleted: Literal[True] = True


class RecomputationRequest(Body):
    """Frames that another model saw, to be looked at again by the one that runs now."""

    model_config = example_config(
        {"sources": [{"stream_id": "str_0123456789ab", "start": "2026-07-01T06:00:00Z"}], "drop_old": False}
    )

    sources: list[SourceOrRange] | None = Field(
        default=None, min_length=1, max_length=1000, description="Left out: every source that the key may see."
    )
    drop_old: bool = Field(
        default=False,
        description="Erase what other models made of an hour once the running model has a token for all of it.",
    )


class RecomputedSource(Body):
    """How far one source is. A frame whose picture is gone meanwhile counts as done."""

    source_id: str
    frames: int = Field(description="Frames with a picture and no token of the model, when the work began.")
    done: int
    unreadable: int = Field(description="Frames whose picture cannot be decoded; their gap says `decode_error`.")
    dropped: int = Field(description="Tokens of other models that were erased, with `drop_old`.")


class UnreadableFrame(Body):
    source_id: str
    time: Time


class RecomputationBody(Body):
    """A recomputation and how far it is; the timeline shows the new frames as they come."""

    id: str
    object: Literal["recomputation"] = "recomputation"
    model: str = Field(description="The model that looks again.")
    fingerprint: str
    drop_old: bool
    status: Literal["queued", "running", "done", "failed", "cancelled"]
    reason: str | None = Field(description="What stands in the way, or why it failed.")
    progress: float = Field(description="0 to 1.")
    eta_s: float | None
    frames: int
    done: int
    unreadable: int
    dropped: int
    waiting_until: str | None = Field(
        description="When the work goes on: what is left is still being recorded, or `reason` tells more."
    )
    created_at: str
    ended_at: str | None
    sources: list[RecomputedSource]
    unreadable_frames: list[UnreadableFrame] = Field(description="The first of them.")


class RecomputationList(Body):
    object: Literal["list"] = "list"
    data: list[RecomputationBody]
    has_more: bool
    next_cursor: str | None
