"""The film of the demo: a minute in front of one camera of the world that the embedded model knows, and what is asked.

The right answers are those of the script that the film was drawn from, told as the world tells them.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compressor_service.training.film import write_film
from compressor_service.training.scene import Clip, draw_clip

SECONDS = 60
LIVE_SECONDS = 19  # of the film's beginning that the camera has shown when it is asked about
_SCRIPT, CAMERA = 24822, 3  # seeds: of what happens, and of the camera that takes it


@dataclass(frozen=True, slots=True)
class Asked:
    """A question about the seconds from `start` to `end` of the film, and its right answer."""

    question: str
    right: str
    start: float = 0
    end: float = SECONDS


LIVE = (
    Asked("Did a person cross?", "yes", end=LIVE_SECONDS),
    Asked("Is there a red car now?", "no", end=LIVE_SECONDS),
)
RECORDED = (
    Asked(
        "What happened?",
        "a person in green crosses to the right, then a red car comes in, then the gate closes, then a white parcel "
        "is put down",
    ),
    Asked("What colour was the car that came in?", "red"),
    Asked("What happened right after a red car comes in?", "the gate closes"),
    Asked("What happened?", "a red car comes in", start=20, end=34),
    Asked("Is there a parcel now?", "no", end=50),
    Asked("Was a parcel delivered?", "yes"),
)
SOUGHT, SEEN_FROM_S = "a red car", 23  # what is searched for, and when it comes in


def sample_clip() -> Clip:
    """A yard by day: a person crosses, a red car comes in, the gate closes, a white parcel is put down."""
    return draw_clip(np.random.default_rng(_SCRIPT), slots=SECONDS)


def write_sample_clip(path: Path) -> None:
    """Write the film as H.264, as a camera would deliver it."""
    write_film(sample_clip(), path, seed=CAMERA)
