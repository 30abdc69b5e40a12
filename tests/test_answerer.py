"""Answers: what they read, how they are made, and what they say they rest on."""

import asyncio

import numpy as np
import pytest
from transformers import AutoTokenizer, LlamaConfig

from compressor_service.llava_mini.prompt import Prompt
from qa_service.answerer import Answerer
from qa_service.clock import parse_stream_time
from qa_service.errors import AnswerTimeout, EmptyAnswer, QueueFull, RangeTooLong, SearchUnavailable, ValidationFailed
from qa_service.schemas import Answer, AnswerCitations, AnswerCreated, AnswerDelta, Question
from qa_service.selection import stratified
from qa_service.settings import QASettings
from store.counters import Counters
from store.gaps import Gap
from store.moments import Moments
from store.segments import Segments
from store.settings import StoreSettings
from store.timeline import Timeline
from tests.qa_parts import QUESTION, Compressor, asked, keyframe, open_parts, stream_range, whole_model

SEGMENTS = Segments("memory://segments")  # where nothing is sealed


@pytest.fixture
async def parts(redis, checkpoint, tmp_path):
    async with open_parts(redis, checkpoint, tmp_path) as parts:
        yield parts


def answerer(parts, *, compressor=None, prompt=None, moments=None, **settings):
    model, usual = whole_model(parts.checkpoint)
    compressor = compressor or parts.compressor
    return Answerer(
        model,
        prompt or usual,
        parts.timeline,
        parts.keyframes,
        parts.sources,
        compressor,
        compressor,
        moments or parts.moments,
        QASettings(**settings),
        counters=Counters(parts.redis),
        model_name="small",
        now=lambda: parts.now,
    )


