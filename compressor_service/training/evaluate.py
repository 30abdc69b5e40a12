"""How well a model answers and finds: looks at an exam as the service does, and scores what it says."""

import io
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from compressor_service import preprocess
from compressor_service.llava_mini import LlavaMini, Prefix
from compressor_service.llava_mini.checkpoint import Dtype, open_checkpoint
from compressor_service.llava_mini.frame_encoder import FrameEncoder, Looked
from compressor_service.llava_mini.prompt import Prompt
from compressor_service.llava_mini.search_text import SearchText
from compressor_service.training.captions import Caption, holds, object_caption
from compressor_service.training.draw import Picture
from compressor_service.training.exam import Group, Scene, draw_scene, draw_scenes, learn_blind
from compressor_service.training.scene import COLOURS, KINDS, View
from compressor_service.training.score import Blind, GroupReport, Judged, Score, Tally
from compressor_service.training.seeds import Split

ANSWER_TOKENS = 64  # the longest answer of the world has about 40
SEARCH_HITS = 5
_FRAMES_A_PASS = 64

Choose = Callable[[int], NDArray[np.int64]]
"""Which of so many frames the text looks at: the service's choice, told by who knows the service."""


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """A scene once looked at: all its tokens (T*C2, D) and search vectors (T, P), and what the text looks at of it."""

    tokens: Tensor
    vectors: NDArray[np.float32]
    chosen: Looked


