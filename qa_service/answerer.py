"""From a question and time ranges to an answer that says what it rests on."""

import asyncio
import hashlib
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compressor_service.llava_mini import LlavaMini, Prefix, Sampling
from compressor_service.llava_mini.prompt import ControlTokenInQuestion, Prompt
from qa_service import clock
from qa_service.coverage import RangeReader, Reading, frame_url, write_slot, written_gaps
from qa_service.errors import (
    AnswerTimeout,
    EmptyAnswer,
    EmptyRange,
    KeyframesNotKept,
    QueueFull,
    RangeTooLong,
    ScalingUp,
    SearchUnavailable,
    ValidationFailed,
    inverted,
)
from qa_service.generation import Generation, ModelThread, PrefixCache
from qa_service.schemas import (
    Answer,
    AnswerCitations,
    AnswerCreated,
    AnswerDelta,
    AnswerEvent,
    Citation,
    Coverage,
    CoverageGap,
    PromptDetails,
    Question,
    SourceRange,
    Timing,
    Usage,
)
from qa_service.seams import MomentSearch, SearchSpace, TextFusion
from qa_service.selection import expected, smallest_stride, stratified, thinned
from qa_service.settings import QASettings
from store.connection import StoreUnavailable
from store.counters import Counters
from store.hot import FrameNotKept
from store.keyframes import Keyframes
from store.moments import Moment, Span
from store.slots import union
from store.source import Source
from store.sources import Sources
from store.timeline import Timeline
from store.token_cache import TokenCache

logger = logging.getLogger(__name__)

MAX_GAPS_IN_ERROR = 100
T = TypeVar("T")
Fusion = Literal["exact", "sampled", "none"]


@dataclass(frozen=True, slots=True)
class Used:
    """The frames of one range that an answer reads: slots (T,), and those of them whose keyframes are kept."""

    reading: Reading
    slots: NDArray[np.int64]
    pictured: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that is settled before the first event.

    `input_ids` (L,) hold the image placeholder once; `fusion_frames` are those whose patches the text looks at.
    """

    input_ids: tuple[int, ...]
    used: tuple[Used, ...]
    stride: int
    fusion: Fusion
    fusion_frames: tuple[tuple[str, tuple[int, ...]], ...]
    note: str | None = None

    @property
    def frames(self) -> int:
        return sum(len(one.slots) for one in self.used)

    @property
    def fusion_count(self) -> int:
        return sum(len(slots) for _, slots in self.fusion_frames)

    def without_picture(self, source_id: str, slot: int) -> "Plan":
        """Return the plan with one keyframe fewer to choose from."""
        left = [
            replace(one, pictured=one.pictured[one.pictured != slot]) if one.reading.source.id == source_id else one
            for one in self.used
        ]
        return replace(self, used=tuple(left))

    def head_key(self, ids_before: Sequence[int]) -> Hashable:
        """Name the rows in front of the question: the same frames, fused in the same way, behind the same text."""
        frames = tuple((one.reading.source.id, hashlib.sha256(one.slots.tobytes()).digest()) for one in self.used)
        return tuple(ids_before), frames, self.fusion, self.fusion_frames


@dataclass(frozen=True, slots=True)
class _Support:
    """What supports an answer: moments, from a search that was `partial` or not, and a note if there can be none."""

    moments: tuple[Moment, ...] = ()
    partial: bool = False
    note: str | None = None


class Stopwatch:
    """Time since the question came, against the time that it may take."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._began = time.monotonic()

    def ms(self) -> int:
        return round((time.monotonic() - self._began) * 1000)

    async def within(self, step: Awaitable[T]) -> T:
        """Wait for a step. Raises AnswerTimeout."""
        left_s = self._limit_s - (time.monotonic() - self._began)
        try:
            async with asyncio.timeout(max(left_s, 0)) as limit:
                return await step
        except TimeoutError:
            if not limit.expired():
                raise
            raise AnswerTimeout(
                f"The answer took longer than {self._limit_s:g} s; ask about a shorter range, or with a larger stride.",
                details={"timeout_s": self._limit_s},
            ) from None


