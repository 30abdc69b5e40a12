"""The paper's first stage: pictures learn to become frame tokens that the language model can already read.

The language model stays as it is. Compressor, projector and pre-fusion learn from both sides: what the frame token of a
picture should be (SceneTokens of its facts), and whether the language model answers right with it. Text comes out of
pre-fusion as it was, questions about clips too: else fusion learns to write what answers a question about this picture
into its text, and a question about a clip, which it never saw, comes out as something that cannot be read. This counts
for little at first, or pictures are learned at half the speed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from safetensors.torch import save_model
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from compressor_service.training.answering import Answered, answer
from compressor_service.training.descent import Descent, Rates, frozen, half_precision
from compressor_service.training.examples import Facts, Texts, Writer
from compressor_service.training.eyes import Eyes
from compressor_service.training.language import SCHOOLED, load_network, load_scenes
from compressor_service.training.network import Network, Shape, fit_to_features
from compressor_service.training.pictures import draw_pictures
from compressor_service.training.questions import CLIP_FAMILIES, PICTURE_FAMILIES, Asked, Story, ask_clip, ask_picture
from compressor_service.training.scene import View, draw_clip, draw_slots
from compressor_service.training.tokenizer import write_tokenizer

ALIGNED = "aligned.safetensors"
_SLOTS = 8, 32  # of clips that are asked about and not seen: long enough for all that is asked


class AlignmentSettings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: NonNegativeInt = 0
    steps: PositiveInt = 2000
    pictures: PositiveInt = 64
    questions: PositiveInt = Field(default=1, description="To each picture.")
    films: NonNegativeInt = Field(default=1, description="Clips in a batch whose pictures come out of a real film.")
    stories: NonNegativeInt = Field(default=8, description="Clips that a batch asks about, and does not show.")
    token_share: NonNegativeFloat = Field(default=1.0, description="Weight of the frame tokens against the answers.")
    text_share: NonNegativeFloat = Field(default=1.0, description="Weight at last of text that is to stay as it is.")
    text_growth: NonNegativeFloat = Field(default=2.0, description="The power of the part done, with which it grows.")
    rates: Rates = Rates(matrices=0.01, others=1.5e-3)
    shape: Shape = Shape()
    device: str = "cpu"


class PictureBatch(NamedTuple):
    """F pictures (F, H, W, 3), their facts (F, 1, ...), and n questions to each; the last may be about some clip."""

    pictures: NDArray[np.uint8]
    facts: Facts
    asked: list[tuple[Asked, ...]]
    texts: Texts


@dataclass(frozen=True, slots=True)
class PictureBatches:
    """Makes the batch of a step: the same for the same seed and number, in whatever process."""

    seed: int
    pictures: int
    questions: int
    films: int
    stories: int
    tokenizer: PreTrainedTokenizerFast

    def __call__(self, number: int, shares: NDArray[np.float64] | None = None) -> PictureBatch:
        """`shares` is how often each family is asked, all as often if None."""
        random = np.random.default_rng((self.seed, number))
        views, _, pictures = draw_pictures(random, count=self.pictures, films=self.films)
        asked = [_ask_many(random, view, self.questions, shares) for view in views]
        if self.stories:
            stories = [_draw_story(random) for _ in range(self.stories)]
            asked = [(*row, _ask_about(random, stories[number % self.stories])) for number, row in enumerate(asked)]
        facts = Facts.of([(view,) for view in views])
        return PictureBatch(np.stack(pictures), facts, asked, Writer(self.tokenizer).write(asked))


def _ask_many(
    random: np.random.Generator, view: View, count: int, shares: NDArray[np.float64] | None
) -> tuple[Asked, ...]:
    families = list(PICTURE_FAMILIES)
    asked: list[Asked] = []
    while len(asked) < count:
        one = ask_picture(random, view, str(random.choice(families, p=shares)))
        if one is not None:
            asked.append(one)
    return tuple(asked)


def _draw_story(random: np.random.Generator) -> Story:
    return Story.of(draw_clip(random, slots=draw_slots(random, *_SLOTS), phase_s=0.0))


def _ask_about(random: np.random.Generator, story: Story) -> Asked:
    families = list(CLIP_FAMILIES)
    while True:
        if (one := ask_clip(random, story, families[random.integers(len(families))])) is not None:
            return one


class AlignmentStage:
    """Trains what stands between the tower and the language model; `folder` holds both."""

    name = "alignment"
    prefetch = True

    def __init__(self, settings: AlignmentSettings, folder: Path) -> None:
        self.settings = settings
        self.steps = settings.steps
        self._device = torch.device(settings.device)
        tokenizer = write_tokenizer(folder)
        self.batch = PictureBatches(
            settings.seed, settings.pictures, settings.questions, settings.films, settings.stories, tokenizer
        )
        self._eyes = Eyes(folder, self._device)
        self.network = load_network(settings.shape, folder, SCHOOLED)
        self.scenes = load_scenes(settings.shape, folder)
        self.network.to(self._device)
        self.scenes.to(self._device)
        frozen(self.scenes.parameters())
        frozen(self.network.language.parameters())
        fit_to_features(self.network, self._eyes.features(self.batch(0).pictures).flatten(0, 1))
        self._before = torch.tensor(Writer(tokenizer).before, device=self._device)
        self._descent = Descent(self.network.named_parameters(), settings.rates, steps=settings.steps)

    def step(self, number: int, batch: PictureBatch) -> dict[str, float]:
        texts = batch.texts.to(self._device)
        with half_precision(self._device):
            wanted = self.scenes(batch.facts.to(self._device))[:, 0]
            tokens, fused, answered = answer_pictures(
                self.network, self._eyes.features(batch.pictures), self._before, texts, self.settings.questions
            )
            asked = _asked(texts)
            missed = _missed(tokens, wanted)
            changed = _missed(fused[asked], self.network.embed(texts.ids)[asked])
            text_share = self.settings.text_share * ((number + 1) / self.steps) ** self.settings.text_growth
            loss = answered.loss + self.settings.token_share * missed + text_share * changed
        self._descent.step(number, loss)
        return {
            "answers": float(answered.loss.detach()),
            "tokens": float(missed.detach()),
            "text": float(changed.detach()),
            "right": float(answered.right.float().mean()),
        }

    def state(self) -> dict[str, Any]:
        return {"network": self.network.state_dict(), "descent": self._descent.state()}

    def restore(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self._descent.restore(state["descent"])

    def finish(self, folder: Path) -> None:
        save_model(self.network, str(folder / ALIGNED))


def answer_pictures(
    network: Network, features: Tensor, before: Tensor, texts: Texts, count: int | None = None
) -> tuple[Tensor, Tensor, Answered]:
    """Answer the first `count` of n questions to each of F pictures, given their features (F, N, V); all if None.

    Also returns frame tokens (F, D), and all texts as they are fused (F, n, L, D).
    """
    plain = network.embed(texts.ids)
    opened = network.embed(before).expand(len(features), -1, -1)
    tokens, opened, fused = network.fuse(network.see(features), opened, plain)
    shared = torch.cat((opened, tokens[:, None]), dim=1)
    seen = texts.first(count)
    return tokens, fused, answer(network, shared, only_questions(fused, plain, texts)[:, :count], seen)


def only_questions(fused: Tensor, plain: Tensor, texts: Texts) -> Tensor:
    """Take questions (B, n, L, D) as frames fuse them, and answers plain: they are said after fusion is over."""
    return torch.where(_asked(texts)[..., None], fused, plain)


def _asked(texts: Texts) -> Tensor:
    """Return which rows (B, n, L) are a question's, with the mark that opens the answer."""
    rows = torch.arange(texts.ids.shape[2], device=texts.ids.device)
    return rows < texts.question_rows[..., None]


def _missed(made: Tensor, wanted: Tensor) -> Tensor:
    """Return how far vectors (n, D) are from what they are to be, squared: 1 is no better than their mean."""
    made, wanted = made.float(), wanted.float()
    return (made - wanted).square().mean() / (wanted - wanted.mean(dim=0)).square().mean()
