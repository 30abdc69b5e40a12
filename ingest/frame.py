"""The message that leaves ingest, and the protocol of what it is sent to."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Frame:
    """The picture of one slot.

    `slot` counts the sampling grid: at 1 fps seconds since the Unix epoch for a stream, since its start for a video.
    `time_ms` is the capture time on the same clock, in milliseconds.
    `keyframe` is the JPEG at the model's input size: the model sees this picture, decoded, and nothing else.
    `epoch` is the lease epoch of the sender: a store refuses the frames of an owner that was replaced.
    """

    source_id: str
    slot: int
    time_ms: int
    keyframe: bytes = field(repr=False)
    epoch: int


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of the frames of one `put`: those of `lost` sources were refused, all others are kept."""

    lost: frozenset[str] = frozenset()


class SinkUnavailable(RuntimeError):
    """The sink cannot take frames now; the same frames may be sent again."""


class SinkFull(SinkUnavailable):
    """The sink has no room, until somebody makes some; the message says what to do."""


class FrameSink(Protocol):
    """Where ingest sends frames."""

    async def input_size_px(self) -> int:
        """Return the side of the square keyframe that the model reads. Raises SinkUnavailable."""

    async def put(self, frames: Sequence[Frame]) -> Receipt:
        """Remember frames of any sources; they are durable on return. Raises SinkUnavailable."""
