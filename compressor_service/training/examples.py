"""Batches to learn from: scenes as numbers, and several questions to each as token ids."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from compressor_service.training.questions import Asked
from compressor_service.training.scene import COLOURS, KINDS, LANES, MAX_THINGS, SIZES, View
from compressor_service.training.tokenizer import ASSISTANT, BEGIN, END, USER, token_id

FLAGS = 5  # of a picture: street, night, rain, gate open, lamp on
IGNORED = -100  # a target that is not learned


@dataclass(frozen=True, slots=True)
class Facts:
    """What is visible in B x T pictures, as numbers: B, T and three things each, 0 where there is none."""

    kinds: Tensor  # (B, T, 3), 1 + the kind's place in KINDS
    colours: Tensor  # (B, T, 3), 1 + the colour's place in COLOURS, 0 for a fire
    sizes: Tensor  # (B, T, 3)
    lanes: Tensor  # (B, T, 3)
    xs: Tensor  # (B, T, 3), float
    flags: Tensor  # (B, T, 5), float: street, night, rain, gate open, lamp on

    def to(self, device: torch.device) -> "Facts":
        return Facts(*(getattr(self, field.name).to(device) for field in fields(self)))

    @classmethod
    def of(cls, views: Sequence[Sequence[View]]) -> "Facts":
        shape = len(views), len(views[0]), MAX_THINGS
        whole = np.zeros((4, *shape), np.int64)
        xs = np.zeros(shape, np.float32)
        flags = np.zeros((*shape[:2], FLAGS), np.float32)
        for b, row in enumerate(views):
            for t, view in enumerate(row):
                setting = view.setting
                flags[b, t] = setting.street, setting.night, setting.rain, view.gate_open, view.lamp_on
                for i, one in enumerate(view.visible):
                    whole[:, b, t, i] = (
                        KINDS.index(one.thing.kind) + 1,
                        COLOURS.index(one.thing.colour) + 1 if one.thing.colour else 0,
                        SIZES.index(one.thing.size),
                        LANES.index(one.lane),
                    )
                    xs[b, t, i] = one.x
        kinds, colours, sizes, lanes = (torch.from_numpy(one) for one in whole)
        return cls(kinds, colours, sizes, lanes, torch.from_numpy(xs), torch.from_numpy(flags))


@dataclass(frozen=True, slots=True)
class Texts:
    """n questions to each of B pictures or clips: what stands behind the frames, question and answer in one row."""

    ids: Tensor  # (B, n, L), padded at the end
    question_rows: Tensor  # (B, n), how many of L are the question with the mark that opens the answer
    targets: Tensor  # (B, n, L), the id that follows each row of the answer, else IGNORED
    events: Tensor  # (B, n, L), the number of the event that a question has named when it comes to a row, else IGNORED

    def to(self, device: torch.device) -> "Texts":
        return Texts(*(getattr(self, field.name).to(device) for field in fields(self)))

    def first(self, count: int | None) -> "Texts":
        """Return the first `count` questions to each, in as many rows; all if None."""
        return Texts(*(getattr(self, field.name)[:, :count] for field in fields(self)))


class Writer:
    """Turns questions and answers into ids, as the service's prompt does."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        control = {one: token_id(tokenizer, one) for one in (BEGIN, USER, ASSISTANT, END)}
        self.before = [control[BEGIN], control[USER]]
        self._open, self._end = control[ASSISTANT], control[END]

    def write(self, asked: Sequence[Sequence[Asked]]) -> Texts:
        """Write n questions to each of B scenes."""
        flat = [one for row in asked for one in row]
        fast = self._tokenizer.backend_tokenizer
        encoded = fast.encode_batch([f"\n{one.question}" for one in flat])
        questions = [[*one.ids, self._open] for one in encoded]
        answers = [[*one.ids, self._end] for one in fast.encode_batch([one.answer for one in flat])]
        longest = max(len(question) + len(answer) for question, answer in zip(questions, answers, strict=True)) - 1
        ids = np.zeros((len(flat), longest), np.int64)
        targets = np.full((len(flat), longest), IGNORED, np.int64)
        events = np.full((len(flat), longest), IGNORED, np.int64)
        for row, (one, encoding) in enumerate(zip(flat, encoded, strict=True)):
            for number, end in _named(one):
                events[row, encoding.char_to_token(end)] = number
        for row, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            together = question + answer
            ids[row, : len(together) - 1] = together[:-1]
            targets[row, len(question) - 1 : len(together) - 1] = answer
        shape = len(asked), len(asked[0])
        rows = np.array([len(question) for question in questions])
        return Texts(
            torch.from_numpy(ids).view(*shape, -1),
            torch.from_numpy(rows).view(*shape),
            torch.from_numpy(targets).view(*shape, -1),
            torch.from_numpy(events).view(*shape, -1),
        )


def _named(asked: Asked) -> Iterator[tuple[int, int]]:
    """Yield the numbers of the events that a question names in full, and where in its line each name ends.

    What is told in the same words as another event names none.
    """
    for number, told in enumerate(asked.told):
        start = asked.question.find(told)
        if start >= 0 and asked.told.count(told) == 1:
            yield number, start + len(told)  # behind the line break, so this is the last letter
