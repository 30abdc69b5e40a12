"""What is trained is what is served: the training's passes against the model that the service loads."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from compressor_service.llava_mini.model import LlavaMini
from compressor_service.llava_mini.prompt import Prompt
from compressor_service.preprocess import pixels
from compressor_service.training.alignment import PictureBatches, answer_pictures, only_questions
from compressor_service.training.answering import answer
from compressor_service.training.descent import Rates
from compressor_service.training.draw import draw
from compressor_service.training.examples import Facts, Writer
from compressor_service.training.eyes import Eyes
from compressor_service.training.language import LanguageSettings, LanguageStage, build_config
from compressor_service.training.network import Network, Shape, initialise
from compressor_service.training.packed import look, pass_packed
from compressor_service.training.questions import Asked
from compressor_service.training.scene import draw_view
from compressor_service.training.tokenizer import write_tokenizer
from compressor_service.training.tower import TowerSettings, TowerStage
from tests.layers import pass_alone

SHAPE = Shape(width=64, inner=96, heads=8, layers=2, prefusion_layers=2, context_rows=512)
TOWER = TowerSettings(
    steps=1,
    pictures=8,
    captions=8,
    films=0,
    width=64,
    layers=2,
    heads=4,
    inner=64,
    space=16,
    text_width=32,
    text_layers=1,
)
QUESTIONS = (
    Asked("presence", "Is there a dog?", "no"),
    Asked("what", "What is in the picture?", "a red car and a person in blue"),
    Asked("gate", "Is the gate open or closed?", "open"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A whole checkpoint of untaught weights, written as the training writes it."""
    folder = tmp_path_factory.mktemp("run")
    TowerStage(TOWER).finish(folder)
    raw, config = build_config(SHAPE, folder)
    network = Network(config)
    initialise(network, write_tokenizer(folder), torch.Generator().manual_seed(4))
    with torch.no_grad():  # so that differences show in the logits
        network.language.lm_head.weight.normal_(generator=torch.Generator().manual_seed(5))
    network.write(folder, raw)
    return folder


@pytest.fixture(scope="module")
def network(folder):
    """The network as it was written: rounded to float16."""
    _, config = build_config(SHAPE, folder)
    network = Network(config)
    network.load(folder)
    return network


@pytest.fixture
def pictures():
    random = np.random.default_rng(11)
    return np.stack([draw(draw_view(random)) for _ in range(3)])


def as_served(picture):
    import io

    from PIL import Image

    target = io.BytesIO()
    Image.fromarray(picture).save(target, "PNG")
    return pixels(target.getvalue(), image_size=112, ratio=1)


