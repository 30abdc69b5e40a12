"""Recorded files: real ones, awkward ones and broken ones."""

import hashlib
import io
import math
import random
import struct
import subprocess
from pathlib import Path
from threading import Event

import av
import numpy as np
import pytest
from PIL import Image

from ingest.archive import ArchiveLimits, ArchiveReader, UnsupportedMedia, decode, probe
from ingest.assignment import Missing
from ingest.keyframe import KeyframeMaker
from tests.ingest_parts import HEIGHT, WIDTH, encode, ffmpeg, number_of, paint, real_clip, steady

LIMITS = ArchiveLimits()


def read(
    path: Path, fps: float = 1.0, last_slot: int | None = None
) -> tuple[list[tuple[int, float, int]], list[Missing]]:
    """Slot, time and number shown of every picture, and what is missing."""
    reader = ArchiveReader(path, fps=fps, last_slot=last_slot, limits=LIMITS)
    found = [(picture.slot, picture.time_s, number_of(picture.image)) for picture in reader.pictures(Event())]
    return found, reader.missing


def expected(times: list[float], fps: float = 1.0) -> list[tuple[int, int]]:
    """Slot and number of the first picture of each slot, by the plainest reading of the rule."""
    found: dict[int, int] = {}
    for number, time in enumerate(times):
        found.setdefault(math.floor((time - times[0]) * fps + 1e-6), number)
    return sorted(found.items())


def slots_and_numbers(path: Path, fps: float = 1.0) -> list[tuple[int, int]]:
    """Slot and number of every picture of a file that is whole, and of which nothing else may be said."""
    reader = ArchiveReader(path, fps=fps, last_slot=None, limits=LIMITS)
    found = [(picture.slot, number_of(picture.image)) for picture in reader.pictures(Event())]
    assert (reader.missing, reader.damaged, reader.is_cut) == ([], 0, False)
    return found


@pytest.mark.parametrize(
    ("name", "seconds", "codec"),
    [("bikes", 10.0, "h264"), ("bigbuckbunny", 5.28, "h264"), ("carphone_pristine", 4.004, "h264")],
)
def test_a_real_file_gives_one_picture_a_second(name, seconds, codec):
    path = real_clip(name)
    facts = probe(path, LIMITS)
    assert (facts.duration_s, facts.codec) == (pytest.approx(seconds), codec)
    reader = ArchiveReader(path, fps=1.0, last_slot=None, limits=LIMITS)
    slots = [picture.slot for picture in reader.pictures(Event())]
    assert slots == list(range(math.ceil(seconds - 0.01)))
    assert (reader.missing, reader.duration_s) == ([], pytest.approx(seconds))


@pytest.mark.parametrize("fps", [0.1, 1.0, 3.0, 10.0])
def test_skipping_gives_the_very_pictures_of_decoding_everything(fps):
    path = real_clip("bikes")  # has B-frames
    everything: dict[int, str] = {}
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            everything.setdefault(math.floor(frame.time * fps + 1e-6), digest(frame))
    reader = ArchiveReader(path, fps=fps, last_slot=None, limits=LIMITS)
    assert {picture.slot: digest(picture.image) for picture in reader.pictures(Event())} == everything


def digest(frame: av.VideoFrame) -> str:
    return hashlib.md5(frame.to_ndarray(format="yuv420p").tobytes()).hexdigest()


