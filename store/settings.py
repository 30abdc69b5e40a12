"""Settings of the store."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, SecretStr

from store.room import Room


class StoreSettings(BaseModel):
    """Where memory is kept, and for how long what belongs to nothing may lie around."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    redis_url: str | None = Field(
        default=None,
        repr=False,  # it may carry a password
        description="Address of Redis or Valkey 6.2 or newer: redis://, rediss:// or unix://. "
        "Without one the service starts its own server in the data folder.",
    )
    data_dir: Path = Field(
        default=Path("data"), description="Folder of uploads, the secret key, the own Redis and, by default, segments."
    )
    segments_url: str | None = Field(
        default=None,
        description="Root of sealed hours and keyframes: a folder, s3://bucket/prefix, gs://... or any fsspec address. "
        "Without one the folder `segments` in the data folder.",
    )
    keyframes_url: str | None = Field(
        default=None,
        description="Root of keyframes whose hour is not over, a file each; later they go into one file beside the "
        "sealed hour. Without one that root. Where that is a bucket, name a folder that all nodes share, before the "
        "first frame: what lies loose elsewhere is not looked for.",
    )
    secret_key: SecretStr | None = Field(
        default=None,
        description="Fernet key that camera passwords are encrypted with: 32 bytes, url-safe base64. "
        "Without one a key is generated once and kept in the data folder.",
    )
    janitor_interval_s: PositiveFloat = Field(
        default=60.0, description="Seconds between two sweeps of retention and purge."
    )
    retention_max_hours: PositiveFloat | None = Field(
        default=None, description="Hours that frames of streams are kept at most, whatever a stream's own retention."
    )
    retention_max_keyframe_hours: PositiveFloat | None = Field(
        default=None, description="The same for keyframes alone; their frame tokens stay."
    )
    retention_max_bytes: PositiveInt | None = Field(
        default=None,
        description="Bytes of frame tokens of all streams and videos together, in Redis and in segments. "
        "Beyond it the oldest full hours go.",
    )
    retention_max_keyframe_bytes: PositiveInt | None = Field(
        default=None, description="The same for keyframes alone; their frame tokens stay."
    )
    seal_settle_s: PositiveFloat = Field(
        default=600.0, description="An hour of a stream is moved from Redis into a segment so long after its end."
    )
    upload_grace_s: PositiveFloat = Field(
        default=3600.0, description="An uploaded file that no video refers to is removed after so many seconds."
    )
    spare_bytes: NonNegativeInt = Field(
        default=256 << 20,
        description="Free bytes on the disks of the store below which no frames, files and sealed hours are written: "
        "leases, gaps and erasures need some.",
    )
    moments_max_bytes: PositiveInt = Field(
        default=5 << 29,
        description="Memory that search shards of one replica may hold: 2.8 MB a sealed hour of a camera, twice as "
        "much an open one. The newest hours are loaded first.",
    )
    moments_patience_s: PositiveFloat = Field(
        default=2.0,
        description="A search waits at most so long for hours that are not in memory yet, and says what it left out.",
    )

    @property
    def segments_root(self) -> str:
        """The fsspec address under which segments and keyframes lie."""
        return self.segments_url if self.segments_url is not None else str(self.data_dir.resolve() / "segments")

    @property
    def keyframes_root(self) -> str:
        """The fsspec address under which keyframes lie until their hour is over."""
        return self.segments_root if self.keyframes_url is None else self.keyframes_url

    @property
    def room(self) -> Room:
        """The disks of the data folder and, if they lie on one, of segments and keyframes."""
        roots = [root.rpartition("://") for root in dict.fromkeys((self.segments_root, self.keyframes_root))]
        local = [Path(path) for scheme, _, path in roots if scheme in ("", "file", "local")]
        return Room((self.data_dir.resolve(), *local), self.spare_bytes)

    @property
    def uploads_dir(self) -> Path:
        """The folder of uploaded files; a video's `file` is a name in it."""
        return self.data_dir / "uploads"
