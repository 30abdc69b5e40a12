"""What the embedded model costs on one core: a frame to look at, a question to answer, and its memory.

    python -m tests.benchmarks.bench_embedded [--frames 6 60 256] [--repeats 9]

One thread does everything: the compressor's encoder, and the answerer as it is served, on a real Redis and keyframe
folder. The frames are keyframes of the world that the model was trained on, one after the other. Medians of `repeats`.

"look at a frame" takes a keyframe's JPEG to its frame token and search vector; its ratio is that of a frame among 32 in
one pass to a frame alone. "answer about N frames" is a question about a range that was asked about before; its ratio is
that to the first question about the range. `first_token_ms` passes until the first word is said, `ms` until the last;
answers have a few words, and the text meets at most 32 frames (text fusion auto). `resident_mb` is the memory of the
process then, with both halves of the model, Python and torch.
"""

import argparse
import asyncio
import io
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from compressor_service.encoder import Encoder
from compressor_service.training.film import film_keyframes
from compressor_service.training.scene import draw_clip
from deploy.local import EMBEDDED_MODEL
from qa_service.answerer import Answerer
from qa_service.schemas import Answer, Question
from store.connection import EmbeddedRedis, connect
from tests.benchmarks.bench_questions import remember
from tests.qa_parts import open_parts

BATCH = 32
QUESTIONS = ("Was there a dog?", "Is the gate open or closed now?", "What is there now?", "Did a car come in?")


def keyframes() -> list[bytes]:
    """Return the keyframes of a minute's film."""
    files = []
    for picture in film_keyframes(draw_clip(np.random.default_rng(5), slots=60)):
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=95, subsampling=0)
        files.append(file.getvalue())
    return files


def resident_mb() -> float:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


def look(encoder: Encoder, pictures: Sequence[bytes], repeats: int) -> dict[str, object]:
    def spent_ms(count: int) -> float:
        spent = []
        for _ in range(repeats + 1):
            began = time.perf_counter()
            encoder.encode([encoder.decode(picture) for picture in pictures[:count]])
            spent.append(1000 * (time.perf_counter() - began) / count)
        return statistics.median(spent[1:])

    alone_ms, among_ms = spent_ms(1), spent_ms(BATCH)
    return {
        "case": f"look at a frame, {BATCH} in one pass",
        "ratio": among_ms / alone_ms,
        "against": "a frame alone",
        "first_token_ms": None,
        "ms": among_ms,
        "against_ms": alone_ms,
        "resident_mb": resident_mb(),
    }


async def ask(answerer: Answerer, video_id: str, frames: int, question: str) -> tuple[float, float]:
    """Return the milliseconds to the first word and in all."""
    asked = Question.model_validate({"question": question, "sources": [{"video_id": video_id, "end": frames}]})
    began = time.perf_counter()
    [done] = [event async for event in answerer.ask(asked) if isinstance(event, Answer)]
    assert done.coverage.frames_used == frames
    return done.timing_ms.first_token, 1000 * (time.perf_counter() - began)


async def measure(frames: Sequence[int], repeats: int) -> None:
    pictures = keyframes()
    with tempfile.TemporaryDirectory() as folder, EmbeddedRedis.start(Path(folder)) as server:
        async with connect(server.url) as redis, open_parts(redis, EMBEDDED_MODEL, Path(folder)) as parts:
            rows = [look(parts.encoder, pictures, repeats)]
            for count in frames:
                video_id = await remember(parts, pictures, count)
                spent = [
                    await ask(parts.answerer, video_id, count, question)
                    for question in islice(cycle(QUESTIONS), repeats + 1)
                ]
                first_ms, later = spent[0][1], spent[1:]
                ms = statistics.median(total for _, total in later)
                row = {
                    "case": f"answer about {count} frames",
                    "ratio": ms / first_ms,
                    "against": "the first question about them",
                    "first_token_ms": statistics.median(first for first, _ in later),
                    "ms": ms,
                    "against_ms": first_ms,
                    "resident_mb": resident_mb(),
                }
                rows.append(row)
    for row in rows:
        print(json.dumps({"benchmark": "embedded model on one core", **row}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--frames", nargs="+", type=int, default=[6, 60, 256])
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    asyncio.run(measure(options.frames, options.repeats))


if __name__ == "__main__":
    main()
