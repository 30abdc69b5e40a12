"""The slot rule, the capture clock, and which packets of a camera are decoded."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.backoff import Backoff, HourCount
from ingest.camera import PacketGate
from ingest.clock import CLOCK_WAS_SET, STAMPS_JUMPED, STAMPS_STAND, CaptureClock
from ingest.sampler import Sampler, milliseconds, slot_of


def picked(times: list[float | None], fps: float = 1.0, **options: object) -> list[tuple[int, float]]:
    sampler = Sampler(fps, **options)
    picks = [sampler.offer(time) for time in times]
    return [(pick.slot, pick.time_s) for pick in picks if pick is not None]


def observe(
    clock: CaptureClock,
    time_s: float,
    arrived: float,
    start_realtime: float | None,
    monotonic: float | None = None,
) -> float:
    """`monotonic` is what arrival would be had nobody set this machine's clock."""
    return clock.observe(time_s, arrived, arrived if monotonic is None else monotonic, start_realtime)


def test_the_first_picture_of_each_slot_is_taken():
    assert picked([0.2, 0.9, 1.1, 1.5, 2.0]) == [(0, 0.2), (1, 1.1), (2, 2.0)]


def test_a_hole_is_not_filled_with_neighbours():
    assert picked([0.0, 1.0, 5.2, 5.4, 5.6, 6.0]) == [(0, 0.0), (1, 1.0), (5, 5.2), (6, 6.0)]


def test_times_that_step_back_choose_nothing_until_they_have_caught_up():
    assert picked([3.0, 1.0, 2.0, 3.5, 4.0]) == [(3, 3.0), (4, 4.0)]


def test_pictures_without_times_are_numbered_by_the_rate():
    assert [slot for slot, _ in picked([None] * 10, frame_s=0.5)] == [0, 1, 2, 3, 4]


def test_work_goes_on_after_the_last_slot():
    assert [slot for slot, _ in picked([0.0, 1.0, 2.0, 3.0], last_slot=1)] == [2, 3]


@pytest.mark.parametrize("fps", [0.1, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0])
def test_the_start_of_a_slot_belongs_to_it_at_every_rate(fps):
    assert all(slot_of(slot / fps, fps) == slot for slot in range(2000))
    now = 1_800_000_000
    assert all(slot_of(slot / fps, fps) == slot for slot in range(int(now * fps), int(now * fps) + 50))


def test_the_milliseconds_of_a_frame_stay_in_its_slot():
    assert [milliseconds(slot / 10) for slot in range(1000)] == [slot * 100 for slot in range(1000)]


@given(st.lists(st.floats(0, 1e6), max_size=60), st.sampled_from([0.1, 0.7, 1.0, 4.0, 10.0]))
def test_slots_rise_and_every_pick_lies_in_its_slot(times, fps):
    picks = picked(times, fps)
    slots = [slot for slot, _ in picks]
    assert slots == sorted(set(slots))
    assert all(slot_of(time, fps) == slot for slot, time in picks)


def test_the_clock_of_the_camera_is_taken_when_it_is_plausible():
    clock = CaptureClock()
    assert observe(clock, 10.0, arrived=1000.3, start_realtime=None) == pytest.approx(1000.3)
    assert observe(clock, 11.0, arrived=1001.4, start_realtime=990.0) == pytest.approx(1001.0)


def test_a_camera_clock_that_is_wrong_is_not_believed():
    clock = CaptureClock()
    assert observe(clock, 10.0, arrived=1000.0, start_realtime=500.0) == pytest.approx(1000.0)
    assert observe(clock, 11.0, arrived=1001.0, start_realtime=990.5) == pytest.approx(1001.0)


def test_late_packets_do_not_move_the_clock():
    clock = CaptureClock()
    observe(clock, 10.0, arrived=1000.0, start_realtime=None)
    assert observe(clock, 11.0, arrived=1003.0, start_realtime=None) == pytest.approx(1001.0, abs=0.01)


