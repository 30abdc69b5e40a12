"""What happens while a clip is watched: a language model that learns to tell and to find it answers questions sooner.

A question about a clip says little about how to answer it: whether one thing came before another is one bit, and it has
to be found in a minute of frames. So while it learns, half of the layers must tell from every frame's row what happens
there and how much has happened so far (watched); where a question has named an event, heads of the next layer must look
at the frames that show it (pointed); and the layer behind that must tell which of two is later (compared), up to the
row that opens the answer: yes or no says little of that as long as "before" and "after" are not told apart.
Losses on inner layers are those of Lee et al., Deeply-Supervised Nets (arXiv 1409.5185), those on where to look of Liu
et al., Neural Machine Translation with Supervised Attention (arXiv 1609.04186). What tells it is thrown away with the
training.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from compressor_service.training.examples import IGNORED, Texts
from compressor_service.training.scene import COLOURS, KINDS, MAX_EVENTS, SIDES, VERBS, Clip, Event

_DEEDS = len(VERBS) * len(KINDS)  # of the gate and the lamp two of these: shut and open, off and on
_DOERS = len(KINDS) * (len(COLOURS) + 1)
LABELS = _DEEDS + _DOERS + len(SIDES) + MAX_EVENTS
_RARE = -3.5  # the log odds of a label, about


def moments(clips: Sequence[Clip]) -> Tensor:
    """Return which of the T slots of B clips of one length show a part of each event: (B, T, MAX_EVENTS), bool."""
    shown = np.zeros((len(clips), clips[0].slots, MAX_EVENTS), bool)
    for number, clip in enumerate(clips):
        times = np.arange(clip.slots) + clip.phase_s
        for count, event in enumerate(clip.events):
            shown[number, :, count] = (event.start_s <= times) & (times - 1 < event.end_s)
    return torch.from_numpy(shown)


def happenings(clips: Sequence[Clip]) -> Tensor:
    """Return what is true in each of the T slots of B clips of one length, as 0 and 1: (B, T, LABELS).

    What happens since the slot before: verb and kind, kind and colour, side; and how many events have begun.
    """
    shown = moments(clips).numpy()
    told = np.zeros((*shown.shape[:2], LABELS), np.float32)
    for number, clip in enumerate(clips):
        times = np.arange(clip.slots) + clip.phase_s
        for count, event in enumerate(clip.events):
            told[number, times >= event.start_s, LABELS - MAX_EVENTS + count] = 1
            for label in _labels(event):
                told[number, shown[number, :, count], label] = 1
    return torch.from_numpy(told)


class Retelling(nn.Module):
    """Tells what happens from the rows of frames, and which of two events is later from the rows that name them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.tell = nn.Linear(width, LABELS)
        self.later = nn.Linear(width, 1)
        for linear in (self.tell, self.later):
            nn.init.zeros_(linear.weight)
        nn.init.constant_(self.tell.bias, _RARE)
        nn.init.zeros_(self.later.bias)

    def watched(self, rows: Tensor, told: Tensor) -> Tensor:
        """Return the loss of what rows (B, T, D) tell against what happens (B, T, LABELS): nats a frame."""
        logits = self.tell(self.norms[0](rows)).float()
        return functional.binary_cross_entropy_with_logits(logits, told, reduction="none").sum(dim=-1).mean()

    def compared(self, rows: Tensor, texts: Texts) -> Tensor:
        """Return the loss of what rows (B, n, L, D) tell of two events that they have named: is the second later?

        Asked of the rows from the second name to the one that opens the answer. Nats a row, 0 without any.
        """
        named = texts.events != IGNORED
        count = named.cumsum(dim=-1)
        first, second = ((texts.events * (named & (count == number))).sum(dim=-1) for number in (1, 2))
        places = torch.arange(named.shape[-1], device=rows.device)
        both = (count == 2) & (places < texts.question_rows[..., None])
        later = (second > first)[..., None].expand_as(both)[both].float()
        logits = self.later(self.norms[1](rows[both])).float().squeeze(-1)
        loss = functional.binary_cross_entropy_with_logits(logits, later, reduction="sum")
        return loss / both.sum().clamp(min=1)


def pointed(looks: Tensor, shown: Tensor, events: Tensor) -> Tensor:
    """Return the loss of where heads look from rows that name an event against the frames that show it: nats a name.

    `looks` (B, heads, n, L, T) are the log weights of frames, `shown` (B, T, MAX_EVENTS) what moments() returns.
    0 where nothing is named that can be seen.
    """
    clips, questions, rows = (events != IGNORED).nonzero(as_tuple=True)
    right = shown[clips, :, events[clips, questions, rows]]
    seen = right.any(dim=-1)
    found = looks[clips, :, questions, rows][seen].masked_fill(~right[seen][:, None], float("-inf"))
    return -found.logsumexp(dim=-1).sum() / (found.shape[1] * seen.sum().clamp(min=1))


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