@pytest.mark.parametrize("fps", [0.5, 1.0, 10.0])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plain.mp4", {}),
        ("bframes.mp4", {"bframes": 3, "gop": 40}),
        ("long_group.mkv", {"bframes": 2, "gop": 1000}),
        ("open_group.ts", {"bframes": 3, "codec_options": {"x264-params": "open-gop=1:keyint=30"}}),
        ("open_group.mp4", {"bframes": 3, "codec_options": {"x264-params": "open-gop=1:keyint=30"}}),
        ("mpeg2.mpg", {"codec": "mpeg2video", "bframes": 2, "gop": 12}),
        ("hevc.mp4", {"codec": "libx265", "bframes": 3, "codec_options": {"x265-params": "log-level=none"}}),
        ("mpeg4.avi", {"codec": "mpeg4", "gop": 12}),
        ("vp9.webm", {"codec": "libvpx-vp9", "codec_options": {"deadline": "realtime", "cpu-used": "8"}}),
        ("intra.avi", {"codec": "mjpeg", "codec_options": {"strict": "unofficial"}}),
        ("wmv.asf", {"codec": "wmv2", "gop": 12}),
        ("fragmented.mp4", {"bframes": 2, "container_options": {"movflags": "frag_keyframe+empty_moov"}}),
        ("av1.mkv", {"codec": "libsvtav1", "codec_options": {"preset": "8", "crf": "10", "svtav1-params": "lp=1"}}),
        ("ten_bits.mp4", {"bframes": 2, "pix_fmt": "yuv420p10le"}),
        ("full_colour.mkv", {"pix_fmt": "yuv444p"}),
    ],
)
def test_the_first_picture_of_each_slot_is_found_in_every_kind_of_file(tmp_path, name, options, fps):
    times = steady(6)
    path = encode(tmp_path / name, times, **options)
    assert slots_and_numbers(path, fps) == expected(times, fps)


def test_a_variable_frame_rate_is_followed(tmp_path):
    randomness = random.Random(7)
    times = [0.0]
    while times[-1] < 12:
        times.append(round(times[-1] + randomness.uniform(0.02, 0.9), 3))
    path = encode(tmp_path / "vfr.mp4", times, bframes=2)
    assert slots_and_numbers(path) == expected(times)


def test_fast_video_gives_the_first_picture_of_each_slot(tmp_path):
    times = steady(4, rate=120.0)
    assert slots_and_numbers(encode(tmp_path / "fast.mp4", times, bframes=2)) == expected(times)


def test_one_picture_in_five_seconds_leaves_the_slots_between_empty(tmp_path):
    times = steady(20, rate=0.2)
    assert slots_and_numbers(encode(tmp_path / "slow.mp4", times)) == expected(times)


def test_pictures_far_apart_and_out_of_order_are_neither_lost_nor_make_the_file_longer(tmp_path):
    times = steady(30, rate=1.0)
    path = encode(tmp_path / "slow.mkv", times, bframes=2)  # Matroska gives no decoding times: FFmpeg guesses
    assert slots_and_numbers(path) == expected(times)
    reader = ArchiveReader(path, fps=1.0, last_slot=None, limits=LIMITS)
    list(reader.pictures(Event()))
    assert reader.duration_s == pytest.approx(29.04)


def test_a_hole_stays_empty_and_nothing_is_repeated(tmp_path):
    times = steady(3) + steady(3, start_s=8.0)
    path = encode(tmp_path / "hole.mp4", times)
    assert slots_and_numbers(path) == expected(times)
    assert [slot for slot, _, _ in read(path)[0]] == [0, 1, 2, 8, 9, 10]


def test_a_file_without_time_stamps_is_numbered_by_its_rate(tmp_path):
    path = encode(tmp_path / "bare.h264", steady(4), bframes=2)
    assert [slot for slot, _, _ in read(path)[0]] == [0, 1, 2, 3]
    assert [number for _, _, number in read(path)[0]] == [0, 25, 50, 75]


def test_the_clock_of_a_file_starts_at_its_first_picture(tmp_path):
    times = steady(4, start_s=1000.0)
    path = encode(tmp_path / "late.mkv", times)
    assert slots_and_numbers(path) == expected(times)


def test_joined_files_go_on_in_time(tmp_path):
    first, second = encode(tmp_path / "a.ts", steady(4)), encode(tmp_path / "b.ts", steady(4))
    joined = tmp_path / "joined.ts"
    joined.write_bytes(first.read_bytes() + second.read_bytes())
    found, _ = read(joined)
    assert [slot for slot, _, _ in found] == list(range(8))
    assert [number for _, _, number in found] == pytest.approx([0, 25, 50, 75] * 2, abs=1)


def test_work_goes_on_after_the_slot_that_is_already_kept(tmp_path):
    times = steady(8)
    path = encode(tmp_path / "clip.mp4", times, bframes=2)
    assert [(slot, number) for slot, _, number in read(path, last_slot=4)[0]] == expected(times)[5:]
    assert read(path, last_slot=7) == ([], [])


