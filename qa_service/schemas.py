"""The bodies of the REST surface. Times of streams are RFC 3339 with zone, times of videos are seconds."""

import base64
import binascii
import unicodedata
from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PositiveInt,
    SecretStr,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from qa_service import clock
from store.gaps import GapReason

BAD_TIME_RANGE = "bad_time_range"  # the type of validation errors that have a code of their own
PATH_TAGS = frozenset({"a stream's range", "a video's range", "an id", "constrained-int", "literal['auto']", "[key]"})
"""What pydantic puts in the paths of validation errors besides fields."""

MAX_SLOT = 10**13  # of the last second of the year 9999, at 30 frames a second

Time = str | float
"""How a time is written: RFC 3339 for a stream, seconds for a video."""


def _stream_seconds(value: object) -> float:
    if not isinstance(value, str):
        raise PydanticCustomError(BAD_TIME_RANGE, clock.STREAM_TIME_ADVICE)
    try:
        return clock.parse_stream_time(value)
    except ValueError:
        raise PydanticCustomError(BAD_TIME_RANGE, clock.STREAM_TIME_ADVICE) from None


def _video_seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PydanticCustomError(BAD_TIME_RANGE, clock.VIDEO_TIME_ADVICE)
    try:
        return clock.check_video_time(value)
    except ValueError:
        raise PydanticCustomError(BAD_TIME_RANGE, clock.VIDEO_TIME_ADVICE) from None


StreamTime = Annotated[
    float,
    BeforeValidator(_stream_seconds, json_schema_input_type=str),
    Field(json_schema_extra={"format": "date-time"}),
]
WrittenTime = Annotated[
    str,
    AfterValidator(lambda text: clock.write_stream_time(_stream_seconds(text))),
    Field(json_schema_extra={"format": "date-time"}),
]
VideoTime = Annotated[float, BeforeValidator(_video_seconds, json_schema_input_type=float)]


def _printable(text: str) -> str:
    """Refuse what no camera or person is called by, and what would take over a terminal that shows it."""
    if not all(unicodedata.category(character) not in _CONTROLS for character in text):
        raise PydanticCustomError("control_character", "Control characters have no place here.")
    return text


_CONTROLS = frozenset({"Cc", "Zl", "Zp"})
Text = Annotated[str, AfterValidator(_printable)]
Name = Annotated[Text, Field(min_length=1, max_length=200, pattern=r"\S")]
Label = Annotated[Text, Field(max_length=200)]
LabelName = Annotated[Text, Field(min_length=1, max_length=64)]
Labels = Annotated[dict[LabelName, Label], Field(max_length=32)]
Username = Annotated[Text, Field(max_length=200)]
Password = Annotated[SecretStr, Field(max_length=1000)]
Fps = Annotated[float, Field(ge=0.001, le=30, allow_inf_nan=False, description="Frames a second that are remembered.")]
Url = Annotated[str, Field(min_length=1, max_length=2000)]


