"""Settings of the compressor."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt


class CompressorSettings(BaseModel):
    """Which model looks at the frames, and how many at once."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    checkpoint: str = Field(
        default="ICTNLP/llava-mini-llama-3.1-8b", min_length=1, description="Hub name or local folder of the model."
    )
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        default="bfloat16", description="What the model computes in, and frame tokens are kept in."
    )
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="auto (cuda when there is one), cpu, cuda or cuda:N.",
    )
    max_batch_frames: PositiveInt = Field(default=32, description="Frames of any sources in one forward pass.")
    batch_wait_s: PositiveFloat = Field(default=0.02, description="Longest wait for a fuller batch.")
    threads: PositiveInt | None = Field(default=None, description="CPU threads of the model; torch chooses without.")
