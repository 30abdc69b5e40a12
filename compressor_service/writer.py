"""Frames of many sources, looked at together and then remembered; and looked at again for a question. No Ray."""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from compressor_service.device import Device
from compressor_service.encoder import Encoder
from compressor_service.facts import BadPicture, Encoded
from ingest.frame import Frame, Receipt, SinkUnavailable
from store.counters import Counters
from store.finish import finish
from store.gaps import Gap, Gaps
from store.hot import Entry, FrameNotKept
from store.keyframes import Keyframes
from store.leases import Leases
from store.room import Room
from store.timeline import Timeline

_log = logging.getLogger(__name__)

PICTURES_AT_ONCE = 2  # that users send and that are decoded; each may need half a GB for a moment


@dataclass(frozen=True, slots=True)
class _Seen:
    """A frame, its token (C2, D) and its search vector (P,)."""

    frame: Frame
    tokens: NDArray[np.generic]
    vector: NDArray[np.float32]


class FrameWriter:
    """Encodes frames and keeps them: the keyframe first, so that a token is never without its picture."""

    def __init__(
        self,
        encoder: Encoder,
        timeline: Timeline,
        keyframes: Keyframes,
        leases: Leases,
        gaps: Gaps,
        counters: Counters,
        *,
        room: Room,
        frames_per_pass: int,
    ) -> None:
        self._encoder = encoder
        self._timeline = timeline
        self._keyframes = keyframes
        self._leases = leases
        self._gaps = gaps
        self._counters = counters
        self._room = room
        self._frames_per_pass = frames_per_pass
        self._device = Device()
        self._decoding = asyncio.Semaphore(PICTURES_AT_ONCE)

    async def put(self, requests: Sequence[Sequence[Frame]]) -> list[Receipt]:
        """Keep the frames of several requests; they are durable on return.

        A frame whose picture cannot be read is logged and recorded as a gap; the others are kept.
        Raises StoreUnavailable, StoreFull before anything is looked at, and SinkUnavailable when the device fails: the
        frames may be sent again after all of them.
        """
        await asyncio.to_thread(self._room.check)
        frames = [frame for request in requests for frame in request]
        newest = _newest_epochs(frames)
        try:
            seen = await self._device.run(
                self._look, [frame for frame in frames if frame.epoch == newest[frame.source_id]]
            )
        except (torch.AcceleratorError, torch.OutOfMemoryError) as error:
            raise SinkUnavailable(f"the device of the compressor failed with {type(error).__name__}") from error
        stale = await self._leases.stale(newest)
        lost = stale | await self._keep([one for one in seen if one.frame.source_id not in stale])
        await self._note_unreadable(frames, seen, newest)
        await self._counters.bump("frames_kept", sum(one.frame.source_id not in lost for one in seen))
        return [_receipt(request, newest, lost) for request in requests]

    async def _keep(self, seen: Sequence[_Seen]) -> frozenset[str]:
        """Write keyframes and tokens; return the sources whose owner was replaced meanwhile."""
        await self._keyframes.put_many({(one.frame.source_id, one.frame.slot): one.frame.keyframe for one in seen})
        lost = await self._timeline.append_many(_by_lease(seen))
        # Nobody would ever look for the pictures of a source that was purged just now, or of a time that was erased.
        # Where a new owner took over, the others may already be its own.
        unowned = frozenset(await self._leases.unowned(lost))
        for source_id in lost:
            for slot in sorted({one.frame.slot for one in seen if one.frame.source_id == source_id}):
                if source_id in unowned or await self._is_erased(source_id, slot):
                    await self._drop_picture(source_id, slot)
        return lost

    async def _is_erased(self, source_id: str, slot: int) -> bool:
        return any(gap.reason == "erased" for gap in await self._gaps.read(source_id, slot, slot + 1))

    async def _drop_picture(self, source_id: str, slot: int) -> None:
        if not len(await self._timeline.slots(source_id, slot, slot + 1)):
            await self._keyframes.erase(source_id, slot, slot + 1)

    async def _note_unreadable(self, frames: Sequence[Frame], seen: Sequence[_Seen], newest: Mapping[str, int]) -> None:
        """Record the slots whose pictures could not be read: to their sender they count as kept."""
        readable = {(one.frame.source_id, one.frame.slot) for one in seen}
        for frame in frames:
            if frame.epoch == newest[frame.source_id] and (frame.source_id, frame.slot) not in readable:
                gap = Gap(start_slot=frame.slot, end_slot=frame.slot + 1, reason="decode_error")
                await self._gaps.add(frame.source_id, frame.epoch, [gap])

    async def encode(self, keyframes: Sequence[bytes]) -> Encoded:
        """Look at keyframes as `put` does, and keep nothing. Raises SinkUnavailable when the device fails.

        This can wait: each pass begins when nothing else wants the device, so that live frames are not held up.
        """
        size = self._frames_per_pass
        try:
            passes = [
                await self._device.run_when_idle(self._encode, keyframes[start : start + size])
                for start in range(0, len(keyframes), size)
            ]
        except (torch.AcceleratorError, torch.OutOfMemoryError) as error:
            raise SinkUnavailable(f"the device of the compressor failed with {type(error).__name__}") from error
        return Encoded.join(passes) if passes else self._encode([])

    async def fuse_text(
        self, input_ids: Sequence[int], frames: Sequence[tuple[str, Sequence[int]]]
    ) -> NDArray[np.float32]:
        """Return the sum (L, D) of the fused text over the slots of every source.

        Raises FrameNotKept for a slot whose keyframe is not there, or cannot be decoded any more.
        The device is given back between passes, so that a long range does not hold up new frames.
        """
        total = np.zeros((len(input_ids), self._encoder.format.width), np.float32)
        for source_id, slots in frames:
            for start in range(0, len(slots), self._frames_per_pass):
                some = slots[start : start + self._frames_per_pass]
                keyframes = await self._keyframes.get_many(source_id, some)
                total += await self._device.run(self._fuse, input_ids, source_id, some, keyframes)
        return total

    async def embed_text(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return unit vectors (n, P). Raises SearchUnavailable."""
        return await self._device.run(self._encoder.embed_text, texts)

    async def embed_image(self, pictures: Sequence[bytes]) -> NDArray[np.float32]:
        """Return unit vectors (n, P). Raises BadPicture.

        Pictures that users send may be large: they are decoded beside the device, so that no live frame waits for them.
        """
        async with self._decoding:
            decoded = [await finish(asyncio.to_thread(self._encoder.decode, picture)) for picture in pictures]
        return await self._device.run(self._encoder.embed_image, decoded)

    def check_health(self) -> None:
        """Raise the error of the device after which no pass can be trusted, if there was one."""
        self._device.check_health()

    def _look(self, frames: Sequence[Frame]) -> list[_Seen]:
        encoded = self._encode([frame.keyframe for frame in frames])
        for frame, is_readable in zip(frames, encoded.readable, strict=True):
            if not is_readable:
                _log.warning("%s slot %d: keyframe dropped: it cannot be decoded", frame.source_id, frame.slot)
        readable = [frame for frame, is_readable in zip(frames, encoded.readable, strict=True) if is_readable]
        return [_Seen(*one) for one in zip(readable, encoded.tokens, encoded.vectors, strict=True)]

    def _fuse(
        self, input_ids: Sequence[int], source_id: str, slots: Sequence[int], keyframes: Sequence[bytes]
    ) -> NDArray[np.float32]:
        pictures = []
        for slot, keyframe in zip(slots, keyframes, strict=True):
            try:
                pictures.append(self._encoder.decode(keyframe))
            except BadPicture:
                _log.error("%s slot %d: its kept keyframe is damaged: answers do without it", source_id, slot)
                raise FrameNotKept(source_id, slot) from None
        return self._encoder.fuse_text(input_ids, pictures)

    def _encode(self, keyframes: Sequence[bytes]) -> Encoded:
        pictures = []
        readable = np.ones(len(keyframes), np.bool_)
        for place, keyframe in enumerate(keyframes):
            try:
                pictures.append(self._encoder.decode(keyframe))
            except BadPicture:
                readable[place] = False
        format = self._encoder.format
        if pictures:
            return Encoded(format.fingerprint, readable, *self._encoder.encode(pictures))
        no_tokens = np.empty((0, *format.token_shape), format.numpy_dtype)
        return Encoded(format.fingerprint, readable, no_tokens, np.empty((0, format.vector_width), np.float32))


def _newest_epochs(frames: Sequence[Frame]) -> dict[str, int]:
    """Return the newest lease of every source: a frame of an older one is lost already."""
    newest: dict[str, int] = {}
    for frame in frames:
        newest[frame.source_id] = max(frame.epoch, newest.get(frame.source_id, frame.epoch))
    return newest


def _by_lease(seen: Sequence[_Seen]) -> dict[tuple[str, int], list[Entry]]:
    batches: dict[tuple[str, int], list[Entry]] = defaultdict(list)
    for one in seen:
        frame = one.frame
        batches[frame.source_id, frame.epoch].append(Entry(frame.slot, frame.time_ms, one.tokens, one.vector))
    return batches


def _receipt(request: Sequence[Frame], newest: dict[str, int], lost: frozenset[str]) -> Receipt:
    refused = {frame.source_id for frame in request if frame.source_id in lost or frame.epoch < newest[frame.source_id]}
    return Receipt(lost=frozenset(refused))
