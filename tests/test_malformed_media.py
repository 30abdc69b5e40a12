"""Some of the damaged files of tests/malformed.py (`make corpus` reads thousands): each ends, and says how."""

from collections import Counter
from pathlib import Path

import pytest

from tests.malformed import Judged, cases, errors_of_ingest, originals, run

pytestmark = pytest.mark.alone

FILES, SEED = 60, 2


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return dict(originals(tmp_path_factory.mktemp("originals")))


async def test_damaged_files_end_ready_partial_or_failed_and_take_nothing_with_them(sources):
    wanted = cases(list(sources), FILES, SEED)
    with errors_of_ingest() as errors:
        judged = await run(wanted, sources, 4, errors)
    ended = {name: [one.case.told for one in judged if one.verdict == name] for name in {one.verdict for one in judged}}
    assert errors.faults == []
    assert errors.deaths == {}
    assert set(ended) <= {"whole", "other pixels", "shorter", "damage told", "failed"}, ended
    assert {"whole", "damage told", "failed"} <= set(
        ended
    )  # else the damage would be too mild or too bad to show anything
    assert all(reason_of(one) for one in judged if one.verdict == "failed")


def reason_of(one: Judged) -> str | None:
    return None if one.ending.report is None else one.ending.report.error


def test_a_seed_makes_the_same_files_again(sources, tmp_path):
    made = [[case.write(sources, tmp_path).read_bytes() for case in cases(list(sources), 8, SEED)] for _ in range(2)]
    assert made[0] == made[1]
    assert all(
        data != sources[case.original].read_bytes()
        for data, case in zip(made[0], cases(list(sources), 8, SEED), strict=True)
    )


def test_every_damage_is_done_to_every_kind_of_file(sources):
    counts = Counter((case.original, case.damage) for case in cases(list(sources), 2000, SEED))
    assert len(counts) == len(sources) * 12
    assert max(counts.values()) - min(counts.values()) <= 1