def test_a_file_that_ends_before_it_says_reports_the_rest_as_missing(tmp_path):
    path = encode(tmp_path / "cut.mp4", steady(20), gop=25, container_options={"movflags": "faststart"})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    found, missing = read(path)
    slots = [slot for slot, _, _ in found]
    assert 5 < len(slots) < 15
    assert slots == list(range(len(slots)))
    assert missing == [Missing(len(slots), 20, "decode_error")]


def test_a_file_that_lost_its_end_without_an_error_reports_the_rest_as_missing(tmp_path):
    path = encode(tmp_path / "cut.mkv", steady(20))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    found, missing = read(path)
    assert missing == [Missing(found[-1][0] + 1, 20, "decode_error")]


def test_damage_costs_the_damaged_slots_and_no_more(tmp_path):
    path = encode(tmp_path / "damaged.mp4", steady(20), gop=25)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 3000] = random.Random(1).randbytes(3000)
    path.write_bytes(data)
    found, missing = read(path)
    slots = {slot for slot, _, _ in found}
    lost = {slot for run in missing for slot in range(run.start_slot, run.end_slot)}
    assert slots | lost == set(range(20))
    assert not slots & lost
    assert len(slots) >= 16
    assert {0, 1, 2, 3, 18, 19} <= slots


def turned(path: Path, times: list[float]) -> Path:
    """Write into the track header of an MP4 file that it is to be shown turned by a quarter."""
    encode(path, times)
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    assert struct.unpack_from(">i", data, matrix)[0] == 65536
    struct.pack_into(">9i", data, matrix, 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


def test_a_turned_recording_gives_upright_keyframes(tmp_path):
    path = turned(tmp_path / "turned.mp4", steady(1))
    reader = ArchiveReader(path, fps=25.0, last_slot=None, limits=LIMITS)
    picture = list(reader.pictures(Event()))[5]  # shows 5: the first and the third column are white
    assert picture.image.rotation == -90
    keyframe = np.asarray(Image.open(io.BytesIO(KeyframeMaker(64).make(picture.image))).convert("L"))
    rows = keyframe[2::4, 32] > 127  # a quarter to the right: the first column has become the top row
    assert np.flatnonzero(rows).tolist() == [0, 2]


def test_a_keyframe_is_a_square_jpeg_without_colour_subsampling():
    with av.open(str(real_clip("bikes"))) as container:
        frame = next(container.decode(video=0))
    picture = Image.open(io.BytesIO(KeyframeMaker(336).make(frame)))
    assert (picture.format, picture.size, picture.mode) == ("JPEG", (336, 336), "RGB")
    assert [layer[1:3] for layer in picture.layer] == [(1, 1)] * 3
    exact = np.asarray(frame.to_image().resize((336, 336), Image.Resampling.BOX)).astype(int)
    assert np.abs(exact - np.asarray(picture)).mean() < 6


def test_a_picture_that_changes_its_size_is_still_squashed_to_the_square(tmp_path):
    maker = KeyframeMaker(64)
    for name in ("bikes", "carphone_pristine", "bigbuckbunny"):
        with av.open(str(real_clip(name))) as container:
            assert Image.open(io.BytesIO(maker.make(next(container.decode(video=0))))).size == (64, 64)


def broken_files(folder: Path) -> dict[str, Path]:
    whole = encode(folder / "whole.mp4", steady(4))
    data = whole.read_bytes()
    neighbour = encode(folder / "neighbour.ts", steady(1))
    assert neighbour.exists()
    sound = folder / "sound.mp4"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    contents = {
        "text.mp4": b"this is no video at all\n" * 100,
        "empty.mp4": b"",
        "truncated.mp4": data[: len(data) // 2],  # its index stands at the end
        "header_only.mp4": data[:40],
        "ffconcat.mp4": b"ffconcat version 1.0\nfile neighbour.ts\n",
        "playlist.mp4": b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nneighbour.ts\n#EXT-X-ENDLIST\n",
        "session.mp4": b"v=0\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
        "random.mp4": random.Random(3).randbytes(50_000),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    picture = folder / "picture.jpg"
    Image.new("RGB", (64, 64)).save(picture)
    return {name: folder / name for name in contents} | {"sound.mp4": sound, "gone.mp4": folder / "gone.mp4"}


@pytest.mark.parametrize(
    "name",
    [
        "text.mp4",
        "empty.mp4",
        "truncated.mp4",
        "header_only.mp4",
        "ffconcat.mp4",
        "playlist.mp4",
        "session.mp4",
        "random.mp4",
        "sound.mp4",
        "gone.mp4",
    ],
)
def test_what_is_no_video_is_refused_without_naming_its_path(tmp_path, name):
    path = broken_files(tmp_path)[name]
    with pytest.raises(UnsupportedMedia) as caught:
        probe(path, LIMITS)
    assert str(tmp_path) not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    with pytest.raises(UnsupportedMedia):
        read(path)


def test_pictures_too_large_to_decode_are_refused(tmp_path):
    path = encode(tmp_path / "clip.mp4", steady(1))
    with pytest.raises(UnsupportedMedia, match="320x64"):
        probe(path, ArchiveLimits(pixels=1000))


def test_an_index_of_a_file_cut_before_its_pictures_gives_no_picture(tmp_path):
    path = encode(tmp_path / "cut.mp4", steady(4), container_options={"movflags": "faststart"})
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"mdat") + 4])
    with pytest.raises(UnsupportedMedia, match="picture"):
        probe(path, LIMITS)


