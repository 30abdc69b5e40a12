"""The Serve side of the compressor: gathers the frames of many callers into one forward pass."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from ray import serve

from compressor_service.facts import Encoded, ModelFacts
from compressor_service.settings import CompressorSettings
from ingest.frame import Frame, Receipt
from store.connection import connect
from store.counters import Counters
from store.gaps import Gaps
from store.keyframes import Keyframes
from store.leases import Leases
from store.room import Room
from store.segments import Segments
from store.timeline import Timeline

if TYPE_CHECKING:
    from compressor_service.llava_mini.checkpoint import Dtype


def _frames_in(requests: Sequence[Sequence[Frame]]) -> int:
    return sum(len(request) for request in requests)


class CompressorService:
    """Looks at frames and remembers them; looks again when a question asks for it."""

    def __init__(
        self,
        checkpoint: str,
        dtype: "Dtype",
        settings: CompressorSettings,
        redis_url: str,
        segments_url: str,
        keyframes_url: str,
        room: Room,
    ) -> None:
        # Here, because every process that names this class imports the module, and only its replicas need torch.
        from compressor_service.encoder import Encoder
        from compressor_service.writer import FrameWriter

        self._encoder = Encoder.load(checkpoint, dtype, settings)
        self._max_batch_frames = settings.max_batch_frames
        redis = connect(redis_url)
        self._writer = FrameWriter(
            self._encoder,
            Timeline(redis, self._encoder.format, Segments(segments_url)),
            Keyframes(redis, segments_url, keyframes_url),
            Leases(redis),
            Gaps(redis),
            Counters(redis),
            room=room,
            frames_per_pass=settings.max_batch_frames,
        )
        self._gather.set_max_batch_size(settings.max_batch_frames)  # type: ignore[attr-defined]
        self._gather.set_batch_wait_timeout_s(settings.batch_wait_s)  # type: ignore[attr-defined]

    async def put(self, frames: Sequence[Frame]) -> Receipt:
        """Remember frames of any sources; they are durable on return. Raises StoreUnavailable and StoreFull."""
        size = self._max_batch_frames
        lost: frozenset[str] = frozenset()
        # One after the other: a source is resumed behind its last slot, so no slot may be kept before those before it.
        for start in range(0, len(frames), size):
            lost |= (await self._gather(frames[start : start + size])).lost
        return Receipt(lost=lost)

    # Two at a time: while one caller's batch is written to the store, the next one has the device.
    @serve.batch(max_concurrent_batches=2, batch_size_fn=_frames_in)
    async def _gather(self, requests: list[Sequence[Frame]]) -> list[Receipt]:
        return await self._writer.put(requests)

    async def encode(self, keyframes: Sequence[bytes]) -> Encoded:
        """Look at keyframes and keep nothing, whenever nothing else wants the device. Raises SinkUnavailable."""
        return await self._writer.encode(keyframes)

    async def fuse_text(
        self, input_ids: Sequence[int], frames: Sequence[tuple[str, Sequence[int]]]
    ) -> NDArray[np.float32]:
        """Return the sum (L, D) of the fused text over the slots of every source. Raises FrameNotKept."""
        return await self._writer.fuse_text(input_ids, frames)

    async def embed_text(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return unit vectors (n, P). Raises SearchUnavailable."""
        return await self._writer.embed_text(texts)

    async def embed_image(self, pictures: Sequence[bytes]) -> NDArray[np.float32]:
        """Return unit vectors (n, P). Raises BadPicture."""
        return await self._writer.embed_image(pictures)

    async def describe(self) -> ModelFacts:
        """Return what model looks, and how its tokens are kept."""
        return self._encoder.describe()

    def check_health(self) -> None:
        """Serve's own check: raises when the device is lost, which a fresh replica mends."""
        self._writer.check_health()
