"""What happens while a clip is watched, frame by frame: a language model that learns to tell it notices events early.

A question about a clip says little about how to answer it: whether one thing came before another is one bit, and it has
to be found in a minute of frames. So while it learns, half of the layers must tell from every frame's row what happens
there and how much has happened so far. Losses on inner layers are those of Lee et al., Deeply-Supervised Nets (arXiv
1409.5185). What tells it is thrown away with the training.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from compressor_service.training.examples import IGNORED
from compressor_service.training.scene import COLOURS, KINDS, MAX_EVENTS, SIDES, VERBS, Clip, Event

_DEEDS = len(VERBS) * len(KINDS)  # of the gate and the lamp two of these: shut and open, off and on
_DOERS = len(KINDS) * (len(COLOURS) + 1)
LABELS = _DEEDS + _DOERS + len(SIDES) + MAX_EVENTS
_RARE = -3.5  # the log odds of a label, about


def happenings(clips: Sequence[Clip]) -> Tensor:
    """Return what is true in each of the T slots of B clips of one length, as 0 and 1: (B, T, LABELS).

    What happens since the slot before: verb and kind, kind and colour, side; and how many events have begun.
    """
    told = np.zeros((len(clips), clips[0].slots, LABELS), np.float32)
    for number, clip in enumerate(clips):
        times = np.arange(clip.slots) + clip.phase_s
        for count, event in enumerate(clip.events):
            begun = times >= event.start_s
            told[number, begun, LABELS - MAX_EVENTS + count] = 1
            for label in _labels(event):
                told[number, begun & (times - 1 < event.end_s), label] = 1
    return torch.from_numpy(told)


class Retelling(nn.Module):
    """Tells what happens from the rows of frames, and which event a question speaks of from the rows that name one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.tell = nn.Linear(width, LABELS)
        self.number = nn.Linear(width, MAX_EVENTS)
        nn.init.zeros_(self.tell.weight)
        nn.init.constant_(self.tell.bias, _RARE)

    def watched(self, rows: Tensor, told: Tensor) -> Tensor:
        """Return the loss of what rows (B, T, D) tell against what happens (B, T, LABELS): nats a frame."""
        logits = self.tell(self.norms[0](rows)).float()
        return functional.binary_cross_entropy_with_logits(logits, told, reduction="none").sum(dim=-1).mean()

    def followed(self, rows: Tensor, events: Tensor) -> Tensor:
        """Return the loss of which event rows (B, n, L, D) tell against the right one (B, n, L): nats a name."""
        named = events != IGNORED
        logits = self.number(self.norms[1](rows[named])).float()
        return functional.cross_entropy(logits, events[named], reduction="sum") / named.sum().clamp(min=1)


def _labels(event: Event) -> list[int]:
    verb = VERBS.index(event.verb) * len(KINDS)
    if event.thing is None:
        return [verb + event.on]
    kind = KINDS.index(event.thing.kind)
    colour = COLOURS.index(event.thing.colour) + 1 if event.thing.colour else 0
    labels = [verb + kind, _DEEDS + kind * (len(COLOURS) + 1) + colour]
    if event.side is not None:
        labels.append(_DEEDS + _DOERS + SIDES.index(event.side))
    return labels
