"""The language model's schooling: it learns to read frame tokens from the facts of scenes, before it sees pictures.

The paper starts from a language model that can talk. This is the place of that: questions and answers about scenes
whose frame tokens are made of their facts (SceneTokens), so that thousands of scenes a second can be learned from.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from safetensors.torch import load_model, save_model
from torch import Tensor
from transformers import CLIPConfig, CLIPVisionConfig

from compressor_service.llava_mini.checkpoint import read_json
from compressor_service.llava_mini.config import LlavaMiniConfig
from compressor_service.training.answering import answer
from compressor_service.training.descent import Descent, Rates, frozen, half_precision
from compressor_service.training.examples import IGNORED, Facts, Texts, Writer
from compressor_service.training.lessons import Lesson, Lessons
from compressor_service.training.look_ups import MADE
from compressor_service.training.network import Network, Read, Shape, initialise, model_config
from compressor_service.training.packed import look
from compressor_service.training.retelling import Retelling, happenings, moments, pointed
from compressor_service.training.scene import Clip
from compressor_service.training.scene_tokens import Codes, SceneTokens
from compressor_service.training.tokenizer import BEGIN, END, token_id, write_tokenizer

SCHOOLED, SCENES = "language.safetensors", "scenes.safetensors"
TRAINED = "trained.safetensors"  # a whole network that goes on learning
_POINTING = 2  # heads that look at what a question has named


class LanguageSettings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: NonNegativeInt = 0
    steps: PositiveInt = 8000
    rows: PositiveInt = Field(default=3072, description="Rows of text and frames in a step, about.")
    clip_share: NonNegativeFloat = Field(default=0.65, le=1)
    longest: PositiveInt = Field(default=320, description="Slots of the longest clips.")
    retelling: NonNegativeFloat = Field(default=0.3, description="Weight of what happens, told frame by frame.")
    noise: tuple[NonNegativeFloat, NonNegativeFloat] = Field(
        default=(0.04, 0.2),
        description="On frame tokens, as a part of their deviation, at the first step and the last.",
    )
    rates: Rates = Rates()
    shape: Shape = Shape()
    device: str = "cpu"


class LanguageBatch(NamedTuple):
    lesson: Lesson
    facts: Facts
    texts: Texts


class LanguageStage:
    """Trains the language model on frame tokens that are made of facts; `folder` holds the tower's clip.

    `further` takes up a network whose pictures already make such tokens: these and the words stay as they are, for
    compression and pre-fusion have learned to write them.
    """

    name = "language"
    prefetch = False  # what is asked depends on what was answered

    def __init__(self, settings: LanguageSettings, folder: Path, *, further: bool = False) -> None:
        self.settings = settings
        self.steps = settings.steps
        self._device = torch.device(settings.device)
        self._tokenizer = write_tokenizer(folder)
        self._writer = Writer(self._tokenizer)
        random = torch.Generator().manual_seed(settings.seed)
        self.raw, config = build_config(settings.shape, folder)
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            if further:
                self.network = load_network(settings.shape, folder, TRAINED)
                self.scenes = load_scenes(settings.shape, folder)
                frozen([*self.scenes.parameters(), *self.network.embed.parameters()])
            else:
                self.network = Network(config)
                self.scenes = SceneTokens(initialise(self.network, self._tokenizer, random))
            self.retelling = Retelling(config.width)
        self.network.to(self._device)
        self.scenes.to(self._device)
        self.retelling.to(self._device)
        self._lessons = Lessons(
            clip_share=settings.clip_share, rows=settings.rows, longest=settings.longest, open_all=further
        )
        modules = self.network.language, self.scenes, self.retelling
        trained = [named for module in modules for named in module.named_parameters()]
        self._descent = Descent(trained, settings.rates, steps=settings.steps, made=MADE)
        self._noise = torch.Generator(self._device).manual_seed(settings.seed)
        self._before = torch.tensor(self._writer.before, device=self._device)

    def batch(self, number: int) -> LanguageBatch:
        lesson = self._lessons.draw(np.random.default_rng((self.settings.seed, number)))
        return LanguageBatch(lesson, Facts.of(lesson.views), self._writer.write(lesson.asked))

    def step(self, number: int, batch: LanguageBatch) -> dict[str, float]:
        texts = batch.texts.to(self._device)
        with half_precision(self._device):
            answered = answer(self.network, self._shared(number, batch.facts), self.network.embed(texts.ids), texts)
            loss, told = answered.loss, {"loss": float(answered.loss.detach())}
            if batch.lesson.clips:
                retold = self._retell(answered.read, batch.lesson.clips, texts)
                loss = loss + self.settings.retelling * sum(retold.values())
                told |= {name: float(one.detach()) for name, one in retold.items()}
        self._descent.step(number, loss)
        self._lessons.learn(batch.lesson, answered.right.tolist())
        return {**told, **self._lessons.told()}

    def _retell(self, read: Read, clips: Sequence[Clip], texts: Texts) -> dict[str, Tensor]:
        """Return the losses of telling what happens in clips, and of finding the events that questions name."""
        layers = self.network.language.layers
        half, first = len(layers) // 2, len(self._before)
        retold = {
            "watched": self.retelling.watched(read.behind[half].shared[:, first:], happenings(clips).to(self._device))
        }
        if bool((texts.events != IGNORED).any()):  # else there is nothing to be good at
            last = read.behind[half].shared.shape[1]
            looks = look(layers[half], self.network.rotary, *read.behind[half])[:, :_POINTING, ..., first:last]
            retold["pointed"] = pointed(looks, moments(clips).to(self._device), texts.events)
            retold["compared"] = self.retelling.compared(read.behind[min(half + 2, len(layers))].own, texts)
        return retold

    def _shared(self, number: int, facts: Facts) -> Tensor:
        """Return what a prompt holds up to the last frame (B, P, D), with noise on frame tokens (B, T, D).

        Noise hides look-ups at first, but what learned without any does not bear what pictures will miss.
        """
        first, last = self.settings.noise
        loudness = first + (last - first) * number / self.steps
        frames = self.scenes(facts.to(self._device)).float()
        noise = torch.randn(frames.shape, generator=self._noise, device=self._device)
        frames = frames + loudness * frames.detach().std() * noise
        return torch.cat((self.network.embed(self._before).expand(len(frames), -1, -1), frames), dim=1)

    def state(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "scenes": self.scenes.state_dict(),
            "retelling": self.retelling.state_dict(),
            "descent": self._descent.state(),
            "lessons": self._lessons.state(),
            "noise": self._noise.get_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.scenes.load_state_dict(state["scenes"])
        self.retelling.load_state_dict(state["retelling"])
        self._descent.restore(state["descent"])
        self._lessons.restore(state["lessons"])
        self._noise.set_state(state["noise"])

    def finish(self, folder: Path) -> None:
        save_model(self.network, str(folder / SCHOOLED))
        save_model(self.scenes, str(folder / SCENES))


def build_config(shape: Shape, folder: Path) -> tuple[dict[str, Any], LlavaMiniConfig]:
    """Describe a model of a shape around the tower in `folder`/clip: as config.json, and parsed."""
    tokenizer = write_tokenizer(folder)
    vision = cast(CLIPVisionConfig, CLIPConfig(**read_json(folder / "clip", "config.json")).vision_config)
    raw = model_config(
        shape,
        len(tokenizer),
        vision.hidden_size,
        stop_id=token_id(tokenizer, END),
        begin_id=token_id(tokenizer, BEGIN),
    )
    return raw, LlavaMiniConfig.parse(raw, vision)


def load_network(shape: Shape, folder: Path, name: str) -> Network:
    """Build a network of a shape, and load what a stage has saved under a name in `folder`."""
    _, config = build_config(shape, folder)
    network = Network(config)
    load_model(network, folder / name)
    return network


def load_scenes(shape: Shape, folder: Path) -> SceneTokens:
    """Load the frame tokens made of facts that the language model has learned from."""
    scenes = SceneTokens(Codes.blank(shape.width))
    load_model(scenes, folder / SCENES)
    return scenes
