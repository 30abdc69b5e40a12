"""The paper's second stage: everything but the tower learns from questions about pictures and clips.

Frame tokens and questions come out of compression and pre-fusion as in the service. Of a clip a few frames fuse the
text; the others are read as tokens alone.
"""

import shutil
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor

from compressor_service.training.alignment import ALIGNED, PictureBatches, answer_pictures, only_questions
from compressor_service.training.answering import Answered, answer
from compressor_service.training.curriculum import Curriculum
from compressor_service.training.descent import Descent, Rates, half_precision
from compressor_service.training.examples import Texts, Writer
from compressor_service.training.eyes import Eyes
from compressor_service.training.gallery import Gallery
from compressor_service.training.language import SCENES, build_config, load_network
from compressor_service.training.lessons import ROWS_OF_QUESTION, Group
from compressor_service.training.look_ups import MADE
from compressor_service.training.network import Shape
from compressor_service.training.questions import CLIP_FAMILIES, PICTURE_FAMILIES, Asked, Story, ask_clip
from compressor_service.training.tokenizer import write_tokenizer

_FUSED_FRAMES = (1, 2)  # one or thirty make no difference to answers, and every one costs
_EVENTFUL = 2  # the power of 1 + a clip's events, with which it is drawn for what is told at length
_QUESTIONS = {False: 12, True: 6}


class TuningSettings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: NonNegativeInt = 0
    steps: PositiveInt = 1800
    pictures: PositiveInt = 32
    questions: PositiveInt = Field(default=8, description="To each picture.")
    clip_share: NonNegativeFloat = Field(default=0.7, le=1)
    rows: PositiveInt = Field(default=1536, description="Rows of text and frames in a step with clips, about.")
    most_frames: PositiveInt = Field(default=256, description="Frames in a step with clips.")
    clips: PositiveInt = 6120
    long_clips: NonNegativeInt = 120
    film_share: NonNegativeFloat = Field(default=0.15, description="Of the clips, to go through a real film.")
    rates: Rates = Rates(matrices=0.0015, others=3e-4, words=1e-4, made=1.5e-4)
    shape: Shape = Shape()
    device: str = "cpu"


class ClipBatch(NamedTuple):
    """Numbers (B,) of clips of one length in the gallery, and n questions to each."""

    numbers: list[int]
    asked: tuple[tuple[Asked, ...], ...]
    texts: Texts


