"""What one vision token a picture costs in accuracy, and what pre-fusion gives back: the paper's central claim.

    python -m tests.benchmarks.bench_tokens [RUN] [--seeds 0 1 2] [--scenes 400] [--alignment 300] [--tuning 1200]

RUN (runs/yard) is a folder of `tokenline train` whose stages `tower` and `language` are done. From there three models
learn side by side, from the same pictures, clips of 4 to 8 s and questions, in the same order, in as many steps with
the same rates: `patches` puts all 49 projected patches of a picture before the language model, `token` the projected
compressed token alone, `fused` (LLaVA-Mini) the frame token that pre-fusion makes. As in the paper the language model
stands still at first (`alignment`) and then learns, too (`tuning`). It was schooled on one vector a frame, before all
three.

`accuracy` is over one question of every family to each of the test scenes of every seed, `low` to `high` its 95 %
interval over scenes, `seeds` the accuracy of each seed. `ratio` is the accuracy against that of `patches`. What a seed
gave is kept in RUN: the same command goes on with the next one.
"""

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compressor_service.training.alignment import load_network, only_questions
from compressor_service.training.answering import Answered, answer
from compressor_service.training.descent import Descent, Rates, frozen, half_precision
from compressor_service.training.draw import Camera, Picture, draw, jpeg_round
from compressor_service.training.examples import Texts, Writer
from compressor_service.training.eyes import Eyes
from compressor_service.training.network import Network, Shape, fit_to_features
from compressor_service.training.pictures import draw_pictures
from compressor_service.training.questions import (
    CLIP_FAMILIES,
    LONG_TEXTS,
    PICTURE_FAMILIES,
    Asked,
    Story,
    ask_clip,
    ask_picture,
)
from compressor_service.training.scene import View, draw_clip
from compressor_service.training.score import Score
from compressor_service.training.seeds import split_seed
from compressor_service.training.tokenizer import write_tokenizer
from compressor_service.training.tuning import mean_text

Vision = Literal["patches", "token", "fused"]
Group = Literal["pictures", "clips"]

SCHOOLED = "language.safetensors"  # the language model, as the stage `language` leaves it
PICTURES, CLIPS = 24, 5  # in a step: of either, by turns
QUESTIONS = 5
SLOTS = (4, 8)
ALIGNMENT = Rates(matrices=0.01, others=1.5e-3)
TUNING = Rates(matrices=0.004, others=5e-4, words=2e-4)


@dataclass(frozen=True, slots=True)
class Batch:
    """B scenes of T pictures each (B * T, H, W, 3), and n questions to each."""

    pictures: NDArray[np.uint8]
    slots: int
    texts: Texts


def see(network: Network, vision: Vision, features: Tensor, before: Tensor, texts: Texts) -> Answered:
    """Answer n questions to each of B scenes, given their features (B, T, N, V) and the ids that open the prompt."""
    scenes, slots = features.shape[:2]
    flat, plain = features.flatten(0, 1), network.embed(texts.ids)
    opened = network.embed(before).expand(scenes, -1, -1)
    if vision == "fused":
        tokens, fused_before, fused = network.fuse(
            network.see(flat),
            opened.repeat_interleave(slots, dim=0),
            plain.repeat_interleave(slots, dim=0),
        )
        opened = mean_text(fused_before, slots)
        own = only_questions(mean_text(fused, slots), plain, texts)
    else:
        rows = flat if vision == "patches" else network.compressor(flat)[0]
        tokens, own = network.projector(rows), plain
    frames = tokens.float().reshape(scenes, -1, opened.shape[-1])
    return answer(network, torch.cat((opened, frames), dim=1), own, texts)


class Learner:
    """One of the three models on its way."""

    def __init__(self, vision: Vision, run: Path, features: Tensor, steps: tuple[int, int]) -> None:
        self.vision, self._steps = vision, steps
        self.network, _ = load_network(Shape(), run, SCHOOLED)
        fit_to_features(self.network, features)
        frozen(self.network.language.parameters())
        self._descent = Descent(self.network.named_parameters(), ALIGNMENT, steps=steps[0])

    def step(self, number: int, features: Tensor, before: Tensor, texts: Texts) -> float:
        alignment, tuning = self._steps
        if number == alignment:
            for parameter in self.network.parameters():
                parameter.requires_grad_(True)
            self._descent = Descent(self.network.named_parameters(), TUNING, steps=tuning)
        with half_precision(torch.device("cpu")):
            answered = see(self.network, self.vision, features, before, texts)
        self._descent.step(number - alignment if number >= alignment else number, answered.loss)
        return float(answered.right.float().mean())


