"""Settings of answering and of the REST surface."""

from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
)

Scope = Literal["streams:read", "streams:write", "ask", "admin"]


class QASettings(BaseModel):
    """How questions are answered."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="auto (cuda when there is one), cpu, cuda or cuda:N, for the language model.",
    )
    load_in_8bit: bool = Field(
        default=False, description="Hold the language model in 8 bits: half the memory. Needs the extra `quantized`."
    )
    system_text: str | None = Field(
        default=None,
        description="System text of every prompt. Empty: the one that the published checkpoint learned with.",
    )
    add_generation_prompt: bool = Field(
        default=True,
        description="End the prompt with the head of the assistant's turn. The published code does not.",
    )
    fusion_frames: PositiveInt = Field(
        default=32,
        description="Frames that `sampled` text fusion looks at again; up to so many it is exact, and so is `auto`.",
    )
    fusion_batch_frames: PositiveInt = Field(
        default=32, description="Frames in one call to the compressor for text fusion."
    )
    max_frames: PositiveInt | None = Field(
        default=None, description="Most frames in one answer. Empty: as many as the model's context holds."
    )
    max_question_chars: PositiveInt = Field(default=8000, description="Longest question, in characters.")
    max_output_tokens: PositiveInt = Field(default=1024, description="Most tokens that a request may ask for.")
    citations: NonNegativeInt = Field(default=5, description="Most citations of an answer.")
    prefix_cache_bytes: NonNegativeInt = Field(
        default=2 << 30,
        description="Memory for what the model keeps of timelines it has read, for follow-up questions.",
    )
    token_cache_bytes: NonNegativeInt = Field(
        default=1 << 30,
        description="Memory for frame tokens that a replica has read: only what is new is fetched again.",
    )
    max_waiting: PositiveInt = Field(
        default=16, description="Questions a replica takes in before it answers `queue_full`."
    )
    answer_timeout_s: PositiveFloat = Field(default=300, description="Longest time for one answer, queueing included.")
    live_lag_s: NonNegativeFloat = Field(
        default=5, description="A live frame is not expected in memory before it is this old."
    )


class ApiKey(BaseModel):
    """One API key, known by its hash alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=64)] = Field(description="Who holds it; stands in logs.")
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] = Field(description="SHA-256 of the key, in hex.")
    scopes: frozenset[Scope] = Field(description="What it may do.")
    sources: frozenset[str] | None = Field(default=None, description="The only sources it may see. Empty: all of them.")


class ApiSettings(BaseModel):
    """The REST surface."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: tuple[ApiKey, ...] = Field(
        default=(),
        description="API keys as JSON: name, sha256 of the key, scopes, sources. None: everything is allowed.",
    )

    requests_per_minute: PositiveInt | None = Field(
        default=None, description="Requests a minute that a key may make. Empty: no limit."
    )
    max_upload_bytes: PositiveInt = Field(default=2 << 30, description="Largest video file, in bytes.")
    max_import_bytes: PositiveInt = Field(default=1 << 40, description="Largest import, in bytes.")
    max_hour_bytes: PositiveInt = Field(
        default=1 << 29, description="Most bytes of an hour's frames, or of its keyframes, in an import."
    )
    max_body_bytes: PositiveInt = Field(default=16 << 20, description="Largest JSON body, in bytes.")
    max_wait_s: PositiveFloat = Field(default=60, description="Longest `?wait=` for the first frame of a stream.")
    sse_ping_s: PositiveFloat = Field(default=15, description="Pause after which an event stream sends a comment.")
    probe_timeout_s: PositiveFloat = Field(default=5, description="Time that a part has to say that it is ready.")

    @field_validator("keys")
    @classmethod
    def _told_apart(cls, keys: tuple[ApiKey, ...]) -> tuple[ApiKey, ...]:
        # The rate limit and repeated requests are kept by name.
        if len({key.name for key in keys}) < len(keys) or len({key.sha256 for key in keys}) < len(keys):
            raise ValueError("two API keys have the same name or the same sha256")
        return keys