class Answerer:
    """Answers questions from the timeline, one at a time; holds the language model and no camera."""

    def __init__(
        self,
        model: LlavaMini,
        prompt: Prompt,
        timeline: Timeline,
        keyframes: Keyframes,
        sources: Sources,
        fusion: TextFusion,
        space: SearchSpace,
        moments: MomentSearch,
        settings: QASettings,
        *,
        counters: Counters,
        model_name: str,
        now: Callable[[], float] = time.time,
    ) -> None:
        if timeline.format.fingerprint != model.fingerprint:
            raise ValueError(
                "the timeline holds tokens of another model: compressor and language model need the same checkpoint "
                "and dtype (TOKENLINE_MODEL__CHECKPOINT, TOKENLINE_MODEL__DTYPE)"
            )
        self._model = model
        self._prompt = prompt
        self._tokens = TokenCache(timeline, settings.token_cache_bytes)
        self._reader = RangeReader(timeline, keyframes, sources, live_lag_s=settings.live_lag_s, now=now)
        self._fusion = fusion
        self._space = space
        self._moments = moments
        self._settings = settings
        self._model_name = model_name
        self._prefixes = PrefixCache(settings.prefix_cache_bytes)
        self._thread = ModelThread(model, self._prefixes)
        self._counters = counters
        self._asked = 0

    @property
    def asked(self) -> int:
        """Questions that are being answered or wait for it."""
        return self._asked

    def max_frames(self, text_tokens: int, output_tokens: int) -> int:
        """Return the most frames that fit beside so many tokens of text and of answer."""
        config = self._model.config
        rows = min(config.context_rows, config.max_position_embeddings - output_tokens) - text_tokens
        fitting = rows // config.tokens_per_frame
        return fitting if self._settings.max_frames is None else min(fitting, self._settings.max_frames)

    async def forget(self, source_id: str) -> None:
        """Let go of what is held of a source, for frames of it were erased."""
        self._prefixes.forget(source_id)
        self._tokens.forget(source_id)

    def close(self) -> None:
        """End the model's thread."""
        self._thread.close()

    async def ask(self, question: Question) -> AsyncGenerator[AnswerEvent, None]:
        """Yield created, deltas, citations and the answer. Closing the generator ends the work.

        Raises ValidationFailed, BadTimeRange, EmptyRange, RangeTooLong, QueueFull, StreamNotFound and VideoNotFound
        before the first event; KeyframesNotKept, AnswerTimeout, EmptyAnswer and StoreUnavailable at any time.
        """
        if self._asked >= self._settings.max_waiting:
            raise QueueFull(f"{self._asked} questions are waiting already; ask again in a moment.")
        self._asked += 1
        events, outcome = self._answer(question), "cancelled"
        try:
            async for event in events:
                yield event
            outcome = "completed"
        except Exception:
            outcome = "failed"
            raise
        finally:
            self._asked -= 1
            await events.aclose()
            with suppress(StoreUnavailable):  # a count must not stand in the way of what it counts
                await self._counters.bump(f"answers_{outcome}")

    async def _answer(self, question: Question) -> AsyncGenerator[AnswerEvent, None]:
        watch = Stopwatch(self._settings.answer_timeout_s)
        plan = await watch.within(self._plan(question))
        created = AnswerCreated(id=f"ans_{uuid.uuid4().hex[:12]}", created=int(time.time()), model=self._model_name)
        yield created

        finding = asyncio.create_task(self._find(question.question, plan))
        try:
            plan, text = await watch.within(self._fused_text(plan, question.text_fusion))
            fusion_ms = watch.ms()
            generation = await watch.within(self._generation(question, plan, text))
            load_ms = watch.ms() - fusion_ms
            pieces: list[str] = []
            made, first_token_ms = 0, 0
            decoder = self._prompt.stream_decoder()
            ids = self._thread.stream(generation)
            try:
                while (one := await watch.within(anext(ids, None))) is not None:
                    made += 1
                    first_token_ms = first_token_ms or watch.ms()
                    if piece := decoder.feed(one):
                        pieces.append(piece)
                        yield AnswerDelta(delta=piece)
            finally:
                await ids.aclose()
            if piece := decoder.finish():
                pieces.append(piece)
                yield AnswerDelta(delta=piece)
            answer = "".join(pieces)
            if not answer.strip():
                raise EmptyAnswer("The model had nothing to say; ask in other words, or about another range.")
            support = await watch.within(finding)
        finally:
            finding.cancel()
            await asyncio.gather(finding, return_exceptions=True)
        citations = _citations(plan, support.moments)  # of the plan as it turned out: a picture may be gone meanwhile
        yield AnswerCitations(citations=citations)
        yield Answer(
            id=created.id,
            created=created.created,
            model=self._model_name,
            answer=answer,
            finish_reason="length" if made >= question.max_output_tokens else "stop",
            citations=citations,
            coverage=_coverage(plan, support),
            usage=self._usage(plan, made),
            timing_ms=Timing(load=load_ms, fusion=fusion_ms, first_token=first_token_ms, total=watch.ms()),
        )

    # Settling what is read

    async def _plan(self, question: Question) -> Plan:
        input_ids = self._input_ids(question)
        readings = [await self._read(place, wanted) for place, wanted in enumerate(question.sources)]
        if not any(len(reading.present) for reading in readings):
            raise await self._empty(readings)
        max_frames = self._room(question, input_ids)
        stride = smallest_stride(readings, max_frames) if question.stride == "auto" else question.stride
        used = tuple([await self._used(reading, stride) for reading in readings])
        frames = sum(len(one.slots) for one in used)
        if frames > max_frames:
            raise RangeTooLong(
                f"The ranges hold {frames} frames, the model reads {max_frames} at most: shorten them, or let `stride` "
                'skip frames ("auto" finds the smallest that fits).',
                param="sources[0].end" if len(used) == 1 else "sources",
                details={"frames": frames, "max_frames": max_frames},
            )
        return self._fused(Plan(input_ids, used, stride, "none", ()), question.text_fusion)

    async def _used(self, reading: Reading, stride: int) -> Used:
        slots = thinned(reading, stride)
        return Used(reading, slots, await self._reader.pictured(reading.source, slots))

    def _input_ids(self, question: Question) -> tuple[int, ...]:
        limit = self._settings.max_question_chars
        if len(question.question) > limit:
            raise ValidationFailed(
                f"The question has {len(question.question)} characters, at most {limit} are read.",
                param="question",
                details={"max_question_chars": limit},
            )
        if not question.question.strip():
            raise ValidationFailed("The question is blank.", param="question")
        if question.max_output_tokens > self._settings.max_output_tokens:
            raise ValidationFailed(
                f"At most {self._settings.max_output_tokens} tokens may be asked for.",
                param="max_output_tokens",
                details={"max_output_tokens": self._settings.max_output_tokens},
            )
        try:
            return tuple(self._prompt.build(question.question))
        except ControlTokenInQuestion:
            raise ValidationFailed(
                "The question holds one of the model's control words; leave it out.", param="question"
            ) from None

    def _room(self, question: Question, input_ids: Sequence[int]) -> int:
        room = self.max_frames(len(input_ids) - 1, question.max_output_tokens)
        if room < 1:
            raise ValidationFailed(
                f"The question has {len(input_ids) - 1} tokens with its prompt, and {question.max_output_tokens} are "
                "asked for: that leaves no room for a frame. Shorten the one or lower the other.",
                param="question",
            )
        return room

    async def _read(self, place: int, wanted: SourceRange) -> Reading:
        source, start_s, end_s = await self._reader.resolve(wanted)
        if end_s <= start_s:
            raise inverted(f"sources[{place}].end")
        return await self._reader.read(source, *clock.slots_between(start_s, end_s, source.fps))

    async def _empty(self, readings: Sequence[Reading]) -> EmptyRange:
        told: list[dict[str, Any]] = []
        for reading in readings:
            source = reading.source
            before, behind = await self._reader.nearest(source, reading.start, reading.end)
            told.append(
                {
                    "source_id": source.id,
                    "nearest_before": None if before is None else write_slot(source, before),
                    "nearest_after": None if behind is None else write_slot(source, behind),
                    "gaps": [gap.model_dump() for gap in written_gaps(reading.gaps[:MAX_GAPS_IN_ERROR], source)],
                    "note": reading.note,
                }
            )
        return EmptyRange(
            "Nothing is remembered of this range; `details` tells the nearest frames and why it is empty.",
            param="sources",
            details={"sources": told},
        )

    def _fused(self, plan: Plan, asked: str) -> Plan:
        """Settle which frames the text is fused with: of those whose keyframes are kept. Raises KeyframesNotKept."""
        frames, pictured = plan.frames, sum(len(one.pictured) for one in plan.used)
        if asked == "none":
            return replace(plan, fusion="none", fusion_frames=())
        if asked == "exact" and pictured < frames:
            raise KeyframesNotKept(
                f"Exact text fusion looks at the pictures of all {frames} frames again, and {pictured} of them are "
                'kept: ask with `text_fusion` "auto", or about a range whose pictures are kept.',
                param="text_fusion",
                details={"frames": frames, "keyframes": pictured},
            )
        note = None
        if pictured < frames:
            looked = "text fusion looked at those alone" if pictured else "so there is no text fusion"
            note = f"Of {frames} frames {pictured} have their pictures still; {looked}."
        count = frames if asked == "exact" else min(self._settings.fusion_frames, pictured)
        fusion: Fusion = "none" if not count else "exact" if count == frames else "sampled"  # all are no sample
        return replace(plan, fusion=fusion, fusion_frames=_fusion_frames(plan.used, count), note=note)

    # What the model reads

    async def _fused_text(self, plan: Plan, asked: str) -> tuple[Plan, Tensor]:
        """Return the rows of the prompt's text (L, D), averaged over fusion frames in float32, and which those were.

        Raises KeyframesNotKept.
        """
        while plan.fusion != "none":
            try:
                return plan, await self._mean(plan)
            except FrameNotKept as error:  # it went since the plan was made
                plan = self._fused(plan.without_picture(error.source_id, error.slot), asked)
        return plan, self._model.embed_text(torch.tensor(plan.input_ids))

    async def _mean(self, plan: Plan) -> Tensor:
        """Return the fused text (L, D), averaged over the plan's fusion frames. Raises FrameNotKept."""
        total: NDArray[np.float32] | None = None
        for frames in _batches(plan.fusion_frames, self._settings.fusion_batch_frames):
            part = await self._fusion.fuse_text(plan.input_ids, frames)
            total = part if total is None else total + part
        assert total is not None
        return torch.from_numpy(total / np.float32(plan.fusion_count))

    async def _generation(self, question: Question, plan: Plan, text: Tensor) -> Generation:
        ids = torch.tensor(plan.input_ids)
        text = text.to(self._model.device, self._model.dtype)
        before, tail = self._model.place_frames(text, ids, text[:0])
        key, turn = plan.head_key(plan.input_ids[: len(before)]), self._prefixes.turn
        head: Tensor | Prefix | None = self._prefixes.get(key)
        if head is None:
            tokens = [await self._tokens.read(one.reading.source.id, one.slots) for one in plan.used]
            head = await asyncio.to_thread(_joined, before, tokens)  # a day of frames is too much for the event loop
        return Generation(
            key=key,
            sources=frozenset(one.reading.source.id for one in plan.used),
            turn=turn,
            head=head,
            tail=tail,
            max_new_tokens=question.max_output_tokens,
            sampling=Sampling(temperature=question.temperature, top_p=question.top_p, seed=question.seed),
            stop_ids=self._prompt.stop_ids,
        )

    # What is told beside the answer

    async def _find(self, question: str, plan: Plan) -> "_Support":
        """Return the used moments that look most like the question, or a note why there are none."""
        if not self._settings.citations:
            return _Support()
        spans = [Span(one.reading.source.id, one.reading.start, one.reading.end) for one in plan.used]
        try:
            [vector] = await self._space.embed_text([question])
            found = await self._moments.search(
                vector, spans, top_k=self._settings.citations, slots=_slots_by_source(plan.used)
            )
        except (SearchUnavailable, QueueFull, ScalingUp) as error:
            logger.info("no citations: %s", error)
            return _Support(note=f"The answer has no citations: {error.message}")
        return _Support(found.moments, found.partial)

    def _usage(self, plan: Plan, made: int) -> Usage:
        video_tokens = plan.frames * self._model.config.tokens_per_frame
        prompt_tokens = len(plan.input_ids) - 1 + video_tokens
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=made,
            total_tokens=prompt_tokens + made,
            prompt_tokens_details=PromptDetails(video_tokens=video_tokens, cached_tokens=video_tokens),
        )


