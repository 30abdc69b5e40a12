"""What training starts from: words find what belongs to them, and frames tell when they are and what is new in them."""

import numpy as np
import pytest
import torch

from compressor_service.training.descent import Descent, Rates
from compressor_service.training.examples import Facts, Writer
from compressor_service.training.language import build_config
from compressor_service.training.network import Network, Shape, initialise
from compressor_service.training.questions import Asked
from compressor_service.training.scene import Clip, Event, Leg, Setting, Thing, draw_view
from compressor_service.training.scene_tokens import ATTRIBUTES, SceneTokens
from compressor_service.training.tokenizer import token_id, write_tokenizer
from compressor_service.training.tower import TowerSettings, TowerStage
from tests.layers import pass_alone

DAY = Setting(street=True, night=False, rain=False, look=1)


class Fresh:
    """An untaught network with the tokens that it can read."""

    def __init__(self, folder):
        TowerStage(TowerSettings(steps=1, pictures=2, captions=2, films=0, width=32, layers=2, heads=2)).finish(folder)
        self.tokenizer = write_tokenizer(folder)
        _, config = build_config(Shape(), folder)
        self.network = Network(config)
        self.scenes = SceneTokens(initialise(self.network, self.tokenizer, torch.Generator().manual_seed(2)))
        self.writer = Writer(self.tokenizer)

    def rows(self, views, question):
        """The prompt (1, P, D) up to the mark that opens the answer."""
        texts = self.writer.write([[Asked("any", question, "yes")]])
        ids = texts.ids[0, :, : int(texts.question_rows[0, 0])]
        before = self.network.embed(torch.tensor([self.writer.before]))
        return torch.cat((before, self.scenes(Facts.of([views])), self.network.embed(ids)), dim=1)

    def said(self, views, question, words):
        """Which of some words is the likeliest answer."""
        states = pass_alone(self.network.language.layers, self.network.rotary, self.rows(views, question))
        logits = self.network.language.lm_head(self.network.language.norm(states[0, -1]))
        return words[int(logits[[token_id(self.tokenizer, word) for word in words]].argmax())]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    with torch.no_grad():
        yield Fresh(tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize(("attribute", "chance", "least"), [("colour", 1 / 6, 0.35), ("size", 1 / 2, 0.76)])
def test_an_untaught_answer_leans_to_what_belongs_to_the_thing_that_is_named(fresh, attribute, chance, least):
    random = np.random.default_rng(0)
    right = []
    while len(right) < 200:
        view = draw_view(random)
        alone = [
            one.thing for one in view.visible if [other.thing.kind for other in view.visible].count(one.thing.kind) == 1
        ]
        if len(view.visible) < 2 or not alone or getattr(alone[0], attribute) is None:
            continue
        said = fresh.said((view,), f"Is the {alone[0].kind} there?", ATTRIBUTES[attribute])
        right.append(said == getattr(alone[0], attribute))
    assert np.mean(right) > least > 1.5 * chance


def parts(fresh, views):
    """What the first layer adds to frames (T, D)."""
    rows = fresh.rows(views, "What happened?")
    first = pass_alone(fresh.network.language.layers[:1], fresh.network.rotary, rows)
    return (first - rows)[0, 2 : 2 + len(views)]


def test_the_first_layer_sees_a_frame_change_where_something_comes_or_goes(fresh):
    car, dog = Thing("car", "red", "big"), Thing("dog", "black", "small")
    clip = Clip(
        DAY,
        slots=12,
        phase_s=0.5,
        gate_open=False,
        lamp_on=False,
        tracks=((dog, (Leg(-1, 14, "near", 0.2, 0.2),)), (car, (Leg(4, 9, "far", 0.8, 0.8),))),
        events=(Event("comes", 4, 4, car), Event("goes", 9, 9, car)),
    )
    views = tuple(clip.views())
    left = parts(fresh, views) + fresh.scenes(Facts.of([views]))[0]
    steps = (left[1:] - left[:-1]).norm(dim=1)
    assert set(torch.topk(steps, 4).indices.tolist()) == {3, 4, 8, 9}  # to what is new and from it: in slots 4 and 9
    assert steps.sort().values[-4] > 2 * steps.sort().values[-5]


def test_frames_tell_how_late_they_are_from_the_first_second_to_minutes(fresh):
    view = draw_view(np.random.default_rng(3))
    added = parts(fresh, (view,) * 240)
    direction = added[4] - added[200]
    told = added @ direction
    assert (told[4:-1] > told[5:]).all()


def test_look_ups_need_heads_enough(tmp_path):
    TowerStage(TowerSettings(steps=1, pictures=2, captions=2, films=0, width=32, layers=2, heads=2)).finish(tmp_path)
    _, config = build_config(Shape(heads=4), tmp_path)
    with pytest.raises(ValueError, match="8 heads"):
        initialise(Network(config), write_tokenizer(tmp_path), torch.Generator())


def test_what_starts_out_made_learns_more_slowly_than_the_rest():
    network = torch.nn.ModuleDict(
        {"layers": torch.nn.ModuleList(torch.nn.Linear(16, 16, bias=False) for _ in range(2))}
    )
    before = [layer.weight.detach().clone() for layer in network["layers"]]
    rates = Rates(matrices=0.01, made=0.001, warm_up=1)
    descent = Descent(network.named_parameters(), rates, steps=10, made=("layers.0.",))
    with torch.enable_grad():
        descent.step(0, sum(layer(torch.ones(1, 16)).square().sum() for layer in network["layers"]))
    made, other = (float((layer.weight - old).norm()) for layer, old in zip(network["layers"], before, strict=True))
    assert other == pytest.approx(10 * made, rel=0.05)
    restored = Descent(network.named_parameters(), rates, steps=10, made=("layers.0.",))
    restored.restore(descent.state())
