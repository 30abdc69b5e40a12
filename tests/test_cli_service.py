"""The command line and its client against the REST surface over real HTTP, Redis, model and keyframes."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deploy.bodies import Answer, Cited, Completed, Created, Delta, Question, Range, Video
from deploy.cli import run_command
from deploy.client import Client
from deploy.sample_clip import write_sample_clip
from qa_service.settings import ApiKey, ApiSettings
from store.gaps import Gap
from store.source import NewStream, VideoStatus
from tests.ingest_parts import simulated_camera
from tests.qa_http import serving
from tests.untrained import write_untrained_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_untrained_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def service(redis_url, checkpoint, tmp_path_factory):
    with serving(redis_url, checkpoint, tmp_path_factory.mktemp("service"), ApiSettings()) as running:
        yield running


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "street.mp4"
    write_sample_clip(path)
    return path


@pytest.fixture
def tokenline(service, monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Run a command line; return exit code, standard output and standard error."""
    monkeypatch.setenv("TOKENLINE_URL", service.url)
    monkeypatch.delenv("TOKENLINE_API_KEY", raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        code = run_command(list(arguments))
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


@pytest.fixture(scope="module")
def video(service) -> Any:
    """A video of 8 seconds, in memory but for second 5, which is damaged."""
    parts = service.parts
    video = service.do(parts.video([0, 1, 2, 3, 4, 6, 7], duration_s=8))
    service.do(parts.sources.add_gaps(video.id, None, [Gap(start_slot=5, end_slot=6, reason="decode_error")]))
    return video


def test_a_camera_is_added_listed_shown_and_removed(tokenline, monkeypatch):
    monkeypatch.setenv("CAMERA_PASSWORD", "s3cret")
    flags = (
        "--username",
        "viewer",
        "--password-env",
        "CAMERA_PASSWORD",
        "--label",
        "site=north",
        "--retention-hours",
        "2",
        "--max-gib",
        "0.5",
        "--keyframe-hours",
        "1",
    )
    code, out, err = tokenline("streams", "add", "gate", "rtsp://1.1.1.1/live", *flags, "--json")
    added = json.loads(out)
    assert (code, err) == (0, "")
    assert added["has_password"]
    assert added["retention"] == {"hours": 2, "max_bytes": 2**29, "keyframes": {"hours": 1, "max_bytes": None}}

    assert json.loads(tokenline("streams", "list", "--label", "site=north", "--json")[1]) == [added]
    assert json.loads(tokenline("streams", "list", "--label", "site=south", "--json")[1]) == []
    listed = tokenline("streams", "list")[1]
    shown = tokenline("streams", "show", added["id"])[1]
    assert all(word in listed for word in (added["id"], "gate", "connecting", "site=north"))
    assert "reconnects_1h" in shown
    assert "s3cret" not in out + listed + shown

    assert tokenline("streams", "rm", added["id"], "--purge")[:2] == (0, f"{added['id']} deleted, 0 frames erased\n")
    code, out, err = tokenline("streams", "show", added["id"])
    assert (code, out) == (1, "")
    assert "(stream_not_found)" in err
    assert "request: req_" in err


def test_a_camera_is_looked_at(tokenline, monkeypatch, tmp_path):
    monkeypatch.setenv("CAMERA_PASSWORD", "s3cret")
    with simulated_camera("--user", "viewer", "--password", "s3cret") as camera:
        flags = ("--username", "viewer", "--password-env", "CAMERA_PASSWORD")
        code, out, err = tokenline("streams", "probe", camera.url, *flags, "--snapshot", str(tmp_path / "dock.jpg"))
        assert (code, err) == (0, "")
        assert out.startswith("h264, 320x180 at ")
        with Image.open(tmp_path / "dock.jpg") as picture:
            assert picture.size == (320, 180)
        code, out, err = tokenline("streams", "probe", camera.url, "--username", "viewer")
    assert (code, out) == (1, "")
    assert "(rtsp_auth_failed)" in err


def test_a_password_comes_from_standard_input(tokenline, service, monkeypatch, tmp_path):
    typed = tmp_path / "typed"
    typed.write_text("pa ss\n")
    with typed.open() as lines:
        monkeypatch.setattr("sys.stdin", lines)
        code, out, _ = tokenline("streams", "add", "yard", "rtsp://1.1.1.1/yard", "--password-stdin", "--json")
    assert code == 0
    assert service.do(service.parts.sources.password(json.loads(out)["id"])) == "pa ss"


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("rtsp://[::1]/live", "bad_url"),
        ("rtsp://user:s3cret@1.1.1.1/live", "bad_url"),
        ("file:///etc/passwd", "bad_url"),
    ],
)
def test_an_address_that_may_not_be_opened_is_refused(tokenline, url, error):
    code, out, err = tokenline("streams", "add", "x", url)
    assert (code, out) == (1, "")
    assert f"({error})" in err
    assert "s3cret" not in err


