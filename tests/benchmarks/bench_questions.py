"""The second question about a range, answered from the timeline, against looking at every frame again.

    python -m tests.benchmarks.bench_questions [--models small larger] [--frames 60 600 3600] [--repeats 3]

Both sides have the same weights, process, threads and pictures, and write as many tokens. Ours is the answerer as it is
served, citations included, on a real Redis and keyframe folder; the first question about the range is not counted. The
other side does what the published code does: every frame alone through the whole model with the question's text, the
text averaged, then the language model. It has its JPEGs in memory, and no video to decode.

`fusion_share` is the part of our time until the question's text is fused with its sample of frames; `over_first` is our
time over that of the first question about the range; "prefix not kept" is a replica that has forgotten the range.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from compressor_service.encoder import Encoder
from compressor_service.llava_mini import LlavaMini
from compressor_service.llava_mini.prompt import Prompt
from qa_service.answerer import Answerer
from qa_service.schemas import Answer, Question
from qa_service.settings import QASettings
from store.connection import EmbeddedRedis, StoreRedis, connect
from store.hot import Entry
from store.leases import Leases
from tests.benchmarks.film import film
from tests.benchmarks.larger_model import write_larger_checkpoint
from tests.qa_parts import Parts, open_parts
from tests.untrained import write_untrained_checkpoint

OUTPUT_TOKENS = 32
CHUNK = 600  # frames of one write
Fusion = Literal["sampled", "none"]


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint to measure with; beyond `looked_at` frames the other side's looking is extrapolated."""

    case: str
    write: Callable[[Path], Path]
    pictures: int
    looked_at: int


