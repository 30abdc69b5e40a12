"""Hours that travel come back as they went; whatever else the bytes are, they are refused by name."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from store.format import HOUR_SLOTS, TokenFormat
from store.keyframes import Keyframes
from store.portable import (
    DamagedHour,
    max_frames_bytes,
    read_frames,
    read_keyframes,
    write_frames,
    write_keyframes,
)
from store.segments import Hour

HOUR = 500_000
START = HOUR * HOUR_SLOTS


def a_format(dtype: str = "bfloat16", vector_width: int = 6) -> TokenFormat:
    return TokenFormat.model_validate(
        {
            "fingerprint": "0123456789abcdef",
            "dtype": dtype,
            "tokens_per_frame": 4,
            "width": 8,
            "vector_width": vector_width,
        }
    )


def an_hour(format: TokenFormat, slots: list[int], seed: int = 0) -> Hour:
    random = np.random.default_rng(seed)
    numbers = random.normal(size=(len(slots), *format.token_shape)).astype(np.float32)
    tokens = numbers.view(np.uint32) >> 16 if format.dtype == "bfloat16" else numbers
    vectors = random.normal(size=(len(slots), format.vector_width)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    halves = vectors.astype(np.float16).astype(np.float32)
    at = START + np.array(slots)
    return Hour(at, tokens.astype(format.numpy_dtype), halves, at * 1000 + 17)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("vector_width", [0, 6])
@pytest.mark.parametrize("slots", [[0], [0, HOUR_SLOTS - 1], list(range(100, 160))])
def test_frames_come_back_bit_for_bit(dtype, vector_width, slots):
    format = a_format(dtype, vector_width)
    rows = an_hour(format, slots)
    content = write_frames(format, HOUR, rows)
    assert len(content) <= max_frames_bytes(format)
    read = read_frames(content, format, HOUR)
    for name in ("slots", "tokens", "vectors", "times"):
        np.testing.assert_array_equal(getattr(read, name), getattr(rows, name))
        assert getattr(read, name).dtype == getattr(rows, name).dtype


def test_a_full_hour_of_the_published_model_fits():
    format = TokenFormat(fingerprint="0" * 16, dtype="bfloat16", tokens_per_frame=1, width=4096, vector_width=768)
    rows = Hour(
        np.arange(START, START + HOUR_SLOTS),
        np.zeros((HOUR_SLOTS, 1, 4096), np.uint16),
        np.eye(1, 768, dtype=np.float32).repeat(HOUR_SLOTS, 0),
        np.zeros(HOUR_SLOTS, np.int64),
    )
    content = write_frames(format, HOUR, rows)
    assert len(content) <= max_frames_bytes(format) < len(content) + (1 << 17)
    assert len(read_frames(content, format, HOUR).slots) == HOUR_SLOTS


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0x7F81])
def test_bits_that_are_no_number_are_refused_by_their_slot(bits):
    format = a_format()
    rows = an_hour(format, [3, 4, 5])
    rows.tokens.view(np.uint16)[1, 2, 3] = bits
    with pytest.raises(DamagedHour, match=f"slot {START + 4} has tokens that are no numbers"):
        read_frames(write_frames(format, HOUR, rows), format, HOUR)


def test_keyframes_come_back_byte_for_byte():
    jpegs = {START + slot: bytes([slot]) * (slot + 1) for slot in (9, 3, 200)}
    assert read_keyframes(write_keyframes(HOUR, jpegs), HOUR) == jpegs


FRAMES = write_frames(a_format(), HOUR, an_hour(a_format(), list(range(5))))
KEYFRAMES = write_keyframes(HOUR, {START + slot: b"\xff\xd8%d" % slot for slot in range(5)})


@given(st.data())
def test_bytes_that_were_changed_are_refused_or_mean_the_same(data):
    content = bytearray(data.draw(st.sampled_from([FRAMES, KEYFRAMES])))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(["change", "cut", "insert"])):
            case "change":
                content[at] = data.draw(st.integers(0, 255))
            case "cut":
                del content[at : at + data.draw(st.integers(1, 99))]
            case "insert":
                content[at:at] = data.draw(st.binary(min_size=1, max_size=99))
        if not content:
            content = bytearray(b"\0")
    try:
        read = read_frames(bytes(content), a_format(), HOUR)
    except DamagedHour:
        pass
    else:
        np.testing.assert_array_equal(read.tokens, read_frames(FRAMES, a_format(), HOUR).tokens)
    try:
        jpegs = read_keyframes(bytes(content), HOUR)
    except DamagedHour:
        pass
    else:
        assert jpegs == read_keyframes(KEYFRAMES, HOUR)


@given(st.binary(max_size=200))
def test_bytes_of_any_kind_are_refused(content):
    with pytest.raises(DamagedHour):
        read_frames(content, a_format(), HOUR)
    with pytest.raises(DamagedHour):
        read_keyframes(content, HOUR)


@pytest.mark.parametrize("place", ["[Infinity, 1]", "[0, 1e400]", "[NaN, 1]", f"[0, {'9' * 5000}]", "[1e9, 1e300]"])
def test_a_header_whose_numbers_are_none_is_refused(place):
    named = ",".join(f'"{name}":{{"data_offsets":{place}}}' for name in ("tokens", "vectors", "times", "slots"))
    header = f'{{"__metadata__":{{"checksum":"0"}},{named}}}'.encode()
    with pytest.raises(DamagedHour):
        read_frames(len(header).to_bytes(8, "little") + header, a_format(), HOUR)


async def test_restored_keyframes_join_those_that_are_packed_and_do_not_replace_them(redis, segments_root):
    keyframes = Keyframes(redis, segments_root)
    jpegs = {START + slot: b"\xff\xd8 restored %d" % slot for slot in range(10)}
    await keyframes.put_many({("str_a", START + slot): b"\xff\xd8 own %d" % slot for slot in (3, 4)})
    assert await keyframes.pack("str_a", HOUR)
    assert await keyframes.restore("str_a", HOUR, jpegs, "")
    found = await keyframes.find("str_a", range(START, START + 20))
    assert found == jpegs | {START + slot: b"\xff\xd8 own %d" % slot for slot in (3, 4)}
    [before] = await keyframes.packed("str_a")
    assert await keyframes.restore("str_a", HOUR, jpegs, "")  # nothing is new, nothing is written
    assert await keyframes.packed("str_a") == [before]
    await keyframes.erase("str_a", START, START + 10)
    assert await keyframes.find("str_a", range(START, START + 20)) == {}


async def test_those_of_the_keyframes_that_are_kept_are_found(redis, segments_root):
    keyframes = Keyframes(redis, segments_root)
    assert await keyframes.find("str_a", []) == {}
    assert await keyframes.find("str_a", [START]) == {}
    await keyframes.put_many({("str_a", START + slot): b"\xff\xd8 %d" % slot for slot in (1, HOUR_SLOTS + 1)})
    assert await keyframes.pack("str_a", HOUR)
    wanted = [START + HOUR_SLOTS + 1, START, START + 1]
    assert sorted(await keyframes.find("str_a", wanted)) == [START + 1, START + HOUR_SLOTS + 1]
