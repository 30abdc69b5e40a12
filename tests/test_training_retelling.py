"""What happens in a clip, frame by frame, and what learns to tell it."""

import numpy as np
import torch

from compressor_service.training.examples import IGNORED, Writer
from compressor_service.training.questions import Asked
from compressor_service.training.retelling import LABELS, Retelling, happenings
from compressor_service.training.scene import MAX_EVENTS, Clip, Event, Setting, Thing, draw_clip
from compressor_service.training.tokenizer import write_tokenizer

SETTING = Setting(street=True, night=False, rain=False, look=1)
CAR = Thing("car", "red", "big")


def clip_of(*events, slots=8, phase_s=0.5):
    return Clip(SETTING, slots, phase_s, gate_open=False, lamp_on=False, tracks=(), events=events)


def slots_with(told, label):
    return np.flatnonzero(told[:, label].numpy()).tolist()


def labels_of(event, slot=1):
    """The labels of an event that happens in the slot, without the count."""
    return set(np.flatnonzero(happenings([clip_of(event)])[0, slot, :-MAX_EVENTS].numpy()).tolist())


def test_an_event_is_told_in_every_slot_that_sees_a_part_of_it_happen():
    told = happenings([clip_of(Event("comes", 1.2, 3.1, CAR))])[0]
    assert told.shape == (8, LABELS)
    for label in np.flatnonzero(told[:, :-MAX_EVENTS].any(dim=0).numpy()):
        assert slots_with(told, label) == [1, 2, 3]  # at 1.5, 2.5 and 3.5 s: the last second of it ends at 3.1


def test_an_event_without_length_is_told_in_the_slot_after_it():
    told = happenings([clip_of(Event("gate", 2.6, 2.6, on=True))])[0]
    (label,) = np.flatnonzero(told[:, :-MAX_EVENTS].any(dim=0).numpy())
    assert slots_with(told, label) == [3]


def test_events_are_counted_from_the_slot_in_which_they_begin():
    told = happenings([clip_of(Event("lamp", 0.6, 0.6, on=True), Event("moves", 4.0, 5.0, CAR, "left"))])[0]
    assert told[:, -MAX_EVENTS:].sum(dim=1).tolist() == [0, 1, 1, 1, 2, 2, 2, 2]


def test_whatever_can_be_told_apart_in_an_event_has_labels_of_its_own():
    events = [
        Event("comes", 0.6, 1.4, CAR),
        Event("goes", 0.6, 1.4, CAR),
        Event("comes", 0.6, 1.4, Thing("dog", "red", "big")),
        Event("comes", 0.6, 1.4, Thing("car", "blue", "big")),
        Event("comes", 0.6, 1.4, Thing("fire", None, "big")),
        Event("moves", 0.6, 1.4, CAR, "left"),
        Event("moves", 0.6, 1.4, CAR, "right"),
        Event("gate", 0.6, 0.6, on=True),
        Event("gate", 0.6, 0.6, on=False),
        Event("lamp", 0.6, 0.6, on=True),
        Event("lamp", 0.6, 0.6, on=False),
    ]
    told = [frozenset(labels_of(event)) for event in events]
    assert all(told)
    assert len(set(told)) == len(events)


def test_a_batch_of_clips_is_told_as_each_alone():
    random = np.random.default_rng(3)
    clips = [draw_clip(random, slots=24, phase_s=0.3) for _ in range(6)]
    assert any(clip.events for clip in clips)
    together = happenings(clips)
    for clip, told in zip(clips, together, strict=True):
        assert torch.equal(told, happenings([clip])[0])


def test_rows_that_show_what_happens_learn_to_tell_it():
    random = np.random.default_rng(5)
    clips = [draw_clip(random, slots=16, phase_s=0.5) for _ in range(16)]
    told = happenings(clips)
    rows = told @ torch.randn(LABELS, 192, generator=torch.Generator().manual_seed(6))
    retelling = Retelling(192)
    untaught = float(retelling.watched(rows, told).detach())
    descent = torch.optim.Adam(retelling.parameters(), lr=0.02)
    for _ in range(150):
        descent.zero_grad()
        loss = retelling.watched(rows, told)
        loss.backward()
        descent.step()
    assert float(loss.detach()) < untaught / 5


TOLD = ("a red car comes in", "the gate opens", "a red car goes away", "the gate opens")


def test_rows_where_a_question_has_named_an_event_know_its_number(tmp_path):
    tokenizer = write_tokenizer(tmp_path)
    question = "Is it true that a red car goes away before a red car comes in?"
    texts = Writer(tokenizer).write([[Asked("order", question, "no", TOLD)]])
    [rows] = (texts.events[0, 0] != IGNORED).nonzero(as_tuple=True)
    ends = [tokenizer.decode(texts.ids[0, 0, : row + 1]).strip() for row in rows.tolist()]
    assert ends == [question.lower().partition(" before")[0], question.lower().rstrip("?")]
    assert texts.events[0, 0, rows].tolist() == [2, 0]


def test_events_that_are_told_in_the_same_words_have_no_number(tmp_path):
    asked = Asked("first", "What happened first: the gate opens or a red car goes away?", "the gate opens", TOLD)
    texts = Writer(write_tokenizer(tmp_path)).write([[asked, Asked("gate", "Is the gate open?", "yes")]])
    assert texts.events[texts.events != IGNORED].tolist() == [2]


def test_a_name_is_told_from_its_row_alone():
    events = torch.tensor([[[IGNORED, 2, IGNORED], [IGNORED, IGNORED, 1]]])
    rows = torch.randn(1, 2, 3, 192, generator=torch.Generator().manual_seed(8))
    retelling = Retelling(192)
    loss = retelling.followed(rows, events)
    assert torch.equal(loss, retelling.followed(rows * (events != IGNORED)[..., None], events))
    assert not torch.equal(loss, retelling.followed(rows.flip(0, 1), events))
    assert float(retelling.followed(rows, torch.full_like(events, IGNORED)).detach()) == 0
