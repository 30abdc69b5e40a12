"""A timeline goes from one service to another by a file: over real HTTP, each with a Redis and a folder of its own."""

import gc
import gzip
import http.server
import io
import json
import re
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import load

from deploy.bodies import Range
from deploy.cli import run_command
from deploy.client import ApiError, Client
from deploy.transfer import export_timeline, import_timeline
from qa_service.clock import write_stream_time
from qa_service.exports import HOURS_OUT
from qa_service.settings import ApiSettings
from store.connection import EmbeddedRedis
from store.format import HOUR_SLOTS
from store.gaps import Gap
from store.janitor import Janitor
from store.memory import Memory
from store.settings import StoreSettings
from tests.qa_http import Service, serving
from tests.qa_parts import asked, stream_range
from tests.untrained import write_untrained_checkpoint

HOUR = HOUR_SLOTS
Tokenline = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_untrained_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def here(redis_url: str, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(redis_url, checkpoint, tmp_path_factory.mktemp("here"), ApiSettings()) as service:
        yield service


@pytest.fixture(scope="module")
def there(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with (
        EmbeddedRedis.start(tmp_path_factory.mktemp("other-redis")) as redis,
        serving(redis.url, checkpoint, tmp_path_factory.mktemp("there"), ApiSettings()) as service,
    ):
        yield service


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with another model."""
    checkpoint = write_untrained_checkpoint(tmp_path_factory.mktemp("other-checkpoint"), seed=7)
    with (
        EmbeddedRedis.start(tmp_path_factory.mktemp("third-redis")) as redis,
        serving(redis.url, checkpoint, tmp_path_factory.mktemp("elsewhere"), ApiSettings()) as service,
    ):
        yield service


@pytest.fixture
def tokenline(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tokenline:
    """Run a command line against a service; return exit code, standard output and standard error."""
    monkeypatch.delenv("TOKENLINE_API_KEY", raising=False)

    def run(service: Service, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setenv("TOKENLINE_URL", service.url)
        code = run_command(list(arguments))
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


@pytest.fixture(scope="module")
def video(here: Service) -> Any:
    """A video of two hours, one of them sealed, with a damaged stretch and one of which no picture is new."""
    slots = [*range(5), *range(8, 12), *range(HOUR, HOUR + 6)]
    video = here.do(here.parts.video(slots, duration_s=HOUR + 7.5))
    here.do(here.parts.timeline.seal(video.id, 0))
    here.do(here.parts.keyframes.pack(video.id, 0))
    here.do(here.parts.sources.add_gaps(video.id, None, [Gap(start_slot=5, end_slot=8, reason="decode_error")]))
    return video


@pytest.fixture(scope="module")
def stream(here: Service) -> Any:
    """A stream and its first slot: two hours that are not sealed, with gaps of two reasons."""
    stream, base = here.do(here.parts.stream(range(10), name="gate"))
    here.do(here.parts.keep(stream.id, [base + 20, base + 21, *range(base + HOUR, base + HOUR + 5)]))
    here.do(
        here.parts.sources.add_gaps(stream.id, None, [Gap(start_slot=base + 10, end_slot=base + 14, reason="shed")])
    )
    return stream, base


def kept(service: Service, source_id: str) -> tuple[list[int], bytes, bytes, list[int], list[bytes]]:
    """Everything that is remembered of a source."""
    parts = service.parts
    slots = service.do(parts.timeline.slots(source_id, 0, 1 << 40))
    found = service.do(parts.keyframes.find(source_id, slots.tolist()))
    return (
        slots.tolist(),
        service.do(parts.timeline.read(source_id, slots)).tobytes(),
        service.do(parts.timeline.vectors(source_id, slots)).tobytes(),
        service.do(parts.timeline.times(source_id, slots)).tolist(),
        [found[slot] for slot in slots.tolist() if slot in found],
    )


def get(service: Service, path: str, **params: Any) -> Any:
    return httpx.get(service.url + path, params=params, timeout=60)


def seal(service: Service, source_id: str) -> None:
    """Seal all hours, as those are that were imported: open ones are searched with more bits a number."""
    for hour in service.do(service.parts.timeline.hot_hours(source_id)):
        assert service.do(service.parts.timeline.seal(source_id, hour))


def answered(service: Service, *sources: dict[str, Any]) -> dict[str, Any]:
    """What an answer says and rests on, without the names of things."""
    answer = httpx.post(f"{service.url}/v1/questions", json=asked(*sources, text_fusion="exact"), timeout=60).json()
    known = {name: answer[name] for name in ("answer", "finish_reason", "citations", "coverage", "usage")}
    known["usage"]["prompt_tokens_details"].pop("cached_tokens")
    return json.loads(re.sub(r"(str|vid)_[0-9a-f]{12}", "SOURCE", json.dumps(known)))


def test_a_video_is_the_same_at_another_service(tokenline, here, there, video, tmp_path):
    code, out, _ = tokenline(here, "export", video.id, str(tmp_path / "yard.tar"))
    assert code == 0
    assert "yard.mp4, 2 hours" in out
    code, out, _ = tokenline(there, "import", str(tmp_path / "yard.tar"), "--json")
    assert code == 0
    imported = json.loads(out)
    assert imported["frames"] == 15
    assert kept(there, imported["id"]) == kept(here, video.id)
    seen = [get(service, f"/v1/videos/{one}").json() for service, one in ((here, video.id), (there, imported["id"]))]
    assert [(one["name"], one["status"], one["duration_s"]) for one in seen] == [("yard.mp4", "ready", HOUR + 7.5)] * 2
    seal(here, video.id)
    assert answered(there, {"video_id": imported["id"]}) == answered(here, {"video_id": video.id})
    timelines = [
        get(service, f"/v1/sources/{one}/timeline").json()
        for service, one in ((here, video.id), (there, imported["id"]))
    ]
    assert timelines[0]["gaps"] == timelines[1]["gaps"] == [{"start": 5.0, "end": 8.0, "reason": "decode_error"}]
    frames = [get(here, f"/v1/sources/{video.id}/frames/9"), get(there, f"/v1/sources/{imported['id']}/frames/9")]
    assert frames[0].content == frames[1].content
    assert frames[0].status_code == 200


def test_a_stream_is_the_same_at_another_service_and_is_not_recorded_there(tokenline, here, there, stream, tmp_path):
    source, base = stream
    assert tokenline(here, "export", source.id, str(tmp_path / "gate.tar"))[0] == 0
    code, out, _ = tokenline(there, "import", str(tmp_path / "gate.tar"), "--json")
    assert code == 0
    imported = json.loads(out)["id"]
    assert kept(there, imported) == kept(here, source.id)
    whole = {"start": write_stream_time(base), "end": write_stream_time(base + HOUR + 5)}
    assert get(there, f"/v1/sources/{imported}/timeline", **whole).json()["gaps"] == [
        {"start": write_stream_time(low), "end": write_stream_time(high), "reason": reason}
        for low, high, reason in (
            (base + 10, base + 14, "shed"),
            (base + 14, base + 20, "stream_down"),
            (base + 22, base + HOUR, "stream_down"),
        )
    ]
    ranges = [{**stream_range(source, base, base + HOUR + 5), "stream_id": one} for one in (source.id, imported)]
    seal(here, source.id)
    assert answered(there, ranges[1]) == answered(here, ranges[0])
    seen = get(there, f"/v1/streams/{imported}").json()
    assert (seen["url"], seen["username"], seen["has_password"], seen["enabled"]) == (None, None, False, False)
    assert (seen["state"], seen["created_at"]) == ("disabled", write_stream_time(base))
    assert imported in [one["id"] for one in get(there, "/v1/streams").json()["data"]]
    listed = tokenline(there, "streams", "list")
    assert listed[0] == 0
    assert imported in listed[1]
    assert here.do(here.parts.sources.get_stream(source.id)).url not in (tmp_path / "gate.tar").read_text("latin-1")


def test_a_camera_goes_on_where_its_imported_memory_ends(tokenline, here, there, stream, tmp_path):
    source, base = stream
    assert tokenline(here, "export", source.id, str(tmp_path / "gate.tar"))[0] == 0
    imported = json.loads(tokenline(there, "import", str(tmp_path / "gate.tar"), "--name", "moved", "--json")[1])["id"]
    refused = httpx.patch(f"{there.url}/v1/streams/{imported}", json={"enabled": True})
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "state_conflict")
    changed = httpx.patch(
        f"{there.url}/v1/streams/{imported}", json={"enabled": True, "url": "rtsp://203.0.113.7/moved"}
    ).json()
    assert (changed["name"], changed["state"], changed["url"]) == ("moved", "connecting", "rtsp://203.0.113.7/moved")
    gaps = there.do(there.parts.sources.gaps(imported, base, base + HOUR + 5))
    assert {gap.reason for gap in gaps} == {"shed", "stream_down"}  # the time at the other service is no pause
    assert there.do(there.parts.timeline.count(imported)) == 17


def test_a_part_of_a_stream_says_that_the_rest_was_never_here(tokenline, here, there, stream, tmp_path):
    source, base = stream
    times = ("--from", write_stream_time(base + 3), "--to", write_stream_time(base + 21))
    assert tokenline(here, "export", source.id, str(tmp_path / "part.tar"), *times)[0] == 0
    imported = json.loads(tokenline(there, "import", str(tmp_path / "part.tar"), "--name", "part", "--json")[1])["id"]
    assert kept(there, imported)[0] == [*range(base + 3, base + 10), base + 20]
    whole = {"start": write_stream_time(base), "end": write_stream_time(base + 30)}
    gaps = get(there, f"/v1/sources/{imported}/timeline", **whole).json()["gaps"]
    assert [gap["reason"] for gap in gaps] == ["not_registered", "shed", "stream_down", "not_registered"]
    assert (gaps[0]["end"], gaps[-1]["start"]) == (write_stream_time(base + 3), write_stream_time(base + 21))


def test_a_part_of_a_video_says_that_the_rest_was_never_here(tokenline, here, there, video, tmp_path):
    assert tokenline(here, "export", video.id, str(tmp_path / "part.tar"), "--from", "2", "--to", "0:10")[0] == 0
    imported = json.loads(tokenline(there, "import", str(tmp_path / "part.tar"), "--json")[1])["id"]
    assert kept(there, imported)[0] == [2, 3, 4, 8, 9]
    assert get(there, f"/v1/videos/{imported}").json()["duration_s"] == 10
    assert get(there, f"/v1/sources/{imported}/timeline", start=0, end=10).json()["gaps"] == [
        {"start": 0.0, "end": 2.0, "reason": "not_registered"},
        {"start": 5.0, "end": 8.0, "reason": "decode_error"},
    ]


def test_without_pictures_tokens_and_search_come_along_and_frames_do_not(tokenline, here, there, video, tmp_path):
    assert tokenline(here, "export", video.id, str(tmp_path / "bare.tar"), "--no-pictures")[0] == 0
    with tarfile.open(tmp_path / "bare.tar") as tar:
        assert tar.getnames() == [f"hours/{hour}/frames.safetensors" for hour in (0, 1)] + ["timeline.json"]
    imported = json.loads(tokenline(there, "import", str(tmp_path / "bare.tar"), "--json")[1])["id"]
    assert kept(there, imported)[:4] == kept(here, video.id)[:4]
    assert kept(there, imported)[4] == []
    assert get(there, f"/v1/sources/{imported}/frames/9").json()["error"]["code"] == "frame_not_kept"
    found = httpx.post(f"{there.url}/v1/search", json={"query": "a red car", "sources": [imported]}, timeout=60).json()
    assert {moment["source_id"] for moment in found["data"]} == {imported}


def test_a_researcher_opens_the_file_with_common_tools(tokenline, here, video, tmp_path):
    assert tokenline(here, "export", video.id, str(tmp_path / "yard.tar"))[0] == 0
    with tarfile.open(tmp_path / "yard.tar") as tar:
        contents = json.load(tar.extractfile("timeline.json"))
        frames = load(tar.extractfile("hours/1/frames.safetensors").read())
        pictures = load(tar.extractfile("hours/1/keyframes.safetensors").read())
    assert contents["format"]["fingerprint"] == here.parts.encoder.format.fingerprint
    assert (contents["kind"], contents["fps"], contents["hours"]) == ("video", 1.0, [0, 1])
    assert contents["gaps"] == [{"start_slot": 5, "end_slot": 8, "reason": "decode_error"}]
    slots = np.arange(HOUR, HOUR + 6)
    assert frames["slots"].tolist() == (slots - HOUR).tolist()
    np.testing.assert_array_equal(frames["tokens"], here.do(here.parts.timeline.read(video.id, slots)))
    first = pictures["jpegs"][: pictures["ends"][0]].tobytes()
    assert first == here.do(here.parts.keyframes.get(video.id, HOUR))


def test_tokens_of_another_model_are_refused_with_both_fingerprints(tokenline, here, elsewhere, video, tmp_path):
    assert tokenline(here, "export", video.id, str(tmp_path / "yard.tar"))[0] == 0
    code, out, err = tokenline(elsewhere, "import", str(tmp_path / "yard.tar"))
    assert (code, out) == (1, "")
    assert "(model_mismatch)" in err
    fingerprints = [service.parts.encoder.format.fingerprint for service in (here, elsewhere)]
    assert fingerprints[0] != fingerprints[1]
    assert all(fingerprint in err for fingerprint in fingerprints)
    assert elsewhere.do(elsewhere.parts.sources.everything()) == []


@pytest.fixture
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_hours_that_were_read_make_room_for_the_next(here, video, no_garbage_collection):
    with httpx.Client(base_url=here.url, timeout=60) as client:
        for _ in range(3 * HOURS_OUT):
            for part in ("frames", "keyframes"):
                assert client.get(f"/v1/sources/{video.id}/export/{part}/0").status_code == 200


def test_hours_that_hold_nothing_take_no_room(here, video, no_garbage_collection):
    with httpx.Client(base_url=here.url, timeout=60) as client:
        for part in ("frames", "keyframes"):
            for _ in range(3 * HOURS_OUT):
                answer = client.get(f"/v1/sources/{video.id}/export/{part}/9")
                assert answer.json()["error"]["code"] == "empty_range"


def test_an_hour_whose_reader_left_makes_room_for_the_next(here, video, no_garbage_collection, monkeypatch):
    monkeypatch.setattr("qa_service.exports.write_frames", lambda *hour: bytes(16 << 20))  # more than a socket takes
    with httpx.Client(base_url=here.url, timeout=60) as client:
        for _ in range(3 * HOURS_OUT):
            with client.stream("GET", f"/v1/sources/{video.id}/export/frames/0") as half_read:
                assert half_read.status_code == 200


def test_a_frame_that_comes_when_its_hour_is_read_already_is_a_gap_of_the_file(here, there, tmp_path):
    video = here.do(here.parts.video([0, 1, 4, HOUR, HOUR + 3], duration_s=HOUR + 4))
    missing = [(2, 4), (HOUR + 1, HOUR + 3)]
    gaps = [Gap(start_slot=start, end_slot=end, reason="decode_error") for start, end in missing]
    here.do(here.parts.sources.add_gaps(video.id, None, gaps))

    def come(done: int, total: int) -> None:
        if done == 1:
            here.do(here.parts.keep(video.id, [2, HOUR + 1]))

    with Client(here.url) as client:
        export_timeline(client, Range(source_id=video.id), tmp_path / "late.tar", on_progress=come)
    with Client(there.url) as client:
        imported = import_timeline(client, tmp_path / "late.tar").id
    assert kept(there, imported)[0] == [0, 1, 4, HOUR, HOUR + 1, HOUR + 3]
    told = get(there, f"/v1/sources/{imported}/timeline").json()["gaps"]
    assert [(gap["start"], gap["end"]) for gap in told] == [(2, 4), (HOUR + 2, HOUR + 3)]


def test_what_is_erased_while_it_is_exported_is_not_imported(here, there, tmp_path):
    video = here.do(here.parts.video([*range(5), HOUR], duration_s=HOUR + 1))

    def erase(done: int, total: int) -> None:
        if done == 1:
            httpx.delete(f"{here.url}/v1/sources/{video.id}/memory", params={"start": 1, "end": 4}).raise_for_status()

    def erase_all(done: int, total: int) -> None:
        if done == total:
            httpx.delete(f"{here.url}/v1/sources/{video.id}/memory").raise_for_status()

    with Client(here.url) as client:
        export_timeline(client, Range(source_id=video.id), tmp_path / "some.tar", on_progress=erase)
        with pytest.raises(ApiError, match="Nothing of this time"):
            export_timeline(client, Range(source_id=video.id), tmp_path / "all.tar", on_progress=erase_all)
    assert [path.name for path in tmp_path.iterdir()] == ["some.tar"]
    with Client(there.url) as client:
        imported = import_timeline(client, tmp_path / "some.tar")
    assert kept(there, imported.id)[0] == [0, 4, HOUR]


@pytest.fixture(scope="module")
def yard(here: Service, video: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "yard.tar"
    with Client(here.url) as client:
        export_timeline(client, Range(source_id=video.id), path)
    return path


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {name: tar.extractfile(name).read() for name in tar.getnames()}  # type: ignore[union-attr]


def plain(name: str, content: bytes) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    return member, content


def tar_of(*held: tuple[tarfile.TarInfo, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for member, content in held:
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def link(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, target
    return member, b""


def sparse(name: str) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.type = tarfile.GNUTYPE_SPARSE
    return member, b""


def contents(held: dict[str, bytes], **changes: Any) -> tuple[tarfile.TarInfo, bytes]:
    return plain("timeline.json", json.dumps(json.loads(held["timeline.json"]) | changes).encode())


BAD_FILES: dict[str, tuple[str, Callable[[dict[str, bytes], bytes], bytes]]] = {
    "nothing": ("no portable timeline", lambda held, whole: b""),
    "words": ("no portable timeline", lambda held, whole: b"what is this?\n" * 999),
    "a compressed one": ("no portable timeline", lambda held, whole: gzip.compress(whole)),
    "the first half": ("cut off", lambda held, whole: whole[: len(whole) // 2]),
    "all but the contents": ("cut off", lambda held, whole: whole[: whole.index(b"timeline.json")]),
    "the head of a member alone": ("", lambda held, whole: whole[:512]),
    "no contents": ("timeline.json", lambda held, whole: tar_of(*(plain(*one) for one in list(held.items())[:-1]))),
    "no hours": ("does not hold the hours", lambda held, whole: tar_of(plain(*list(held.items())[-1]))),
    "pictures without frames": (
        "does not hold the hours",
        lambda held, whole: tar_of(*(plain(*one) for one in held.items() if one[0] != "hours/1/frames.safetensors")),
    ),
    "a member twice": ("twice", lambda held, whole: tar_of(*(plain(*one) for one in [*held.items(), *held.items()]))),
    "a path out of it": ("passwd", lambda held, whole: tar_of(plain("../../etc/passwd", b"x"))),
    "a path from the root": ("passwd", lambda held, whole: tar_of(plain("/etc/passwd", b"x"))),
    "a link": ("no plain file", lambda held, whole: tar_of(link("timeline.json", "/etc/passwd"))),
    "a file of holes": ("", lambda held, whole: tar_of(sparse("timeline.json"))),
    "contents that are no JSON": ("cannot be read", lambda held, whole: tar_of(plain("timeline.json", b"{"))),
    "contents that are nested to death": (
        "cannot be read",
        lambda held, whole: tar_of(plain("timeline.json", b"[" * 999_999)),
    ),
    "contents that are a list": ("cannot be read", lambda held, whole: tar_of(plain("timeline.json", b"[]"))),
    "a later version": ("has version 2", lambda held, whole: tar_of(contents(held, version=2))),
    "hours that are words": ("hours", lambda held, whole: tar_of(contents(held, hours={"a": "b"}))),
    "contents with a number that is none": (
        "cannot be read",
        lambda held, whole: tar_of(contents(held, duration_s=float("nan"))),
    ),
    "contents with an endless number": ("cannot be read", lambda held, whole: tar_of(contents(held, fps=float("inf")))),
    "contents with half a letter": ("cannot be read", lambda held, whole: tar_of(contents(held, name="\ud800"))),
    "long names of long names": ("", lambda held, whole: tar_header(tarfile.GNUTYPE_LONGNAME, 0) * 1500),
    "names of names": ("", lambda held, whole: tar_header(tarfile.XHDTYPE, 0) * 1500),
    "a good member and long names behind it": (
        "",
        lambda held, whole: (
            tar_of(plain(*next(iter(held.items()))))[:-10240] + tar_header(tarfile.GNUTYPE_LONGNAME, 0) * 1500
        ),
    ),
    "a name of 4 TiB": ("", lambda held, whole: tar_header(tarfile.XHDTYPE, 1 << 42)),
    "a header that claims 8 EiB": ("", lambda held, whole: tar_claiming(2**63 - 1)),
    "a header that claims less than nothing": ("", lambda held, whole: tar_claiming(-(2**40))),
}


def tar_header(kind: bytes, size: int) -> bytes:
    member = tarfile.TarInfo("x")
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT)


def tar_claiming(size: int) -> bytes:
    member = tarfile.TarInfo("timeline.json")
    member.size = size
    return member.tobuf(tarfile.GNU_FORMAT) + b"{}"


@pytest.mark.parametrize("what", BAD_FILES)
def test_a_file_that_is_no_portable_timeline_is_refused_in_one_sentence(tokenline, there, yard, tmp_path, what):
    told, make = BAD_FILES[what]
    bad = tmp_path / "bad.tar"
    bad.write_bytes(make(members(yard), yard.read_bytes()))
    before = there.do(there.parts.sources.everything())
    code, out, err = tokenline(there, "import", str(bad))
    assert (code, out) == (1, "")
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert told in line
    assert "Traceback" not in err
    assert there.do(there.parts.sources.everything()) == before


def test_an_hour_that_was_changed_is_refused_and_nothing_of_the_import_stays(tokenline, there, yard, tmp_path):
    held = members(yard)
    held["hours/1/frames.safetensors"] = held["hours/1/frames.safetensors"][:-1] + b"\x07"
    (tmp_path / "changed.tar").write_bytes(tar_of(*(plain(*one) for one in held.items())))
    code, out, err = tokenline(there, "import", str(tmp_path / "changed.tar"))
    assert (code, out) == (1, "")
    assert "checksum" in err
    assert "(damaged_export)" in err
    assert [kept.purge for kept in there.do(there.parts.sources.everything()) if kept.hidden or kept.purge] == [True]
    memory = Memory(there.parts.redis, there.parts.segments, there.parts.keyframes)
    settings = StoreSettings(data_dir=there.parts.uploads.parent)
    janitor = Janitor(there.parts.redis, there.parts.sources, memory, settings)
    for _ in range(3):
        there.do(janitor.sweep())
    assert not any(kept.hidden or kept.purge for kept in there.do(there.parts.sources.everything()))


def test_an_import_that_is_interrupted_is_given_up(there, yard):
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with Client(there.url) as client, pytest.raises(KeyboardInterrupt):
        import_timeline(client, yard, on_progress=interrupt)
    [left] = [kept for kept in there.do(there.parts.sources.everything()) if kept.hidden or kept.purge]
    assert (left.purge, left.hidden) == (True, False)


def test_an_export_that_is_interrupted_leaves_the_file_that_was_there(here, video, tmp_path):
    (tmp_path / "yard.tar").write_text("an older one")

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with Client(here.url) as client, pytest.raises(KeyboardInterrupt):
        export_timeline(client, Range(source_id=video.id), tmp_path / "yard.tar", on_progress=interrupt)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("yard.tar", "an older one")]


@pytest.mark.parametrize(
    ("arguments", "exit_code", "told"),
    [
        (("export", "vid_000000000000", "{}/x.tar"), 1, "(video_not_found)"),
        (("export", "{video}", "{}/x.tar", "--from", "yesterday"), 2, "no position in a video"),
        (("export", "str_000000000000", "{}/x.tar", "--from", "2026-01-01T00:00:00"), 2, "time zone"),
        (("export", "{video}", "{}/x.tar", "--from", "5", "--to", "6"), 1, "(empty_range)"),
        (("export", "{video}", "{}/no/folder/x.tar"), 1, "there is no folder {}/no/folder\n"),
        (("import", "{}/x.tar"), 1, "error: {}/x.tar: No such file or directory\n"),
        (("import", "{}"), 1, "error: {}: Is a directory\n"),
    ],
)
def test_what_cannot_be_exported_or_imported_says_why(tokenline, here, video, tmp_path, arguments, exit_code, told):
    code, out, err = tokenline(here, *(one.format(tmp_path, video=video.id) for one in arguments))
    assert (code, out) == (exit_code, "")
    assert told.format(tmp_path) in err
    assert list(tmp_path.iterdir()) == []


class Shaky(http.server.BaseHTTPRequestHandler):
    """Hands on what it is asked for; for the first time of every hour it says that it cannot, or hangs up."""

    behind = ""
    seen: list[str]

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "frames/" in self.path and self.path not in self.seen:
            self.seen.append(self.path)
            if len(self.seen) % 2:
                self.send_response(503)
                self.send_header("Content-Length", "0")
                self.end_headers()
            self.close_connection = True
            return
        headers = {"Content-Type": self.headers.get("Content-Type", "")}
        answer = httpx.request(self.command, self.behind + self.path, content=body, headers=headers, timeout=60)
        self.send_response(answer.status_code)
        self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        self.wfile.write(answer.content)

    do_GET = do_PUT = do_POST = do_DELETE = _answer

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_a_service_that_is_away_a_moment_is_asked_again(here, there, video, tmp_path, monkeypatch):
    monkeypatch.setattr("deploy.transfer.PAUSES_S", (0.01, 0.01, 0.01))
    imported = None
    for service in (here, there):
        handler = type("Handler", (Shaky,), {"behind": service.url, "seen": []})
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            with Client(f"http://127.0.0.1:{server.server_address[1]}") as client:
                if service is here:
                    export_timeline(client, Range(source_id=video.id), tmp_path / "yard.tar")
                else:
                    imported = import_timeline(client, tmp_path / "yard.tar")
            server.shutdown()
        assert len(handler.seen) == 4  # type: ignore[attr-defined]
    assert imported is not None
    assert kept(there, imported.id) == kept(here, video.id)
