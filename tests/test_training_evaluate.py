"""Evaluation: exams that can be drawn again, answers as the service gives them, and what is told of them."""

import io
import json
import shutil
from dataclasses import replace

import av
import numpy as np
import pytest
from PIL import Image

from compressor_service.training import evaluate
from compressor_service.training.captions import holds
from compressor_service.training.evaluate import Evaluation, Reader, examine, queries, score_search, search_offline
from compressor_service.training.exam import SLOTS, any_phase, draw_scene, draw_scenes
from compressor_service.training.questions import CLIP_FAMILIES, Story, ask_clip
from compressor_service.training.scene import Placed, Setting, Thing, View, draw_clip
from compressor_service.training.score import Score, same
from deploy.cli import run_command
from deploy.evaluation import FullReport, chosen_frames, print_report
from deploy.served_evaluation import SLATE_S, Compared, ServiceReport, whole_pass, write_camera_film
from ingest.keyframe import KeyframeMaker
from qa_service.schemas import Answer, Question
from tests.qa_parts import keyframe, open_parts

DAY = Setting(street=True, night=False, rain=False, look=1)
CAR, DOG = Thing("car", "red", "big"), Thing("dog", "black", "small")


@pytest.fixture(scope="module")
def reader(checkpoint):
    return Reader.load(checkpoint, chosen_frames, device="cpu")


@pytest.fixture(scope="module")
def report(reader):
    evaluation = Evaluation(reader, split="test", seed=3)
    for group, count in (("pictures", 3), ("clips", 2)):
        evaluation.examine(group, count, lambda: None)
    evaluation.examined["long"].append(evaluation.examined["clips"][0])  # a film of minutes would take its time
    evaluation.look_for_search(40)
    return evaluation.report("small", show_wrong=2)


def seen_at(*things: Placed) -> View:
    return View(DAY, False, False, things)


def picture(jpeg: bytes):
    with Image.open(io.BytesIO(jpeg)) as opened:
        return np.array(opened)


# Exams


@pytest.mark.parametrize("group", ["pictures", "clips", "long", "cameras"])
def test_an_exam_is_the_same_again_and_a_shorter_one_its_beginning(group):
    scenes = list(draw_scenes("test", 7, group, 4))
    assert scenes == list(draw_scenes("test", 7, group, 4))
    assert scenes[:2] == list(draw_scenes("test", 7, group, 2))
    for other in (draw_scenes("test", 8, group, 4), draw_scenes("validation", 7, group, 4)):
        assert all(one.shown != another.shown for one, another in zip(scenes, other, strict=True))


@pytest.mark.parametrize("group", ["pictures", "clips"])
def test_a_scene_has_one_question_of_a_family_at_most_and_every_family_is_asked(group):
    scenes = list(draw_scenes("test", 0, group, 60))
    families = [[one.family for one in scene.asked] for scene in scenes]
    assert all(len(some) == len(set(some)) for some in families)
    wanted = {"pictures": 12, "clips": 17}[group]
    assert len(set().union(*families)) == wanted


def test_clips_have_the_lengths_of_their_group_and_every_other_one_starts_as_a_file():
    for group, (low, high) in SLOTS.items():
        lengths = [len(scene.views) - (group == "cameras") for scene in draw_scenes("test", 0, group, 40)]
        assert low <= min(lengths) < max(lengths) <= high
    starts = [scene.starts_as_a_file for scene in draw_scenes("test", 0, "clips", 6)]
    assert starts == [True, False] * 3


def test_keyframes_of_a_picture_and_of_a_clip_are_one_a_slot():
    for group in ("pictures", "clips"):
        scene = draw_scene("test", 0, group, 0)
        keyframes = scene.keyframes()
        assert len(keyframes) == len(scene.views)
        assert all(one.shape == (112, 112, 3) for one in keyframes)
        again = scene.keyframes()
        assert all(np.array_equal(*both) for both in zip(keyframes, again, strict=True))


def test_what_is_asked_of_a_camera_s_clip_does_not_depend_on_when_its_seconds_begin():
    for number in range(40):
        clip = any_phase(draw_clip(np.random.default_rng(number), slots=12, phase_s=1.0))
        usual = Story.of(clip)
        for phase_s in (0.0, 0.01, 0.6, 0.999):
            other = Story.of(replace(clip, phase_s=phase_s))
            assert (other.start.visible, other.end.visible) == (usual.start.visible, usual.end.visible)
            for family in CLIP_FAMILIES:
                asked = [ask_clip(np.random.default_rng(5), story, family) for story in (usual, other)]
                assert asked[0] == asked[1]


