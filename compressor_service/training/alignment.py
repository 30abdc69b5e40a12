"""The paper's first stage: pictures learn to become frame tokens that the language model can already read.

The language model stays as it is. Compressor, projector and pre-fusion learn from both sides: what the frame token of a
picture should be (SceneTokens of its facts), and whether the language model answers right with it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from compressor_service.training.answering import Answered, answer
from compressor_service.training.descent import Descent, Rates, frozen, half_precision
from compressor_service.training.examples import Facts, Texts, Writer
from compressor_service.training.eyes import Eyes
from compressor_service.training.language import build_config, load_schooled, save_schooled
from compressor_service.training.network import Network, Shape, fit_to_features
from compressor_service.training.pictures import draw_pictures
from compressor_service.training.questions import PICTURE_FAMILIES, Asked, ask_picture
from compressor_service.training.scene import View
from compressor_service.training.scene_tokens import Codes, SceneTokens
from compressor_service.training.tokenizer import write_tokenizer

_FILE = "aligned.safetensors"


class AlignmentSettings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: NonNegativeInt = 0
    steps: PositiveInt = 2400
    pictures: PositiveInt = 64
    questions: PositiveInt = Field(default=1, description="To each picture.")
    films: NonNegativeInt = Field(default=1, description="Clips in a batch whose pictures come out of a real film.")
    token_share: NonNegativeFloat = Field(default=1.0, description="Weight of the frame tokens against the answers.")
    rates: Rates = Rates(matrices=0.01, others=1.5e-3)
    shape: Shape = Shape()
    device: str = "cpu"


class PictureBatch(NamedTuple):
    """F pictures (F, H, W, 3), their facts (F, 1, ...), and n questions to each."""

    pictures: NDArray[np.uint8]
    facts: Facts
    texts: Texts
    asked: tuple[tuple[Asked, ...], ...]


@dataclass(frozen=True, slots=True)
class PictureBatches:
    """Makes the batch of a step: the same for the same seed and number, in whatever process."""

    seed: int
    pictures: int
    questions: int
    films: int
    tokenizer: PreTrainedTokenizerFast

    def __call__(self, number: int) -> PictureBatch:
        random = np.random.default_rng((self.seed, number))
        views, _, pictures = draw_pictures(random, count=self.pictures, films=self.films)
        asked = tuple(ask_many(random, view, self.questions) for view in views)
        texts = Writer(self.tokenizer).write(asked)
        return PictureBatch(np.stack(pictures), Facts.of([(view,) for view in views]), texts, asked)


def ask_many(random: np.random.Generator, view: View, count: int) -> tuple[Asked, ...]:
    """Ask about a picture, every family as often as the others."""
    families = list(PICTURE_FAMILIES)
    asked: list[Asked] = []
    while len(asked) < count:
        one = ask_picture(random, view, families[random.integers(len(families))])
        if one is not None:
            asked.append(one)
    return tuple(asked)


class AlignmentStage:
    """Trains what stands between the tower and the language model; `folder` holds both."""

    name = "alignment"
    prefetch = True

    def __init__(self, settings: AlignmentSettings, folder: Path) -> None:
        self.settings = settings
        self.steps = settings.steps
        self._device = torch.device(settings.device)
        tokenizer = write_tokenizer(folder)
        self.batch = PictureBatches(settings.seed, settings.pictures, settings.questions, settings.films, tokenizer)
        self._eyes = Eyes(folder, self._device)
        self.network, self.scenes = load_network(settings.shape, folder, "language.safetensors")
        self.network.to(self._device)
        self.scenes.to(self._device)
        frozen(self.scenes.parameters())
        frozen(self.network.language.parameters())
        fit_to_features(self.network, self._eyes.features(self.batch(0).pictures).flatten(0, 1))
        self._before = torch.tensor(Writer(tokenizer).before, device=self._device)
        self._descent = Descent(self.network.named_parameters(), settings.rates, steps=settings.steps)

    def step(self, number: int, batch: PictureBatch) -> dict[str, float]:
        with half_precision(self._device):
            wanted = self.scenes(batch.facts.to(self._device))[:, 0].float()
            tokens, answered = answer_pictures(
                self.network, self._eyes.features(batch.pictures), self._before, batch.texts.to(self._device)
            )
            # As a part of what tokens differ by at all: 1 is no better than their mean.
            missed = (tokens.float() - wanted).square().mean() / (wanted - wanted.mean(dim=0)).square().mean()
            loss = answered.loss + self.settings.token_share * missed
        self._descent.step(number, loss)
        return {
            "answers": float(answered.loss.detach()),
            "tokens": float(missed.detach()),
            "right": float(answered.right.float().mean()),
        }

    def state(self) -> dict[str, Any]:
        return {"network": self.network.state_dict(), "descent": self._descent.state()}

    def restore(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self._descent.restore(state["descent"])

    def finish(self, folder: Path) -> None:
        save_schooled(folder / _FILE, self.network, self.scenes)


def answer_pictures(network: Network, features: Tensor, before: Tensor, texts: Texts) -> tuple[Tensor, Answered]:
    """Answer n questions to each of F pictures, given their features (F, N, V). Also returns frame tokens (F, D)."""
    plain = network.embed(texts.ids)
    opened = network.embed(before).expand(len(features), -1, -1)
    tokens, opened, fused = network.fuse(network.see(features), opened, plain)
    shared = torch.cat((opened, tokens[:, None]), dim=1)
    return tokens, answer(network, shared, only_questions(fused, plain, texts), texts)


def only_questions(fused: Tensor, plain: Tensor, texts: Texts) -> Tensor:
    """Take questions (B, n, L, D) as frames fuse them, and answers plain: they are said after fusion is over."""
    rows = torch.arange(plain.shape[2], device=plain.device)
    asked = rows < texts.question_rows[..., None]
    return torch.where(asked[..., None], fused, plain)


def load_network(shape: Shape, folder: Path, name: str) -> tuple[Network, SceneTokens]:
    """Build a network and load what an earlier stage wrote."""
    _, config = build_config(shape, folder)
    network = Network(config)
    scenes = SceneTokens(Codes.blank(config.width))
    load_schooled(folder / name, network, scenes)
    return network, scenes
