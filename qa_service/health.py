"""Whether every part of the service is ready."""

import asyncio
import logging
from collections.abc import Mapping

from qa_service.schemas import Health
from qa_service.seams import ReadyProbe

logger = logging.getLogger(__name__)


class Readiness:
    """Asks every part, all at once, and waits no longer than a time for each."""

    def __init__(self, probes: Mapping[str, ReadyProbe], timeout_s: float) -> None:
        self._probes = dict(probes)
        self._timeout_s = timeout_s

    async def check(self) -> Health:
        """Return a status a part."""
        told = await asyncio.gather(*(self._ask(name, probe) for name, probe in self._probes.items()))
        parts = dict(zip(self._probes, told, strict=True))
        ready = all(status == "ok" for status in told)
        return Health(status="ok" if ready else "unavailable", parts=parts)

    async def _ask(self, name: str, probe: ReadyProbe) -> str:
        try:
            async with asyncio.timeout(self._timeout_s):
                await probe()
        except TimeoutError:
            return "timeout"
        except Exception:  # whatever a part raises, the others are asked all the same
            logger.warning("%s is not ready", name, exc_info=True)
            return "unavailable"
        return "ok"
