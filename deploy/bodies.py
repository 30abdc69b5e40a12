"""What the client sends and what it reads, as plain typed objects."""

from base64 import b64decode
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, SecretStr

HourPart = Literal["frames", "keyframes"]
Time = float | datetime
"""A moment of a source: seconds since the start of a video, a date with zone for a stream."""


class _Read(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")


class Stream(_Read):
    """A registered camera."""

    id: str
    name: str
    url: str | None = None  # of a camera's memory that was imported
    state: str
    reason: str | None = None
    fps: float
    labels: dict[str, str] = {}


class StreamHealth(_Read):
    """How a camera is doing; `frames_1h` are the frames of the last hour."""

    state: str
    reason: str | None = None
    since: str | float | None = None
    last_frame_at: str | float | None = None
    lag_s: float | None = None
    reconnects_1h: int = 0
    frames_1h: int = 0
    next_retry_at: str | float | None = None
    clock: str | None = None


class StreamProbe(_Read):
    """What a camera sends: `first_frame_ms` passed until its first picture, of which `snapshot` is a data URL."""

    codec: str
    width: int
    height: int
    fps: float | None = None
    first_frame_ms: int
    snapshot: str

    @property
    def snapshot_jpeg(self) -> bytes:
        """The snapshot as a file."""
        return b64decode(self.snapshot.partition(",")[2])


class Video(_Read):
    """An archived video and how far it is into the memory (`progress` 0 to 1)."""

    id: str
    name: str | None = None
    status: Literal["queued", "processing", "ready", "failed"]
    progress: float = 0.0
    eta_s: float | None = None
    duration_s: float | None = None
    error: str | dict[str, Any] | None = None
    damage: dict[str, Any] | None = None

    @property
    def reason(self) -> str | None:
        """Why the video failed, or what is missing from it."""
        told = self.error if self.error is not None else self.damage
        return str(told.get("message", told)) if isinstance(told, dict) else told


class Deleted(_Read):
    """A source is gone; `purged_frames` of its frames were erased with it."""

    id: str
    purged_frames: int = 0


class Recomputation(_Read):
    """Frames that the running model looks at again: of `frames` so many are `done` or `unreadable`."""

    id: str
    model: str | None = None
    fingerprint: str | None = None
    status: str
    reason: str | None = None
    progress: float = 0.0
    eta_s: float | None = None
    frames: int = 0
    done: int = 0
    unreadable: int = 0
    dropped: int = 0
    waiting_until: str | None = None


class Receipt(_Read):
    """Proof of an erasure: `erased` counts what is gone, by where it was."""

    id: str
    source_id: str
    start: str | float | None = None
    end: str | float | None = None
    erased: dict[str, int] = {}
    redis_log_rewritten: bool = False
    completed_at: str | None = None


class TimelineExport(_Read):
    """What can be exported of a source: `hours` that have frames, and all that is to be known of the frames."""

    kind: str
    name: str
    fps: float
    start_slot: int
    end_slot: int
    hours: tuple[int, ...]
    gaps: tuple[dict[str, Any], ...] = ()

    def range(self, source_id: str) -> "Range":
        """Return the same slots of the source as a range."""
        start_s, end_s = self.start_slot / self.fps, self.end_slot / self.fps
        if self.kind == "video":
            return Range(source_id=source_id, start=start_s, end=end_s)
        return Range(source_id=source_id, start=_moment(start_s), end=_moment(end_s))


class Imported(_Read):
    """A source that was imported."""

    id: str
    kind: str
    frames: int


class Moment(_Read):
    """A stretch of a source that resembles what was searched for."""

    source_id: str
    start: str | float
    end: str | float
    time: str | float
    score: float
    frame_url: str | None = None


class SearchCoverage(_Read):
    """How much of what is remembered was searched; `partial` if not all."""

    frames_kept: int
    frames_searched: int
    partial: bool


class Moments(_Read):
    """Moments, best first, and how much was searched for them."""

    data: tuple[Moment, ...]
    coverage: SearchCoverage


class Citation(Moment):
    """A moment that an answer rests on, and the method that found it."""

    method: str | None = None


class Gap(_Read):
    """A stretch of a source without frames."""

    source_id: str
    start: str | float
    end: str | float
    reason: str


class Coverage(_Read):
    """What an answer was based on."""

    slots_expected: int
    frames_used: int
    stride: int = 1
    text_fusion: str
    fusion_frames: int = 0
    partial: bool = False
    gaps: tuple[Gap, ...] = ()


class Answer(_Read):
    """A whole answer. `timing_ms` maps each stage to its milliseconds."""

    id: str
    model: str | None = None
    answer: str = ""
    finish_reason: str | None = None
    citations: tuple[Citation, ...] = ()
    coverage: Coverage
    usage: dict[str, Any] = {}
    timing_ms: dict[str, float] = {}


class Created(_Read):
    """The service has begun to work on a question."""

    id: str
    model: str | None = None


class Delta(_Read):
    """The next piece of an answer's text."""

    delta: str


class Cited(_Read):
    """What the answer rests on."""

    citations: tuple[Citation, ...]


class Completed(Answer):
    """The answer is finished."""


AnswerEvent = Created | Delta | Cited | Completed


class Health(_Read):
    """Whether the service can take questions, the state of each of its parts, and what to do about those in trouble."""

    ready: bool
    parts: dict[str, Any]
    advice: dict[str, str] = {}


class Model(_Read):
    """The model that answers; `untrained` weights give answers without meaning."""

    id: str
    fingerprint: str
    tokens_per_frame: int
    max_frames: int
    untrained: bool = False
    note: str | None = None


class CameraAddress(BaseModel):
    """Where a camera is and how it is opened. A password goes here, never into the URL."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str
    username: str | None = None
    password: SecretStr | None = None
    transport: Literal["tcp", "udp"] = "tcp"

    def body(self) -> dict[str, Any]:
        """Return the JSON body of POST /v1/streams/probe."""
        body = self.model_dump(exclude={"password"}, exclude_none=True)
        if self.password is not None:
            body["password"] = self.password.get_secret_value()
        return body


class Event(_Read):
    """Something that changed: a stream's `state` with its `reason`, or a video's `status`."""

    id: str | None = None  # None of an event that cannot be gone on from
    type: str
    created_at: str | None = None
    source_id: str | None = None
    state: str | None = None
    reason: str | None = None
    status: str | None = None
    error: str | None = None


class NewStream(CameraAddress):
    """A camera to be registered."""

    name: str
    fps: float = 1.0
    labels: dict[str, str] = {}
    retention_hours: float | None = None
    retention_bytes: int | None = None
    keyframe_hours: float | None = None
    keyframe_bytes: int | None = None

    def body(self) -> dict[str, Any]:
        """Return the JSON body of POST /v1/streams."""
        body = super().body()
        limits = {
            name: body.pop(name, None)
            for name in ("retention_hours", "retention_bytes", "keyframe_hours", "keyframe_bytes")
        }
        retention = without_none({"hours": limits["retention_hours"], "max_bytes": limits["retention_bytes"]})
        keyframes = without_none({"hours": limits["keyframe_hours"], "max_bytes": limits["keyframe_bytes"]})
        if keyframes:
            retention["keyframes"] = keyframes
        return body | ({"retention": retention} if retention else {})


class Range(BaseModel):
    """The part [start, end) of a stream or video; a time that is left out: from its first frame on, up to its last."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source_id: str
    start: Time | None = None
    end: Time | None = None

    def body(self) -> dict[str, Any]:
        """Return the source as questions and searches name it."""
        key = "stream_id" if self.source_id.startswith("str_") else "video_id"
        times = {"start": self.start, "end": self.end}
        return {key: self.source_id} | {name: json_time(at) for name, at in times.items() if at is not None}


class Question(BaseModel):
    """A question about one or more ranges."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    question: str
    sources: tuple[Range, ...]
    text_fusion: Literal["auto", "exact", "sampled", "none"] = "auto"
    stride: int | Literal["auto"] = 1
    max_output_tokens: int = 256
    temperature: float = 0.0
    seed: int | None = None

    def body(self) -> dict[str, Any]:
        """Return the JSON body of POST /v1/questions."""
        body = self.model_dump(exclude={"sources"}, exclude_none=True)
        return body | {"sources": [source.body() for source in self.sources]}


def json_time(at: Time) -> str | float:
    return at.isoformat() if isinstance(at, datetime) else at


def _moment(seconds: float) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)


def without_none(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
