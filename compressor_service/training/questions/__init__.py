"""Questions about pictures and clips, with the one right answer to each, drawn so that no answer can be guessed.

A family is one thing to be good at. Where its answers could be guessed from their frequency, the answer is drawn first
and then a question that has it.
"""

from dataclasses import dataclass

from compressor_service.training.questions.clips import CLIP_FAMILIES, Story
from compressor_service.training.questions.phrases import Random
from compressor_service.training.questions.pictures import PICTURE_FAMILIES
from compressor_service.training.scene import View

__all__ = ["CLIP_FAMILIES", "LONG_TEXTS", "PICTURE_FAMILIES", "Asked", "Story", "ask_clip", "ask_picture"]

LONG_TEXTS = ("what", "caption", "first", "order", "what_now", "what_at_start", "changed")


@dataclass(frozen=True, slots=True)
class Asked:
    """A question about a picture or a clip, its right answer, and the family it counts for."""

    family: str
    question: str
    answer: str
    told: tuple[str, ...] = ()  # the events of the clip, in their order, as the question may name them


def ask_picture(random: Random, view: View, family: str) -> Asked | None:
    """Ask about a picture; None where this picture has no question of the family."""
    made = PICTURE_FAMILIES[family](random, view)
    return None if made is None else Asked(family, _as_typed(random, made[0]), made[1])


def ask_clip(random: Random, story: Story, family: str) -> Asked | None:
    """Ask about a clip; None where this clip has no question of the family."""
    made = CLIP_FAMILIES[family](random, story)
    return None if made is None else Asked(family, _as_typed(random, made[0]), made[1], story.told)


def _as_typed(random: Random, question: str) -> str:
    """People leave the question mark out, or do not begin with a capital."""
    if random.random() < 0.15:
        question = question.rstrip("?.")
    return question[0].lower() + question[1:] if random.random() < 0.15 else question