def test_a_clip_that_was_drawn_for_one_phase_is_not_taken_for_a_camera_s():
    with pytest.raises(ValueError, match="phase_s is 0"):
        any_phase(draw_clip(np.random.default_rng(0), slots=9))


# Answers


@pytest.mark.parametrize("frames", [5, 40], ids=["exact", "sampled"])
async def test_a_clip_is_answered_as_the_service_answers_it(redis, checkpoint, tmp_path, reader, frames):
    async with open_parts(redis, checkpoint, tmp_path) as parts:
        video = await parts.video(range(frames), duration_s=float(frames))
        asked = ["What happened?", "Is there a red car now?"]
        told = []
        for one in asked:
            body = {"question": one, "sources": [{"video_id": video.id}], "max_output_tokens": evaluate.ANSWER_TOKENS}
            [*_, answer] = [event async for event in parts.answerer.ask(Question.model_validate(body))]
            assert isinstance(answer, Answer)
            told.append(answer.answer)
        pictures = [picture(keyframe(slot, parts.encoder.input_size_px)) for slot in range(frames)]
    assert reader.answer(reader.look(pictures), asked) == told


def test_questions_put_together_are_answered_as_each_alone(reader):
    scene = draw_scene("test", 1, "clips", 0)
    questions = [one.question for one in scene.asked]
    seen = reader.look(scene.keyframes())
    together = reader.answer(seen, questions)
    assert together == [reader.answer(seen, [question])[0] for question in questions]
    assert len(set(together)) > 1


def test_a_clip_that_takes_several_passes_has_the_tokens_of_its_frames_alone(reader, monkeypatch):
    monkeypatch.setattr(evaluate, "_FRAMES_A_PASS", 16)
    pictures = [picture(keyframe(slot, 112)) for slot in range(40)]
    seen = reader.look(pictures)
    assert seen.vectors.shape[0] == 40
    for slot in (0, 15, 16, 39):
        alone = reader.look(pictures[slot : slot + 1])
        np.testing.assert_allclose(seen.tokens[slot].numpy(), alone.tokens[0].numpy(), atol=1e-5)
        np.testing.assert_allclose(seen.vectors[slot], alone.vectors[0], atol=1e-5)


# Search


def test_queries_name_every_kind_in_every_colour():
    texts = [query.text for query in queries()]
    assert len(texts) == len(set(texts)) == 7 * 6 + 1
    assert {"a red car", "a black dog", "a fire"} <= set(texts)


def test_a_search_is_right_if_what_is_sought_is_visible_in_one_of_the_seconds_found():
    with_car, with_dog = seen_at(Placed(CAR, "far", 0.5)), seen_at(Placed(DOG, "near", 0.2))
    empty, outside = seen_at(), seen_at(Placed(CAR, "far", 1.2))
    views = [empty, with_car, with_dog, outside] + [empty] * 16
    half = score_search(views, lambda text: [empty, with_dog, outside])
    assert half is not None
    assert (half.recall.n, half.recall.right, half.missed, half.seconds) == (2, 1, ("a red car",), 20)
    assert half.chance == pytest.approx(5 / 20)
    perfect = score_search(views, lambda text: [with_car, with_dog])
    assert perfect is not None
    assert perfect.recall.accuracy == 1


def test_where_nothing_is_visible_nothing_is_searched():
    assert score_search([seen_at()] * 3, lambda text: []) is None


def test_offline_the_five_seconds_nearest_to_a_text_are_found(reader):
    one = examine(reader, replace(draw_scene("test", 0, "clips", 0), asked=()))
    views = one.scene.views
    wanted = next(query for query in queries() if any(holds(query, view) for view in views))
    there = np.array([holds(wanted, view) for view in views])
    towards = reader.embed(wanted.text)
    found = search_offline(reader, [replace(one, vectors=np.where(there[:, None], towards, -towards))])
    missed = search_offline(reader, [replace(one, vectors=np.where(there[:, None], -towards, towards))])
    assert found is not None
    assert missed is not None
    assert wanted.text not in found.missed
    assert (wanted.text in missed.missed) == ((~there).sum() >= 5)


# Reports


def test_the_report_is_the_mean_over_questions_to_pictures_and_clips(report):
    pictures, clips, long = (report.groups[name] for name in ("pictures", "clips", "long"))
    assert report.all.score.n == pictures.all.score.n + clips.all.score.n
    assert report.questions == report.all.score.n + long.all.score.n
    assert report.scenes == 6
    assert (pictures.all.score.scenes, clips.all.score.scenes, long.all.score.scenes) == (3, 2, 1)
    for group in report.groups.values():
        assert sum(one.score.n for one in group.families.values()) == group.all.score.n
    assert report.untrained
    assert report.search.seconds >= 40


