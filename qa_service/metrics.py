"""Prometheus metrics of the whole installation, computed from Redis at every scrape.

Ray exports what concerns processes; here stands what outlives them, so every replica tells the same numbers.
"""

from collections import Counter
from typing import get_args

from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client import Counter as Total

from store.counters import Counters
from store.pages import PAGE_LIMIT
from store.sizes import KeyframeHours, TokenHours
from store.source import Stream, StreamState, StreamStatus, Video, VideoState
from store.sources import Sources

STREAM_STATES = get_args(StreamState)
VIDEO_STATES = get_args(VideoState)


class Metrics:
    """Writes the metrics. Raises StoreUnavailable."""

    def __init__(self, sources: Sources, counters: Counters, tokens: TokenHours, keyframes: KeyframeHours) -> None:
        self._sources = sources
        self._counters = counters
        self._tokens = tokens
        self._keyframes = keyframes

    async def text(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        registry = CollectorRegistry()
        self._put_streams(registry, await self._statuses())
        self._put_videos(registry, Counter[str](video.status for video in await self._videos()))
        await self._put_sizes(registry)
        total = Total("tokenline_events", "What happened so far, by name.", ["event"], registry=registry)
        for name, count in (await self._counters.counters()).items():
            total.labels(name).inc(count)
        return generate_latest(registry)

    def _put_streams(self, registry: CollectorRegistry, statuses: list[StreamStatus]) -> None:
        states = Counter[str](status.state for status in statuses)
        streams = Gauge("tokenline_streams", "Registered streams by state.", ["state"], registry=registry)
        for state in STREAM_STATES:
            streams.labels(state).set(states[state])
        sums = {
            "frames_1h": ("Frames that streams brought within an hour.", sum(one.frames_1h for one in statuses)),
            "reconnects_1h": ("Reconnects of streams within an hour.", sum(one.reconnects_1h for one in statuses)),
            "dropped_frames": ("Frames shed since streams were claimed.", sum(one.dropped_frames for one in statuses)),
            "max_lag_seconds": (
                "Lag of the stream that is furthest behind.",
                max((one.lag_s for one in statuses if one.lag_s is not None), default=0.0),
            ),
        }
        for name, (help_text, value) in sums.items():
            Gauge(f"tokenline_stream_{name}", help_text, registry=registry).set(value)

    def _put_videos(self, registry: CollectorRegistry, states: Counter[str]) -> None:
        videos = Gauge("tokenline_videos", "Videos by status.", ["status"], registry=registry)
        for state in VIDEO_STATES:
            videos.labels(state).set(states[state])

    async def _put_sizes(self, registry: CollectorRegistry) -> None:
        everything = await self._sources.everything()  # deleted ones have memory too
        source_ids = [kept.source.id for kept in everything if not (kept.purge or kept.hidden)]
        tokens = (await self._tokens.totals(source_ids)).values()
        sizes = {
            "tokens_redis": sum(one.hot for one in tokens),
            "tokens_sealed": sum(one.sealed for one in tokens),
            "keyframes": sum((await self._keyframes.totals(source_ids)).values()),
        }
        kept = Gauge("tokenline_kept_bytes", "Bytes of memory that are kept, by kind.", ["kind"], registry=registry)
        for kind, size in sizes.items():
            kept.labels(kind).set(size)

    async def _statuses(self) -> list[StreamStatus]:
        streams: list[Stream] = []
        cursor: str | None = None
        while True:
            page = await self._sources.list_streams(cursor=cursor, limit=PAGE_LIMIT)
            streams += page.items
            cursor = page.next_cursor
            if cursor is None:
                return list((await self._sources.statuses(streams)).values())

    async def _videos(self) -> list[Video]:
        videos: list[Video] = []
        cursor: str | None = None
        while True:
            page = await self._sources.list_videos(cursor=cursor, limit=PAGE_LIMIT)
            videos += page.items
            cursor = page.next_cursor
            if cursor is None:
                return videos
