"""Settings of ingest."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, field_validator, model_validator

from ingest.address import AddressPolicy


class IngestSettings(BaseModel):
    """How many sources one process reads, and how patient it is with each."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_sources: PositiveInt = Field(default=32, description="Sources that one ingest process owns at most.")
    tick_s: PositiveFloat = Field(default=0.5, description="Time between two hand-overs of frames to the compressor.")
    batch_frames: PositiveInt = Field(default=64, description="Frames handed over at once, of all sources together.")
    queue_frames: PositiveInt = Field(
        default=30, description="Frames of one source that may wait; a full queue drops a camera's oldest frame."
    )
    open_timeout_s: PositiveFloat = Field(default=10.0, description="Patience while a camera's connection opens.")
    read_timeout_s: PositiveFloat = Field(
        default=5.0, description="A camera is given up after it sent nothing for twice this time."
    )
    backoff_min_s: PositiveFloat = Field(default=0.5, description="First wait before a camera is tried again.")
    backoff_max_s: PositiveFloat = Field(default=10.0, description="Longest wait before a camera is tried again.")
    healthy_s: PositiveFloat = Field(default=30.0, description="A connection that lasted this long resets the waits.")
    auth_retry_s: PositiveFloat = Field(
        default=60.0,
        description="Wait after a refused password or a path that never was: cameras lock accounts that try too often.",
    )
    frozen_s: PositiveFloat = Field(
        default=120.0, description="A camera whose picture has not changed for so long is reported as degraded."
    )
    allowed_networks: tuple[str, ...] = Field(
        default=(),
        description="Networks (CIDR) whose private addresses cameras and downloads may have, such as 192.168.0.0/16.",
    )
    max_download_bytes: PositiveInt = Field(default=20 * 2**30, description="Largest file fetched from a URL.")
    download_timeout_s: PositiveFloat = Field(default=30.0, description="Patience with a silent download server.")
    max_pixels: PositiveInt = Field(
        default=8192 * 4320, description="Pictures with more pixels are refused instead of decoded."
    )
    max_video_s: PositiveFloat = Field(
        default=7 * 86400.0, description="Files that hold more seconds of video, or say so, are refused."
    )
    max_streams: PositiveInt = Field(default=64, description="Files with more streams (video, sound, ...) are refused.")
    look_timeout_s: PositiveFloat = Field(
        default=30.0, description="Longest first look at a file until its first picture, and longest work at a picture."
    )
    max_decoder_bytes: PositiveInt = Field(
        default=2 * 2**30, description="Memory of one process that looks at or reads files or cameras."
    )
    cameras_per_process: PositiveInt = Field(
        default=8, description="Cameras that one process reads: a decoder that crashes takes no others with it."
    )
    archives_at_once: PositiveInt = Field(
        default=2, description="Files that one ingest process reads side by side, each in a process of its own."
    )
    process_timeout_s: PositiveFloat = Field(
        default=8.0, description="A reading process that gives no answer for this long is ended and started again."
    )
    lease_s: PositiveFloat = Field(default=15.0, description="A process silent for this long loses its sources.")
    renew_s: PositiveFloat = Field(default=5.0, description="Time between two renewals of the leases.")
    poll_s: PositiveFloat = Field(default=2.0, description="Time between two looks for unowned sources.")
    report_s: PositiveFloat = Field(default=2.0, description="Time between two status reports of a source.")

    @field_validator("allowed_networks")
    @classmethod
    def _networks_parse(cls, networks: tuple[str, ...]) -> tuple[str, ...]:
        AddressPolicy(networks)
        return networks

    @model_validator(mode="after")
    def _renewals_beat_expiry(self) -> Self:
        if self.renew_s >= self.lease_s:
            raise ValueError(f"renew_s ({self.renew_s}) must be shorter than lease_s ({self.lease_s})")
        if self.backoff_min_s > self.backoff_max_s:
            raise ValueError(f"backoff_min_s ({self.backoff_min_s}) is above backoff_max_s ({self.backoff_max_s})")
        return self