def test_reading_stops_when_told():
    reader = ArchiveReader(real_clip("bikes"), fps=10.0, last_slot=None, limits=LIMITS)
    halt = Event()
    slots = []
    for picture in reader.pictures(halt):
        slots.append(picture.slot)
        if len(slots) == 5:
            halt.set()
    assert slots == [0, 1, 2, 3, 4]
    assert reader.missing == []


def test_damage_is_told_before_the_pictures_behind_it(tmp_path):
    path = encode(tmp_path / "damaged.mp4", steady(20), gop=25)
    content = bytearray(path.read_bytes())
    start = content.find(b"mdat") + 4
    third = (len(content) - start) // 3
    content[start + third : start + third + 3000] = random.Random(1).randbytes(3000)
    path.write_bytes(content)
    reader = ArchiveReader(path, fps=1.0, last_slot=None, limits=ArchiveLimits())
    told = {picture.slot: len(reader.missing) for picture in reader.pictures(Event())}
    assert reader.missing
    assert told[19] == len(reader.missing)
    assert all(gap.end_slot in told for gap in reader.missing)


def test_a_hole_of_a_steady_film_is_missing_unless_the_file_says_that_a_picture_lasts_so_long(tmp_path):
    times = steady(3) + steady(3, start_s=8.0)
    found, missing = read(encode(tmp_path / "hole.mkv", times))  # says 40 ms of every picture
    assert [slot for slot, _, _ in found] == [0, 1, 2, 8, 9, 10]
    assert missing == [Missing(3, 8, "decode_error")]
    assert read(encode(tmp_path / "hole.mp4", times))[1] == []


def test_a_part_of_a_file_that_was_wiped_out_is_missing_though_no_decoder_complains(tmp_path):
    path = encode(tmp_path / "wiped.mkv", steady(20), gop=25)
    data = bytearray(path.read_bytes())
    middle, fifth = len(data) // 2, len(data) // 5
    data[middle : middle + fifth] = bytes(fifth)
    path.write_bytes(data)
    found, missing = read(path)
    lost = {slot for run in missing for slot in range(run.start_slot, run.end_slot)}
    assert lost
    assert sorted({slot for slot, _, _ in found} | lost) == list(range(20))


