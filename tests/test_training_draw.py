import io
import itertools

import av
import numpy as np
import pytest

from compressor_service.training.captions import (
    Caption,
    Wanted,
    clip_tokenizer,
    draw_caption,
    holds,
    object_caption,
    state,
)
from compressor_service.training.draw import Camera, degrade, draw, draw_owned, jpeg_round, patch_owners
from compressor_service.training.film import film_keyframes, write_film
from compressor_service.training.scene import (
    COLOURS,
    KINDS,
    Clip,
    Event,
    Leg,
    Placed,
    Setting,
    Thing,
    View,
    draw_view,
)

_DAY = Setting(street=True, night=False, rain=False, look=3)
_CAR = Thing("car", "red", "big")


def _view(*things, setting=_DAY, gate_open=False, lamp_on=False):
    return View(setting, gate_open, lamp_on, things)


def _away(one, other):
    """How far two pictures are apart at their most different place of 8 x 8 pixels."""
    apart = np.abs(one.astype(float) - other).mean(axis=2)
    return apart.reshape(14, 8, 14, 8).mean(axis=(1, 3)).max()


def test_the_same_view_gives_the_same_picture():
    view = draw_view(np.random.default_rng(4))
    assert draw(view).shape == (112, 112, 3)
    assert (draw(view) == draw(view)).all()
    assert draw(view, (320, 240)).shape == (240, 320, 3)


@pytest.mark.parametrize("night", [False, True])
def test_every_kind_and_colour_looks_different_even_when_small_and_far(night):
    setting = Setting(street=True, night=night, rain=True, look=8)
    pairs = [(kind, colour) for kind in KINDS for colour in (COLOURS if kind != "fire" else (None,))]
    pictures = [draw(_view(Placed(Thing(*pair, "small"), "far", 0.5), setting=setting)) for pair in pairs]
    for (one, picture), (other, another) in itertools.combinations(zip(pairs, pictures, strict=True), 2):
        assert _away(picture, another) > 4, (one, other)


@pytest.mark.parametrize("setting", [_DAY, Setting(street=False, night=True, rain=True, look=5)])
def test_every_state_of_a_view_shows(setting):
    plain = draw(_view(setting=setting))
    assert _away(plain, draw(_view(setting=setting, gate_open=True))) > 15
    assert _away(plain, draw(_view(setting=setting, lamp_on=True))) > 15
    near, far, small = (Placed(_CAR, "near", 0.5), Placed(_CAR, "far", 0.5), Thing("car", "red", "small"))
    assert _away(draw(_view(near, setting=setting)), draw(_view(far, setting=setting))) > 15
    assert _away(draw(_view(near, setting=setting)), draw(_view(Placed(small, "near", 0.5), setting=setting))) > 10


def test_patches_name_the_thing_that_covers_them():
    dog = Thing("dog", "white", "small")
    named = patch_owners(draw_owned(_view(Placed(_CAR, "near", 0.2), Placed(dog, "far", 0.8))))
    assert named.shape == (7, 7)
    assert named[5, 1] == 0
    assert (named[2:5, 4:] == 1).any()
    assert (named[:2] == -1).all()


def test_a_border_cuts_a_thing_off():
    whole, half, none = ((draw_owned(_view(Placed(_CAR, "near", x))).owners == 0).sum() for x in (0.5, 1.0, 1.3))
    assert whole * 0.4 < half < whole * 0.6
    assert none == 0


def test_a_camera_spoils_a_picture_only_a_little_and_the_same_for_the_same_chance():
    picture = draw(draw_view(np.random.default_rng(1)))
    for seed in range(10):
        taken = degrade(picture, np.random.default_rng(seed))
        assert (taken == degrade(picture, np.random.default_rng(seed))).all()
        assert np.abs(taken.astype(float) - picture).mean() < 60
    assert np.abs(jpeg_round(picture).astype(float) - picture).mean() < 5
    camera = Camera.draw(np.random.default_rng(2), compress=False)
    assert camera.take(picture, np.random.default_rng(0)).dtype == np.uint8


@pytest.fixture
def clip():
    """A red car crosses, and then the gate opens."""
    track = (_CAR, (Leg(0.6, 3.4, "near", -0.3, 1.3),))
    events = (Event("crosses", 0.6, 3.4, _CAR, "right"), Event("gate", 5.2, 5.2, on=True))
    return Clip(_DAY, 8, 0.0, gate_open=False, lamp_on=False, tracks=(track,), events=events)


@pytest.mark.parametrize("size_px", [(320, 240), (428, 240)])
def test_a_film_shows_the_views_of_its_whole_seconds(clip, size_px):
    film = io.BytesIO()
    write_film(clip, film, size_px=size_px, seed=5)
    film.seek(0)
    with av.open(film) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        times = [float(frame.pts * frame.time_base) for frame in container.decode(stream)]
    assert times == [number / 8 for number in range(57)]


def test_the_same_clip_gives_the_same_film(clip):
    films = [io.BytesIO() for _ in range(3)]
    for film in films:
        write_film(clip, film, fps=4, seed=2)
    assert films[0].getvalue() == films[1].getvalue() == films[2].getvalue()


def test_keyframes_of_a_film_look_like_the_pictures_drawn(clip):
    keyframes = film_keyframes(clip, seed=5)
    drawn = [draw(view) for view in clip.views()]
    assert len(keyframes) == 8
    for second, keyframe in enumerate(keyframes):
        apart = [np.abs(keyframe.astype(float) - other).mean() for other in drawn]
        # Equal views are equally near, apart from noise.
        assert apart[second] < min(apart) + 0.5
    assert np.abs(keyframes[2].astype(float) - keyframes[0]).mean() > 2


def test_a_caption_drawn_for_a_view_is_true_of_it():
    random = np.random.default_rng(9)
    for _ in range(1500):
        view = draw_view(random)
        caption = draw_caption(random, view)
        assert holds(caption, view), caption.text


def test_captions_know_what_is_true():
    cat = Thing("cat", "black", "small")
    view = _view(Placed(_CAR, "near", 0.1), Placed(cat, "far", 0.9), Placed(Thing("dog", "red", "big"), "far", 1.2))
    assert holds(object_caption("car", "red"), view)
    assert object_caption("car", "red").text == "a red car"
    assert not holds(object_caption("dog"), view)  # it is outside
    assert not holds(object_caption("cat", "red"), view)
    assert holds(Caption("a small black cat on the right", (Wanted(("cat",), "black", "small", "far", 2),)), view)
    assert holds(Caption("one car", (Wanted(("car",), count=1),)), view)
    assert holds(Caption("no dogs", (Wanted(("dog",), count=0),)), view)
    assert not holds(Caption("two cars", (Wanted(("car",), count=2),)), view)
    assert not holds(Caption("nothing", empty=True), view)
    assert holds(Caption("nothing", empty=True), _view())
    assert holds(Caption("a car by day", (Wanted(("car",)),), (("night", False),)), view)
    assert state(view, "street")
    assert not state(view, "lamp")


def test_the_tokenizer_reads_captions_without_losing_anything():
    tokenizer, random = clip_tokenizer(), np.random.default_rng(2)
    for text in [draw_caption(random).text for _ in range(100)] + ["A RED car", "an unheard-of zebra!"]:
        ids = tokenizer(text)["input_ids"]
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.lower().replace(" ", "")
