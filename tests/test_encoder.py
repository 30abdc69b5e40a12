"""Keyframes to stored tokens: pictures in, the border to numpy, and frames of many sources kept together."""

import asyncio
import io
import logging
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from compressor_service.encoder import Encoder
from compressor_service.facts import BadPicture, SearchUnavailable
from compressor_service.llava_mini import LlavaMini
from compressor_service.preprocess import pixels
from compressor_service.settings import CompressorSettings
from compressor_service.writer import PICTURES_AT_ONCE, FrameWriter
from ingest.frame import Frame, Receipt
from store.counters import Counters
from store.gaps import Gap, Gaps
from store.hot import FrameNotKept
from store.keyframes import Keyframes
from store.leases import Leases
from store.memory import Memory
from store.room import Room
from store.segments import Segments
from store.timeline import Timeline
from tests.ingest_parts import until
from tests.reference import make_checkpoint
from tests.untrained import write_untrained_checkpoint

SEGMENTS = Segments("memory://segments")  # where nothing is sealed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_untrained_checkpoint(tmp_path_factory.mktemp("untrained"))


@pytest.fixture(scope="module")
def encoder(folder):
    return load(folder)


@pytest.fixture
def timeline(redis, encoder):
    return Timeline(redis, encoder.format, SEGMENTS)


@pytest.fixture
def keyframes(redis, tmp_path):
    return Keyframes(redis, str(tmp_path / "segments"))


@pytest.fixture
def writer(encoder, timeline, keyframes, redis):
    return FrameWriter(
        encoder, timeline, keyframes, Leases(redis), Gaps(redis), Counters(redis), room=Room((), 0), frames_per_pass=4
    )


def load(folder, dtype="float32"):
    return Encoder.load(folder, dtype, CompressorSettings(device="cpu", max_batch_frames=4))


def picture(seed, size=(112, 112)):
    coarse = np.random.default_rng(seed).integers(0, 255, (7, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def jpeg(seed, size=(112, 112), kind="JPEG"):
    target = io.BytesIO()
    picture(seed, size).save(target, kind, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}))
    return target.getvalue()


def decoded(encoder, jpegs):
    return [encoder.decode(one) for one in jpegs]


def frame(source_id, slot, epoch, keyframe=None):
    return Frame(source_id, slot, slot * 1000, jpeg(slot) if keyframe is None else keyframe, epoch)


async def lease(redis, source_id):
    return await Leases(redis).acquire(source_id, "a test", 60)


def test_a_keyframe_is_read_as_it_is_and_normalised():
    whole = pixels(jpeg(1), image_size=112, ratio=1)
    decoded = np.asarray(Image.open(io.BytesIO(jpeg(1))), np.float32) / 255
    expected = (decoded - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    assert whole.shape == (1, 3, 112, 112)
    np.testing.assert_allclose(whole[0].permute(1, 2, 0).numpy(), expected, atol=1e-6)


def test_high_resolution_parts_are_the_crops_row_by_row_and_then_the_whole():
    parts = pixels(jpeg(1), image_size=56, ratio=2)
    whole = pixels(jpeg(1), image_size=112, ratio=1)[0]
    assert parts.shape == (5, 3, 56, 56)
    corners = [whole[:, :56, :56], whole[:, :56, 56:], whole[:, 56:, :56], whole[:, 56:, 56:]]
    assert all(torch.equal(part, corner) for part, corner in zip(parts[:4], corners, strict=True))
    pooled = torch.nn.functional.avg_pool2d(whole, 2)
    assert (parts[4] - pooled).abs().max() < 0.5


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("size", [(64, 200), (300, 40)])
def test_a_picture_of_any_size_is_squashed_to_the_square(kind, size):
    assert pixels(jpeg(1, size, kind), image_size=112, ratio=1).shape == (1, 3, 112, 112)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_pictures_of_other_colours_are_read(mode):
    target = io.BytesIO()
    picture(1).convert(mode).save(target, "JPEG" if mode in ("L", "CMYK") else "PNG")
    assert pixels(target.getvalue(), image_size=112, ratio=1).shape == (1, 3, 112, 112)


def cut_header(png):
    """A PNG whose first chunk is said to have less bytes than its size needs."""
    return png[:8] + b"\0\0\0\5" + png[12:]


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"no picture",
        jpeg(1)[:400],
        jpeg(1, kind="GIF"),
        b"\xff\xd8\xff" + bytes(100),
        cut_header(jpeg(1, kind="PNG")),
    ],
    ids=range(6),
)
def test_bytes_that_are_no_whole_picture_are_refused(broken):
    with pytest.raises(BadPicture):
        pixels(broken, image_size=112, ratio=1)