def test_a_file_that_was_cut_within_a_second_says_so(tmp_path):
    path = encode(tmp_path / "cut.mp4", steady(4), gop=25, container_options={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[:-600])
    reader = ArchiveReader(path, fps=1.0, last_slot=None, limits=LIMITS)
    assert len(list(reader.pictures(Event()))) == 4
    assert reader.is_cut
    assert reader.held_s is not None
    assert reader.held_s < 3.8


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_pictures_are_those_that_the_ffmpeg_program_shows(tmp_path, turn):
    """The keyframes of a turned file against what ffmpeg, an independent program, makes of the same pictures."""
    source, path = real_clip("bikes"), tmp_path / "turned.mp4"
    quiet = [ffmpeg(), "-nostdin", "-v", "error"]
    subprocess.run([*quiet, "-i", source, "-c", "copy", "-metadata:s:v:0", f"rotate={turn}", path], check=True)
    filters = "select='isnan(prev_selected_t)+gte(floor(t)\\,floor(prev_selected_t)+1)',scale=64:64:flags=area"
    shown = subprocess.run(
        [*quiet, "-i", path, "-vf", filters, "-fps_mode", "passthrough", "-pix_fmt", "rgb24", "-f", "rawvideo", "-"],
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    theirs = np.frombuffer(shown, np.uint8).reshape(-1, 64, 64, 3).astype(int)
    reader, maker = ArchiveReader(path, fps=1.0, last_slot=None, limits=LIMITS), KeyframeMaker(64)
    ours = np.stack([maker.pixels(picture.image).astype(int) for picture in reader.pictures(Event())])
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).mean() < 1.5


def reread(path: Path) -> tuple[ArchiveReader, list[int]]:
    """A reader that has read a file, and the slots of which it found pictures."""
    reader = ArchiveReader(path, fps=1.0, last_slot=None, limits=LIMITS)
    return reader, [picture.slot for picture in reader.pictures(Event())]


@pytest.mark.parametrize(
    ("name", "codec", "options"), [("cut.avi", "mjpeg", {"strict": "unofficial"}), ("cut.asf", "wmv2", {})]
)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_an_avi_or_asf_file_that_lost_its_end_reports_the_rest_as_missing(tmp_path, name, codec, options, share):
    """FFmpeg takes a length that the size of the file does not agree with for a mistake, and makes up its own."""
    path = encode(tmp_path / name, steady(20), codec=codec, codec_options=options)
    pictures, _, _ = path.read_bytes().partition(b"idx1")
    path.write_bytes(pictures[: int(len(pictures) * share)])
    reader, slots = reread(path)
    assert reader.is_cut
    assert reader.duration_s == pytest.approx(20, abs=0.1)
    lost = {slot for run in reader.missing for slot in range(run.start_slot, run.end_slot)}
    assert sorted(lost.union(slots)) == list(range(20))


class Pipe(io.RawIOBase):
    """Takes bytes and cannot go back, so that what is written to it has a header that knows no length."""

    def __init__(self) -> None:
        self.written = b""

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        self.written += bytes(data)
        return len(data)


@pytest.mark.parametrize(("form", "codec"), [("avi", "mpeg4"), ("asf", "wmv2"), ("flv", "flv"), ("matroska", "mpeg4")])
def test_a_file_that_was_written_to_a_pipe_is_not_cut(tmp_path, form, codec):
    pipe = Pipe()
    with av.open(pipe, "w", format=form) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height = WIDTH, HEIGHT
        for number in range(100):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(paint(number), format="rgb24")))
        container.mux(stream.encode(None))
    path = tmp_path / f"piped.{form}"
    path.write_bytes(pipe.written)
    assert slots_and_numbers(path) == expected(steady(4))


@pytest.mark.parametrize(
    ("name", "codec"), [("film.mkv", "mpeg4"), ("film.flv", "flv"), ("film.asf", "wmv2"), ("film.mp4", "mpeg4")]
)
def test_sound_that_goes_on_behind_the_last_picture_does_not_make_a_file_cut(tmp_path, name, codec):
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        video, sound = container.add_stream(codec, rate=25), container.add_stream("libmp3lame", rate=44100)
        video.width, video.height = WIDTH, HEIGHT
        for number in range(100):
            container.mux(video.encode(av.VideoFrame.from_ndarray(paint(number), format="rgb24")))
        container.mux(video.encode(None))
        samples = np.zeros((1, 44100), np.int16)
        for number in range(9):
            second = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            second.rate, second.pts = 44100, number * 44100
            container.mux(sound.encode(second))
        container.mux(sound.encode(None))
    assert slots_and_numbers(path) == expected(steady(4))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    if name != "film.mp4":  # which has its index at the end
        assert reread(path)[0].is_cut


