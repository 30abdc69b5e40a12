"""What happens in a clip, frame by frame, and what learns to tell it."""

import numpy as np
import pytest
import torch

from compressor_service.training.examples import IGNORED, Texts, Writer
from compressor_service.training.questions import Asked
from compressor_service.training.retelling import LABELS, Retelling, happenings, moments, pointed
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


def test_an_event_is_shown_by_the_slots_that_see_a_part_of_it():
    shown = moments([clip_of(Event("comes", 1.2, 3.1, CAR), Event("gate", 4.6, 4.6, on=True))])[0]
    assert [slots_with(shown, event) for event in range(3)] == [[1, 2, 3], [5], []]


def texts_of(events, question_rows):
    events, question_rows = torch.tensor(events), torch.tensor(question_rows)
    return Texts(torch.zeros_like(events), question_rows, torch.zeros_like(events), events)


def test_two_names_are_compared_from_the_second_to_the_row_that_opens_the_answer():
    texts = texts_of(
        [[[IGNORED, 2, IGNORED, 0, IGNORED, IGNORED], [1, IGNORED, IGNORED, 3, IGNORED, IGNORED]]], [[5, 4]]
    )
    rows = torch.randn(1, 2, 6, 192, generator=torch.Generator().manual_seed(8))
    retelling = Retelling(192)
    torch.nn.init.normal_(retelling.later.weight)
    asked = torch.zeros(1, 2, 6, 1)
    asked[0, 0, 3:5] = asked[0, 1, 3] = 1
    loss = retelling.compared(rows, texts)
    assert torch.equal(loss, retelling.compared(rows * asked, texts))
    assert not torch.equal(loss, retelling.compared(rows * (1 - asked), texts))


def test_rows_learn_to_tell_which_of_two_events_is_later():
    texts = texts_of([[[2, 0], [1, 3], [0, 1], [3, 2]]], [[2, 2, 2, 2]])
    rows = torch.randn(1, 4, 2, 192, generator=torch.Generator().manual_seed(9))
    retelling = Retelling(192)
    descent = torch.optim.Adam(retelling.parameters(), lr=0.02)
    assert float(retelling.compared(rows, texts).detach()) == pytest.approx(np.log(2))
    for _ in range(50):
        descent.zero_grad()
        loss = retelling.compared(rows, texts)
        loss.backward()
        descent.step()
    assert float(loss.detach()) < 0.1


def test_where_no_second_event_is_named_there_is_nothing_to_compare():
    texts = texts_of([[[IGNORED, 2], [1, IGNORED]], [[IGNORED, IGNORED], [IGNORED, 3]]], [[2, 2], [2, 2]])
    assert float(Retelling(192).compared(torch.randn(2, 2, 2, 192), texts).detach()) == 0


def test_a_head_that_looks_at_the_frames_of_what_is_named_loses_nothing():
    events = torch.tensor([[[IGNORED, 1]], [[0, IGNORED]]])
    shown = torch.zeros(2, 6, MAX_EVENTS, dtype=torch.bool)
    shown[0, 2:4, 1] = shown[1, 5, 0] = True
    weights = torch.full((2, 1, 1, 2, 6), 1e-6)
    weights[0, 0, 0, 1, 2:4] = 0.5
    weights[1, 0, 0, 0, 5] = 1
    assert float(pointed(weights.log(), shown, events)) == pytest.approx(0, abs=1e-4)
    assert float(pointed(weights.flip(-1).log(), shown, events)) > 5
    shown[1] = False  # what no frame shows cannot be looked at
    assert float(pointed(weights.log(), shown, events)) == pytest.approx(0, abs=1e-4)
    assert float(pointed(weights.log(), torch.zeros_like(shown), events)) == 0
