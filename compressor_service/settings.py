"""Settings of the model and of the compressor."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt


class ModelSettings(BaseModel):
    """Which model looks and answers. Compressor and language model are two halves of one checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    checkpoint: str | None = Field(
        default=None,
        min_length=1,
        description="Hub name or local folder of the model, such as ICTNLP/llava-mini-llama-3.1-8b. "
        "Without one the small embedded model.",
    )
    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(
        default=None,
        description="What the model computes in, and frame tokens are kept in: bfloat16, float16 or float32. "
        "Without one bfloat16, and float32 for the embedded model.",
    )


class CompressorSettings(BaseModel):
    """How many frames are looked at at once, and on what device."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="auto (cuda when there is one), cpu, cuda or cuda:N.",
    )
    max_batch_frames: PositiveInt = Field(default=32, description="Frames of any sources in one forward pass.")
    batch_wait_s: PositiveFloat = Field(default=0.02, description="Longest wait for a fuller batch.")
    threads: PositiveInt | None = Field(default=None, description="CPU threads of the model; torch chooses without.")