def test_a_small_file_of_a_giant_picture_is_refused_before_it_is_unpacked():
    target = io.BytesIO()
    Image.new("1", (6001, 6000)).save(target, "PNG")
    with pytest.raises(BadPicture, match="6001 x 6000"):
        pixels(target.getvalue(), image_size=112, ratio=1)


def saved(mode="RGB", kind="JPEG", **options):
    target = io.BytesIO()
    picture(1).convert(mode).save(target, kind, **options)
    return target.getvalue()


def repeated_scan(times):
    """A progressive JPEG whose last scan is said so many times more."""
    whole = saved(progressive=True)
    last = whole[whole.rindex(b"\xff\xda") : -2]
    return whole[:-2] + last * times + whole[-2:]


def repeated_exif(times):
    return jpeg(1)[:2] + b"\xff\xe1\0\x0aExif\0\0MM" * times + jpeg(1)[2:]


def repeated_profile(times):
    whole = saved(kind="PNG", icc_profile=b"a profile")
    at = whole.index(b"iCCP") - 4
    end = at + 12 + int.from_bytes(whole[at : at + 4])
    return whole[:at] + whole[at:end] * times + whole[end:]


@pytest.mark.parametrize("repeated", [repeated_scan, repeated_exif, repeated_profile])
def test_a_small_picture_that_repeats_what_is_work_again_and_again_is_refused_before_it_is_decoded(repeated):
    assert pixels(repeated(10), image_size=112, ratio=1).shape == (1, 3, 112, 112)
    with pytest.raises(BadPicture, match="more than 100 times"):
        pixels(repeated(101), image_size=112, ratio=1)


def with_thumbnail(**options):
    """A JPEG whose EXIF holds another one."""
    exif = Image.Exif()
    exif[0x010E] = saved(progressive=True)
    return saved(exif=exif, **options)


def not_packed():
    """A PNG of yellow, whose pixels are the bytes with which a scan of a JPEG begins."""
    target = io.BytesIO()
    Image.new("RGB", (112, 112), (0xFF, 0xDA, 0)).save(target, "PNG", compress_level=0)
    return target.getvalue()


ORDINARY = {
    "progressive": saved(progressive=True),
    "grey and progressive": saved("L", progressive=True),
    "CMYK and progressive": saved("CMYK", progressive=True),
    "of a scan with restarts": saved(restart_marker_blocks=1),
    "with a thumbnail": with_thumbnail(),
    "progressive with a thumbnail": with_thumbnail(progressive=True),
    "with a profile": saved(icc_profile=np.random.default_rng(1).bytes(500_000)),
    "a film behind it": saved() + np.random.default_rng(1).bytes(8 << 20),
    "PNG that is not packed": not_packed(),
}


@pytest.mark.parametrize("kind", ORDINARY)
def test_ordinary_pictures_are_read(kind):
    assert pixels(ORDINARY[kind], image_size=112, ratio=1).shape == (1, 3, 112, 112)


def test_the_encoder_gives_what_the_model_gives(folder, encoder):
    model = LlavaMini.from_pretrained(folder)
    keyframes = [jpeg(seed) for seed in range(6)]
    pictures = torch.stack([pixels(one, image_size=112, ratio=1) for one in keyframes])
    tokens, vectors = encoder.encode(decoded(encoder, keyframes))
    assert (tokens.shape, tokens.dtype, vectors.shape) == ((6, 1, 128), np.float32, (6, 48))
    np.testing.assert_allclose(tokens, model.encode_frames(pictures).numpy(), atol=1e-5)
    prompt = [5, -200, 9, 10]
    expected = model.fuse_text(torch.tensor(prompt), pictures).sum(dim=0)
    np.testing.assert_allclose(encoder.fuse_text(prompt, decoded(encoder, keyframes)), expected.numpy(), atol=1e-4)


