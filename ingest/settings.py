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
    backoff_max_s: PositiveFloat = Field(default=30.0, description="Longest wait before a camera is tried again.")
    healthy_s: PositiveFloat = Field(default=30.0, description="A connection that lasted this long resets the waits.")
    auth_retry_s: PositiveFloat = Field(
        default=60.0, description="Wait after a refused password or path: cameras lock accounts that try too often."
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
    look_timeout_s: PositiveFloat = Field(
        default=30.0, description="Longest first look at an uploaded file, until its first picture."
    )
    max_decoder_bytes: PositiveInt = Field(
        default=2 * 2**30, description="Memory that a first look at a file or a camera may take."
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