class TuningStage:
    """Trains the whole but the tower; `folder` holds what the stages before have written, the network as `start`."""

    name = "tuning"
    prefetch = False

    def __init__(self, settings: TuningSettings, folder: Path, *, start: str = ALIGNED) -> None:
        self.settings = settings
        self.steps = settings.steps
        self._device = torch.device(settings.device)
        tokenizer = write_tokenizer(folder)
        self._writer = Writer(tokenizer)
        self._eyes = Eyes(folder, self._device)
        self.network = load_network(settings.shape, folder, start)
        self.network.to(self._device)
        self._raw, _ = build_config(settings.shape, folder)
        self._gallery = Gallery(
            folder / "gallery.npy",
            self._eyes,
            seed=settings.seed,
            count=settings.clips,
            long_count=settings.long_clips,
            film_share=settings.film_share,
        )
        self._stories: dict[int, Story] = {}
        self._known = {
            "pictures": Curriculum(tuple(PICTURE_FAMILIES)),
            "clips": Curriculum(tuple(CLIP_FAMILIES)),
        }
        eventful = (1.0 + self._gallery.events) ** _EVENTFUL
        self._chances = {False: np.ones(len(eventful)), True: eventful}
        self._pictures = PictureBatches(settings.seed, settings.pictures, settings.questions, 0, 0, tokenizer)
        self._before = torch.tensor(self._writer.before, device=self._device)
        made = tuple(f"language.{prefix}" for prefix in MADE)
        self._descent = Descent(self.network.named_parameters(), settings.rates, steps=settings.steps, made=made)

    def batch(self, number: int) -> Any:
        random = np.random.default_rng((self.settings.seed, number, 2))
        if random.random() >= self.settings.clip_share:
            return self._pictures(number, self._known["pictures"].shares())
        return self._clips(random)

    def step(self, number: int, batch: Any) -> dict[str, float]:
        random = np.random.default_rng((self.settings.seed, number, 3))
        with half_precision(self._device):
            if isinstance(batch, ClipBatch):
                kind, answered = "clips", self._answer_clips(random, batch)
            else:
                features = self._eyes.features(batch.pictures)
                kind = "pictures"
                _, _, answered = answer_pictures(self.network, features, self._before, batch.texts.to(self._device))
        self._descent.step(number, answered.loss)
        for asked, right in zip(batch.asked, answered.right.tolist(), strict=True):
            self._known[kind].learn((one.family, good) for one, good in zip(asked, right, strict=True))
        return {kind: float(answered.loss.detach()), f"{kind}_right": float(answered.right.float().mean())}

    def state(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "descent": self._descent.state(),
            "known": {kind: known.state() for kind, known in self._known.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self._descent.restore(state["descent"])
        for kind, known in self._known.items():
            known.restore(state["known"][kind])

    def finish(self, folder: Path) -> None:
        checkpoint = folder / "checkpoint"
        self.network.write(checkpoint, self._raw)
        write_tokenizer(checkpoint)
        shutil.copy2(folder / SCENES, checkpoint)
        shutil.copytree(folder / "clip", checkpoint / "clip", dirs_exist_ok=True)

    def _clips(self, random: np.random.Generator) -> ClipBatch:
        group = Group.draw(random, self._known["clips"])
        chances = self._chances[group.long]
        slots = int(random.choice(self._gallery.lengths, p=chances / chances.sum()))
        count = _QUESTIONS[group.long]
        rows = slots + count * ROWS_OF_QUESTION[group.long]
        many = max(1, min(self.settings.rows // rows, self.settings.most_frames // slots))
        alike = self._gallery.of_length(slots)
        chances = chances[alike]
        numbers: list[int] = []
        asked: list[tuple[Asked, ...]] = []
        for one in random.choice(alike, size=len(alike), replace=False, p=chances / chances.sum()):
            questions = self._ask(random, int(one), group, count)
            if len(questions) == count:
                numbers.append(int(one))
                asked.append(questions)
            if len(numbers) == many:
                break
        return ClipBatch(numbers, tuple(asked), self._writer.write(asked))

    def _ask(self, random: np.random.Generator, number: int, group: Group, count: int) -> tuple[Asked, ...]:
        if number not in self._stories:
            self._stories[number] = self._gallery.story(number)
        families = random.choice(group.families, size=20 * count, p=group.shares).tolist()
        found = (ask_clip(random, self._stories[number], family) for family in families)
        return tuple(islice((one for one in found if one is not None), count))

    def _answer_clips(self, random: np.random.Generator, batch: ClipBatch) -> Answered:
        texts = batch.texts.to(self._device)
        features = torch.from_numpy(self._gallery.features(batch.numbers)).to(self._device).float()
        clips, slots = features.shape[:2]
        with torch.no_grad():
            tokens = self.network.tokens(features.flatten(0, 1)).float().view(clips, slots, -1)
        count = min(slots, int(random.choice(_FUSED_FRAMES)))
        chosen = torch.from_numpy(np.sort(random.permutation(slots)[:count])).to(self._device)
        plain = self.network.embed(texts.ids)
        fresh, before, fused = self.network.fuse(
            self.network.see(features[:, chosen].flatten(0, 1)),
            self.network.embed(self._before).expand(clips * count, -1, -1),
            plain.repeat_interleave(count, dim=0),
        )
        tokens = tokens.index_copy(1, chosen, fresh.float().view(clips, count, -1))
        shared = torch.cat((mean_text(before, count), tokens), dim=1)
        return answer(self.network, shared, only_questions(mean_text(fused, count), plain, texts), texts)


def mean_text(fused: Tensor, count: int) -> Tensor:
    """Average the text that `count` frames of each clip fused, (B * count, ...), as the service does."""
    return fused.float().view(-1, count, *fused.shape[1:]).mean(dim=1)
