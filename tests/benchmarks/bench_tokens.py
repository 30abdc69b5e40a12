"""What one vision token a picture costs in accuracy, and what pre-fusion gives back: the paper's central claim.

    python -m tests.benchmarks.bench_tokens [RUN] [--seeds 0 1 2] [--scenes 400] [--alignment 400] [--tuning 800]

RUN is a folder of `tokenline train` whose stages `tower` and `language` are done; without one it is `schooled` beside
this file, which holds what these stages of the embedded model left. From there three models learn side by side, from
the same pictures, clips of 4 to 8 s and questions, in the same order, in as many steps with the same rates: `patches`
puts all 49 projected patches of a picture before the language model, `token` the projected compressed token alone,
`fused` (LLaVA-Mini) the frame token that pre-fusion makes. As in the paper the language model stands still at first
(`alignment`) and then learns, too (`tuning`). It was schooled on one vector a frame, before all three.

`accuracy` is over one question of every family to each of the test scenes of every seed, `low` to `high` its 95 %
interval over scenes, `seeds` the accuracy of each seed. `ratio` is the accuracy against that of `patches`. A seed takes
about an hour on one core, and is kept in runs/one-token-SEED: the same command goes on after a stop.
"""

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from compressor_service.training.alignment import only_questions
from compressor_service.training.answering import Answered, answer
from compressor_service.training.descent import Descent, Rates, frozen, half_precision
from compressor_service.training.draw import Camera, Picture, draw, jpeg_round
from compressor_service.training.examples import Texts, Writer
from compressor_service.training.eyes import Eyes
from compressor_service.training.language import SCHOOLED, load_network
from compressor_service.training.network import Network, Shape, fit_to_features
from compressor_service.training.pictures import draw_pictures
from compressor_service.training.progress import Display
from compressor_service.training.questions import (
    CLIP_FAMILIES,
    LONG_TEXTS,
    PICTURE_FAMILIES,
    Asked,
    Story,
    ask_clip,
    ask_picture,
)
from compressor_service.training.runner import StagePlan, run
from compressor_service.training.scene import View, draw_clip
from compressor_service.training.score import Score
from compressor_service.training.seeds import split_seed
from compressor_service.training.tokenizer import write_tokenizer
from compressor_service.training.tuning import mean_text

Vision = Literal["patches", "token", "fused"]
Group = Literal["pictures", "clips"]

JUDGED = "judged.json"
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