def test_wrong_answers_are_shown_as_many_as_wanted(report):
    assert len(report.wrong) == 2
    assert not any(same(one.said, one.right) for one in report.wrong)


def test_a_report_is_printed_for_people(report, capsys):
    score = Score.of([("a", True), ("b", False)])
    compared = Compared(offline=score, service=score, difference=0.0, same_answers=2)
    service = ServiceReport(sources={"videos": compared}, search=None, notes=("pictures are no films",))
    print_report(FullReport(**dict(report), service=service))
    shown = capsys.readouterr().out
    for words in ("pictures, 3 scenes", "yes or no", "how_often", "search: of", "2 of 2", "no films", "NO meaning"):
        assert words in shown


def test_the_command_prints_one_json_object_and_nothing_else(checkpoint, capsys):
    flags = ["--checkpoint", str(checkpoint), "--seed", "2", "--scenes", "1", "--search-seconds", "0"]
    assert run_command(["evaluate", *flags, "--device", "cpu", "--show-wrong", "1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told["groups"]) == {"pictures", "clips"}
    assert set(told["all"]) == {"score", "blind"}
    assert set(told["all"]["score"]) == {"n", "scenes", "right", "accuracy", "low", "high"}
    assert (told["seed"], told["split"], told["device"], told["dtype"]) == (2, "test", "cpu", "float32")
    assert len(told["fingerprint"]) == 16
    assert {"drawing", "looking", "answering", "all"} <= set(told["seconds"])
    assert len(told["wrong"]) == 1
    assert (told["search"], told["service"]) == (None, None)


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--checkpoint", "/no/such folder"], 1, "no folder"),
        (["--checkpoint", "x", "--scenes", "0"], 2, "greater than 0"),
        (["--checkpoint", "x", "--seed", "-1"], 2, "seed"),
        (["--checkpoint", "x", "--dtype", "int8"], 2, "dtype"),
        (["--checkpoint", "x", "--device", "tpu"], 2, "device"),
    ],
)
def test_what_cannot_be_evaluated_is_told_by_name(flags, code, words, capsys):
    assert run_command(["evaluate", *flags]) == code
    assert words in capsys.readouterr().err


def test_without_a_checkpoint_the_embedded_model_is_evaluated(capsys):
    flags = ["--scenes", "1", "--search-seconds", "0", "--device", "cpu", "--json"]
    assert run_command(["evaluate", *flags]) == 0
    assert json.loads(capsys.readouterr().out)["checkpoint"].endswith("tokenline-yard")


def test_a_folder_without_a_model_is_told(tmp_path, capsys):
    assert run_command(["evaluate", "--checkpoint", str(tmp_path)]) == 1
    assert "config.json" in capsys.readouterr().err


def test_without_a_text_half_nothing_is_searched(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "mute")
    (folder / "clip" / "tokenizer_config.json").unlink()
    reader = Reader.load(folder, chosen_frames, device="cpu")
    one = examine(reader, replace(draw_scene("test", 0, "clips", 0), asked=()))
    assert not reader.searches
    assert search_offline(reader, [one]) is None


# Cameras


def test_a_pass_is_whole_between_two_slates_and_without_a_hole():
    def shown(text: str):
        return dict(enumerate({"s": "slate", "c": "clip", ".": "missing"}[one] for one in text))

    assert whole_pass(shown("..ccssscccss"), 3) == 7
    assert whole_pass(shown("scccs"), 3) == 1
    assert whole_pass(shown("ssc.csscccs"), 3) == 7
    assert whole_pass(shown("ssccc"), 3) is None
    assert whole_pass(shown("cccs"), 3) is None
    assert whole_pass(shown("sccccs"), 3) is None
    assert whole_pass({}, 3) is None


def test_a_camera_s_film_begins_with_an_even_slate_and_then_shows_its_clip_as_long_as_it_has_slots(reader, tmp_path):
    one = examine(reader, replace(draw_scene("test", 0, "cameras", 0), asked=()))
    write_camera_film(one, tmp_path / "film.mp4")
    maker, spreads = KeyframeMaker(112), []
    with av.open(str(tmp_path / "film.mp4")) as container:
        for frame in container.decode(video=0):
            spreads.append(float(picture(maker.make(frame)).mean(axis=2).std()))
    slate = SLATE_S * 8
    assert len(spreads) == slate + 8 * len(one.scene.views)
    assert max(spreads[:slate]) < 1
    assert min(spreads[slate:]) > 7