class Body(BaseModel):
    """A body of the REST surface: unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def example_config(example: dict[str, Any]) -> ConfigDict:
    return ConfigDict(frozen=True, extra="forbid", json_schema_extra={"examples": [example]})


# Errors


class ErrorFacts(Body):
    type: str = Field(description="The family of the error.")
    code: str = Field(description="What went wrong, for programs.")
    message: str = Field(description="What went wrong and what to do, for people.")
    param: str | None = Field(description="Path of the field at fault.")
    details: dict[str, Any]
    request_id: str


class ErrorBody(Body):
    """Every error has this shape."""

    model_config = example_config(
        {
            "error": {
                "type": "invalid_request_error",
                "code": "range_too_long",
                "message": "The sources hold 210000 frames, the model reads at most 131000 at once.",
                "param": "sources",
                "details": {"frames": 210000, "max_frames": 131000},
                "request_id": "req_1",
            }
        }
    )

    error: ErrorFacts


# Streams


Hours = Annotated[float, Field(gt=0, le=24 * 366 * 10, allow_inf_nan=False)]
MaxBytes = Annotated[int, Field(strict=True, gt=0, le=2**60)]


class KeyframeRetention(Body):
    """How long pictures are kept. Answers go on without them; only text fusion looks at them again."""

    hours: Hours | None = Field(default=None, description="At most those of the frames. Null: as long as those.")
    max_bytes: MaxBytes | None = Field(default=None, description="The oldest full hours go beyond it. Null: no limit.")


class Retention(Body):
    """How long, and how much, of a stream is kept; in a change, what is left out stays.

    What is gone is a gap with the reason `expired`.
    """

    hours: Hours = Field(default=168, description="Hours that the memory of a stream is kept.")
    max_bytes: MaxBytes | None = Field(
        default=None, description="Bytes of its frame tokens; the oldest full hours go beyond it. Null: no limit."
    )
    keyframes: KeyframeRetention = KeyframeRetention()


class StreamRequest(Body):
    """A camera to be registered."""

    model_config = example_config(
        {
            "name": "dock",
            "url": "rtsp://192.0.2.10/stream1",
            "username": "viewer",
            "password": "secret",
            "transport": "tcp",
            "fps": 1,
            "labels": {"site": "north"},
            "retention": {"hours": 720, "keyframes": {"hours": 24}},
            "enabled": True,
        }
    )

    name: Name
    url: Url = Field(description="rtsp:// or rtsps:// address, without user name and password.")
    username: Username | None = None
    password: Password | None = Field(default=None, description="Write-only: no response ever holds it.")
    transport: Literal["tcp", "udp"] = "tcp"
    fps: Fps = 1
    labels: Labels = Field(default_factory=dict)
    retention: Retention = Retention()
    enabled: bool = True


class StreamProbeRequest(Body):
    """A camera to be looked at, without registering it."""

    model_config = example_config({"url": "rtsp://192.0.2.10/stream1", "username": "viewer", "password": "secret"})

    url: Url = Field(description="rtsp:// or rtsps:// address, without user name and password.")
    username: Username | None = None
    password: Password | None = Field(default=None, description="Write-only: no response ever holds it.")
    transport: Literal["tcp", "udp"] = "tcp"


class StreamProbe(Body):
    """What a camera sends, seen in about a second of it."""

    object: Literal["stream.probe"] = "stream.probe"
    codec: str
    width: int
    height: int
    fps: float | None = Field(description="As measured; null where too little came to tell.")
    first_frame_ms: int = Field(description="From the first attempt to connect to the first picture.")
    snapshot: str = Field(description="The first picture as a data URL: a JPEG, at most 640 pixels long.")


class StreamPatch(Body):
    """Fields of a stream to be changed; those left out stay. `{"enabled": false}` stops ingest and keeps the memory."""

    model_config = example_config({"enabled": False})

    name: Name = ""
    url: Url = ""
    username: Username | None = None
    password: Password | None = None
    transport: Literal["tcp", "udp"] = "tcp"
    fps: Fps = 1
    labels: Labels = Field(default_factory=dict)
    retention: Retention = Retention()
    enabled: bool = True

    @model_validator(mode="after")
    def _changes_something(self) -> Self:
        if not self.model_fields_set:
            raise PydanticCustomError("nothing_to_change", "Name at least one field to change.")
        return self


StreamState = Literal["connecting", "online", "degraded", "reconnecting", "auth_failed", "disabled"]


class StreamHealth(Body):
    """How a camera is doing."""

    state: StreamState
    reason: str | None
    since: str
    last_frame_at: str | None
    lag_s: float | None
    reconnects_1h: int
    frames_1h: int
    next_retry_at: str | None
    clock: Literal["camera", "arrival"] | None = Field(
        description="What gives the times of frames: the camera's own clock, or else their arrival."
    )


class StreamBody(Body):
    """A registered camera."""

    id: str
    object: Literal["stream"] = "stream"
    name: str
    url: str | None = Field(
        description="Null: its memory was imported, and it has no camera here until it is given one."
    )
    username: str | None
    has_password: bool
    transport: Literal["tcp", "udp"]
    fps: float
    labels: dict[str, str]
    retention: Retention
    enabled: bool
    created_at: str
    state: StreamState
    reason: str | None
    since: str
    last_frame_at: str | None


class StreamList(Body):
    object: Literal["list"] = "list"
    data: list[StreamBody]
    has_more: bool
    next_cursor: str | None


class StreamDeleted(Body):
    id: str
    deleted: Literal[True] = True
    purged_frames: int


# Events


class EventBody(Body):
    """Something that changed: a stream's `state`, `reason` and `since`, a video's `status`, `progress` and `error`."""

    id: str = Field(description="Send the last one as `Last-Event-ID` to go on from there.")
    object: Literal["event"] = "event"
    type: Literal["stream.state", "video.status"]
    created_at: str
    source_id: str
    state: StreamState | None = None
    reason: str | None = None
    since: str | None = None
    status: Literal["queued", "processing", "ready", "failed"] | None = None
    progress: float | None = None
    error: str | None = None


# Videos


class VideoRequest(Body):
    """A video to be fetched from a web address."""

    model_config = example_config({"url": "https://example.com/yard.mp4", "name": "yard", "fps": 1})

    url: Url
    name: Name
    recorded_at: StreamTime | None = Field(default=None, description="When the recording began.")
    fps: Fps = 1


class VideoForm(Body):
    """The fields beside the file of a multipart upload. Everything arrives as text."""

    name: Name | None = None
    recorded_at: StreamTime | None = None
    fps: Fps = 1


class VideoFailure(Body):
    message: str


class VideoDamage(Body):
    """What a file does not give."""

    message: str
    held_s: float = Field(description="Seconds of video that the file holds; `duration_s` is what it states.")
    lost_s: float = Field(description="Seconds without a picture that should have one; the timeline says which.")
    errors: int = Field(description="Errors met while reading and decoding it.")


class VideoBody(Body):
    """An archived video and how far it is remembered."""

    id: str
    object: Literal["video"] = "video"
    name: str
    url: str | None
    recorded_at: str | None
    fps: float
    created_at: str
    status: Literal["queued", "processing", "ready", "failed"]
    progress: float
    eta_s: float | None
    duration_s: float | None
    error: VideoFailure | None
    damage: VideoDamage | None = Field(description="What is missing from a file that is damaged or cut off.")


class VideoList(Body):
    object: Literal["list"] = "list"
    data: list[VideoBody]
    has_more: bool
    next_cursor: str | None


class VideoDeleted(Body):
    id: str
    deleted: Literal[True] = True
    purged_frames: int


# Sources


_GAP_REASON = (
    "`stream_down`, `decode_error`, `shed`, `store_full`, `not_registered`, `erased` (on demand), `expired` (by "
    "retention) or `other_model` (kept, but only another model has looked)."
)


class GapBody(Body):
    start: Time
    end: Time
    reason: GapReason = Field(description=_GAP_REASON)


# Export and import

Slot = Annotated[int, Field(ge=0, le=MAX_SLOT)]


# Questions and search


class StreamRange(Body):
    stream_id: str = Field(max_length=64)
    start: StreamTime | None = Field(default=None, description="Left out: from the oldest frame on.")
    end: StreamTime | None = Field(default=None, description="Left out: up to now.")


class VideoRange(Body):
    video_id: str = Field(max_length=64)
    start: VideoTime = 0.0
    end: VideoTime | None = Field(default=None, description="Left out: the end of the video.")


def _kind_of_range(value: Any) -> str | None:
    fields = value if isinstance(value, dict) else getattr(value, "model_fields_set", ())
    kinds = {"stream_id": "a stream's range", "video_id": "a video's range"}
    named = [kind for field, kind in kinds.items() if field in fields]
    return named[0] if len(named) == 1 else None


def _kind_of_source(value: Any) -> str | None:
    return "an id" if isinstance(value, str) else _kind_of_range(value)


def _told(kind_of: Callable[[Any], str | None], advice: str) -> Discriminator:
    return Discriminator(kind_of, custom_error_type="kind_of_source", custom_error_message=advice)


SourceRange = Annotated[
    Annotated[StreamRange, Tag("a stream's range")] | Annotated[VideoRange, Tag("a video's range")],
    _told(_kind_of_range, "Name either `stream_id` or `video_id`."),
]
SourceOrRange = Annotated[
    Annotated[StreamRange, Tag("a stream's range")]
    | Annotated[VideoRange, Tag("a video's range")]
    | Annotated[str, Tag("an id"), Field(max_length=64)],
    _told(_kind_of_source, "Give the id of a source, or an object with either `stream_id` or `video_id`."),
]


class Question(Body):
    """A question about time ranges of sources."""

    model_config = example_config(
        {
            "question": "When did the white van leave?",
            "sources": [
                {"stream_id": "str_0123456789ab", "start": "2026-07-01T06:00:00Z", "end": "2026-07-01T09:00:00Z"}
            ],
            "text_fusion": "auto",
            "stride": 1,
            "max_output_tokens": 256,
            "temperature": 0,
            "seed": 1,
            "stream": False,
        }
    )

    question: str = Field(min_length=1)
    sources: list[SourceRange] = Field(min_length=1, max_length=64)
    text_fusion: Literal["auto", "exact", "sampled", "none"] = Field(
        default="auto",
        description="How many frames the question's words look at again: all, a sample, or none. Frames whose pictures "
        "are not kept any more cannot be looked at: `exact` is refused then, the others go without them and say so.",
    )
    stride: Annotated[int, Field(ge=1, le=1_000_000)] | Literal["auto"] = Field(
        default=1, description="Every n-th frame; `auto`: the smallest stride that fits the model's context."
    )
    max_output_tokens: PositiveInt = 256
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stream: bool = Field(default=False, description="Answer as server-sent events.")


class Citation(Body):
    source_id: str
    start: Time
    end: Time
    time: Time
    score: float
    method: Literal["search", "attention"]
    frame_url: str | None = Field(description="Where its picture is served; null if that is not kept any more.")


class CoverageGap(Body):
    source_id: str
    start: Time
    end: Time
    reason: GapReason = Field(description=_GAP_REASON)


class Coverage(Body):
    """What an answer rests on."""

    slots_expected: int
    frames_used: int
    stride: int
    text_fusion: Literal["exact", "sampled", "none"] = Field(description="What was done, whatever was asked for.")
    fusion_frames: int = Field(description="Frames that the question's words looked at.")
    partial: bool = Field(
        default=False, description="True if the citations come from a search that had not all of the frames loaded yet."
    )
    gaps: list[CoverageGap]
    notes: list[str] = Field(default_factory=list, description="What else limits the answer, for people.")


class PromptDetails(Body):
    video_tokens: int
    cached_tokens: int = Field(description="Frame tokens that were read from memory instead of computed.")


class Usage(Body):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Timing(Body):
    load: int
    fusion: int
    first_token: int
    total: int


class Answer(Body):
    """An answer and what it rests on."""

    id: str
    object: Literal["answer"] = "answer"
    created: int
    model: str
    answer: str
    finish_reason: Literal["stop", "length"]
    citations: list[Citation]
    coverage: Coverage
    usage: Usage
    timing_ms: Timing


class AnswerCreated(Body):
    """The question is understood and its range holds frames: an answer follows."""

    id: str
    object: Literal["answer"] = "answer"
    created: int
    model: str


class AnswerDelta(Body):
    """The next piece of the answer."""

    delta: str


class AnswerCitations(Body):
    """Where in the used frames the answer is supported."""

    citations: list[Citation]


AnswerEvent = AnswerCreated | AnswerDelta | AnswerCitations | Answer
"""What becomes of a question, in this order: created, deltas, citations, and at last the answer whole."""

MAX_PICTURE_BYTES = 8 << 20


def _picture(value: object) -> bytes:
    """Take base64 or a data URL of a JPEG or PNG."""
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise PydanticCustomError("picture", "An image is base64 of a JPEG or PNG, or a data: URL of one.")
    text = value.partition(",")[2] if value.startswith("data:") else value
    if len(text) > MAX_PICTURE_BYTES * 4 // 3 + 4:
        raise PydanticCustomError("picture", "An image has at most 8 MiB.")
    try:
        picture = base64.b64decode(text, validate=True)
    except binascii.Error:
        raise PydanticCustomError("picture", "An image is base64 of a JPEG or PNG, or a data: URL of one.") from None
    if not picture.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")):
        raise PydanticCustomError("picture", "An image is a JPEG or a PNG.")
    return picture


Picture = Annotated[bytes, BeforeValidator(_picture, json_schema_input_type=str)]


class SearchRequest(Body):
    """Find the moments that look like a text or a picture."""

    model_config = example_config(
        {"query": "a white van", "sources": [{"stream_id": "str_0123456789ab"}], "top_k": 10, "min_score": 0.2}
    )

    query: Annotated[str, Field(min_length=1, max_length=2000)] | None = None
    image: Picture | None = None
    sources: list[SourceOrRange] = Field(
        min_length=1, max_length=64, description="Ids, or ranges as in questions; start and end may be left out."
    )
    top_k: Annotated[int, Field(ge=1, le=100)] = 10
    min_score: Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.query is None) == (self.image is None):
            raise PydanticCustomError("one_of_two", "Give either `query` or `image`.")
        return self


class MomentBody(Body):
    source_id: str
    start: Time
    end: Time
    time: Time
    score: float
    frame_url: str | None = Field(description="Where its picture is served; null if that is not kept any more.")


class SearchCoverage(Body):
    """How much of what is remembered of the ranges was searched."""

    frames_kept: int
    frames_searched: int
    partial: bool = Field(
        description="True if not all was searched: hours that are not loaded yet are read newest first, for a while."
    )


class MomentList(Body):
    object: Literal["list"] = "list"
    data: list[MomentBody]
    coverage: SearchCoverage
    has_more: Literal[False] = False
    next_cursor: None = None


# The service itself


class ModelBody(Body):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    tokens_per_frame: PositiveInt
    max_frames: int
    fingerprint: str
    untrained: bool
    note: str | None = None


class ModelList(Body):
    object: Literal["list"] = "list"
    data: list[ModelBody]
    has_more: Literal[False] = False
    next_cursor: None = None


class Health(Body):
    status: Literal["ok", "unavailable"]
    parts: dict[str, str] = Field(default_factory=dict, description="ok, unavailable, timeout or full, by part.")
    advice: dict[str, str] = Field(default_factory=dict, description="What to do about a part that is full, by part.")