def test_a_file_is_uploaded_waited_for_and_removed(tokenline, service, clip):
    code, out, _ = tokenline("videos", "add", str(clip), "--name", "street", "--fps", "0.5", "--json")
    added = json.loads(out)
    assert (code, added["status"], added["name"], added["fps"]) == (0, "queued", "street", 0.5)
    assert added["id"] in tokenline("videos", "list")[1]

    told: list[Video] = []

    def finish(seen: Video) -> None:
        if not told:  # now ingest reads the file
            service.do(service.parts.keep(added["id"], [0, 1], video_status=VideoStatus(status="ready", progress=1)))
        told.append(seen)

    with Client(service.url) as client:
        assert client.wait_video(added["id"], on_progress=finish, poll_s=0.01).status == "ready"
    assert [seen.status for seen in told][:1] == ["queued"]
    assert "100%" in tokenline("videos", "list")[1]
    assert tokenline("videos", "rm", added["id"])[:2] == (0, f"{added['id']} deleted, 2 frames erased\n")
    assert "(video_not_found)" in tokenline("videos", "show", added["id"])[2]


def test_an_upload_tells_its_bytes(service, clip):
    sent: list[tuple[int, int]] = []
    with Client(service.url) as client:
        added = client.upload_video(clip, on_progress=lambda done, total: sent.append((done, total)))
    assert sent[-1] == (clip.stat().st_size, clip.stat().st_size)
    assert [done for done, _ in sent] == sorted(done for done, _ in sent)
    assert added.name == "street.mp4"


def test_text_that_is_named_a_video_is_refused(tokenline, tmp_path):
    (tmp_path / "text.mp4").write_text("no pictures here\n" * 99)
    code, out, err = tokenline("videos", "add", str(tmp_path / "text.mp4"))
    assert (code, out) == (1, "")
    assert "(unsupported_media)" in err


def test_a_question_is_answered_with_what_the_answer_rests_on(tokenline, video):
    code, out, err = tokenline("ask", "what is there?", "--video", f"{video.id}@0..8", "--max-output-tokens", "12")
    assert (code, err) == (0, "")
    assert out.splitlines()[0].strip()
    assert "coverage: 7 of 8 slots, stride 1, text fusion exact from 7 frames" in out
    assert f"gap {video.id} 0:05 to 0:06" in out
    assert "first_token" in out


def test_the_streamed_answer_is_the_one_that_is_given_at_once(tokenline, service, video):
    flags = ("--video", video.id, "--text-fusion", "sampled", "--stride", "auto", "--max-output-tokens", "12")
    code, out, _ = tokenline("ask", "what is there?", *flags, "--json")
    whole = Answer.model_validate_json(out)
    assert code == 0
    question = Question(
        question="what is there?",
        sources=(Range(source_id=video.id),),
        text_fusion="sampled",
        stride="auto",
        max_output_tokens=12,
    )
    with Client(service.url) as client:
        events = list(client.ask(question))
    assert "".join(event.delta for event in events if isinstance(event, Delta)) == whole.answer
    assert (type(events[0]), type(events[-1])) == (Created, Completed)
    assert [event.citations for event in events if isinstance(event, Cited)] == [whole.citations]


