"""The command line: what people type, what they are told when it cannot be done, and what never shows."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from deploy.bodies import Completed, Created, Delta, Moments, NewStream, Question, Range
from deploy.cli import Ask, Search, parse_labels, run_command
from deploy.client import ApiError, Client, Unreachable
from deploy.commands import UsageError
from deploy.display import print_moments, printable
from deploy.local import why_not_running
from deploy.times import BadTime, parse_duration, parse_moment, parse_position, show_position

NOW = datetime(2026, 7, 1, 12, 0, tzinfo=UTC)
ROOT = Path(__file__).parent.parent


# Times


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("10m", 600), ("2h30m", 9000), ("1d", 86400), ("1d12h", 129600), ("1.5s", 1.5), (" 5m ", 300)],
)
def test_a_duration_is_read(text, seconds):
    assert parse_duration(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    "text", ["", "10", "m", "5x", "-5m", "1h-5m", "30m2h", "ten minutes", "1e9m", "٣m ago", "9" * 30 + "d"]
)
def test_what_is_no_duration_is_refused_with_an_example(text):
    with pytest.raises(BadTime, match=re.escape(repr(text))):
        parse_duration(text)


def test_a_moment_is_now_or_ago_or_a_date_with_zone():
    assert parse_moment("now", NOW) == NOW
    assert parse_moment("2h30m", NOW) == NOW - timedelta(hours=2.5)
    assert parse_moment("2026-07-01T06:00:00Z", NOW) == datetime(2026, 7, 1, 6, tzinfo=UTC)
    assert parse_moment("2026-07-01T08:00:00+02:00", NOW) == datetime(2026, 7, 1, 6, tzinfo=UTC)


def test_a_date_without_zone_is_refused_because_it_could_mean_either():
    with pytest.raises(BadTime, match="no time zone"):
        parse_moment("2026-07-01T06:00:00", NOW)


@pytest.mark.parametrize("text", ["", "yesterday", "25:00", "2026-13-01T00:00:00Z", "999999d"])
def test_what_is_no_moment_is_refused(text):
    with pytest.raises(BadTime):
        parse_moment(text, NOW)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90.5", 90.5), ("1:30", 90), ("1:02:03", 3723), ("0:00.5", 0.5), ("10m", 600)]
)
def test_a_position_in_a_video_is_read(text, seconds):
    assert parse_position(text) == seconds


@pytest.mark.parametrize("text", ["", "-1", "1:2:3:4", "nan", "inf", "2026-07-01T06:00:00Z", "1:5"])
def test_what_is_no_position_is_refused(text):
    with pytest.raises(BadTime):
        parse_position(text)


@given(st.integers(min_value=0, max_value=10**9))
def test_a_shown_position_reads_back_as_itself(milliseconds):
    assert parse_position(show_position(milliseconds / 1000)) == pytest.approx(milliseconds / 1000, abs=1e-6)


# Ranges


def ask(*flags: str) -> tuple[Range, ...]:
    names = {"--stream": "stream", "--video": "video"}
    fields: dict[str, list[str] | str] = {}
    for flag, value in zip(flags[::2], flags[1::2], strict=True):
        if flag in names:
            fields[names[flag]] = [*fields.get(names[flag], []), value]
        else:
            fields[flag.removeprefix("--")] = value
    return Ask(question="?", **fields).ranges(NOW)


def test_the_last_minutes_of_a_stream():
    assert ask("--stream", "str_1", "--last", "10m") == (
        Range(source_id="str_1", start=NOW - timedelta(minutes=10), end=NOW),
    )


def test_a_stream_from_a_date_on_ends_now():
    [asked] = ask("--stream", "str_1", "--start", "2026-07-01T06:00:00Z")
    assert (asked.start, asked.end) == (datetime(2026, 7, 1, 6, tzinfo=UTC), NOW)


def test_a_video_without_times_is_asked_whole():
    assert ask("--video", "vid_1") == (Range(source_id="vid_1"),)


def test_every_source_may_have_a_range_of_its_own():
    assert ask("--stream", "str_1@2h..1h", "--video", "vid_1@1:30..", "--video", "vid_2@..9") == (
        Range(source_id="str_1", start=NOW - timedelta(hours=2), end=NOW - timedelta(hours=1)),
        Range(source_id="vid_1", start=90),
        Range(source_id="vid_2", end=9),
    )


@pytest.mark.parametrize(
    ("flags", "advice"),
    [
        ((), "at least one"),
        (("--stream", "str_1"), "say which time of str_1"),
        (("--stream", "str_1", "--last", "5m", "--start", "6m"), "exclude"),
        (("--stream", "str_1", "--video", "vid_1", "--start", "5"), "ID@START..END"),
        (("--stream", "str_1@5m"), "ID@START..END"),
        (("--stream", "str_1", "--end", "now"), "say which time"),
    ],
)
def test_a_range_that_is_left_open_is_refused_with_advice(flags, advice):
    with pytest.raises(UsageError, match=re.escape(advice)):
        ask(*flags)


def test_a_search_without_times_looks_through_all_of_a_stream():
    assert Search(query="van", stream=["str_1"]).ranges(NOW, open_ended=True) == (Range(source_id="str_1"),)


@pytest.mark.parametrize("flags", [["--video", "vid_1"], ["--stream", "str_1"], []])
def test_nothing_is_erased_without_a_time_unless_everything_is_meant(flags, capsys):
    assert run_command(["erase", *flags]) == 2
    assert "time" in capsys.readouterr().err or not flags


def test_an_erasure_prints_its_receipt(capsys):
    receipt = {
        "id": "era_1",
        "source_id": "vid_1",
        "start": 5.0,
        "end": None,
        "erased": {"redis_frames": 1, "sealed_frames": 20, "keyframes": 21},
        "completed_at": "2026-07-01T06:00:00Z",
    }
    with stranger(200, json.dumps(receipt)) as (url, asked):
        assert run_command(["erase", "--video", "vid_1@5..", "--url", url]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("era_1", "vid_1", "20", "21"))
    assert asked


def test_labels_are_pairs():
    assert parse_labels(["site=north", "note=a=b", "empty="]) == {"site": "north", "note": "a=b", "empty": ""}
    with pytest.raises(UsageError, match="NAME=VALUE"):
        parse_labels(["north"])


# Command lines


@pytest.fixture(autouse=True)
def _no_service_of_the_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith("TOKENLINE_")]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize("searched", [0, 40, 90])
def test_a_search_that_left_frames_out_says_how_many_it_looked_at(searched, capsys):
    coverage = {"frames_kept": 90, "frames_searched": searched, "partial": searched < 90}
    print_moments(Moments.model_validate({"data": [], "coverage": coverage}))
    shown = capsys.readouterr().out
    assert "nothing found" in shown
    assert (f"{searched} of 90 frames" in shown) == (searched < 90)


def test_help_tells_every_command(capsys):
    assert run_command(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in ("run", "demo", "streams", "videos", "ask", "search", "health"))


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["streams"],
        ["streams", "paint"],
        ["streams", "add", "dock"],
        ["streams", "add", "dock", "rtsp://host/1", "--fps", "fast"],
        ["streams", "add", "dock", "rtsp://host/1", "--label", "north"],
        ["streams", "add", "dock", "rtsp://host/1", "--password", "secret"],
        ["streams", "add", "dock", "rtsp://host/1", "--password-env", "NOT_SET_ANYWHERE"],
        ["streams", "add", "dock", "rtsp://host/1", "--password-env", "PATH", "--password-stdin"],
        ["videos", "add", "no-such-file.mp4"],
        ["ask", "what?"],
        ["ask", "what?", "--stream", "str_1", "--last", "long"],
        ["ask", "what?", "--video", "vid_1", "--stride", "0"],
        ["ask", "what?", "--video", "vid_1", "--text-fusion", "guess"],
        ["search", "van", "--video", "vid_1", "--top-k", "many"],
        ["health", "extra"],
        ["run", "--no-such-setting", "1"],
    ],
)
def test_a_wrong_command_line_says_so_and_exits_with_2(arguments, capsys):
    assert run_command(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "error" in shown.err.lower()
    assert "Traceback" not in shown.err


def test_a_setting_that_is_wrong_in_the_environment_stops_the_run_and_keeps_its_value_secret(monkeypatch, capsys):
    monkeypatch.setenv("TOKENLINE_SERVE__PORT", "s3cret")
    assert run_command(["run"]) == 2
    shown = capsys.readouterr().err
    assert "serve.port" in shown
    assert "s3cret" not in shown


def test_variables_of_others_are_no_commands(monkeypatch, capsys):
    monkeypatch.setenv("run", "1")
    monkeypatch.setenv("search", "van")
    assert run_command(["ask", "what?"]) == 2
    assert "at least one --stream" in capsys.readouterr().err


def test_the_service_refuses_to_listen_beyond_this_machine_without_a_key(capsys):
    assert run_command(["run", "--serve.host", "0.0.0.0"]) == 1
    assert "TOKENLINE_API__KEYS" in capsys.readouterr().err


def test_a_model_that_cannot_be_loaded_ends_the_run_in_one_line(monkeypatch, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("TOKENLINE_STORE__DATA_DIR", str(tmp_path / "data"))
    for folder in ("gone", "empty"):
        monkeypatch.setenv("TOKENLINE_MODEL__CHECKPOINT", str(tmp_path / folder))
        assert run_command(["run"]) == 1
        told = capsys.readouterr().err
        assert "TOKENLINE_MODEL__CHECKPOINT" in told
        assert folder in told
        assert "Traceback" not in told
    assert not (tmp_path / "data").exists()  # nothing was started


def test_a_deployment_that_cannot_start_is_told_by_the_last_line_of_its_error():
    from ray.serve.schema import ApplicationStatusOverview, DeploymentStatusOverview

    def deployment(status, message):
        return DeploymentStatusOverview(
            status=status, status_trigger="REPLICA_STARTUP_FAILED", replica_states={}, message=message
        )

    broken = 'Traceback (most recent call last):\n  File "/secret/place.py", line 1\nRuntimeError: no such device\n\n'
    parts = {"compressor": deployment("DEPLOY_FAILED", broken), "qa": deployment("UPDATING", "")}
    told = why_not_running(
        ApplicationStatusOverview(status="DEPLOY_FAILED", message="", last_deployed_time_s=0, deployments=parts)
    )
    assert told == "compressor cannot start: RuntimeError: no such device"


def test_a_missing_settings_file_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("TOKENLINE_CONFIG", str(tmp_path / "gone.yaml"))
    assert run_command(["run"]) == 1
    assert "gone.yaml" in capsys.readouterr().err


def test_the_installed_command_is_this_one():
    result = subprocess.run([Path(sys.executable).with_name("tokenline"), "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    assert result.stdout.startswith("usage: tokenline")


# A service that is not there, or is something else


@pytest.fixture
def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield probe.getsockname()[1]  # bound but not listening: connections are refused


def test_a_service_that_is_not_there_is_named_with_what_to_do(closed_port, capsys):
    assert run_command(["health", "--url", f"http://127.0.0.1:{closed_port}"]) == 1
    assert capsys.readouterr().err == (
        f"error: no service answers at http://127.0.0.1:{closed_port}; start one with `tokenline run`\n"
    )


def test_the_environment_names_the_service_and_the_flag_goes_before(closed_port, monkeypatch, capsys):
    monkeypatch.setenv("TOKENLINE_URL", "http://127.0.0.1:1")
    assert run_command(["streams", "list"]) == 1
    assert "http://127.0.0.1:1;" in capsys.readouterr().err
    assert run_command(["streams", "list", "--url", f"http://127.0.0.1:{closed_port}"]) == 1
    assert f":{closed_port};" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["nonsense", "ftp://127.0.0.1", "http://[", "http://127.0.0.1:port"])
def test_what_is_no_address_is_refused(url, capsys):
    assert run_command(["health", "--url", url]) == 1
    assert "error:" in capsys.readouterr().err


@contextmanager
def stranger(status: int, body: str, headers: dict[str, str] | None = None):
    """Serve one reply to every request, as something that is not (or no longer) this service does."""
    seen: list[tuple[str, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append((self.path, self.headers.get("Authorization")))
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body.encode())

        do_POST = do_DELETE = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize(("status", "body"), [(200, "<html>hello</html>"), (200, "[]"), (404, "not here"), (502, "")])
def test_another_server_at_the_address_is_an_error_without_traceback(status, body, capsys):
    with stranger(status, body) as (url, _):
        assert run_command(["streams", "list", "--url", url]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "(unexpected_response)" in shown.err


def test_an_error_shows_message_code_and_request(capsys):
    error = {"error": {"code": "stream_not_found", "message": "There is no stream str_1.", "request_id": "req_7"}}
    with stranger(404, json.dumps(error)) as (url, _):
        assert run_command(["streams", "rm", "str_1", "--url", url]) == 1
    assert capsys.readouterr().err == "error: There is no stream str_1. (stream_not_found)\nrequest: req_7\n"


def test_a_service_that_is_not_ready_tells_which_part_and_exits_with_1(capsys):
    body = {"status": "unavailable", "parts": {"redis": "timeout", "qa": "ok"}}
    with stranger(503, json.dumps(body)) as (url, _):
        assert run_command(["health", "--url", url]) == 1
        shown = capsys.readouterr().out
        assert run_command(["health", "--url", url, "--json"]) == 1
    assert "timeout" in shown
    assert shown.endswith("not ready\n")
    assert json.loads(capsys.readouterr().out) == {"ready": False, "parts": body["parts"], "advice": {}}


def test_the_key_goes_into_the_header_and_nowhere_else(monkeypatch, capsys):
    monkeypatch.setenv("TOKENLINE_API_KEY", "k3y")
    with stranger(401, "{}") as (url, seen):
        assert run_command(["streams", "list", "--url", url]) == 1
    assert seen == [("/v1/streams", "Bearer k3y")]
    assert "k3y" not in "".join(capsys.readouterr())


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(monkeypatch, closed_port):
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{closed_port}")
    with stranger(200, '{"data": []}') as (url, seen), Client(url) as client:
        assert list(client.list_streams()) == []
    assert len(seen) == 1


# Answers as they arrive

COVERAGE = {"slots_expected": 2, "frames_used": 2, "stride": 1, "text_fusion": "none", "fusion_frames": 0, "gaps": []}
WHOLE = {"id": "ans_1", "answer": "It left.", "citations": [], "coverage": COVERAGE, "timing_ms": {"total": 9}}
EVENTS = (
    'event: answer.created\ndata: {"id": "ans_1", "model": "m"}\n\n: ping\n\n'
    'event: answer.delta\ndata: {"delta": "It "}\n\nevent: later.kind\ndata: ?\n\n'
    'event: answer.delta\ndata: {"delta": "left."}\n\n'
    f"event: answer.completed\ndata: {json.dumps(WHOLE)}\n\n"
)
SSE = {"Content-Type": "text/event-stream"}
QUESTION = Question(question="when?", sources=(Range(source_id="vid_1", start=0, end=2),))


def test_events_arrive_typed_and_unknown_ones_are_skipped():
    with stranger(200, EVENTS + "data: [DONE]\n\n", SSE) as (url, _), Client(url) as client:
        events = list(client.ask(QUESTION))
    assert [type(event) for event in events] == [Created, Delta, Delta, Completed]
    assert "".join(event.delta for event in events if isinstance(event, Delta)) == "It left."


def test_an_answer_is_printed_as_it_comes_with_what_it_rests_on(capsys):
    with stranger(200, EVENTS + "data: [DONE]\n\n", SSE) as (url, _):
        assert run_command(["ask", "when?", "--video", "vid_1", "--url", url]) == 0
    assert capsys.readouterr().out == (
        "It left.\ncoverage: 2 of 2 slots, stride 1, text fusion none\ntiming: total 9 ms\n"
    )


def test_an_answer_that_is_cut_off_is_an_error(capsys):
    with stranger(200, EVENTS.partition("event: answer.completed")[0], SSE) as (url, _):
        assert run_command(["ask", "when?", "--video", "vid_1", "--url", url]) == 1
    assert "cut off" in capsys.readouterr().err


def test_an_error_in_the_middle_of_an_answer_is_told_with_its_code():
    failed = (
        'event: error\ndata: {"error": {"code": "answer_timeout", "message": "Too slow.", "request_id": "req_1"}}\n\n'
    )
    with stranger(200, EVENTS.partition(": ping")[0] + failed, SSE) as (url, _), Client(url) as client:
        events = client.ask(QUESTION)
        assert isinstance(next(events), Created)
        with pytest.raises(ApiError, match="Too slow") as raised:
            next(events)
    assert (raised.value.code, raised.value.request_id) == ("answer_timeout", "req_1")


@pytest.mark.parametrize("data", ["{", "[]", '{"delta": 1, "id"', "null"])
def test_an_event_that_cannot_be_read_is_an_error(data):
    with stranger(200, f"event: answer.delta\ndata: {data}\n\n", SSE) as (url, _), Client(url) as client:
        events = client.ask(QUESTION)
        with pytest.raises(ApiError, match=r"answer\.delta"):
            next(events)


def test_a_server_that_hangs_up_is_unreachable():
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=lambda: server.accept()[0].close())
        thread.start()
        with Client(f"http://127.0.0.1:{server.getsockname()[1]}") as client, pytest.raises(Unreachable, match="lost"):
            client.get_stream("str_1")
        thread.join()


def test_ctrl_c_ends_a_command_quietly_with_130():
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = [Path(sys.executable).with_name("tokenline"), "health"]
        environment = os.environ | {"TOKENLINE_URL": f"http://127.0.0.1:{server.getsockname()[1]}"}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        connection, _ = server.accept()
        with connection:
            try:
                assert connection.recv(4)  # the command has asked, and is waiting for an answer soon
                time.sleep(0.5)
                process.send_signal(signal.SIGINT)
                out, err = process.communicate(timeout=30)
            finally:
                process.kill()
    assert (process.returncode, out, err) == (130, b"", b"")


def test_a_reader_that_goes_away_ends_a_command_quietly():
    streams = [
        {"id": f"str_{n:012x}", "name": "x" * 99, "url": "rtsp://h/1", "state": "online", "fps": 1} for n in range(2000)
    ]
    with stranger(200, json.dumps({"data": streams})) as (url, _):
        command = [Path(sys.executable).with_name("tokenline"), "streams", "list", "--json", "--url", url]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdout.read(10)
        process.stdout.close()
        error = process.stderr.read()
        process.stderr.close()
        process.wait(timeout=30)
    assert error == b""


# What is shown, and what is not


def test_control_characters_never_reach_the_terminal():
    assert printable("red\x1b[31m car\x07\u202e\r\n\tok é") == "red[31m car\n\tok é"


def test_a_password_is_sent_and_shown_nowhere():
    stream = NewStream(name="dock", url="rtsp://h/1", username="u", password=SecretStr("s3cret"), retention_hours=2)
    assert stream.body()["password"] == "s3cret"
    assert stream.body()["retention"] == {"hours": 2}
    assert "s3cret" not in repr(stream)


def test_limits_of_a_stream_are_sent_only_where_they_are_given():
    stream = NewStream(name="dock", url="rtsp://h/1")
    assert "retention" not in stream.body()
    for limits, sent in [
        ({"retention_bytes": 5}, {"max_bytes": 5}),
        ({"keyframe_hours": 24}, {"keyframes": {"hours": 24}}),
        ({"retention_hours": 9, "keyframe_bytes": 7}, {"hours": 9, "keyframes": {"max_bytes": 7}}),
    ]:
        assert stream.model_copy(update=limits).body()["retention"] == sent


@pytest.mark.parametrize("flags", [("--max-gib", "0"), ("--max-gib", "-1"), ("--keyframe-max-gib", "nan")])
def test_a_size_that_is_none_is_a_wrong_command_line(flags, capsys):
    assert run_command(["streams", "add", "dock", "rtsp://h/1", *flags]) == 2
    assert flags[0].removeprefix("--") in capsys.readouterr().err.replace("_", "-")


def test_a_video_that_failed_says_why(capsys):
    failed = {"id": "vid_1", "name": "yard", "status": "failed", "error": {"message": "no picture could be decoded"}}
    with stranger(200, json.dumps(failed)) as (url, _):
        assert run_command(["videos", "add", "http://example.com/yard.mp4", "--wait", "--url", url]) == 1
        assert "no picture could be decoded" in capsys.readouterr().err
        assert run_command(["videos", "show", "vid_1", "--json", "--url", url]) == 0
    assert json.loads(capsys.readouterr().out)["error"] == {"message": "no picture could be decoded"}