class Judged(NamedTuple):
    """A question to a test scene, and whether it was answered right."""

    vision: Vision
    group: Group
    scene: str
    right: bool


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
    """One of the three models in one of its two stages."""

    def __init__(self, vision: Vision, network: Network, rates: Rates, steps: int) -> None:
        self.vision, self.network = vision, network
        self._descent = Descent(network.named_parameters(), rates, steps=steps)

    def step(self, number: int, features: Tensor, before: Tensor, texts: Texts) -> float:
        with half_precision(torch.device("cpu")):
            answered = see(self.network, self.vision, features, before, texts)
        self._descent.step(number, answered.loss)
        return float(answered.right.float().mean())

    def state(self) -> dict[str, Any]:
        return {"network": self.network.state_dict(), "descent": self._descent.state()}

    def restore(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self._descent.restore(state["descent"])


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int
    alignment: int
    tuning: int
    scenes: int


class SideBySide:
    """The three learn from the same batches, one step each."""

    prefetch = False

    def __init__(self, settings: Settings, run: Path, folder: Path, name: Literal["alignment", "tuning"]) -> None:
        self.name, self.steps = name, getattr(settings, name)
        self._settings, self._run = settings, run
        self._eyes, self._writer = Eyes(run, torch.device("cpu")), Writer(write_tokenizer(folder))
        self._before = torch.tensor(self._writer.before)
        self._learners = [self._learner(vision, folder) for vision in get_args(Vision)]

    def _learner(self, vision: Vision, folder: Path) -> Learner:
        if self.name == "tuning":
            network = load_network(Shape(), self._run, SCHOOLED)
            network.load_state_dict(torch.load(folder / _aligned(vision), weights_only=True))
            return Learner(vision, network, TUNING, self.steps)
        network = load_network(Shape(), self._run, SCHOOLED)
        fit_to_features(network, self._eyes.features(self.batch(0).pictures).flatten(0, 1))
        frozen(network.language.parameters())
        return Learner(vision, network, ALIGNMENT, self.steps)

    def batch(self, number: int) -> Batch:
        begun = self._settings.alignment if self.name == "tuning" else 0
        return draw_batch(self._settings.seed, begun + number, self._writer)

    def step(self, number: int, batch: Batch) -> dict[str, float]:
        features = self._eyes.features(batch.pictures)
        features = features.view(-1, batch.slots, *features.shape[1:])
        return {learner.vision: learner.step(number, features, self._before, batch.texts) for learner in self._learners}

    def state(self) -> dict[str, Any]:
        return {learner.vision: learner.state() for learner in self._learners}

    def restore(self, state: dict[str, Any]) -> None:
        for learner in self._learners:
            learner.restore(state[learner.vision])

    def finish(self, folder: Path) -> None:
        for learner in self._learners:
            if self.name == "alignment":
                torch.save(learner.network.state_dict(), folder / _aligned(learner.vision))
        if self.name == "tuning":
            judged = [one for learner in self._learners for one in self._examine(learner)]
            (folder / JUDGED).write_text(json.dumps(judged))

    @torch.no_grad()
    def _examine(self, learner: Learner) -> list[Judged]:
        """Ask one question of every family to test scenes.

        An answer counts as right if every token of it is the likeliest after the right ones before: greedy decoding
        says exactly this answer then.
        """
        judged: list[Judged] = []
        for number in range(2 * self._settings.scenes):
            random = np.random.default_rng(split_seed("test", self._settings.seed, number))
            group: Group = "clips" if number % 2 else "pictures"
            [scene], pictures = _draw(random, clips=number % 2 == 1, count=1)
            asked = [one for family in _families(scene) if (one := _ask(random, scene, family)) is not None]
            with half_precision(torch.device("cpu")):
                features = self._eyes.features(pictures)[None]
                answered = see(learner.network, learner.vision, features, self._before, self._writer.write([asked]))
            scene_id = f"{self._settings.seed}/{number}"
            judged += [Judged(learner.vision, group, scene_id, bool(right)) for right in answered.right[0]]
        return judged


def _aligned(vision: Vision) -> str:
    return f"aligned-{vision}.pt"


def judge(trained: Path, settings: Settings) -> list[Judged]:
    """Let the three learn and examine them, or go on with that."""
    folder = Path("runs") / f"one-token-{settings.seed}"
    plans = [
        StagePlan("alignment", lambda folder: SideBySide(settings, trained, folder, "alignment"), settings.alignment),
        StagePlan("tuning", lambda folder: SideBySide(settings, trained, folder, "tuning"), settings.tuning),
    ]
    with Display() as shown:
        run(plans, folder, recipe=settings, seed=settings.seed, on_progress=shown.progress, on_note=shown.note)
    return [Judged(*one) for one in json.loads((folder / JUDGED).read_text())]


def draw_batch(seed: int, number: int, writer: Writer) -> Batch:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=Path, nargs="?", default=Path(__file__).parent / "schooled")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scenes", type=int, default=400)
    parser.add_argument("--alignment", type=int, default=400)
    parser.add_argument("--tuning", type=int, default=800)
    options = parser.parse_args()
    rights: defaultdict[tuple[Group, Vision], dict[int, list[tuple[str, bool]]]] = defaultdict(dict)
    for seed in options.seeds:
        settings = Settings(seed=seed, alignment=options.alignment, tuning=options.tuning, scenes=options.scenes)
        for one in judge(options.run, settings):
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
