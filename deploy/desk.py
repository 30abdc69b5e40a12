"""The desk that gives ingest its work, from the registry and the leases in the store."""

import logging
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import PurePath

from ingest.assignment import Archive, ArchiveReport, Assignment, Camera, CameraReport, Damage, Missing
from store.cipher import WrongKey
from store.gaps import Gap
from store.leases import Leases
from store.source import SourceNotFound, Stream, StreamStatus, Video, VideoStatus
from store.sources import Sources
from store.timeline import Timeline

logger = logging.getLogger(__name__)


class StoreDesk:
    """An AssignmentDesk over Redis. Raises StoreUnavailable, a ConnectionError."""

    def __init__(self, sources: Sources, leases: Leases, timeline: Timeline, lease_s: float) -> None:
        self._sources = sources
        self._leases = leases
        self._timeline = timeline
        self._lease_s = lease_s
        self._refused: set[str] = set()  # streams whose refusal was logged

    async def unowned(self) -> int:
        """Return how many sources wait for an owner."""
        return len(await self._leases.unowned(source.id for source in await self._sources.claimable()))

    async def claim(self, owner: str, room: int, archives: int) -> Sequence[Assignment]:
        claimable = await self._sources.claimable()
        # Another order for every owner: replicas that start together do not all race for the same sources.
        random.shuffle(claimable)
        streams = [source.id for source in claimable if isinstance(source, Stream)]
        videos = [source.id for source in claimable if isinstance(source, Video)]
        epochs = await self._leases.acquire_many(streams, owner, self._lease_s, limit=room)
        room = min(archives, room - len(epochs))
        epochs |= await self._leases.acquire_many(videos, owner, self._lease_s, limit=room)
        if not epochs:
            return []
        # Read again, now that every change will take the lease from us: the first reading may be outdated.
        sources = {source.id: source for source in await self._sources.claimable()}
        assignments = []
        for source_id, epoch in epochs.items():
            try:
                assignments.append(await self._assignment(sources[source_id], epoch))
                self._refused.discard(source_id)
            except (KeyError, SourceNotFound):  # disabled or deleted a moment ago
                await self._leases.release(owner, {source_id: epoch})
            except WrongKey as error:
                await self._refuse(source_id, epoch, error)
        return assignments

    async def renew(self, owner: str, held: Mapping[str, int]) -> frozenset[str]:
        lost = await self._leases.renew(owner, held, self._lease_s)
        # Whoever disables or deletes a source revokes its lease afterwards, unless it dies in between.
        unwanted = held.keys() - lost - {source.id for source in await self._sources.claimable()}
        for source_id in unwanted:
            await self._leases.revoke(source_id)
        return lost | unwanted

    async def release(self, owner: str, held: Mapping[str, int]) -> None:
        await self._leases.release(owner, held)

    async def report(self, source_id: str, epoch: int, report: CameraReport | ArchiveReport) -> None:
        if isinstance(report, CameraReport):
            await self._sources.set_status(source_id, epoch, StreamStatus.model_validate(asdict(report)))
        else:
            await self._sources.set_video_status(source_id, epoch, VideoStatus.model_validate(asdict(report)))

    async def missing(self, source_id: str, epoch: int, missing: Sequence[Missing]) -> None:
        gaps = [Gap(start_slot=run.start_slot, end_slot=run.end_slot, reason=run.reason) for run in missing]
        await self._sources.add_gaps(source_id, epoch, gaps)

    async def _refuse(self, source_id: str, epoch: int, error: WrongKey) -> None:
        """Tell why a stream cannot be read; its lease is left to run out, and the next claim tries again."""
        if source_id not in self._refused:
            logger.error("%s cannot be read: %s", source_id, error)
            self._refused.add(source_id)
        status = StreamStatus(state="auth_failed", since=time.time(), reason=str(error))
        await self._sources.set_status(source_id, epoch, status)

    async def _assignment(self, source: Stream | Video, epoch: int) -> Assignment:
        extent = await self._timeline.extent(source.id)
        return Assignment(
            source_id=source.id,
            epoch=epoch,
            fps=source.fps,
            media=await self._camera(source) if isinstance(source, Stream) else _archive(source),
            last_slot=None if extent is None else extent[1],
            damage=_damage(source),
        )

    async def _camera(self, stream: Stream) -> Camera:
        password = await self._sources.password(stream.id)
        assert stream.url is not None  # none is enabled without one
        return Camera(url=stream.url, username=stream.username, password=password, transport=stream.transport)


def _damage(source: Stream | Video) -> Damage | None:
    if isinstance(source, Stream) or source.damage is None:
        return None
    return Damage(**source.damage.model_dump())


def _archive(video: Video) -> Archive:
    if video.file is not None:
        return Archive(path=PurePath(video.file).name)
    return Archive(url=video.url)