def test_bfloat16_tokens_travel_as_their_bits(folder):
    half = load(folder, "bfloat16")
    tokens, _ = half.encode(decoded(half, [jpeg(1)]))
    assert tokens.dtype == half.format.numpy_dtype == np.uint16
    model = LlavaMini.from_pretrained(folder, dtype="bfloat16")
    expected = model.encode_frames(pixels(jpeg(1), image_size=112, ratio=1)[None])
    assert torch.equal(torch.from_numpy(tokens.view(np.int16)).view(torch.bfloat16), expected)


def test_the_format_names_the_model(folder, encoder):
    facts = encoder.describe()
    assert facts.untrained
    assert facts.searches_text
    assert facts.input_size_px == encoder.input_size_px == 112
    assert facts.format.fingerprint == LlavaMini.from_pretrained(folder, part="llm").fingerprint
    assert (facts.format.tokens_per_frame, facts.format.width, facts.format.vector_width) == (1, 128, 48)


def test_pictures_and_text_share_one_space(encoder):
    texts, pictures = (
        encoder.embed_text(["a red car", "a dog"]),
        encoder.embed_image(decoded(encoder, [jpeg(1), jpeg(2, (50, 90), "PNG")])),
    )
    assert texts.shape == pictures.shape == (2, 48)
    np.testing.assert_allclose(np.linalg.norm(np.concatenate((texts, pictures)), axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(pictures[0], encoder.encode(decoded(encoder, [jpeg(1)]))[1][0], atol=1e-6)


def test_text_vectors_are_those_of_the_whole_clip_model(folder, encoder):
    from transformers import AutoTokenizer, CLIPModel

    clip, tokenizer = CLIPModel.from_pretrained(folder / "clip"), AutoTokenizer.from_pretrained(folder / "clip")
    with torch.no_grad():
        expected = clip.get_text_features(**tokenizer(["a red car"], return_tensors="pt")).pooler_output
        seen = clip.get_image_features(pixels(jpeg(1), image_size=112, ratio=1)).pooler_output
    normal = torch.nn.functional.normalize
    np.testing.assert_allclose(encoder.embed_text(["a red car"]), normal(expected).numpy(), atol=1e-5)
    np.testing.assert_allclose(encoder.embed_image(decoded(encoder, [jpeg(1)])), normal(seen).numpy(), atol=1e-5)


def test_nothing_of_a_long_text_is_cut_off(encoder):
    long = "a red car " * 60
    vector = encoder.embed_text([long])
    np.testing.assert_allclose(np.linalg.norm(vector), 1, atol=1e-6)
    assert np.abs(vector - encoder.embed_text([long + "and at last a dog"])).max() > 1e-4
    assert encoder.embed_text([""]).shape == (1, 48)
    assert encoder.embed_text([]).shape == encoder.embed_image([]).shape == (0, 48)


def test_a_checkpoint_without_a_text_half_says_what_to_do(tmp_path):
    encoder = load(make_checkpoint.write(tmp_path, 1, 1))
    with pytest.raises(SearchUnavailable, match="the whole CLIP model"):
        encoder.embed_text(["a dog"])
    assert not encoder.describe().searches_text
    assert encoder.embed_image(decoded(encoder, [jpeg(1)])).shape == (1, 1024)


@pytest.mark.parametrize("bad", [{"device": "tpu"}, {"max_batch_frames": 0}, {"threads": 0}, {"unknown": 1}], ids=str)
def test_settings_that_make_no_sense_are_refused(bad):
    with pytest.raises(ValidationError, match=next(iter(bad))):
        CompressorSettings(**bad)


async def test_frames_of_many_sources_are_kept_as_encoded_alone(redis, encoder, writer, timeline, keyframes):
    sources = [f"str_{number:012x}" for number in range(3)]
    epochs = {source: await lease(redis, source) for source in sources}
    requests = [[frame(source, slot, epochs[source]) for slot in (60, 61, 125)] for source in sources]
    assert await writer.put(requests) == [Receipt()] * 3
    for source in sources:
        slots = await timeline.slots(source, 0, 1000)
        assert slots.tolist() == [60, 61, 125]
        alone = [encoder.encode(decoded(encoder, [jpeg(slot)])) for slot in slots]
        np.testing.assert_allclose(await timeline.read(source, slots), [one[0][0] for one in alone], atol=1e-5)
        np.testing.assert_allclose(await timeline.vectors(source, slots), [one[1][0] for one in alone], atol=1e-3)
        assert (await timeline.times(source, slots)).tolist() == [60_000, 61_000, 125_000]
        assert await keyframes.get_many(source, slots.tolist()) == [jpeg(slot) for slot in slots]


async def test_frames_of_a_replaced_owner_are_reported_lost_to_it_alone(redis, writer, timeline):
    old = await lease(redis, "str_a")
    await Leases(redis).revoke("str_a")
    new, other = await lease(redis, "str_a"), await lease(redis, "str_b")
    assert new > old
    requests = [[frame("str_a", 1, old), frame("str_b", 1, other)], [frame("str_a", 2, new)], []]
    assert await writer.put(requests) == [Receipt(lost=frozenset({"str_a"})), Receipt(), Receipt()]
    assert (await timeline.slots("str_a", 0, 9)).tolist() == [2]
    assert (await timeline.slots("str_b", 0, 9)).tolist() == [1]
    assert await writer.put([[frame("str_a", 3, old)]]) == [Receipt(lost=frozenset({"str_a"}))]
    assert (await timeline.slots("str_a", 0, 9)).tolist() == [2]


async def test_a_broken_keyframe_does_not_fail_the_others(redis, writer, timeline, keyframes, caplog):
    epoch = await lease(redis, "str_c")
    frames = [frame("str_c", 1, epoch), frame("str_c", 2, epoch, b"broken"), frame("str_c", 3, epoch)]
    with caplog.at_level(logging.WARNING):
        assert await writer.put([frames]) == [Receipt()]
    assert (await timeline.slots("str_c", 0, 9)).tolist() == [1, 3]
    assert "str_c slot 2: keyframe dropped" in caplog.text
    with pytest.raises(FrameNotKept):
        await keyframes.get("str_c", 2)
    assert await writer.put([[frame("str_c", 4, epoch, b"broken")]]) == [Receipt()]


async def test_text_fused_from_the_store_equals_text_fused_from_the_pictures(redis, encoder, writer):
    epochs = {source: await lease(redis, source) for source in ("str_d", "str_e")}
    await writer.put([[frame("str_d", slot, epochs["str_d"]) for slot in range(6)]])
    await writer.put([[frame("str_e", slot, epochs["str_e"]) for slot in range(3)]])
    prompt = [5, 6, -200, 9, 10, 11]
    fused = await writer.fuse_text(prompt, [("str_d", [0, 1, 2, 3, 5]), ("str_e", [2])])
    expected = encoder.fuse_text(prompt, decoded(encoder, [jpeg(slot) for slot in (0, 1, 2, 3, 5, 2)]))
    np.testing.assert_allclose(fused, expected, atol=1e-4)
    with pytest.raises(FrameNotKept):
        await writer.fuse_text(prompt, [("str_d", [0, 77])])


async def test_text_is_not_fused_with_a_kept_keyframe_that_is_damaged_and_its_slot_is_named(
    redis, writer, keyframes, caplog
):
    epoch = await lease(redis, "str_d")
    await writer.put([[frame("str_d", slot, epoch) for slot in range(3)]])
    await keyframes.put("str_d", 1, jpeg(1)[:100])
    with pytest.raises(FrameNotKept) as raised:
        await writer.fuse_text([5, 6, -200, 9], [("str_d", [0, 1, 2])])
    assert (raised.value.source_id, raised.value.slot) == ("str_d", 1)
    assert "str_d slot 1: its kept keyframe is damaged" in caplog.text


async def test_many_callers_at_once_get_their_own_results(redis, encoder, writer):
    epoch = await lease(redis, "str_f")
    *receipts, texts, fused_once = await asyncio.gather(
        *(writer.put([[frame("str_f", slot, epoch)]]) for slot in range(8)),
        writer.embed_text(["a red car"]),
        writer.embed_image([jpeg(3)]),
    )
    assert receipts == [[Receipt()]] * 8
    np.testing.assert_allclose(texts, encoder.embed_text(["a red car"]), atol=1e-6)
    np.testing.assert_allclose(fused_once, encoder.embed_image(decoded(encoder, [jpeg(3)])), atol=1e-6)
    writer.check_health()


async def test_live_frames_do_not_wait_for_a_picture_that_somebody_sent_and_few_are_decoded_at_once(
    redis, encoder, writer, monkeypatch
):
    epoch = await lease(redis, "str_f")
    decode, sent, begun, may_end = encoder.decode, jpeg(99), [], threading.Event()

    def slow(one: bytes) -> torch.Tensor:
        if one == sent:
            begun.append(one)
            assert may_end.wait(60)
        return decode(one)

    monkeypatch.setattr(encoder, "decode", slow)
    searches = [asyncio.create_task(writer.embed_image([sent])) for _ in range(PICTURES_AT_ONCE + 1)]
    try:
        await until(lambda: len(begun) == PICTURES_AT_ONCE)
        async with asyncio.timeout(10):
            assert await writer.put([[frame("str_f", 1, epoch)]]) == [Receipt()]
        assert len(begun) == PICTURES_AT_ONCE
    finally:
        may_end.set()
        found = await asyncio.gather(*searches)
    assert len(begun) == len(searches)
    np.testing.assert_allclose(
        np.concatenate(found), encoder.embed_image(decoded(encoder, [sent] * len(searches))), atol=1e-6
    )
    assert (await writer.embed_image([])).shape == (0, 48)


async def test_late_frames_of_a_purged_source_leave_nothing_behind(redis, writer, timeline, keyframes, tmp_path):
    epoch = await lease(redis, "str_a")
    await writer.put([[frame("str_a", 1, epoch)]])
    await Leases(redis).revoke("str_a")
    await timeline.erase("str_a")
    await keyframes.erase("str_a")
    assert await writer.put([[frame("str_a", 2, epoch)]]) == [Receipt(lost=frozenset({"str_a"}))]
    assert await timeline.extent("str_a") is None
    assert not (tmp_path / "segments" / "str_a").exists()


async def test_of_purges_in_the_middle_of_a_put_no_keyframe_survives(redis, writer, timeline, keyframes, tmp_path):
    async def purge(source_id):
        await Leases(redis).revoke(source_id)
        await timeline.erase(source_id)
        await keyframes.erase(source_id)

    for number in range(12):  # the purge meets the put at another step each time
        source_id = f"str_{number}"
        epoch = await lease(redis, source_id)
        put = asyncio.create_task(writer.put([[frame(source_id, slot, epoch) for slot in range(4)]]))
        async for _ in steps(number * 3):
            pass
        await asyncio.gather(put, purge(source_id))
        assert await timeline.extent(source_id) is None
        with pytest.raises(FrameNotKept):
            await keyframes.get(source_id, 0)
    assert list((tmp_path / "segments").rglob("*.jpg")) == []


async def test_of_an_erasure_in_the_middle_of_a_put_no_picture_survives_though_a_new_owner_took_over(
    redis, writer, timeline, keyframes, monkeypatch
):
    epoch, put_many = await lease(redis, "str_a"), keyframes.put_many
    await writer.put([[frame("str_a", 1, epoch)]])

    async def overtaken(pictures):
        await Leases(redis).revoke("str_a")
        await Gaps(redis).add("str_a", None, [Gap(start_slot=0, end_slot=3, reason="erased")])
        await Memory(redis, SEGMENTS, keyframes).erase("str_a", 0, 3)
        await lease(redis, "str_a")
        await put_many(pictures)

    monkeypatch.setattr(keyframes, "put_many", overtaken)
    assert await writer.put([[frame("str_a", 2, epoch)]]) == [Receipt(lost=frozenset({"str_a"}))]
    assert await keyframes.find("str_a", [1, 2]) == {}


async def steps(count):
    for _ in range(count):
        yield await asyncio.sleep(0.002)


async def test_a_replaced_owner_does_not_overwrite_the_pictures_of_its_successor(redis, writer, keyframes):
    old = await lease(redis, "str_a")
    await Leases(redis).revoke("str_a")
    new = await lease(redis, "str_a")
    await writer.put([[frame("str_a", 5, new, jpeg(1))]])
    await writer.put([[frame("str_a", 5, old, jpeg(2))]])
    assert await keyframes.get("str_a", 5) == jpeg(1)


async def test_a_picture_that_cannot_be_read_is_recorded_as_a_gap(redis, writer):
    epoch = await lease(redis, "str_a")
    await writer.put([[frame("str_a", 7, epoch), frame("str_a", 8, epoch, b"no picture")]])
    assert await Gaps(redis).read("str_a", 0, 20) == [Gap(start_slot=8, end_slot=9, reason="decode_error")]