def batch(seed: int, number: int, writer: Writer) -> Batch:
    """Draw what is learned from in a step: questions with short texts or with long ones, that none be padded much."""
    random = np.random.default_rng((seed, number, 3))
    long = number % 6 < 2
    scenes, pictures = _draw(random, clips=number % 2 == 1, count=CLIPS if number % 2 else PICTURES)
    asked = []
    for scene in scenes:
        families = [family for family in _families(scene) if (family in LONG_TEXTS) == long]
        questions: list[Asked] = []
        while len(questions) < QUESTIONS:
            one = _ask(random, scene, families[random.integers(len(families))])
            questions += [] if one is None else [one]
        asked.append(questions)
    return Batch(pictures, len(pictures) // len(scenes), writer.write(asked))


def _draw(random: np.random.Generator, *, clips: bool, count: int) -> tuple[Sequence[View | Story], NDArray[np.uint8]]:
    """Draw scenes of as many slots each, and all their pictures."""
    if not clips:
        views, _, pictures = draw_pictures(random, count=count, films=0)
        return views, np.stack(pictures)
    slots = int(random.integers(SLOTS[0], SLOTS[1] + 1))
    stories = [Story.of(draw_clip(random, slots=slots, phase_s=float(random.random()))) for _ in range(count)]
    return stories, np.stack([picture for story in stories for picture in _filmed(random, story)])


def _filmed(random: np.random.Generator, story: Story) -> list[Picture]:
    camera = Camera.draw(random)
    return [jpeg_round(camera.take(draw(view, moment=4 * slot), random)) for slot, view in enumerate(story.views)]


def _families(scene: View | Story) -> Iterable[str]:
    return PICTURE_FAMILIES if isinstance(scene, View) else CLIP_FAMILIES


def _ask(random: np.random.Generator, scene: View | Story, family: str) -> Asked | None:
    return ask_picture(random, scene, family) if isinstance(scene, View) else ask_clip(random, scene, family)


def learn(run: Path, seed: int, steps: tuple[int, int], writer: Writer) -> list[Learner]:
    """Let the three learn side by side."""
    eyes, before = Eyes(run, torch.device("cpu")), torch.tensor(writer.before)
    torch.manual_seed(seed)
    first = eyes.features(batch(seed, 0, writer).pictures).flatten(0, 1)
    learners = [Learner(vision, run, first, steps) for vision in get_args(Vision)]
    recent = dict.fromkeys(get_args(Vision), 0.0)
    for number in range(sum(steps)):
        drawn = batch(seed, number, writer)
        features = eyes.features(drawn.pictures)
        features = features.view(-1, drawn.slots, *features.shape[1:])
        for learner in learners:
            right = learner.step(number, features, before, drawn.texts)
            recent[learner.vision] += 0.02 * (right - recent[learner.vision])
        if number % 50 == 49:
            told = ", ".join(f"{vision} {right:.2f}" for vision, right in recent.items())
            print(f"seed {seed}, step {number + 1} of {sum(steps)}: {told}", file=sys.stderr, flush=True)
    return learners


class Judged(NamedTuple):
    """A question to a test scene, and whether it was answered right."""

    vision: Vision
    group: Group
    scene: str
    right: bool


@torch.no_grad()
def examine(learner: Learner, run: Path, seed: int, scenes: int, writer: Writer) -> list[Judged]:
    """Ask one question of every family to test scenes.

    An answer counts as right if every token of it is the likeliest after the right ones before: greedy decoding says
    exactly this answer then.
    """
    eyes, before = Eyes(run, torch.device("cpu")), torch.tensor(writer.before)
    judged: list[Judged] = []
    for number in range(2 * scenes):
        random = np.random.default_rng(split_seed("test", seed, number))
        group: Group = "clips" if number % 2 else "pictures"
        [scene], pictures = _draw(random, clips=number % 2 == 1, count=1)
        asked = [one for family in _families(scene) if (one := _ask(random, scene, family)) is not None]
        with half_precision(torch.device("cpu")):
            features = eyes.features(pictures)[None]
            answered = see(learner.network, learner.vision, features, before, writer.write([asked]))
        judged += [Judged(learner.vision, group, f"{seed}/{number}", bool(right)) for right in answered.right[0]]
    return judged


def judge(run: Path, seed: int, steps: tuple[int, int], scenes: int, writer: Writer) -> list[Judged]:
    """Let the three learn and examine them, unless that was done before."""
    kept = run / f"one-token-{seed}-{steps[0]}-{steps[1]}-{scenes}.json"
    if kept.exists():
        return [Judged(*one) for one in json.loads(kept.read_text())]
    judged = [one for learner in learn(run, seed, steps, writer) for one in examine(learner, run, seed, scenes, writer)]
    kept.write_text(json.dumps(judged))
    return judged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/yard"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scenes", type=int, default=400)
    parser.add_argument("--alignment", type=int, default=300)
    parser.add_argument("--tuning", type=int, default=1200)
    options = parser.parse_args()
    if not (options.run / SCHOOLED).exists():
        print(f"left out: {options.run} holds no trained language model", file=sys.stderr)
        return
    writer = Writer(write_tokenizer(options.run))
    steps = (options.alignment, options.tuning)
    rights: defaultdict[tuple[Group, Vision], dict[int, list[tuple[str, bool]]]] = defaultdict(dict)
    for seed in options.seeds:
        for one in judge(options.run, seed, steps, options.scenes, writer):
            rights[one.group, one.vision].setdefault(seed, []).append((one.scene, one.right))
    for (group, vision), by_seed in sorted(rights.items(), key=lambda one: one[0][0]):
        score = Score.of(one for some in by_seed.values() for one in some)
        patches = Score.of(one for some in rights[group, "patches"].values() for one in some)
        row = {
            "benchmark": "one token",
            "case": f"{group}, {vision}",
            "ratio": score.accuracy / patches.accuracy if patches.accuracy else math.nan,
            "against": "patches",
            "accuracy": score.accuracy,
            "low": score.low,
            "high": score.high,
            "seeds": " ".join(f"{Score.of(some).accuracy:.3f}" for some in by_seed.values()),
            "questions": score.n,
        }
        print(json.dumps(row))


if __name__ == "__main__":
    main()
