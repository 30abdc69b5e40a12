"""When a live picture was taken: stream time to unix time."""

# Arrival is compared for hours while the crystal of the camera drifts (100 ppm or so): let the offset follow.
_SLEW = 5e-4
_FARTHEST_S = 5.0
_STEP_BACK_S = 2.0  # B-frames step back by less
_STEP_AHEAD_S = 10.0


class CaptureClock:
    """Anchors the time stamps of one connection to the wall clock.

    The camera's own clock (RTCP) is taken when it agrees with the arrival of the pictures within 5 s: it is right to
    the millisecond. Otherwise the earliest arrival counts, which is late by the network's delay. Times that jump
    anchor anew.
    """

    def __init__(self) -> None:
        self._offset: float | None = None
        self._last_time: float | None = None
        self._last_arrival = 0.0
        self._camera_is_right: bool | None = None

    def observe(self, time_s: float, arrived: float, start_realtime: float | None) -> float:
        """Note that a packet of stream time `time_s` arrived (unix seconds); return its capture time.

        `start_realtime` is the unix time of stream time 0 as the camera reports it, None before its first report.
        """
        if self._last_time is None or not -_STEP_BACK_S < time_s - self._last_time < _STEP_AHEAD_S:
            self._offset = None
            self._camera_is_right = None
        self._follow(arrived - time_s, arrived)
        self._last_time, self._last_arrival = time_s, arrived
        return self._wall(time_s, start_realtime)

    def wall(self, time_s: float, start_realtime: float | None) -> float | None:
        """Return the capture time of a picture of stream time `time_s`; None before anything arrived."""
        return None if self._offset is None else self._wall(time_s, start_realtime)

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
                return start_realtime + time_s
        return self._offset + time_s
