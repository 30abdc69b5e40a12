"""When a live picture was taken: stream time to unix time."""

from typing import Literal

ClockName = Literal["camera", "arrival"]

# Arrival is compared for hours while the crystal of the camera drifts (100 ppm or so): let the offset follow.
_SLEW = 5e-4
_FARTHEST_S = 5.0
_STEP_BACK_S = 2.0  # B-frames step back by less
_STEP_AHEAD_S = 10.0
_SET_S = 1.0  # what a clock that is merely slewed never gains or loses between two packets
_EARLY_S = 1.0  # a packet cannot come so much sooner than the quickest before it, unless its time stamp jumped ...
_OPENING_S = 1.0  # ... or it lay there since before the connection was read

_STANDING_S = 3.0  # how long no time stamp may be newer than those before, while packets come ...
_STANDING_PACKETS = 8  # ... and so many in a row: a few pictures shown out of order may come behind a pause

STAMPS_JUMPED = "the time stamps of the camera jumped"
STAMPS_STAND = "the time stamps of the camera stand still"
CLOCK_WAS_SET = "the clock of the machine that reads the camera was set"


class CaptureClock:
    """Anchors the time stamps of one connection to the wall clock.

    The camera's own clock (RTCP) is taken when it agrees with the arrival of the pictures within 5 s: it is right to
    the millisecond. Otherwise the earliest arrival counts, which is late by the network's delay. Times that jump or
    stand still anchor anew, by arrival alone: what the camera has told of its clock held for the times before. So does
    a clock of this machine that was set; `jumped` says which it was last and when
    (monotonic seconds), None before any, and `source` whose clock gave the last time.
    """

    def __init__(self) -> None:
        self.jumped: tuple[float, str] | None = None
        self.source: ClockName = "arrival"
        self._offset: float | None = None
        self._last_time: float | None = None
        self._newest: tuple[float, float] = (0.0, 0.0)  # the newest time stamp, and when it came (monotonic)
        self._older = 0  # packets since then
        self._last_arrival = 0.0
        self._last_monotonic = 0.0
        self._open_at = 0.0  # monotonic
        self._camera_is_right: bool | None = None

    def observe(self, time_s: float, arrived: float, monotonic: float, start_realtime: float | None) -> float:
        """Note that a packet of stream time `time_s` arrived; return its capture time.

        It arrived at `arrived` in unix seconds, and at `monotonic` by a clock that nobody can set. `start_realtime` is
        the unix time of stream time 0 as the camera reports it, None before its first report.
        """
        if self._last_time is None:
            self._open_at = monotonic + _OPENING_S
        why = self._why_anew(time_s, arrived, monotonic)
        if why is not None:
            self.jumped = monotonic, why
            self._offset = None
            self._camera_is_right = None if why == CLOCK_WAS_SET else False
        if self._last_time is None or time_s > self._newest[0] or why in (STAMPS_JUMPED, CLOCK_WAS_SET):
            self._newest, self._older = (time_s, monotonic), 0
        else:
            self._older += 1
        self._follow(arrived - time_s, arrived)
        self._last_time, self._last_arrival, self._last_monotonic = time_s, arrived, monotonic
        return self._wall(time_s, start_realtime)

    def wall(self, time_s: float, start_realtime: float | None) -> float | None:
        """Return the capture time of a picture of stream time `time_s`; None before anything arrived."""
        return None if self._offset is None else self._wall(time_s, start_realtime)

    def _why_anew(self, time_s: float, arrived: float, monotonic: float) -> str | None:
        """Return why what was known of the clocks does not hold any more, None if it does."""
        if self._last_time is None or self._offset is None:
            return None
        passed_s = monotonic - self._last_monotonic
        if not -_STEP_BACK_S < time_s - self._last_time < _STEP_AHEAD_S + passed_s:
            return STAMPS_JUMPED
        if abs(arrived - self._last_arrival - passed_s) > _SET_S:
            return CLOCK_WAS_SET
        if monotonic > self._open_at and arrived - time_s < self._offset - _EARLY_S:
            return STAMPS_JUMPED
        is_older = time_s <= self._newest[0] and self._older >= _STANDING_PACKETS
        if is_older and monotonic - self._newest[1] > _STANDING_S:
            return STAMPS_STAND
        return None

    def _follow(self, offset: float, arrived: float) -> None:
        if self._offset is None:
            self._offset = offset
        else:
            slewed = self._offset + _SLEW * max(0.0, arrived - self._last_arrival)
            self._offset = min(offset, slewed)

    def _wall(self, time_s: float, start_realtime: float | None) -> float:
        assert self._offset is not None
        if start_realtime is not None and self._camera_is_right is not False:
            # Once wrong, wrong until the next anchor: near the limit the times would jump to and fro.
            self._camera_is_right = abs(start_realtime - self._offset) < _FARTHEST_S
            if self._camera_is_right:
                self.source = "camera"
                return start_realtime + time_s
        self.source = "arrival"
        return self._offset + time_s
