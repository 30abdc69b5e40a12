"""The feed of events over real HTTP: in order, for those who may see them, and from where a client was."""

import hashlib
import itertools
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
from pydantic import SecretStr

from deploy.bodies import Event
from deploy.client import ApiError, Client
from qa_service.settings import ApiKey, ApiSettings
from store import events as event_log
from store.events import Events
from store.leases import Leases
from store.source import NewStream, NewVideo, StreamStatus, VideoStatus
from tests.qa_http import Service, serving


def api_key(name: str, *scopes: str, sources: tuple[str, ...] | None = None) -> ApiKey:
    return ApiKey(name=name, sha256=hashlib.sha256(name.encode()).hexdigest(), scopes=scopes, sources=sources)


@pytest.fixture
def service(redis_url, checkpoint, tmp_path) -> Iterator[Service]:
    with serving(redis_url, checkpoint, tmp_path, ApiSettings()) as running:
        yield running


def report(service: Service, stream_id: str, *statuses: StreamStatus) -> None:
    """Report as the owner of a stream."""

    async def work() -> None:
        leases = Leases(service.parts.redis)
        epoch = await leases.acquire(stream_id, "test", 60)
        for status in statuses:
            assert await service.parts.sources.set_status(stream_id, epoch, status)
        await leases.release("test", {stream_id: epoch})

    service.do(work())


def online(since: float = 5.0, **facts: object) -> StreamStatus:
    return StreamStatus(state="online", since=since, **facts)


def told(client: Client, count: int, **options: object) -> list[Event]:
    return list(itertools.islice(client.events(**options), count))


def test_what_changes_is_told_in_order_and_only_what_changes(service):
    stream = service.do(service.parts.sources.create_stream(NewStream(name="dock", url="rtsp://203.0.113.7/1")))
    frozen = StreamStatus(state="degraded", reason="the picture is black", since=9.0)
    report(service, stream.id, online(), online(frames_1h=7), online(since=6.0), frozen, frozen)
    service.do(service.parts.sources.update_stream(stream.id, enabled=False))
    with Client(service.url) as client:
        found = told(client, 4, after="0-0")
    assert [(one.type, one.source_id) for one in found] == [("stream.state", stream.id)] * 4
    assert [one.state for one in found] == ["connecting", "online", "degraded", "disabled"]
    assert found[2].reason == "the picture is black"
    assert found[2].since == "1970-01-01T00:00:09Z"
    assert [one.id for one in found] == sorted({one.id for one in found}, key=lambda one: (len(one), one))


def test_a_video_tells_its_way_and_types_are_chosen(service):
    sources = service.parts.sources
    service.do(sources.create_stream(NewStream(name="dock", url="rtsp://203.0.113.7/1")))
    video = service.do(sources.create_video(NewVideo(name="yard", file="yard.upload")))

    async def read() -> None:
        epoch = await Leases(service.parts.redis).acquire(video.id, "test", 60)
        for progress in (0.1, 0.5):
            await sources.set_video_status(video.id, epoch, VideoStatus(status="processing", progress=progress))
        await sources.set_video_status(video.id, epoch, VideoStatus(status="failed", error="it is damaged"))

    service.do(read())
    with Client(service.url) as client:
        found = told(client, 3, after="0-0", types=["video.status"])
    assert [(one.type, one.status) for one in found] == [
        ("video.status", "queued"),
        ("video.status", "processing"),
        ("video.status", "failed"),
    ]
    assert found[2].error == "it is damaged"


def test_a_client_that_comes_without_an_id_hears_what_happens_from_then_on(service):
    stream = service.do(service.parts.sources.create_stream(NewStream(name="dock", url="rtsp://203.0.113.7/1")))
    heard: list[Event] = []

    def listen() -> None:
        with Client(service.url) as client:
            heard.extend(told(client, 1))

    listening = threading.Thread(target=listen)
    listening.start()
    deadline = time.monotonic() + 20
    since = 10.0
    while listening.is_alive():  # it may not have asked yet
        assert time.monotonic() < deadline
        report(service, stream.id, online(since=since), StreamStatus(state="reconnecting", since=since))
        since += 1
        listening.join(0.2)
    assert heard[0].state in ("online", "reconnecting")


def test_a_client_goes_on_behind_the_last_event_it_has_seen(service):
    stream = service.do(service.parts.sources.create_stream(NewStream(name="dock", url="rtsp://203.0.113.7/1")))
    report(service, stream.id, online(), StreamStatus(state="reconnecting", since=7.0), online(since=8.0))
    with Client(service.url) as client:
        every = told(client, 4, after="0-0")
        assert told(client, 2, after=every[1].id) == every[2:]


def test_a_client_that_was_away_for_too_long_is_told_so(service, monkeypatch):
    monkeypatch.setattr(event_log, "_KEPT", 1)
    events = Events(service.parts.redis)
    with Client(service.url) as client:
        service.do(events.add("stream.state", "str_1", {"state": "online"}))
        [first] = told(client, 1, after="0-0")
        for _ in range(300):  # the log is cut in whole nodes
            service.do(events.add("stream.state", "str_1", {"state": "online"}))
        assert [one.type for one in told(client, 2, after=first.id)] == ["events.cut", "stream.state"]


def test_a_key_hears_of_the_sources_that_it_may_see(redis_url, checkpoint, tmp_path):
    keys = (
        api_key("all", "streams:read"),
        api_key("one", "streams:read", sources=("str_seen",)),
        api_key("asker", "ask"),
    )
    with serving(redis_url, checkpoint, tmp_path, ApiSettings(keys=keys)) as service:
        events = Events(service.parts.redis)
        for source_id in ("str_hidden", "str_seen", "str_hidden", "str_seen"):
            service.do(events.add("stream.state", source_id, {"state": "online"}))
        with Client(service.url, SecretStr("all")) as client:
            assert len(told(client, 4, after="0-0")) == 4
        with Client(service.url, SecretStr("one")) as client:
            assert {one.source_id for one in told(client, 2, after="0-0")} == {"str_seen"}
        with Client(service.url, SecretStr("asker")) as client, pytest.raises(ApiError) as caught:
            told(client, 1)
        assert caught.value.code == "scope_missing"


@pytest.mark.parametrize("last_id", ["yesterday", "1-", "-1", "1-1-1", f"{2**70}-0", "(1-1"])
def test_an_id_that_no_event_has_is_refused(service, last_id):
    response = httpx.get(f"{service.url}/v1/events", headers={"Last-Event-ID": last_id})
    assert (response.status_code, response.json()["error"]["code"]) == (422, "validation_failed")


@pytest.mark.parametrize("types", ["", "stream.state,nonsense", "answer.delta"])
def test_a_type_that_there_is_not_is_refused(service, types):
    response = httpx.get(f"{service.url}/v1/events", params={"types": types})
    assert (response.status_code, response.json()["error"]["param"]) == (422, "types")


def test_silence_is_filled_with_comments_and_a_feed_ends_with_its_client(redis_url, checkpoint, tmp_path):
    with (
        serving(redis_url, checkpoint, tmp_path, ApiSettings(sse_ping_s=0.5)) as service,
        httpx.stream("GET", f"{service.url}/v1/events") as response,
    ):
        lines = [line for line in itertools.islice(response.iter_lines(), 6) if line]
    assert lines == [": ping"] * 3
