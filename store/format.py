"""What one frame token is made of, and the grid on which frames are kept."""

from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

BLOCK_SLOTS = 60  # slots of one Redis string: a minute at 1 fps
BLOCKS_PER_HOUR = 60
HOUR_SLOTS = (
    BLOCK_SLOTS * BLOCKS_PER_HOUR
)  # slots of one segment, one keyframe folder and one search shard: an hour at 1 fps
VECTOR_DTYPE = np.dtype("<f2")  # unit vectors lose nothing a search would notice in half precision
TIME_DTYPE = np.dtype("<i8")


def hours_of(start: int | None, end: int | None) -> tuple[int | None, int | None]:
    """Return the first and the last hour that slots [start, end) touch; None where a side is unbounded."""
    return None if start is None else start // HOUR_SLOTS, None if end is None else (end - 1) // HOUR_SLOTS


def hours_cut(start: int | None, end: int | None) -> list[int]:
    """Return the hours of which slots [start, end) touch some and leave some; None leaves a side unbounded."""
    return sorted({bound // HOUR_SLOTS for bound in (start, end) if bound is not None and bound % HOUR_SLOTS})


def span_of(hour: int) -> tuple[int, int]:
    """Return the slots [start, end) of an hour."""
    return hour * HOUR_SLOTS, (hour + 1) * HOUR_SLOTS


class TokenFormat(BaseModel):
    """The layout of a frame token (C2, D) and its search vector (P,), and the model that makes them.

    Tokens of different fingerprints never mix: the fingerprint is a part of every timeline key.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    fingerprint: str = Field(pattern=r"^[0-9a-f]{16}$", description="Hash of the weights, the dtype, C and D.")
    dtype: Literal["float16", "bfloat16", "float32"] = Field(description="The dtype the model computes in.")
    tokens_per_frame: int = Field(ge=1, description="C2: vectors of one frame.")
    width: int = Field(ge=1, description="D: width of the language model.")
    vector_width: int = Field(ge=0, description="P: width of the search vector; 0 if the model makes none.")

    @property
    def numpy_dtype(self) -> np.dtype[np.generic]:
        """The dtype of tokens in numpy, which has no bfloat16: its bit pattern travels as uint16."""
        names: dict[str, str] = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4"}
        return np.dtype(names[self.dtype])

    @property
    def token_shape(self) -> tuple[int, int]:
        """(C2, D)."""
        return self.tokens_per_frame, self.width

    @property
    def token_bytes(self) -> int:
        """Bytes of one frame's tokens."""
        return self.tokens_per_frame * self.width * self.numpy_dtype.itemsize

    @property
    def vector_bytes(self) -> int:
        """Bytes of one frame's search vector as it is kept."""
        return self.vector_width * VECTOR_DTYPE.itemsize

    @property
    def frame_bytes(self) -> int:
        """Bytes of all that is kept of one frame but its picture."""
        return self.token_bytes + self.vector_bytes + TIME_DTYPE.itemsize
