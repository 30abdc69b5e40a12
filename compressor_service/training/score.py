"""Right or wrong: answers compared with the right ones, and how far a share of right ones can be trusted.

**The interval.** Questions about one scene are not independent: a model that takes a dog for a cat gets several of them
wrong at once. So the spread is taken between scenes (the ratio estimator of a cluster sample), and turned into the
number of independent questions that would spread as much; Wilson's interval is then that of so many questions. With
one question a scene, as in a family, it is Wilson's own. A bootstrap over scenes is worse where most answers are right
(simulated: 40 scenes, 97 % right, it holds the truth 71 to 92 times in a hundred, this one 88 to 95), and it says 100 %
without a doubt where none is wrong. There no spread can be seen: a scene then counts as one question.

**Blind.** What answers without looking would get: the most usual right answer of each wording, learned from other
scenes. Wordings too rare for that are taken together once the names in them are left out, and else by family.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from compressor_service.training.questions import Asked
from compressor_service.training.scene import COLOURS, KINDS
from compressor_service.training.words import PLURALS

_Z = 1.959964  # of 95 %
_FORMER, _LATTER = "<former>", "<latter>"  # "the one that is named first" can be said without looking, too
_OFTEN = 8  # times that a wording was heard, for its own answer to count
_NAMES = re.compile(rf"\b({'|'.join((*PLURALS.values(), *KINDS, *COLOURS))})\b")


def normalised(text: str) -> str:
    """Lower the case, and leave out punctuation and surplus blanks."""
    return " ".join(re.sub(r"[^\w\s]", " ", text.lower()).split())


def same(said: str, right: str) -> bool:
    """Tell whether two answers have the same words."""
    return normalised(said) == normalised(right)


@dataclass(frozen=True, slots=True)
class Judged:
    """A question about a scene, what was said to it, and what is said without looking."""

    scene: str
    asked: Asked
    said: str
    blind: str

    @property
    def right(self) -> bool:
        return same(self.said, self.asked.answer)

    @property
    def is_yes_no(self) -> bool:
        return self.asked.answer in ("yes", "no")


class Score(BaseModel):
    """`right` of `n` questions about `scenes` scenes, with a 95 % interval from `low` to `high`."""

    model_config = ConfigDict(frozen=True)

    n: int
    scenes: int
    right: int
    accuracy: float
    low: float
    high: float

    @classmethod
    def of(cls, answers: Iterable[tuple[str, bool]]) -> Self:
        """Score answers, each with the name of its scene. Raises ValueError if there are none."""
        by_scene: defaultdict[str, list[bool]] = defaultdict(list)
        for scene, is_right in answers:
            by_scene[scene].append(is_right)
        counts = np.array([len(one) for one in by_scene.values()], np.float64)
        rights = np.array([sum(one) for one in by_scene.values()], np.float64)
        if not len(counts):
            raise ValueError("there is no answer to be scored")
        low, high = clustered_interval(rights, counts)
        n, right = int(counts.sum()), int(rights.sum())
        return cls(n=n, scenes=len(counts), right=right, accuracy=right / n, low=low, high=high)


def clustered_interval(rights: NDArray[np.float64], counts: NDArray[np.float64]) -> tuple[float, float]:
    """Return the interval of a share that was seen as `rights` (S,) of `counts` (S,) questions about S scenes."""
    n, scenes = counts.sum(), len(counts)
    share = rights.sum() / n
    fewest = n**2 / (counts**2).sum()  # independent questions, were the answers about a scene all alike
    alone = share * (1 - share) / max(n - 1, 1)  # the variance, were all answers independent
    between = scenes / max(scenes - 1, 1) * ((rights - share * counts) ** 2).sum() / n**2
    if not alone or scenes == 1:  # no spread can be seen
        return wilson(float(share), float(fewest))
    independent = n * alone / between if between else n
    return wilson(float(share), float(np.clip(independent, fewest, n)))


def wilson(share: float, n: float) -> tuple[float, float]:
    """Return Wilson's interval of a share of `n` independent questions."""
    middle = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    return middle - half if share else 0.0, middle + half if share < 1 else 1.0


class Blind:
    """Answers without looking."""

    def __init__(self) -> None:
        self._heard: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def learn(self, asked: Asked) -> None:
        """Hear a question with its right answer."""
        for key in _keys(asked):
            self._heard[key][_as_place(asked.question, normalised(asked.answer))] += 1

    def say(self, asked: Asked) -> str:
        """Answer a question by its words; of answers heard as often the first in the alphabet."""
        exact, masked, family = (self._heard.get(key, Counter()) for key in _keys(asked))
        heard = exact if exact.total() >= _OFTEN else masked if masked.total() >= _OFTEN else family
        if not heard:
            return ""
        best = min(heard, key=lambda answer: (-heard[answer], answer))
        former, latter = _named(asked.question)
        return {_FORMER: former, _LATTER: latter}.get(best, best)


def _keys(asked: Asked) -> tuple[str, str, str]:
    words = normalised(asked.question)
    return f"{asked.family}/{words}", f"{asked.family}//{_NAMES.sub('_', words)}", asked.family


def _named(question: str) -> tuple[str, str]:
    """Return the two sides of an "A or B?"; empty ones where the question is none."""
    former, either, latter = re.split(r"[:,]", question, maxsplit=1)[-1].partition(" or ")
    return (normalised(former), normalised(latter)) if either else ("", "")


def _as_place(question: str, answer: str) -> str:
    former, latter = _named(question)
    return _FORMER if answer == former else _LATTER if answer == latter else answer


class Tally(BaseModel):
    """A score, and the share that answers without looking would get of the same questions."""

    model_config = ConfigDict(frozen=True)

    score: Score
    blind: float

    @classmethod
    def of(cls, judged: Sequence[Judged]) -> Self:
        """Raises ValueError if nothing was asked."""
        score = Score.of((one.scene, one.right) for one in judged)
        return cls(score=score, blind=sum(same(one.blind, one.asked.answer) for one in judged) / len(judged))


class GroupReport(BaseModel):
    """A group of scenes: over all its questions, over yes/no questions and the others, and by family."""

    model_config = ConfigDict(frozen=True)

    all: Tally
    yes_no: Tally | None
    other: Tally | None
    families: dict[str, Tally]

    @classmethod
    def of(cls, judged: Sequence[Judged]) -> Self:
        """Raises ValueError if nothing was asked."""
        families: defaultdict[str, list[Judged]] = defaultdict(list)
        for one in judged:
            families[one.asked.family].append(one)
        yes_no, other = ([one for one in judged if one.is_yes_no == wanted] for wanted in (True, False))
        return cls(
            all=Tally.of(judged),
            yes_no=Tally.of(yes_no) if yes_no else None,
            other=Tally.of(other) if other else None,
            families={family: Tally.of(some) for family, some in families.items()},
        )
