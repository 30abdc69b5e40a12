"""What ingest is given to do, what it reports back, and the protocol of the desk in between."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

CameraState = Literal["connecting", "online", "degraded", "reconnecting", "auth_failed"]
ArchiveStatus = Literal["processing", "ready", "failed"]
MissingReason = Literal["stream_down", "decode_error", "shed", "store_full"]


@dataclass(frozen=True, slots=True)
class Camera:
    """A live RTSP source. `url` holds no credentials: they travel beside it and are never shown."""

    url: str
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    transport: Literal["tcp", "udp"] = "tcp"


@dataclass(frozen=True, slots=True)
class Archive:
    """A recorded file: `path` names it inside the upload folder, or `url` says where to fetch it first."""

    path: str | None = None
    url: str | None = None

    def __post_init__(self) -> None:
        if (self.path is None) == (self.url is None):
            raise ValueError("an archive has either a path or a url")


@dataclass(frozen=True, slots=True)
class Damage:
    """What a file does not give: it holds `held_s` of its duration, `lost_s` have no picture, `errors` were met."""

    held_s: float
    lost_s: float
    errors: int


@dataclass(frozen=True, slots=True)
class Assignment:
    """One source this process now owns.

    `epoch` is the lease epoch that every frame and report must carry; `fps` the slots in a second;
    `last_slot` the newest slot that is already accounted for: work goes on after it. `damage` is what was found of a
    file up to there.
    """

    source_id: str
    epoch: int
    fps: float
    media: Camera | Archive
    last_slot: int | None = None
    damage: Damage | None = None


@dataclass(frozen=True, slots=True)
class Missing:
    """Slots [start_slot, end_slot) that will never get a frame, and why."""

    start_slot: int
    end_slot: int
    reason: MissingReason


@dataclass(frozen=True, slots=True)
class CameraReport:
    """How a camera is doing. Times are unix seconds; `lag_s` is capture to durable for the newest frame.

    `clock` says whether the camera's own clock gave the times of its frames, or their arrival. `reconnects_1h` and
    `frames_1h` count the last hour, `dropped_frames` everything shed since the claim.
    """

    state: CameraState
    reason: str | None
    since: float
    last_frame_at: float | None
    lag_s: float | None
    reconnects_1h: int
    frames_1h: int
    dropped_frames: int
    next_retry_at: float | None
    clock: Literal["camera", "arrival"]


@dataclass(frozen=True, slots=True)
class ArchiveReport:
    """How far a recorded file is; `progress` runs from 0 to 1 and `error` is set when `status` is failed."""

    status: ArchiveStatus
    progress: float
    eta_s: float | None
    duration_s: float | None
    error: str | None
    damage: Damage | None


class AssignmentDesk(Protocol):
    """Where ingest gets its work and reports. Every method raises ConnectionError while the desk is away."""

    async def claim(self, owner: str, room: int, archives: int) -> Sequence[Assignment]:
        """Take the leases of at most `room` sources that nobody owns, at most `archives` files among them."""

    async def renew(self, owner: str, held: Mapping[str, int]) -> frozenset[str]:
        """Prolong the leases `held` (source id to epoch); return the ids that are no longer ours."""

    async def release(self, owner: str, held: Mapping[str, int]) -> None:
        """Give the leases back, so that another owner may claim at once."""

    async def report(self, source_id: str, epoch: int, report: CameraReport | ArchiveReport) -> None:
        """Publish how the source is doing; ignored when the epoch is stale."""

    async def missing(self, source_id: str, epoch: int, missing: Sequence[Missing]) -> None:
        """Record slots that stay empty; ignored when the epoch is stale."""