def _coverage(plan: Plan, support: _Support) -> Coverage:
    notes = [*(one.reading.note for one in plan.used), plan.note, support.note]
    return Coverage(
        slots_expected=sum(expected(one.reading, plan.stride) for one in plan.used),
        frames_used=plan.frames,
        stride=plan.stride,
        text_fusion=plan.fusion,
        fusion_frames=plan.fusion_count,
        partial=support.partial,
        gaps=[
            CoverageGap(source_id=one.reading.source.id, **gap.model_dump())
            for one in plan.used
            for gap in written_gaps(one.reading.gaps, one.reading.source)
        ],
        notes=[one for one in notes if one is not None],
    )


def _citations(plan: Plan, moments: Iterable[Moment]) -> list[Citation]:
    sources = {one.reading.source.id: one.reading.source for one in plan.used}
    pictured = {(one.reading.source.id, slot) for one in plan.used for slot in one.pictured.tolist()}
    return [
        _citation(sources[one.source_id], one, is_pictured=(one.source_id, one.slot) in pictured) for one in moments
    ]


def _citation(source: Source, moment: Moment, *, is_pictured: bool) -> Citation:
    return Citation(
        source_id=source.id,
        start=write_slot(source, moment.start),
        end=write_slot(source, moment.end),
        time=write_slot(source, moment.slot),
        score=round(moment.score, 4),
        method="search",
        frame_url=frame_url(source, moment.slot) if is_pictured else None,
    )