def test_many_questions_in_one_pass_are_the_same_as_one_by_one(network):
    random = torch.Generator().manual_seed(1)
    shared = torch.randn(2, 9, 64, generator=random)
    own = torch.randn(2, 3, 5, 64, generator=random)
    together_shared, together = pass_packed(network.language.layers, network.rotary, shared, own)
    for number in range(3):
        rows = torch.cat((shared, own[:, number]), dim=1)
        alone = pass_alone(network.language.layers, network.rotary, rows)
        torch.testing.assert_close(together[:, number], alone[:, 9:], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(together_shared, alone[:, :9], atol=1e-5, rtol=1e-4)


def test_heads_are_said_to_look_where_they_attend(network):
    random = torch.Generator().manual_seed(2)
    shared = torch.randn(2, 9, 64, generator=random)
    own = torch.randn(2, 3, 5, 64, generator=random)
    layer = network.language.layers[0]
    weights = look(layer, network.rotary, shared, own).exp()
    attention, heads = layer.self_attn, network.language.layers[0].self_attn.config.num_attention_heads
    rows = torch.cat((shared, own[:, 1]), dim=1)
    turns = network.rotary(rows, position_ids=torch.arange(14)[None])
    hidden = torch.full((14, 14), float("-inf")).triu(1)[None, None]
    attention.config._attn_implementation = "eager"
    _, theirs = attention(layer.input_layernorm(rows), position_embeddings=turns, attention_mask=hidden)
    assert theirs.shape == (2, heads, 14, 14)
    torch.testing.assert_close(weights[:, :, 1], theirs[:, :, 9:], atol=1e-5, rtol=1e-4)


def test_frame_tokens_in_training_are_those_of_the_service(folder, network, pictures):
    model = LlavaMini.from_pretrained(folder)
    features = Eyes(folder, torch.device("cpu")).features(pictures)
    served = model.encode_frames(torch.stack([as_served(one) for one in pictures]))[:, 0]
    with torch.no_grad():
        trained = network.tokens(features)
    # The tower may run in bfloat16 in training.
    assert (trained - served).abs().max() < 0.05 * served.std()


@torch.no_grad()
def test_frame_tokens_are_nearly_the_same_where_matrices_are_multiplied_in_bfloat16(network):
    features = torch.randn(5, 49, TOWER.width, generator=torch.Generator().manual_seed(6))
    whole = network.tokens(features)
    with torch.autocast("cpu", torch.bfloat16):
        half = network.tokens(features)
    assert half.dtype == torch.bfloat16
    assert (half.float() - whole).abs().max() < 0.1 * whole.std()


def test_logits_in_training_are_those_of_the_service(folder, network, pictures):
    model, prompt = LlavaMini.from_pretrained(folder), Prompt.from_pretrained(folder)
    tower = torch.stack([as_served(one) for one in pictures])
    features = model._eyes.tower(tower[:, 0]).patches.clone()
    writer = Writer(write_tokenizer(folder))
    texts = writer.write([QUESTIONS] * len(pictures))
    before = torch.tensor(writer.before)
    with torch.no_grad():
        plain = network.embed(texts.ids)
        opened = network.embed(before).expand(len(pictures), -1, -1)
        tokens, opened, fused = network.fuse(network.see(features), opened, plain)
        shared = torch.cat((opened, tokens[:, None]), dim=1)
        trained = network.language.lm_head(network.read(shared, only_questions(fused, plain, texts)).states)
    for at, question in enumerate(QUESTIONS):
        ids = torch.tensor(prompt.build(question.question))
        rows = model.inputs_embeds(ids.expand(len(pictures), -1), tower[:, None])
        last = int(texts.question_rows[0, at]) - 1
        torch.testing.assert_close(trained[:, at, last], model.logits(rows)[:, -1], atol=2e-4, rtol=1e-3)


def test_an_answer_is_right_only_to_its_last_token(folder, network, pictures):
    writer = Writer(write_tokenizer(folder))
    texts = writer.write([QUESTIONS] * len(pictures))
    features = Eyes(folder, torch.device("cpu")).features(pictures)
    _, _, answered = answer_pictures(network, features, torch.tensor(writer.before), texts)
    assert answered.loss > 0
    assert not answered.right.any()  # untaught


def test_questions_that_are_only_fused_change_no_answer(folder, network, pictures):
    writer = Writer(write_tokenizer(folder))
    texts = writer.write([QUESTIONS] * len(pictures))
    features = Eyes(folder, torch.device("cpu")).features(pictures)
    with torch.no_grad():
        _, fused, answered = answer_pictures(network, features, torch.tensor(writer.before), texts, 2)
        _, fused_alone, alone = answer_pictures(network, features, torch.tensor(writer.before), texts.first(2))
    assert answered.right.shape == (len(pictures), 2)
    assert fused.shape[1] == len(QUESTIONS)
    torch.testing.assert_close(fused[:, :2], fused_alone)
    torch.testing.assert_close(answered.loss, alone.loss)


def test_the_last_question_of_a_batch_may_be_about_a_clip(folder):
    tokenizer = write_tokenizer(folder)
    with_clips = PictureBatches(3, pictures=6, questions=2, films=0, stories=2, tokenizer=tokenizer)(5)
    without = PictureBatches(3, pictures=6, questions=2, films=0, stories=0, tokenizer=tokenizer)(5)
    assert with_clips.texts.ids.shape[:2] == (6, 3)
    assert without.texts.ids.shape[:2] == (6, 2)
    rows = without.texts.ids.shape[2]
    assert torch.equal(with_clips.texts.first(2).ids[..., :rows], without.texts.ids)
    assert np.array_equal(with_clips.pictures, without.pictures)


def test_a_padded_question_answers_as_it_does_without_padding(folder, network):
    writer = Writer(write_tokenizer(folder))
    shared = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        alone = writer.write([QUESTIONS[:1]])
        among = writer.write([QUESTIONS])
        loss = answer(network, shared, network.embed(alone.ids), alone).loss
        padded = among.targets.clone()
        padded[:, 1:] = -100
        among.targets.copy_(padded)
        together = answer(network, shared, network.embed(among.ids), among).loss
    torch.testing.assert_close(loss, together, atol=1e-5, rtol=1e-4)


def test_facts_tell_what_is_visible_and_nothing_else():
    random = np.random.default_rng(3)
    views = [draw_view(random) for _ in range(20)]
    facts = Facts.of([(view,) for view in views])
    for number, view in enumerate(views):
        assert int((facts.kinds[number, 0] > 0).sum()) == len(view.visible)
        assert facts.flags[number, 0].tolist() == [
            view.setting.street, view.setting.night, view.setting.rain, view.gate_open, view.lamp_on,
        ]  # fmt: skip


def test_the_checkpoint_is_in_the_published_layout_and_says_what_world_it_knows(folder):
    raw = json.loads((folder / "config.json").read_text())
    assert raw["model_type"] == "llava_mini_llama"
    assert "tokenline_untrained" not in raw
    names = load_file(folder / "model.safetensors")
    assert {"model.embed_tokens.weight", "model.prefusion_layers.1.mlp.up_proj.weight", "lm_head.weight"} <= set(names)
    assert {str(tensor.dtype) for tensor in names.values()} == {"torch.float16"}


def test_schooling_goes_on_where_it_was_interrupted(folder, tmp_path):
    shutil.copytree(folder / "clip", tmp_path / "clip")
    settings = LanguageSettings(steps=6, rows=256, shape=SHAPE)

    def stage():
        return LanguageStage(settings, tmp_path)

    whole, first, second = stage(), stage(), stage()
    for number in range(6):
        whole.step(number, whole.batch(number))
    for number in range(3):
        first.step(number, first.batch(number))
    second.restore(first.state())
    for number in range(3, 6):
        second.step(number, second.batch(number))
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, second.network.state_dict()[name]), name


def test_schooling_lowers_the_loss(folder, tmp_path):
    shutil.copytree(folder / "clip", tmp_path / "clip")
    rates = Rates(matrices=0.02, others=1e-2, words=3e-3, warm_up=3)
    stage = LanguageStage(LanguageSettings(steps=30, rows=512, shape=SHAPE, rates=rates), tmp_path)
    losses = [stage.step(number, stage.batch(number))["loss"] for number in range(30)]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
