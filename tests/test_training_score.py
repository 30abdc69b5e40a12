"""Scores: what counts as right, how far a share can be trusted, and what guessing would get."""

import numpy as np
import pytest

from compressor_service.training.exam import draw_scenes, learn_blind
from compressor_service.training.questions import Asked
from compressor_service.training.score import (
    Blind,
    GroupReport,
    Judged,
    Score,
    clustered_interval,
    normalised,
    same,
    wilson,
)
from compressor_service.training.seeds import split_seed


def judged(scene: str, family: str, answer: str, said: str, blind: str = "") -> Judged:
    return Judged(scene, Asked(family, "What is it?", answer), said, blind)


def drawn(seed: np.random.SeedSequence) -> list[int]:
    return np.random.default_rng(seed).integers(2**31, size=4).tolist()


def coverage(spread: float, *, share: float, scenes: int, questions: int, rounds: int = 600) -> float:
    """How often the interval holds the true share, when scenes differ by `spread` (0: not at all)."""
    random = np.random.default_rng(3)
    held = 0
    for _ in range(rounds):
        counts = random.integers(1, questions + 1, scenes)
        shares = share if not spread else random.beta(share / spread, (1 - share) / spread, scenes)
        rights = random.binomial(counts, shares)
        low, high = clustered_interval(rights.astype(float), counts.astype(float))
        held += low <= share <= high
    return held / rounds


def test_case_punctuation_and_surplus_blanks_do_not_matter_but_words_and_their_order_do():
    assert normalised("  A red car,\nthen the gate opens. ") == "a red car then the gate opens"
    assert same("Yes!", "yes")
    assert not same("a dog and a car", "a car and a dog")
    assert not same("", "yes")


def test_a_score_counts_questions_and_scenes():
    score = Score.of([("a", True), ("a", False), ("b", True), ("c", True)])
    assert (score.n, score.scenes, score.right, score.accuracy) == (4, 3, 3, 0.75)
    assert 0 < score.low < 0.75 < score.high < 1


def test_nothing_asked_is_no_score():
    with pytest.raises(ValueError, match="no answer"):
        Score.of([])


def test_with_one_question_a_scene_the_interval_is_wilson_s():
    score = Score.of((str(number), number < 30) for number in range(40))
    assert (score.low, score.high) == pytest.approx(wilson(0.75, 40))
    assert (score.low, score.high) == pytest.approx((0.598, 0.858), abs=1e-3)  # by the textbook's formula


def test_answers_that_go_together_by_scene_count_as_one():
    alike = Score.of((str(scene), scene < 30) for scene in range(40) for _ in range(10))
    assert (alike.low, alike.high) == pytest.approx(wilson(0.75, 40))
    mixed = Score.of((str(scene), one % 4 > 0) for scene in range(40) for one in range(8))
    assert (mixed.low, mixed.high) == pytest.approx(wilson(0.75, 320))


def test_without_a_wrong_answer_the_interval_has_the_width_of_as_many_scenes():
    all_right = Score.of((str(scene), True) for scene in range(20) for _ in range(15))
    assert (all_right.low, all_right.high) == (wilson(1, 20)[0], 1.0)
    none_right = Score.of((str(scene), False) for scene in range(20) for _ in range(15))
    assert (none_right.low, none_right.high) == (0.0, wilson(0, 20)[1])


def test_one_scene_is_one_question_however_much_is_asked_about_it():
    score = Score.of(("only", number % 2 == 0) for number in range(50))
    assert (score.low, score.high) == pytest.approx(wilson(0.5, 1))


@pytest.mark.parametrize("share", [0.5, 0.9, 0.97])
@pytest.mark.parametrize("spread", [0.0, 0.1, 0.5])
def test_the_interval_holds_the_true_share_about_nineteen_times_in_twenty(share, spread):
    assert coverage(spread, share=share, scenes=200, questions=15) > 0.925