def _fusion_frames(used: Sequence[Used], count: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Choose `count` of the used frames whose keyframes are kept, spread over all ranges in their order."""
    if not count:
        return ()
    chosen = stratified(np.arange(sum(len(one.pictured) for one in used)), count)
    frames, first = [], 0
    for one in used:
        behind = first + len(one.pictured)
        own = chosen[(chosen >= first) & (chosen < behind)] - first
        if len(own):
            frames.append((one.reading.source.id, tuple(one.pictured[own].tolist())))
        first = behind
    return tuple(frames)


def _batches(frames: Sequence[tuple[str, tuple[int, ...]]], size: int) -> list[list[tuple[str, tuple[int, ...]]]]:
    """Cut frames (source id, slots) into batches of at most `size` slots."""
    batches: list[list[tuple[str, tuple[int, ...]]]] = []
    room = 0
    for source_id, slots in frames:
        at = 0
        while at < len(slots):
            if not room:
                batches.append([])
                room = size
            part = slots[at : at + room]
            batches[-1].append((source_id, part))
            at += len(part)
            room -= len(part)
    return batches


def _slots_by_source(used: Sequence[Used]) -> dict[str, NDArray[np.int64]]:
    slots: dict[str, NDArray[np.int64]] = {}
    for one in used:
        held = slots.get(one.reading.source.id)
        slots[one.reading.source.id] = one.slots if held is None else union(held, one.slots)
    return slots


def _joined(before: Tensor, tokens: Sequence[NDArray[np.generic]]) -> Tensor:
    """Put frame tokens (T, C2, D), as the store keeps them, behind rows (L, D) of text: (L + T*C2, D)."""
    return torch.cat((before, *(_as_tensor(one, before.dtype).flatten(0, 1).to(before.device) for one in tokens)))


def _as_tensor(tokens: NDArray[np.generic], dtype: torch.dtype) -> Tensor:
    """Take tokens bit for bit; numpy has no bfloat16, so those come as their bits."""
    return torch.tensor(tokens.view(np.int16)).view(torch.bfloat16) if dtype == torch.bfloat16 else torch.tensor(tokens)
