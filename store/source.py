"""What streams and videos are, how they are doing, and what cannot be of them."""

from typing import Literal, TypedDict

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

StreamState = Literal["connecting", "online", "degraded", "reconnecting", "auth_failed", "disabled"]
VideoState = Literal["queued", "processing", "ready", "failed"]


class SourceNotFound(LookupError):
    """No such source, or it was purged."""

    def __str__(self) -> str:
        return f"there is no source {self.args[0]}"


class StreamNotFound(SourceNotFound):
    """No such stream, or it was deleted."""

    def __str__(self) -> str:
        return f"there is no stream {self.args[0]}"


class VideoNotFound(SourceNotFound):
    """No such video, or it was deleted."""

    def __str__(self) -> str:
        return f"there is no video {self.args[0]}"


class StreamExists(ValueError):
    """Another stream has the same name or address."""

    def __init__(self, existing_id: str, field: Literal["name", "url"]) -> None:
        super().__init__(existing_id, field)
        self.existing_id = existing_id
        self.field = field

    def __str__(self) -> str:
        return (
            f"stream {self.existing_id} has this {self.field} already; change that one or choose another {self.field}"
        )


class KeyframesOutlive(ValueError):
    """Keyframes would be kept longer than the frame tokens they belong to."""

    def __init__(self, keyframe_hours: float, retention_hours: float) -> None:
        super().__init__(keyframe_hours, retention_hours)
        self.keyframe_hours = keyframe_hours
        self.retention_hours = retention_hours

    def __str__(self) -> str:
        return (
            f"keyframes cannot be kept for {self.keyframe_hours:g} hours when their frames are kept for "
            f"{self.retention_hours:g}: lower the one or raise the other"
        )


class StateConflict(RuntimeError):
    """The source is in a state that does not allow what was asked."""


class Frozen(BaseModel):
    # Inputs are hidden because one of them may be a password.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class NewStream(Frozen):
    """What a stream is registered with; one whose memory is imported has no url until it is given one."""

    name: str = Field(min_length=1, max_length=200)
    url: str | None = Field(min_length=1, max_length=2000, description="rtsp:// or rtsps:// without credentials.")
    username: str | None = None
    password: SecretStr | None = None
    transport: Literal["tcp", "udp"] = "tcp"
    fps: float = Field(default=1.0, gt=0, le=30, allow_inf_nan=False)
    labels: dict[str, str] = Field(default_factory=dict)
    retention_hours: float = Field(default=168.0, gt=0, allow_inf_nan=False)
    retention_bytes: int | None = Field(default=None, gt=0, description="Of frame tokens; None: no limit.")
    keyframe_hours: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="At most `retention_hours`; None: as long as those."
    )
    keyframe_bytes: int | None = Field(default=None, gt=0, description="None: no limit.")
    enabled: bool = True

    @model_validator(mode="after")
    def _can_be_opened(self) -> "NewStream":
        if self.enabled and self.url is None:
            raise ValueError("a stream without a url cannot be enabled")
        return self


class StreamChanges(TypedDict, total=False):
    """What may be changed of a stream; `password` None removes it."""

    name: str
    url: str
    username: str | None
    password: str | None
    transport: Literal["tcp", "udp"]
    fps: float
    labels: dict[str, str]
    retention_hours: float
    retention_bytes: int | None
    keyframe_hours: float | None
    keyframe_bytes: int | None
    enabled: bool


class Stream(Frozen):
    """A registered camera. `deleted`: no longer listed or recorded, its memory answers until retention takes it.

    One that was imported has no url until it is given one, and `created_at` is where its memory begins.
    """

    id: str
    name: str
    url: str | None
    username: str | None
    has_password: bool
    transport: Literal["tcp", "udp"]
    fps: float
    labels: dict[str, str]
    retention_hours: float
    retention_bytes: int | None = None
    keyframe_hours: float | None = None
    keyframe_bytes: int | None = None
    enabled: bool
    created_at: float
    deleted: bool = False


class StreamStatus(Frozen):
    """How a stream is doing; times in seconds since the Unix epoch."""

    state: StreamState
    since: float
    reason: str | None = None
    last_frame_at: float | None = None
    lag_s: float | None = None
    reconnects_1h: int = 0
    frames_1h: int = 0
    dropped_frames: int = 0
    next_retry_at: float | None = None
    clock: Literal["camera", "arrival"] | None = None


class NewVideo(Frozen):
    """What a video is registered with: a file in the upload folder, or the address to download it from."""

    name: str = Field(min_length=1, max_length=200)
    file: str | None = None
    url: str | None = None
    recorded_at: float | None = None
    fps: float = Field(default=1.0, gt=0, le=30, allow_inf_nan=False)


class Damage(Frozen):
    """What a file does not give: it holds `held_s` of its duration, `lost_s` have no picture, `errors` were met."""

    held_s: float
    lost_s: float
    errors: int


class VideoStatus(Frozen):
    """How far a video has been read: progress 0..1, durations in seconds."""

    status: VideoState = "queued"
    progress: float = Field(default=0.0, ge=0, le=1)
    eta_s: float | None = None
    duration_s: float | None = None
    error: str | None = None
    damage: Damage | None = None


class Video(Frozen):
    """An archived file and how far it has been read."""

    id: str
    name: str
    file: str | None
    url: str | None
    recorded_at: float | None
    fps: float
    created_at: float
    status: VideoState
    progress: float
    eta_s: float | None
    duration_s: float | None
    error: str | None
    damage: Damage | None

    @property
    def is_being_read(self) -> bool:
        """Whether frames of it may come still."""
        return self.status in ("queued", "processing")


Source = Stream | Video