def fragmented(folder: Path) -> Path:
    options = {"movflags": "frag_keyframe+empty_moov"}
    return encode(folder / "fragmented.mp4", steady(8), container_options=options)


@pytest.mark.parametrize("filling", [b"\xff", b"\0"])
def test_a_fragmented_file_whose_second_fragment_is_gone_says_so(tmp_path, filling):
    path = fragmented(tmp_path)
    data = path.read_bytes()
    second = data.index(b"moof", data.index(b"moof") + 4) - 4
    path.write_bytes(data[:second] + filling * 100 + data[second + 100 :])
    reader, slots = reread(path)  # FFmpeg takes this for the end of the file
    assert slots == [0]
    assert reader.damaged


def test_room_that_was_never_used_behind_a_fragmented_file_is_no_damage(tmp_path):
    path = fragmented(tmp_path)
    path.write_bytes(path.read_bytes() + bytes(3 * 2**20))
    assert slots_and_numbers(path) == expected(steady(8))


def test_headers_that_contradict_each_other_about_the_time_are_damage(tmp_path):
    movie = encode(tmp_path / "fast.mp4", steady(4))
    data = bytearray(movie.read_bytes())
    data[data.index(b"mdhd") + 16] ^= 1  # a bit of the ticks in a second: now 16 million more
    movie.write_bytes(data)
    film = encode(tmp_path / "slow.avi", steady(4), codec="mjpeg", codec_options={"strict": "unofficial"})
    data = bytearray(film.read_bytes())
    data[data.index(b"strh") + 29] ^= 4  # a bit of the time of a picture: now 1,024 more
    film.write_bytes(data)
    assert [reread(path)[0].damaged for path in (movie, film)] == [1, 1]


def test_pictures_in_which_the_decoder_fills_in_what_is_damaged_are_counted(tmp_path):
    path = tmp_path / "flipped.mp4"
    data = bytearray(real_clip("bikes").read_bytes())
    start = data.index(b"mdat") + 4
    randomness = random.Random(5)
    for _ in range(40):
        data[start + randomness.randrange(400_000)] ^= 1 << randomness.randrange(8)
    path.write_bytes(data)
    with av.open(str(path)) as container:
        errors: list[None] = []
        images = [one for packet in container.demux(video=0) for one in decode(packet, lambda: errors.append(None))]
    assert not errors
    assert any(image.is_corrupt for image in images)
    assert reread(path)[0].damaged


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("open_group.ts", {"bframes": 3, "codec_options": {"x264-params": "open-gop=1:keyint=30"}}),
        ("refresh.ts", {"codec_options": {"x264-params": "intra-refresh=1:keyint=30"}}),
        ("hevc.ts", {"codec": "libx265", "bframes": 3, "codec_options": {"x265-params": "log-level=none:keyint=30"}}),
        ("mpeg2.ts", {"codec": "mpeg2video", "bframes": 2, "gop": 12}),
    ],
)
@pytest.mark.parametrize("share", [0.1, 0.37])
def test_a_recording_that_begins_between_two_keyframes_is_not_taken_for_one_with_errors(tmp_path, name, options, share):
    path = encode(tmp_path / name, steady(6), **options)
    data = path.read_bytes()
    path.write_bytes(data[int(len(data) * share) // 188 * 188 :])
    reader, slots = reread(path)
    assert (reader.damaged, reader.is_cut) == (0, False)
    assert len(slots) >= 3


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video"])
def test_a_recording_that_stops_in_the_middle_of_a_picture_is_not_taken_for_one_with_errors(tmp_path, codec):
    whole = noisy(tmp_path / "whole.ts", 60, 0, codec).read_bytes()
    path = tmp_path / "stopped.ts"
    repaired = 0
    for packets in range(2000, 2400, 40):
        path.write_bytes(whole[: packets * 188])
        with av.open(str(path)) as container:
            repaired += sum(image.is_corrupt for packet in container.demux(video=0) for image in decode(packet))
        reader = ArchiveReader(path, fps=25.0, last_slot=None, limits=LIMITS)
        assert len(list(reader.pictures(Event()))) > 5
        assert (reader.damaged, reader.missing) == (0, [])
    assert repaired


@pytest.mark.parametrize("start_s", [0.3, 1.9, 3.3])
@pytest.mark.parametrize("bframes", [0, 3])
def test_a_film_trimmed_without_encoding_begins_where_it_is_shown(tmp_path, start_s, bframes):
    """What comes before is still in the file, for the decoder alone: an edit list says so."""
    whole, path = encode(tmp_path / "whole.mp4", steady(10), bframes=bframes, gop=75), tmp_path / "trimmed.mp4"
    command = [ffmpeg(), "-nostdin", "-v", "error", "-ss", str(start_s), "-i", whole, "-t", "4", "-c", "copy", path]
    subprocess.run(command, check=True)
    with av.open(str(path)) as container:
        assert any(packet.is_discard for packet in container.demux(video=0))
    with av.open(str(path)) as container:
        shown = [(image.time, number_of(image)) for image in container.decode(video=0)]
    first: dict[int, int] = {}
    for time, number in shown:
        first.setdefault(math.floor(time - shown[0][0] + 1e-6), number)
    assert slots_and_numbers(path) == sorted(first.items())


def noisy(path: Path, pictures: int, sounds: int, codec: str = "mpeg2video") -> Path:
    """A film of noise, so that it is large, with silence beside it."""
    randomness = np.random.default_rng(1)
    with av.open(str(path), "w") as container:
        video = container.add_stream(codec, rate=25)
        video.width, video.height, video.codec_context.options = WIDTH, HEIGHT, {"qmin": "1", "qmax": "1"}
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.int16), format="s16", layout="mono")
        silence.rate, silence.pts = 48000, 0
        voices = [container.add_stream("mp2", rate=48000, layout="mono") for _ in range(sounds)]
        for voice in voices:
            container.mux(voice.encode(silence))
        for _ in range(pictures):
            noise = randomness.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        container.mux(video.encode(None))
    return path