def test_a_live_stream_and_a_video_are_asked_together(tokenline, service, video):
    stream, base = service.do(service.parts.stream(range(4), name="ramp"))
    start, end = (datetime.fromtimestamp(at, UTC).isoformat() for at in (base, base + 4))
    code, out, _ = tokenline(
        "ask",
        "what?",
        "--stream",
        f"{stream.id}@{start}..{end}",
        "--video",
        f"{video.id}@0..4",
        "--max-output-tokens",
        "5",
    )
    assert code == 0
    assert "coverage: 8 of 8 slots" in out
    with Client(service.url) as client:
        assert client.frames_kept(stream.id, datetime.fromtimestamp(base - 1, UTC)) <= 4


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (("{}@5..6",), "empty_range"),
        (("{}@6..2",), "bad_time_range"),
        (("vid_000000000000",), "video_not_found"),
        (("{}", "--max-output-tokens", "-1"), "validation_failed"),
    ],
)
def test_what_cannot_be_answered_says_why(tokenline, video, flags, error):
    place, *more = flags
    code, out, err = tokenline("ask", "what?", "--video", place.format(video.id), *more)
    assert (code, out) == (1, "")
    assert f"({error})" in err


def test_a_question_of_100000_characters_is_refused(tokenline, video):
    code, _, err = tokenline("ask", "x" * 100_000, "--video", video.id)
    assert code == 1
    assert "(validation_failed)" in err


def test_moments_are_found(tokenline, video):
    code, out, _ = tokenline("search", "a red car", "--video", video.id, "--top-k", "3", "--json")
    told = json.loads(out)
    found = told["data"]
    assert code == 0
    assert found
    assert told["coverage"] == {"frames_kept": 7, "frames_searched": 7, "partial": False}
    assert all(one["source_id"] == video.id for one in found)
    assert video.id in tokenline("search", "a red car", "--video", video.id)[1]
    assert tokenline("search", "a red car", "--video", video.id, "--min-score", "1")[:2] == (0, "nothing found\n")


def test_events_are_printed_as_they_come_until_interrupted(service):
    stream = service.do(service.parts.sources.create_stream(NewStream(name="hall", url="rtsp://203.0.113.7/hall")))
    command = [Path(sys.executable).with_name("tokenline"), "events", "--type", "stream.state"]
    environment = {**os.environ, "TOKENLINE_URL": service.url}
    with subprocess.Popen(
        [*command, "--after", "0-0"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as following:
        assert following.stdout is not None
        lines = iter(following.stdout.readline, "")
        assert any(stream.id in line and "stream.state  connecting: waiting" in line for line in lines)
        following.send_signal(signal.SIGINT)
        assert following.communicate(timeout=20)[1] == ""
        assert following.returncode == 130


def test_health_and_model_are_told(tokenline, service):
    code, out, _ = tokenline("health")
    assert code == 0
    assert out.endswith("ready\n")
    assert "redis" in out
    with Client(service.url) as client:
        model = client.model()
    assert model.untrained
    assert model.tokens_per_frame == 1


def test_every_page_of_a_list_is_read(service):
    names = {f"page-{number}" for number in range(105)}
    for name in names:
        service.do(service.parts.stream(name=name))
    with Client(service.url) as client:
        assert names <= {stream.name for stream in client.list_streams()}


def test_a_key_opens_what_its_scopes_allow(redis_url, checkpoint, tmp_path, monkeypatch, capsys):
    key = ApiKey(name="reader", sha256=hashlib.sha256(b"k3y").hexdigest(), scopes=frozenset({"streams:read"}))
    with serving(redis_url, checkpoint, tmp_path, ApiSettings(keys=(key,))) as service:
        monkeypatch.setenv("TOKENLINE_URL", service.url)
        codes = []
        for secret in ("", "wr0ng", "k3y"):
            monkeypatch.setenv("TOKENLINE_API_KEY", secret)
            codes.append(run_command(["streams", "list"]))
        codes.append(run_command(["streams", "add", "dock", "rtsp://1.1.1.1/live"]))
        codes.append(run_command(["health"]))
    shown = capsys.readouterr()
    assert codes == [1, 1, 0, 1, 0]
    assert [code for code in ("missing_key", "bad_key", "scope_missing") if f"({code})" not in shown.err] == []
    assert not any(secret in shown.out + shown.err for secret in ("wr0ng", "k3y"))