MODELS = {
    "small": Model("small seeded model, untrained, 49 patches", write_untrained_checkpoint, 600, 3600),
    "larger": Model("larger seeded model, untrained, 576 patches", write_larger_checkpoint, 60, 60),
}


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds of one answer, and those of them until its text was fused."""

    total_s: float
    fusion_s: float
    tokens: int


class FrameByFrame:
    """Answers without a memory: every frame of the range through the whole model, for every question."""

    def __init__(self, checkpoint: Path, encoder: Encoder, pictures: Sequence[bytes], looked_at: int) -> None:
        self._model = LlavaMini.from_pretrained(checkpoint, "float32", "cpu", frames_per_pass=1)
        self._prompt = Prompt.from_pretrained(checkpoint)
        self._encoder = encoder
        self._pictures = pictures
        self._looked_at = looked_at

    def answer_s(self, question: str, frames: int, tokens: int) -> float:
        """Return the seconds of one answer; looking is extrapolated beyond `looked_at` frames, writing is not."""
        looked_at = min(frames, self._looked_at)
        ids = torch.tensor([self._prompt.build(question)])
        started = time.perf_counter()
        rows = self._model.inputs_embeds(ids, self._pixels(looked_at)[None])
        looked = time.perf_counter()
        if looked_at < frames:
            rows = self._repeated(rows, ids[0], frames, looked_at)
        began = time.perf_counter()
        self._model.generate(rows, tokens)
        return (looked - started) * frames / looked_at + time.perf_counter() - began

    def _pixels(self, frames: int) -> Tensor:
        count = len(self._pictures)
        return torch.stack([self._encoder.decode(self._pictures[slot % count]) for slot in range(frames)])

    def _repeated(self, rows: Tensor, ids: Tensor, frames: int, looked_at: int) -> Tensor:
        """Repeat the frame tokens in rows (1, S, D) until there are enough for `frames`."""
        first = int((ids < 0).nonzero())
        seen = rows[:, first : first + looked_at]
        times = -(-frames // looked_at)
        return torch.cat((rows[:, :first], seen.repeat(1, times, 1)[:, :frames], rows[:, first + looked_at :]), dim=1)


async def remember(parts: Parts, pictures: Sequence[bytes], frames: int) -> str:
    """Keep `frames` frames, the pictures again and again, and return the id of their video."""
    decoded = [parts.encoder.decode(picture) for picture in pictures]
    encoded = [parts.encoder.encode(decoded[first : first + 32]) for first in range(0, len(decoded), 32)]
    seen = [one for tokens, vectors in encoded for one in zip(tokens, vectors, strict=True)]
    video = await parts.video((), duration_s=frames)
    epoch = await Leases(parts.redis).acquire(video.id, "bench", 3600)
    assert epoch is not None
    for first in range(0, frames, CHUNK):
        slots = range(first, min(first + CHUNK, frames))
        await parts.keyframes.put_many({(video.id, slot): pictures[slot % len(pictures)] for slot in slots})
        entries = [Entry(slot, slot * 1000, *seen[slot % len(seen)]) for slot in slots]
        await parts.timeline.append(video.id, epoch, entries)
    return video.id


async def answer(answerer: Answerer, video_id: str, frames: int, fusion: Fusion, question: str) -> Spent:
    asked = Question.model_validate(
        {
            "question": question,
            "sources": [{"video_id": video_id, "start": 0, "end": frames}],
            "text_fusion": fusion,
            "max_output_tokens": OUTPUT_TOKENS,
        }
    )
    started = time.perf_counter()
    [done] = [event async for event in answerer.ask(asked) if isinstance(event, Answer)]
    spent = time.perf_counter() - started
    assert done.coverage.frames_used == frames
    return Spent(spent, done.timing_ms.fusion / 1000, done.usage.completion_tokens)


async def measure(
    redis: StoreRedis, model: Model, folder: Path, frames: Sequence[int], repeats: int
) -> list[dict[str, object]]:
    checkpoint = model.write(folder / "model")
    cold = QASettings(prefix_cache_bytes=0)
    async with open_parts(redis, checkpoint, folder) as parts, open_parts(redis, checkpoint, folder, cold) as forgetful:
        pictures = film(model.pictures, parts.encoder.input_size_px)
        video_id = await remember(parts, pictures, max(frames))
        other = FrameByFrame(checkpoint, parts.encoder, pictures, model.looked_at)
        return [
            row
            for count in frames
            for row in await compare(model, parts.answerer, forgetful.answerer, other, video_id, count, repeats)
        ]


async def compare(
    model: Model,
    warm: Answerer,
    cold: Answerer,
    other: FrameByFrame,
    video_id: str,
    frames: int,
    repeats: int,
) -> list[dict[str, object]]:
    questions = [f"what is there beside the road in part {number}?" for number in range(repeats + 1)]
    ours: dict[tuple[Fusion, str], list[Spent]] = {
        (fusion, kept): [] for fusion in ("sampled", "none") for kept in ("kept", "not kept")
    }
    theirs_s: list[float] = []
    extrapolated = frames > model.looked_at
    times = 1 if extrapolated else min(repeats, max(1, 1800 // frames))
    for asked, question in enumerate(questions):  # in turns, so that a busy machine slows both alike
        for (fusion, kept), spent in ours.items():
            spent.append(await answer(warm if kept == "kept" else cold, video_id, frames, fusion, question))
        if 1 <= asked <= times:
            tokens = min(spent[-1].tokens for spent in ours.values())
            theirs_s.append(other.answer_s(question, frames, tokens))
    their_median_s = statistics.median(theirs_s)
    return [
        {
            "benchmark": "second question",
            "case": f"{model.case}: {frames} frames, text fusion {fusion}, prefix {kept}",
            "ratio": statistics.median(one.total_s for one in spent[1:]) / their_median_s,
            "against": "every frame alone through the whole model again",
            "fusion_share": statistics.median(one.fusion_s / one.total_s for one in spent[1:]),
            "over_first": statistics.median(one.total_s for one in spent[1:]) / spent[0].total_s,
            "their_frames": f"{model.looked_at} measured, extrapolated" if extrapolated else f"{frames} measured",
            "repeats": f"{repeats} against {times}",
            "ours_s": statistics.median(one.total_s for one in spent[1:]),
            "theirs_s": their_median_s,
        }
        for (fusion, kept), spent in ours.items()
    ]


async def run(names: Sequence[str], frames: Sequence[int], repeats: int) -> None:
    for name in names:
        with tempfile.TemporaryDirectory() as folder, EmbeddedRedis.start(Path(folder)) as server:
            async with connect(server.url) as redis:
                for row in await measure(redis, MODELS[name], Path(folder), frames, repeats):
                    print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--frames", nargs="+", type=int, default=[60, 600, 3600])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    asyncio.run(run(options.models, options.frames, options.repeats))


if __name__ == "__main__":
    main()