def test_a_stream_that_comes_up_late_is_no_damage(tmp_path):
    """As in a recording whose sound was switched on in between."""
    joined = tmp_path / "joined.ts"
    silent, loud = noisy(tmp_path / "silent.ts", 250, 0).read_bytes(), noisy(tmp_path / "loud.ts", 50, 8).read_bytes()
    joined.write_bytes(silent + loud + silent)  # FFmpeg looks for streams at both ends
    with av.open(str(joined)) as container:
        assert len(container.streams) == 1
    reader, slots = reread(joined)
    assert (reader.damaged, reader.missing, slots) == (0, [], list(range(22)))


def many_streams(path: Path, count: int) -> Path:
    """The same pictures in so many streams."""
    source = encode(path.with_name(f"one{path.suffix}"), steady(1), codec="mpeg4")
    with av.open(str(source)) as video, av.open(str(path), "w") as container:
        streams = [container.add_stream_from_template(video.streams.video[0]) for _ in range(count)]
        for packet in video.demux(video=0):
            if packet.dts is not None:
                times, data = (packet.pts, packet.dts, packet.time_base), bytes(packet)
                for stream in streams:
                    copy = av.Packet(data)
                    copy.pts, copy.dts, copy.time_base = times
                    copy.is_keyframe, copy.stream = packet.is_keyframe, stream
                    container.mux(copy)
    return path


@pytest.mark.parametrize(
    ("name", "count"),
    [(f"many.{ending}", count) for ending in ("mkv", "ts", "mp4", "avi") for count in (64, 65, 66, 90)]
    + [("many.mkv", 500), ("many.ts", 500), ("many.mp4", 500)],
)
def test_a_file_with_too_many_streams_is_refused_by_the_name_of_the_limit(tmp_path, name, count):
    path = many_streams(tmp_path / name, count)
    if count == 64:
        assert probe(path, LIMITS).width == 320
        return
    for look in (lambda: probe(path, LIMITS), lambda: read(path)):
        with pytest.raises(UnsupportedMedia, match="more than 64 streams; TOKENLINE_INGEST__MAX_STREAMS"):
            look()
