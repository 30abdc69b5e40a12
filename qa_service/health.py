"""Whether every part of the service is ready."""

import asyncio
import logging
from collections.abc import Mapping

from qa_service.schemas import Health
from qa_service.seams import ReadyProbe
from store.connection import StoreFull

logger = logging.getLogger(__name__)


class Readiness:
    """Asks every part, all at once, and waits no longer than a time for each."""

    def __init__(self, probes: Mapping[str, ReadyProbe], timeout_s: float) -> None:
        self._probes = dict(probes)
        self._timeout_s = timeout_s
        self._told: Mapping[str, str] = {}

    async def check(self) -> Health:
        """Return a status a part, and what to do about those that are full."""
        told = await asyncio.gather(*(self._ask(name, probe) for name, probe in self._probes.items()))
        self._told = parts = {name: status for name, (status, _) in zip(self._probes, told, strict=True)}
        advice = {name: advice for name, (_, advice) in zip(self._probes, told, strict=True) if advice}
        ready = all(status == "ok" for status in parts.values())
        return Health(status="ok" if ready else "unavailable", parts=parts, advice=advice)

    async def _ask(self, name: str, probe: ReadyProbe) -> tuple[str, str]:
        """Return the status of a part, and advice."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await probe()
        except TimeoutError:
            return "timeout", ""
        except StoreFull as error:
            if self._told.get(name) != "full":  # it may last for days, and somebody asks every few seconds
                logger.warning("%s is full: %s", name, error)
            return "full", str(error)
        except Exception:  # whatever a part raises, the others are asked all the same
            logger.warning("%s is not ready", name, exc_info=True)
            return "unavailable", ""
        return "ok", ""