def test_taking_questions_for_independent_would_hold_it_far_less_often():
    random = np.random.default_rng(3)
    held = 0
    for _ in range(300):
        rights = random.binomial(15, random.beta(0.2, 0.2, 40))
        low, high = wilson(rights.sum() / 600, 600)
        held += low <= 0.5 <= high
    assert held / 300 < 0.6


def test_a_group_is_scored_by_family_and_yes_no_apart():
    report = GroupReport.of(
        [
            judged("a", "what", "a dog", "a dog"),
            judged("a", "gate", "open", "closed", blind="open"),
            judged("a", "presence", "yes", "Yes.", blind="no"),
            judged("b", "presence", "no", "yes", blind="no"),
        ]
    )
    assert (report.all.score.right, report.all.score.n, report.all.blind) == (2, 4, 0.5)
    assert report.yes_no is not None
    assert (report.yes_no.score.right, report.yes_no.score.n, report.yes_no.blind) == (1, 2, 0.5)
    assert report.other is not None
    assert report.other.score.n == 2
    assert {family: one.score.n for family, one in report.families.items()} == {"what": 1, "gate": 1, "presence": 2}


def test_a_group_without_yes_or_no_has_no_score_of_them():
    assert GroupReport.of([judged("a", "what", "a dog", "a cat")]).yes_no is None


def test_blind_says_the_most_usual_answer_to_a_wording():
    blind = Blind()
    for answer, often in (("day", 7), ("night", 5)):
        for _ in range(often):
            blind.learn(Asked("light", "What time of day is it?", answer))
    assert blind.say(Asked("light", "what time of day is it", "night")) == "day"


def test_blind_falls_back_to_the_wording_without_names_and_then_to_the_family():
    blind = Blind()
    for kind in ("car", "dog", "cat", "truck"):
        for answer in ("no", "no", "yes"):
            blind.learn(Asked("presence", f"Is there a red {kind}?", answer))
    assert blind.say(Asked("presence", "Is there a blue bicycle?", "yes")) == "no"
    assert blind.say(Asked("presence", "Anything burning?", "yes")) == "no"
    assert blind.say(Asked("colour", "What colour is it?", "red")) == ""


def test_blind_may_name_the_former_of_two():
    blind = Blind()
    for kind in ("car", "dog", "cat", "truck", "bicycle", "person", "parcel", "fire"):
        told = f"a {kind} comes in"
        blind.learn(Asked("first", f"What happened first: {told} or the gate opens?", told))
    asked = Asked("first", "Which came first, the lamp goes off or a blue truck goes away?", "?")
    assert blind.say(asked) == "the lamp goes off"


def test_guessing_gets_half_of_yes_or_no_and_little_of_what_must_be_seen():
    blind = learn_blind("validation", 0, "clips")
    asked = [one for scene in draw_scenes("test", 0, "clips", 300) for one in scene.asked]
    right = [(one.family, same(blind.say(one), one.answer)) for one in asked]
    shares = {family: np.mean([good for name, good in right if name == family]) for family, _ in right}
    assert 0.4 < shares["did"] < 0.7
    assert 0.2 < shares["order"] < 0.5
    assert 0.4 < shares["first"] < 0.7
    assert shares["who"] < 0.2
    assert shares["caption"] < 0.2


def test_splits_seeds_and_parts_never_meet_and_are_always_the_same():
    seeds = [split_seed(split, seed, *key) for split in ("train", "validation", "test") for seed in (0, 1)
             for key in ((), (0,), (0, 1), (1, 0))]  # fmt: skip
    seeds += [np.random.SeedSequence(seed) for seed in (0, 1)]
    seeds += np.random.SeedSequence(0).spawn(3)
    numbers = [tuple(drawn(seed)) for seed in seeds]
    assert len(set(numbers)) == len(numbers)
    assert drawn(split_seed("test", 5, 2)) == drawn(split_seed("test", 5, 2))


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="-1"):
        split_seed("test", -1)