def test_a_jump_of_the_time_stamps_anchors_anew():
    clock = CaptureClock()
    observe(clock, 10.0, arrived=1000.0, start_realtime=None)
    assert observe(clock, 60.0, arrived=1001.0, start_realtime=None) == pytest.approx(1001.0)
    assert observe(clock, 40.0, arrived=1002.0, start_realtime=None) == pytest.approx(1002.0)


@pytest.mark.parametrize("step_s", [4.0, -3.0, 50.0])
def test_after_a_jump_what_the_camera_told_of_its_clock_does_not_hold(step_s):
    clock = CaptureClock()
    for second in range(10):
        assert observe(clock, 10.0 + second, 1000.1 + second, 990.0) == 1000.0 + second
    after = [observe(clock, 10.0 + second + step_s, 1000.1 + second, 990.0) for second in range(10, 20)]
    assert after == pytest.approx([1000.1 + second for second in range(10, 20)], abs=0.01)
    assert clock.jumped == (1010.1, STAMPS_JUMPED)
    assert clock.source == "arrival"


def test_packets_that_lay_there_when_a_connection_opened_are_no_jump():
    clock = CaptureClock()
    for second in range(3):
        observe(clock, 10.0 + 2 * second, 1000.0, 988.0)  # of a camera that sends a picture in two seconds
    assert observe(clock, 16.0, 1004.0, 988.0) == 1004.0
    assert clock.jumped is None


def test_whose_clock_gave_the_time_is_told():
    clock = CaptureClock()
    observe(clock, 10.0, arrived=1000.3, start_realtime=None)
    assert clock.source == "arrival"
    observe(clock, 11.0, arrived=1001.4, start_realtime=990.0)
    assert clock.source == "camera"
    assert clock.jumped is None


@pytest.mark.parametrize("step_s", [50.0, -50.0, 3600.0])
@pytest.mark.parametrize("start_realtime", [None, 990.0])
def test_a_clock_of_this_machine_that_is_set_is_followed_and_named(step_s, start_realtime):
    clock = CaptureClock()
    for second in range(30):
        observe(clock, 10.0 + second, 1000.0 + second, start_realtime, 1000.0 + second)
    after = [
        observe(clock, 10.0 + second, 1000.0 + second + step_s, start_realtime, 1000.0 + second)
        for second in range(30, 40)
    ]
    assert after == pytest.approx([1000.0 + second + step_s for second in range(30, 40)], abs=0.1)
    assert clock.jumped == (1030.0, CLOCK_WAS_SET)


def test_jumps_of_time_stamps_are_named_and_stalls_are_none():
    clock = CaptureClock()
    observe(clock, 10.0, 1000.0, None)
    observe(clock, 40.0, 1030.0, None)  # nothing came for half a minute
    assert clock.jumped is None
    observe(clock, 90.0, 1031.0, None)
    assert clock.jumped == (1031.0, STAMPS_JUMPED)


def test_time_stamps_that_stand_still_give_way_to_arrival():
    clock = CaptureClock()
    for second in range(10):
        observe(clock, 10.0 + second, 1000.0 + second, 990.0)
    arrivals = [1009.0 + number / 4 for number in range(1, 100)]
    stood = [observe(clock, 19.0, arrived, 990.0) for arrived in arrivals]
    assert stood[:12] == [1009.0] * 12
    assert stood[12:] == pytest.approx(arrivals[12:])
    assert clock.jumped == (arrivals[-1], STAMPS_STAND)
    assert clock.source == "arrival"
    again = [observe(clock, 19.0 + second, arrivals[-1] + second, 990.0) for second in range(1, 10)]
    assert again == pytest.approx([arrivals[-1] + second for second in range(1, 10)], abs=0.1)
    assert clock.jumped == (arrivals[-1], STAMPS_STAND)