async def answer(parts, question, **settings):
    one = answerer(parts, **settings)
    events = [event async for event in one.ask(Question.model_validate(question))]
    one.close()
    assert isinstance(events[-1], Answer)
    return events[-1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
async def test_exact_fusion_gives_the_offline_model_s_answer_id_for_id(redis, checkpoint, tmp_path, dtype):
    settings = QASettings(prefix_cache_bytes=0)  # a prompt read in two parts rounds differently in its last bit
    async with open_parts(redis, checkpoint, tmp_path, settings, dtype=dtype) as parts:
        stream, base = await parts.stream(range(5))
        question = Question.model_validate(asked(stream_range(stream, base, base + 5), text_fusion="exact"))
        [*_, online] = [event async for event in parts.answerer.ask(question)]

    pictures = [keyframe(base + slot, parts.encoder.input_size_px) for slot in range(5)]
    expected = parts.offline(QUESTION, pictures, 12)
    _, prompt = whole_model(checkpoint, dtype)
    assert online.answer == prompt.decode(expected)
    assert online.usage.completion_tokens == len(expected) > 0
    assert (online.coverage.text_fusion, online.coverage.fusion_frames) == ("exact", 5)
    assert online.usage.prompt_tokens == len(prompt.build(QUESTION)) - 1 + 5
    assert online.usage.prompt_tokens_details.cached_tokens == online.usage.prompt_tokens_details.video_tokens == 5


async def test_ranges_may_be_left_open(parts):
    stream, base = await parts.stream([0, 1, 2])
    told = (await answer(parts, asked({"stream_id": stream.id}))).coverage
    assert (told.slots_expected, told.frames_used, told.notes) == (int(parts.now) - 5 - base, 3, [])
    video = await parts.video([0, 1, 2], duration_s=3.4)
    for wanted in ({"video_id": video.id}, {"video_id": video.id, "start": 0, "end": 3.4}):
        told = (await answer(parts, asked(wanted))).coverage
        assert (told.slots_expected, told.frames_used, told.notes, told.gaps) == (3, 3, [], [])
    beyond = (await answer(parts, asked({"video_id": video.id, "start": 0, "end": 9}))).coverage
    assert "beyond the video's end at 3.0 s" in beyond.notes[0]


async def test_events_come_in_order_and_their_pieces_are_the_answer(parts):
    stream, base = await parts.stream(range(3))
    question = Question.model_validate(asked(stream_range(stream, base, base + 3)))

    events = [event async for event in parts.answerer.ask(question)]

    kinds = [type(event) for event in events]
    assert kinds[0] is AnswerCreated
    assert kinds[-2:] == [AnswerCitations, Answer]
    assert set(kinds[1:-2]) == {AnswerDelta}
    assert "".join(event.delta for event in events[1:-2]) == events[-1].answer
    assert events[0].id == events[-1].id
    assert events[-2].citations == events[-1].citations
    timing = events[-1].timing_ms
    assert 0 <= timing.first_token <= timing.total


async def test_a_follow_up_from_the_kept_prefix_answers_as_one_without_it(parts):
    stream, base = await parts.stream(range(6))
    first = asked(stream_range(stream, base, base + 6), text_fusion="none")
    follow_up = {**first, "question": "and where is the red car?"}

    warm = answerer(parts)
    async for _ in warm.ask(Question.model_validate(first)):
        pass
    [*_, kept] = [event async for event in warm.ask(Question.model_validate(follow_up))]
    warm.close()
    cold = await answer(parts, follow_up, prefix_cache_bytes=0)

    assert kept.answer == cold.answer
    assert kept.usage == cold.usage


async def test_auto_fusion_is_exact_up_to_its_limit_and_sampled_beyond(parts):
    stream, base = await parts.stream(range(9))
    short, long = (asked(stream_range(stream, base, base + count)) for count in (3, 9))

    exact = await answer(parts, short, fusion_frames=3)
    sampled = await answer(parts, long, fusion_frames=3)

    assert (exact.coverage.text_fusion, exact.coverage.fusion_frames) == ("exact", 3)
    assert (sampled.coverage.text_fusion, sampled.coverage.fusion_frames) == ("sampled", 3)
    assert parts.compressor.fused[-1] == [(stream.id, (base + 1, base + 4, base + 7))]


async def test_no_fusion_asks_nothing_of_the_compressor(parts):
    stream, base = await parts.stream(range(3))
    plain = await answer(parts, asked(stream_range(stream, base, base + 3), text_fusion="none"))
    assert (plain.coverage.text_fusion, plain.coverage.fusion_frames) == ("none", 0)
    assert parts.compressor.fused == []


async def test_fusion_in_batches_sums_up_to_the_same_answer(parts):
    stream, base = await parts.stream(range(5))
    question = asked(stream_range(stream, base, base + 5), text_fusion="exact")
    assert (await answer(parts, question, fusion_batch_frames=2)).answer == (await answer(parts, question)).answer
    assert [sum(len(slots) for _, slots in frames) for frames in parts.compressor.fused[:3]] == [2, 2, 1]


def test_a_stratified_sample_is_spread_evenly_and_always_the_same():
    slots = np.arange(100, 200)
    assert stratified(slots, 4).tolist() == [112, 137, 162, 187]
    assert stratified(slots, 100).tolist() == slots.tolist()
    assert stratified(slots, 1000).tolist() == slots.tolist()
    for count in range(1, 100):
        chosen = stratified(slots, count)
        assert len(set(chosen.tolist())) == count
        assert np.ptp(np.diff(chosen)) <= 1 if count > 1 else True


async def test_coverage_tells_every_gap_and_its_reason(parts):
    stream, base = await parts.stream([0, 1, 4, 5, 9])
    await parts.sources.add_gaps(stream.id, None, [Gap(start_slot=base + 2, end_slot=base + 3, reason="shed")])

    told = (await answer(parts, asked(stream_range(stream, base - 5, base + 12)))).coverage

    assert (told.slots_expected, told.frames_used, told.stride) == (17, 5, 1)
    assert [(_slot(gap.start) - base, _slot(gap.end) - base, gap.reason) for gap in told.gaps] == [
        (-5, -1, "not_registered"),
        (-1, 0, "stream_down"),
        (2, 3, "shed"),
        (3, 4, "stream_down"),
        (6, 9, "stream_down"),
        (10, 12, "stream_down"),
    ]


def _slot(time):
    return int(parse_stream_time(time))


async def test_the_live_tail_and_the_future_are_not_expected(parts):
    stream, base = await parts.stream([0, 1, 2])
    now = int(parts.now)
    told = (await answer(parts, asked(stream_range(stream, base, now + 500)))).coverage
    assert told.slots_expected == now - 5 - base
    assert [gap.reason for gap in told.gaps] == ["stream_down"]
    assert "beyond now" in told.notes[0]


async def test_an_early_live_frame_is_used(parts):
    stream, base = await parts.stream()
    newest = int(parts.now) - 1
    await parts.keep(stream.id, [newest])
    told = (await answer(parts, asked(stream_range(stream, newest - 2, newest + 2)))).coverage
    assert (told.slots_expected, told.frames_used) == (3, 1)
    assert base < newest


async def test_a_video_that_is_still_read_expects_what_is_there_and_says_so(parts):
    video = await parts.video([0, 1, 2], duration_s=60, status="processing")
    told = (await answer(parts, asked({"video_id": video.id, "start": 0, "end": 60}))).coverage
    assert (told.slots_expected, told.frames_used, told.gaps) == (3, 3, [])
    assert "processing" in told.notes[0]


async def test_a_slot_in_which_a_video_shows_no_new_picture_is_not_missing(parts):
    video = await parts.video([0, 1, 4], duration_s=6.4)
    told = (await answer(parts, asked({"video_id": video.id}))).coverage
    assert (told.slots_expected, told.frames_used, told.gaps) == (3, 3, [])


async def test_what_could_not_be_decoded_of_a_video_is_a_gap(parts):
    video = await parts.video([0, 1, 4], duration_s=6.4)
    lost = [Gap(start_slot=2, end_slot=4, reason="decode_error"), Gap(start_slot=5, end_slot=6, reason="decode_error")]
    await parts.sources.add_gaps(video.id, None, lost)
    told = (await answer(parts, asked({"video_id": video.id}))).coverage
    assert (told.slots_expected, told.frames_used) == (6, 3)
    assert [(gap.start, gap.end, gap.reason) for gap in told.gaps] == [
        (2.0, 4.0, "decode_error"),
        (5.0, 6.0, "decode_error"),
    ]


async def test_a_stride_takes_the_first_kept_frame_of_every_stretch(parts):
    stream, base = await parts.stream([0, 1, 2, 5, 6, 7, 8])
    told = await answer(parts, asked(stream_range(stream, base, base + 9), stride=3, text_fusion="exact"))
    assert (told.coverage.slots_expected, told.coverage.frames_used, told.coverage.stride) == (3, 3, 3)
    assert parts.compressor.fused[-1] == [(stream.id, (base, base + 5, base + 6))]


async def test_too_many_frames_are_refused_or_thinned_as_the_question_says(parts):
    stream, base = await parts.stream(range(10))
    question = asked(stream_range(stream, base, base + 10))
    with pytest.raises(RangeTooLong) as refused:
        await answer(parts, question, max_frames=4)
    assert refused.value.details == {"frames": 10, "max_frames": 4}
    assert refused.value.param == "sources[0].end"

    thinned = (await answer(parts, {**question, "stride": "auto"}, max_frames=4)).coverage
    assert (thinned.stride, thinned.frames_used) == (3, 4)


async def test_several_sources_are_read_in_the_order_asked(parts):
    stream, base = await parts.stream(range(3))
    video = await parts.video(range(4), duration_s=4)
    question = asked({"video_id": video.id}, stream_range(stream, base, base + 3), text_fusion="exact")
    side = parts.encoder.input_size_px
    pictures = [keyframe(slot, side) for slot in [*range(4), *range(base, base + 3)]]
    _, prompt = whole_model(parts.checkpoint)
    assert (await answer(parts, question)).answer == prompt.decode(parts.offline(QUESTION, pictures, 12))


async def test_citations_lie_inside_the_used_frames(parts):
    stream, base = await parts.stream(range(20))
    told = await answer(parts, asked(stream_range(stream, base + 5, base + 15), stride=2))
    assert told.citations
    used = {base + slot for slot in range(5, 15, 2)}
    for citation in told.citations:
        assert parse_stream_time(citation.time) in used
        assert base + 5 <= parse_stream_time(citation.start) < parse_stream_time(citation.end) <= base + 15
        assert citation.frame_url == f"/v1/sources/{stream.id}/frames/{citation.time}"


class WithoutText(Compressor):
    """A compressor whose checkpoint has no text half."""

    async def embed_text(self, texts):
        raise SearchUnavailable("This checkpoint cannot be searched by text.")


async def test_without_a_text_half_the_answer_has_no_citations_and_says_why(parts):
    stream, base = await parts.stream(range(3))
    told = await answer(parts, asked(stream_range(stream, base, base + 3)), compressor=WithoutText(parts.writer))
    assert told.citations == []
    assert "no citations" in told.coverage.notes[0]


async def test_an_answer_tells_that_its_citations_come_from_a_part_of_the_frames(parts):
    stream, base = await parts.stream(range(3))
    question = asked(stream_range(stream, base, base + 3))
    told = await answer(parts, question, moments=Moments(parts.timeline, StoreSettings(moments_patience_s=1e-9)))
    assert (told.coverage.partial, told.citations) == (True, [])
    told = await answer(parts, question)
    assert (told.coverage.partial, len(told.citations) > 0) == (False, True)


async def test_the_same_seed_draws_the_same_answer(parts):
    stream, base = await parts.stream(range(3))
    question = asked(stream_range(stream, base, base + 3), temperature=1.5)
    once, again, other = [await answer(parts, {**question, "seed": seed}) for seed in (1, 1, 2)]
    assert once.answer == again.answer != other.answer


async def test_an_answer_that_was_cut_by_its_limit_says_so(parts):
    stream, base = await parts.stream(range(3))
    told = await answer(parts, asked(stream_range(stream, base, base + 3), max_output_tokens=2))
    assert (told.finish_reason, told.usage.completion_tokens) == ("length", 2)


def never_stopping(parts):
    """A prompt without stop ids: its answers go on to their limit."""
    tokenizer = AutoTokenizer.from_pretrained(parts.checkpoint, config=LlamaConfig())
    return Prompt(tokenizer, frozenset())


async def test_closing_the_events_stops_the_model_s_thread(parts):
    stream, base = await parts.stream(range(3))
    one = answerer(parts, prompt=never_stopping(parts), max_output_tokens=30000)
    question = Question.model_validate(asked(stream_range(stream, base, base + 3), max_output_tokens=30000))
    events = one.ask(question)
    assert isinstance(await anext(events), AnswerCreated)
    assert isinstance(await anext(events), AnswerDelta)

    await events.aclose()
    async with asyncio.timeout(20):  # 30,000 ids take minutes
        await asyncio.to_thread(one.close)
    assert one.asked == 0


async def test_an_answer_without_a_word_is_an_error(parts):
    stream, base = await parts.stream(range(3))
    model, _ = whole_model(parts.checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(parts.checkpoint, config=LlamaConfig())
    mute = Prompt(tokenizer, frozenset(range(model.config.vocabulary)))
    with pytest.raises(EmptyAnswer, match="nothing to say"):
        await answer(parts, asked(stream_range(stream, base, base + 3)), prompt=mute)


async def test_a_queue_that_is_full_takes_no_question(parts):
    stream, base = await parts.stream(range(3))
    one = answerer(parts, max_waiting=1)
    question = Question.model_validate(asked(stream_range(stream, base, base + 3)))
    first = one.ask(question)
    await anext(first)
    with pytest.raises(QueueFull):
        await anext(one.ask(question))
    await first.aclose()
    assert isinstance([event async for event in one.ask(question)][-1], Answer)
    one.close()


async def test_an_answer_that_takes_too_long_is_given_up(parts):
    stream, base = await parts.stream(range(3))
    endless = asked(stream_range(stream, base, base + 3), max_output_tokens=30000, text_fusion="none")
    limits = {"answer_timeout_s": 1, "max_output_tokens": 30000}
    with pytest.raises(AnswerTimeout, match="shorter range"):
        await answer(parts, endless, prompt=never_stopping(parts), **limits)


async def test_questions_that_cannot_be_put_are_refused(parts):
    stream, base = await parts.stream(range(3))
    wanted = stream_range(stream, base, base + 3)
    for bad, message in [
        ({"question": "x" * 100_000}, "at most 8000"),
        ({"question": " \n "}, "blank"),
        ({"question": "look <image> here"}, "control words"),
        ({"question": "<|eot_id|>"}, "control words"),
        ({"max_output_tokens": 5000}, "At most 1024"),
    ]:
        with pytest.raises(ValidationFailed, match=message):
            await answer(parts, {**asked(wanted), **bad})
    with pytest.raises(ValidationFailed, match="no room for a frame"):
        await answer(parts, {**asked(wanted), "max_output_tokens": 32760}, max_output_tokens=40000)


async def test_tokens_of_another_model_are_refused_at_the_start(parts):
    model, prompt = whole_model(parts.checkpoint)
    other = Timeline(parts.redis, parts.timeline.format.model_copy(update={"fingerprint": "0" * 16}), SEGMENTS)
    with pytest.raises(ValueError, match="same checkpoint"):
        Answerer(
            model,
            prompt,
            other,
            parts.keyframes,
            parts.sources,
            parts.compressor,
            parts.compressor,
            parts.moments,
            QASettings(),
            counters=Counters(parts.redis),
            model_name="small",
        )