class Reader:
    """Both halves of a model, as the service loads them; answers questions about scenes step by step as it does."""

    def __init__(
        self, model: LlavaMini, eyes: FrameEncoder, prompt: Prompt, text: SearchText | None, choose: Choose
    ) -> None:
        """`model` is the half that answers."""
        self.model = model
        self.seconds = defaultdict[str, float](float)  # by what was done
        self._eyes, self._prompt, self._text, self._choose = eyes, prompt, text, choose

    @classmethod
    def load(cls, path: str | Path, choose: Choose, *, dtype: Dtype = "float32", device: str = "auto") -> Self:
        """Raises BadCheckpoint."""
        checkpoint = open_checkpoint(path)
        model = LlavaMini.from_pretrained(path, dtype=dtype, device=device, part="llm")
        # On their own, because LlavaMini looks again for every text: one look here serves all questions to a scene.
        rotary = LlamaRotaryEmbedding(model.config.llama).to(model.device)
        with torch.device("meta"):
            eyes = FrameEncoder(checkpoint, rotary)
        eyes.load(checkpoint, dtype=model.dtype, device=model.device)
        eyes.eval()
        text = None
        if checkpoint.clip is not None and checkpoint.clip.reads_text:
            text = SearchText(checkpoint.clip, dtype=model.dtype, device=model.device)
        return cls(model, eyes, Prompt.from_pretrained(path), text, choose)

    @property
    def searches(self) -> bool:
        """Whether the checkpoint can embed texts."""
        return self._text is not None

    def embed(self, text: str) -> NDArray[np.float32]:
        """Return a text's vector (P,) in the space of search."""
        assert self._text is not None
        vector: NDArray[np.float32] = self._text.embed([text])[0].numpy()
        return vector

    @torch.inference_mode()
    def look(self, pictures: Sequence[Picture]) -> Seen:
        """Look at the keyframes of a scene."""
        with self._clocked("looking"):
            pixels = torch.stack([self._pixels(picture) for picture in pictures]).to(
                self.model.device, self.model.dtype
            )
            places = torch.from_numpy(self._choose(len(pictures))).to(self.model.device)
            chosen = self._eyes.look(pixels[places])
            passes = [chosen]
            if len(places) < len(pixels):
                passes = [self._eyes.look(some) for some in torch.split(pixels, _FRAMES_A_PASS)]
            tokens = torch.cat([one.tokens for one in passes]).flatten(0, 1)
            return Seen(tokens, torch.cat([one.vectors for one in passes]).cpu().numpy(), chosen)

    @torch.inference_mode()
    def answer(self, seen: Seen, questions: Iterable[str]) -> list[str]:
        """Answer questions about one scene; the model reads the scene once, and each question behind it."""
        answers: list[str] = []
        prefix: Prefix | None = None
        with self._clocked("answering"):
            for question in questions:
                ids = torch.tensor(self._prompt.build(question))
                head, tail = self.model.place_frames(self._fused(ids, seen.chosen), ids, seen.tokens)
                # Before the question the text is fused with the frames alone: the same for all of them.
                prefix = prefix or self.model.prefill(head)
                made = self.model.stream(
                    tail, max_new_tokens=ANSWER_TOKENS, prefix=prefix, stop_ids=self._prompt.stop_ids
                )
                answers.append(self._prompt.decode(list(made)))
        return answers

    def _fused(self, ids: Tensor, chosen: Looked) -> Tensor:
        """Return the text (L, D) of ids (L,), averaged over the chosen frames in float32."""
        visible = (ids > 0).to(self.model.device)
        own = chosen._replace(states=deepcopy(chosen.states))  # a text is put behind what the layers kept of the frames
        fused = self._eyes.fuse_text(self.model.embed_text(ids), visible, own)
        return (fused.float().sum(dim=0) / len(fused)).to(self.model.dtype)

    def _pixels(self, picture: Picture) -> Tensor:
        """Go the service's way from a file to pixels; PNG keeps every bit of what the keyframe's JPEG holds."""
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG", compress_level=0)
        config = self.model.config
        return preprocess.pixels(file.getvalue(), image_size=config.image_size, ratio=config.resolution_ratio)

    @contextmanager
    def _clocked(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - began


@dataclass(frozen=True, slots=True, eq=False)
class Examined:
    """A scene, what was said to each of its questions, and its search vectors (T, P)."""

    scene: Scene
    said: tuple[str, ...]
    vectors: NDArray[np.float32]


def examine(reader: Reader, scene: Scene) -> Examined:
    """Put a scene's questions to a model."""
    began = time.perf_counter()
    pictures = scene.keyframes()
    reader.seconds["drawing"] += time.perf_counter() - began
    seen = reader.look(pictures)
    return Examined(scene, tuple(reader.answer(seen, [one.question for one in scene.asked])), seen.vectors)


class SearchScore(BaseModel):
    """Recall at 5: in how many searches for one thing it is visible in one of the first five seconds found.

    `chance` is what five seconds at random would get of the same searches.
    """

    model_config = ConfigDict(frozen=True)

    seconds: int
    recall: Score
    chance: float
    missed: tuple[str, ...]


def score_search(views: Sequence[View], find: Callable[[str], Iterable[View]]) -> SearchScore | None:
    """Search for each thing of a kind and a colour that is visible in `views`; None if none ever is.

    `find` returns what is seen in the first seconds found.
    """
    found: dict[str, bool] = {}
    chances = []
    for wanted in queries():
        there = sum(holds(wanted, view) for view in views)
        if not there:
            continue
        found[wanted.text] = any(holds(wanted, view) for view in find(wanted.text))
        others = np.arange(SEARCH_HITS)
        chances.append(1 - float(np.prod(np.clip((len(views) - there - others) / (len(views) - others), 0, 1))))
    if not found:
        return None
    return SearchScore(
        seconds=len(views),
        recall=Score.of(found.items()),
        chance=sum(chances) / len(chances),
        missed=tuple(text for text, hit in found.items() if not hit),
    )


def queries() -> list[Caption]:
    """Every thing that can be searched for by kind and colour."""
    return [object_caption(kind, colour) for kind in KINDS for colour in (COLOURS if kind != "fire" else (None,))]


def search_offline(reader: Reader, timeline: Sequence[Examined]) -> SearchScore | None:
    """Search the seconds of clips laid end to end."""
    views = [view for one in timeline for view in one.scene.views]
    if not views or not reader.searches:
        return None
    vectors = np.concatenate([one.vectors for one in timeline])

    def find(text: str) -> list[View]:
        first = np.argsort(-(vectors @ reader.embed(text)), kind="stable")[:SEARCH_HITS]
        return [views[second] for second in first]

    return score_search(views, find)


class Wrong(BaseModel):
    """A wrong answer, to look at."""

    model_config = ConfigDict(frozen=True)

    scene: str
    family: str
    question: str
    right: str
    said: str


class Report(BaseModel):
    """All that was found out. `all` is the mean over every question to a picture or a clip, whatever its family.

    `long` clips are a group of their own and do not count for `all`.
    """

    model_config = ConfigDict(frozen=True)

    checkpoint: str
    fingerprint: str
    untrained: bool
    device: str
    dtype: str
    split: Split
    seed: int
    scenes: int
    questions: int
    seconds: dict[str, float]
    all: Tally
    groups: dict[str, GroupReport]
    search: SearchScore | None
    wrong: tuple[Wrong, ...]


class Evaluation:
    """One evaluation: what was asked, and what was said."""

    def __init__(self, reader: Reader, *, split: Split, seed: int) -> None:
        """`seed` and `split` choose the scenes; answering without looking is learned from another split."""
        self.reader, self.split, self.seed = reader, split, seed
        self.examined: defaultdict[Group, list[Examined]] = defaultdict(list)
        self.timeline: list[Examined] = []
        other: Split = "train" if split == "validation" else "validation"
        self._blind_pictures = learn_blind(other, seed, "pictures")
        self._blind_clips = learn_blind(other, seed, "clips")

    def examine(self, group: Group, count: int, on_scene: Callable[[], None]) -> None:
        """Examine the first scenes of a group; `on_scene` is called after each."""
        for scene in draw_scenes(self.split, self.seed, group, count):
            self.examined[group].append(examine(self.reader, scene))
            on_scene()

    def judged(self, examined: Iterable[Examined]) -> list[Judged]:
        """Judge what was said to scenes."""
        return [
            Judged(one.scene.name, asked, said, self._blind_of(one.scene).say(asked))
            for one in examined
            for asked, said in zip(one.scene.asked, one.said, strict=True)
        ]

    def look_for_search(self, seconds: int) -> None:
        """Look at so many seconds of clips for the search: those examined, and more if these are too few."""
        for one in self.examined["clips"]:
            if self._lasting() < seconds:
                self.timeline.append(one)
        number = len(self.examined["clips"])
        while self._lasting() < seconds:
            scene = draw_scene(self.split, self.seed, "clips", number)
            self.timeline.append(examine(self.reader, replace(scene, asked=())))
            number += 1

    def _lasting(self) -> int:
        return sum(len(one.vectors) for one in self.timeline)

    def _blind_of(self, scene: Scene) -> Blind:
        return self._blind_pictures if scene.group == "pictures" else self._blind_clips

    def report(self, checkpoint: str, *, show_wrong: int = 0) -> Report:
        """Score everything. Raises ValueError if nothing was examined."""
        judged = {group: self.judged(examined) for group, examined in self.examined.items()}
        counted = [*judged.get("pictures", ()), *judged.get("clips", ())]
        every = [one for some in judged.values() for one in some]
        config, model = self.reader.model.config, self.reader.model
        return Report(
            checkpoint=checkpoint,
            fingerprint=model.fingerprint,
            untrained=config.untrained,
            device=str(model.device),
            dtype=str(model.dtype).removeprefix("torch."),
            split=self.split,
            seed=self.seed,
            scenes=sum(len(some) for some in self.examined.values()),
            questions=len(every),
            seconds={name: round(seconds, 3) for name, seconds in self.reader.seconds.items()},
            all=Tally.of(counted),
            groups={group: GroupReport.of(some) for group, some in judged.items()},
            search=search_offline(self.reader, self.timeline),
            wrong=tuple(
                Wrong(
                    scene=one.scene, family=one.asked.family, question=one.asked.question,
                    right=one.asked.answer, said=one.said,
                )
                for one in [one for one in every if not one.right][:show_wrong]
            ),
        )  # fmt: skip