def test_pictures_shown_out_of_order_do_not_stand_still():
    clock = CaptureClock()
    for second in range(20):
        for ahead in (1.0, 0.0, 0.5):
            observe(clock, second + ahead, 1000.0 + second, None)
    for late in (20.5, 20.25, 21.0):  # the first after a pause
        observe(clock, late, 1030.0, None)
    assert clock.jumped is None


def test_a_slow_crystal_is_followed_for_hours():
    clock = CaptureClock()
    for second in range(4 * 3600):
        wall = observe(clock, second * (1 - 1e-4), arrived=1000.0 + second, start_realtime=None)
    assert wall == pytest.approx(1000.0 + second, abs=0.1)


def decoded(times: list[tuple[float, bool]], fps: float = 1.0) -> list[float]:
    sampler = Sampler(fps)
    gate = PacketGate(sampler)
    wanted = []
    for time, is_key in times:
        if gate.wants(is_key, time):
            wanted.append(time)
            sampler.offer(time)
    return wanted


def stream(seconds: int, gop: int, *, rate: int = 5, start: float = 100.2) -> list[tuple[float, bool]]:
    return [(start + number / rate, number % gop == 0) for number in range(seconds * rate)]


def test_frequent_keyframes_are_decoded_alone():
    # All of the first three groups; of the fourth a picture was chosen before its keyframe came.
    assert len(decoded(stream(20, gop=5))) == 3 * 5 + 16


@pytest.mark.parametrize("phase", [0.0, 0.5, 0.9, 0.95, 0.97, 0.99, 0.999])
@pytest.mark.parametrize("jitter_s", [0.0, 0.01, 0.04])
def test_wherever_in_its_second_a_keyframe_comes_no_slot_is_lost_and_little_is_decoded(phase, jitter_s):
    chance = np.random.default_rng(1)
    times = np.sort(100 + phase + np.arange(25 * 500) / 25 + chance.uniform(-jitter_s, jitter_s, 25 * 500))
    wanted = decoded([(float(time), number % 25 == 0) for number, time in enumerate(times)])
    slots = {slot_of(time, 1.0) for time in wanted}
    assert slots == set(range(min(slots), max(slots) + 1))
    assert len(wanted) < 0.25 * len(times)


def test_pictures_shown_before_a_keyframe_are_not_taken_where_those_behind_the_last_one_were_left_out():
    gate = PacketGate(Sampler(1.0))
    for second in range(6):
        assert gate.wants(True, 100.97 + second)
    assert not gate.is_whole(105.9)
    assert gate.is_whole(105.97)
    assert gate.is_whole(106.0)


def test_rare_keyframes_need_every_picture():
    assert len(decoded(stream(20, gop=10))) == 100


def test_above_one_frame_a_second_every_picture_is_decoded():
    assert len(decoded(stream(20, gop=5), fps=2.0)) == 100


def test_a_stream_of_keyframes_is_decoded_once_a_slot():
    wanted = decoded(stream(20, gop=1))
    assert len(wanted) <= 20 + 4
    assert {slot_of(time, 1.0) for time in wanted} == set(range(100, 121))


def test_keyframes_just_over_a_second_apart_lose_no_slot():
    times = [(100.2 + number * 1.04 / 25, number % 25 == 0) for number in range(25 * 200)]
    slots = {slot_of(time, 1.0) for time in decoded(times)}
    assert slots == set(range(100, max(slots) + 1))
    assert len(decoded(times)) < 0.3 * len(times)


def test_waits_double_with_jitter_up_to_the_limit():
    backoff = Backoff(0.5, 30.0)
    waits = [backoff.next_s() for _ in range(40)]
    assert 0.25 <= waits[0] <= 0.75
    assert all(wait <= 30.0 for wait in waits)
    assert all(wait >= 15.0 for wait in waits[6:])
    backoff.reset()
    assert backoff.next_s() <= 0.75


def test_only_the_last_hour_is_counted():
    count = HourCount()
    for minute in range(120):
        count.add(minute * 60.0, 2)
    assert count.total(119 * 60.0) == 120
    assert count.total(300 * 60.0) == 0
