"""What answering needs of other services; whoever puts the parts together supplies it."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from qa_service.schemas import AnswerEvent, ModelBody, Question, StreamProbe, StreamProbeRequest
from store.moments import Found, Span


class TextFusion(Protocol):
    """The compressor's second look: text after the pre-fusion layers."""

    async def fuse_text(
        self, input_ids: Sequence[int], frames: Sequence[tuple[str, Sequence[int]]]
    ) -> NDArray[np.float32]:
        """Return the sum (L, D) over all frames (source id, slots) of the fused text of ids (L,)."""


class SearchSpace(Protocol):
    """The space in which texts, pictures and frames are compared: rows of unit length.

    Raises SearchUnavailable for texts when the checkpoint has no text half.
    """

    async def embed_text(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return (n, P)."""

    async def embed_image(self, pictures: Sequence[bytes]) -> NDArray[np.float32]:
        """Return (n, P) for JPEG or PNG files. Raises UnsupportedMedia for what cannot be decoded."""


class MomentSearch(Protocol):
    """Search over the frames of ranges."""

    async def search(
        self,
        vector: NDArray[np.float32],
        spans: Sequence[Span],
        *,
        top_k: int,
        min_score: float | None = None,
        slots: Mapping[str, NDArray[np.int64]] | None = None,
    ) -> Found:
        """Return the moments inside `spans` nearest to a vector (P,), best first; `slots` narrows them further."""


class Questions(Protocol):
    """Something that answers."""

    def ask(self, question: Question) -> AsyncGenerator[AnswerEvent, None]:
        """Yield what becomes of the question. Errors before the first event are those of the request."""


class AddressCheck(Protocol):
    """Says whether an address may be opened from here."""

    async def __call__(self, url: str) -> None:
        """Raises BadUrl with what to do about it."""


class MediaProbe(Protocol):
    """Says whether a file is a video. Called in a thread."""

    def __call__(self, path: Path) -> float | None:
        """Return its duration in seconds, None if the file does not say. Raises UnsupportedMedia."""


class CameraProbe(Protocol):
    """Looks at what a camera sends."""

    async def __call__(self, wanted: StreamProbeRequest) -> StreamProbe:
        """Raises BadUrl, RtspUnreachable, RtspAuthFailed and RtspTimeout."""


class ReadyProbe(Protocol):
    """Says whether a part of the service is ready."""

    async def __call__(self) -> None:
        """Return if it is; raise what stands in the way if not."""


class Describe(Protocol):
    """Tells which model answers."""

    async def __call__(self) -> ModelBody:
        """Return its facts. Raises ModelLoading."""
