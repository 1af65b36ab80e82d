"""Bytes nobody vouches for: the same facts from both checks, a reason for every refusal, upright RGB."""

from __future__ import annotations

import pickle
import struct
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.errors import ConfigError
from pipeline.images import (
    HARD_MAX_PIXELS,
    Check,
    Crop,
    Facts,
    ImageRejected,
    Limits,
    can_decode_crops,
    crops,
    decode_crop,
    decode_rgb,
    inspect,
    plain,
)
from pipeline.images.pillow import _refusal
from pipeline.images.plain import plain_jpeg
from pipeline.schema import Reason

CHECKS: tuple[Check, ...] = get_args(Check)
LIMITS = Limits()
WRITERS: dict[str, tuple[str, dict[str, Any]]] = {
    "jpg": ("JPEG", {"quality": 95}),
    "progressive": ("JPEG", {"progressive": True, "quality": 95}),
    "png": ("PNG", {}),
    "webp": ("WEBP", {"lossless": True}),
    "gif": ("GIF", {}),
    "bmp": ("BMP", {}),
    "tif": ("TIFF", {}),
    "tif-lzw": ("TIFF", {"compression": "tiff_lzw"}),
}


def picture(width: int = 40, height: int = 24) -> Image.Image:
    """Smooth, so that lossy formats keep it, and different in every corner."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))


def encoded(image: Image.Image, pillow_format: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, pillow_format, **options)
    return buffer.getvalue()


def sample(name: str, mode: str = "RGB") -> bytes:
    pillow_format, options = WRITERS[name]
    return encoded(picture().convert(mode), pillow_format, **options)


def verdict(data: bytes, check: Check, limits: Limits = LIMITS) -> Facts | Reason:
    try:
        return inspect(data, check=check, limits=limits)
    except ImageRejected as rejected:
        return rejected.reason


def both(data: bytes, limits: Limits = LIMITS) -> Facts | Reason:
    """The verdict that both checks agree on."""
    first, second = (verdict(data, check, limits) for check in CHECKS)
    assert first == second
    return first


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def bare_png(width: int, height: int, bits: int = 8, colour: int = 2, pixels: bytes = b"") -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(pixels)) + png_chunk(b"IEND", b"")


@pytest.mark.parametrize("name", WRITERS)
def test_facts_of_each_format(name: str) -> None:
    found = both(sample(name))
    extension = {"progressive": "jpg", "tif-lzw": "tif"}.get(name, name)
    assert found == Facts(width=40, height=24, format=extension, mode="P" if name == "gif" else "RGB")


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_both_checks_agree_on_modes_of_jpeg(mode: str) -> None:
    found = both(sample("jpg", mode))
    assert isinstance(found, Facts)
    assert found.mode == mode


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_both_checks_agree_on_modes_of_png(mode: str) -> None:
    image = picture().convert("L").convert("I;16") if mode == "I;16" else picture().convert(mode)
    found = both(encoded(image, "PNG"))
    assert isinstance(found, Facts)
    assert found.mode == mode


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("check", CHECKS)
def test_no_cut_file_passes(name: str, check: Check) -> None:
    data = sample(name)
    for percent in range(100):
        cut = data[: len(data) * percent // 100]
        assert isinstance(verdict(cut, check), Reason), percent
    assert verdict(data[: len(data) // 2], check) in (Reason.TRUNCATED, Reason.CORRUPT)


@pytest.mark.parametrize("name", ["jpg", "progressive", "png", "webp", "gif"])
def test_a_cut_file_is_called_truncated(name: str) -> None:
    data = sample(name)
    assert both(data[: len(data) // 2]) == Reason.TRUNCATED


def test_the_end_of_a_thumbnail_is_not_the_end_of_the_image() -> None:
    data = sample("jpg")
    thumbnail = b"\xff\xe1" + struct.pack(">H", len(data) + 2) + data
    with_thumbnail = data[:2] + thumbnail + data[2:]
    assert isinstance(both(with_thumbnail), Facts)
    assert both(with_thumbnail[:-40]) == Reason.TRUNCATED


def test_bytes_after_the_end_are_forgiven() -> None:
    assert isinstance(both(sample("jpg") + b"trailer" * 100), Facts)
    assert isinstance(both(sample("png") + b"trailer" * 100), Facts)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", Reason.EMPTY),
        (b"<!DOCTYPE html><html>404</html>", Reason.NOT_AN_IMAGE),
        (b"just words", Reason.NOT_AN_IMAGE),
        (b"BMW is a maker of cars, and no bitmap", Reason.NOT_AN_IMAGE),
        (b"\0" * 100, Reason.NOT_AN_IMAGE),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", Reason.FORMAT_NOT_ALLOWED),
        (b"8BPS" + b"\0" * 50, Reason.FORMAT_NOT_ALLOWED),
        (b"\0\0\0\x1cftypavif" + b"\0" * 20, Reason.FORMAT_NOT_ALLOWED),
        (b"<?xml version='1.0'?><svg/>", Reason.FORMAT_NOT_ALLOWED),
        (b"\xff\xd8\xff" + b"\0" * 50 + b"\xff\xda\0\0\xff\xd9", Reason.CORRUPT),
    ],
)
def test_what_is_no_image_has_a_reason(data: bytes, reason: Reason) -> None:
    assert both(data) == reason


@pytest.mark.parametrize("pillow_format", ["EPS", "ICO", "PPM", "JPEG2000", "TGA"])
def test_formats_that_pillow_knows_and_we_do_not_open(pillow_format: str) -> None:
    assert both(encoded(picture(), pillow_format)) in (Reason.FORMAT_NOT_ALLOWED, Reason.NOT_AN_IMAGE)


def test_a_bomb_is_refused_by_its_header() -> None:
    assert both(bare_png(30_000, 30_000)) == Reason.TOO_LARGE
    with pytest.raises(ImageRejected) as caught:
        decode_rgb(bare_png(30_000, 30_000))
    assert caught.value.reason == Reason.TOO_LARGE


@pytest.mark.parametrize("name", WRITERS)
def test_the_pixel_limit_is_exact(name: str) -> None:
    data = sample(name)
    assert isinstance(both(data, Limits(max_pixels=40 * 24)), Facts)
    assert both(data, Limits(max_pixels=40 * 24 - 1)) == Reason.TOO_LARGE


def test_the_byte_limit_is_exact() -> None:
    data = sample("jpg")
    assert isinstance(both(data, Limits(max_bytes=len(data))), Facts)
    assert both(data, Limits(max_bytes=len(data) - 1)) == Reason.TOO_LARGE


@pytest.mark.parametrize("limits", [{"max_pixels": 0}, {"max_pixels": HARD_MAX_PIXELS + 1}, {"max_bytes": 0}])
def test_limits_have_limits(limits: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        Limits(**limits)


def test_a_png_without_its_pixels_is_refused_when_decoded() -> None:
    assert verdict(bare_png(4, 4, pixels=b"\0" * 5), "decode") in (Reason.TRUNCATED, Reason.CORRUPT)


def test_a_flipped_bit_in_a_png_is_seen_by_both_checks() -> None:
    data = bytearray(sample("png"))
    data[len(data) // 2] ^= 1
    assert isinstance(both(bytes(data)), Reason)


def test_details_hold_no_memory_address() -> None:
    with pytest.raises(ImageRejected) as caught:
        inspect(b"GIF89a" + b"\0" * 3, check="decode", limits=LIMITS)
    assert "0x" not in str(caught.value)
    assert "0x7f" not in str(_refusal(OSError("bad <_io.BytesIO object at 0x7f00deadbeef>")))


def test_a_rejection_travels_between_processes() -> None:
    copy = pickle.loads(pickle.dumps(ImageRejected(Reason.GONE, "no such file")))
    assert (copy.reason, copy.detail) == (Reason.GONE, "no such file")


@settings(max_examples=150)
@given(st.sampled_from(sorted(WRITERS)), st.data())
def test_mutated_bytes_give_facts_or_a_reason(name: str, data: st.DataObject) -> None:
    original = bytearray(sample(name))
    for place in data.draw(st.lists(st.integers(0, min(len(original), 400) - 1), min_size=1, max_size=8)):
        original[place] = data.draw(st.integers(0, 255))
    limits = Limits(max_pixels=1 << 20)
    for check in CHECKS:
        assert isinstance(verdict(bytes(original), check, limits), Facts | Reason)


# --- Pixels ---

# From the EXIF standard: what the first stored row and the first stored column are to the eye.
STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda eye: eye,  # top, left
    2: lambda eye: eye[:, ::-1],  # top, right
    3: lambda eye: eye[::-1, ::-1],  # bottom, right
    4: lambda eye: eye[::-1],  # bottom, left
    5: lambda eye: eye.transpose(1, 0, 2),  # left, top
    6: lambda eye: eye.transpose(1, 0, 2)[::-1],  # right, top
    7: lambda eye: eye.transpose(1, 0, 2)[::-1, ::-1],  # right, bottom
    8: lambda eye: eye.transpose(1, 0, 2)[:, ::-1],  # left, bottom
}


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: int = 12) -> None:
    assert found.dtype == np.uint8
    assert found.shape == expected.shape
    assert int(np.abs(found.astype(int) - expected.astype(int)).max()) <= tolerance


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "gif"])
def test_rgb_comes_back(name: str) -> None:
    assert_close(decode_rgb(sample(name)), np.asarray(picture()))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("pillow_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_orientation_comes_back_upright(orientation: int, pillow_format: str) -> None:
    upright = np.asarray(picture())
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, pillow_format, exif=exif, **({"quality": 95} if pillow_format == "JPEG" else {}))
    assert_close(decode_rgb(data), upright, 40 if pillow_format == "WEBP" else 12)
    found = both(data)
    assert isinstance(found, Facts)
    assert (found.width, found.height) == stored.size


def test_damaged_exif_is_no_reason_to_refuse() -> None:
    data = encoded(picture(), "JPEG", quality=95, exif=b"Exif\0\0garbage that is no TIFF header")
    assert_close(decode_rgb(data), np.asarray(picture()))


def test_cmyk_of_photoshop_is_not_inverted() -> None:
    found = decode_rgb(sample("jpg", "CMYK"))
    assert_close(found, np.asarray(picture()), 20)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    values = np.linspace(0, 65535, 64 * 5).astype(np.uint16).reshape(5, 64)
    found = decode_rgb(encoded(Image.fromarray(values), "PNG"))
    assert_close(found, np.repeat((values // 257).astype(np.uint8)[..., None], 3, axis=2), 1)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.0, 255.0), (0.0, 65535.0), (-5.0, 1e6)])
def test_floats_are_scaled_to_the_range_they_use(low: float, high: float) -> None:
    values = np.linspace(low, high, 64, dtype=np.float32).reshape(4, 16)
    found = decode_rgb(encoded(Image.fromarray(values), "TIFF"))
    assert_close(found[..., 0], np.linspace(0, 255, 64).round().astype(np.uint8).reshape(4, 16), 1)


def test_thirty_two_bit_integers_that_fit_sixteen_are_taken_for_sixteen() -> None:
    values = np.linspace(0, 65535, 64).astype(np.int32).reshape(4, 16)
    found = decode_rgb(encoded(Image.fromarray(values), "TIFF"))
    assert_close(found[..., 0], (values // 257).astype(np.uint8), 1)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_lies_over_white(mode: str) -> None:
    image = Image.new("RGBA", (3, 2), (0, 0, 0, 0)).convert(mode)
    assert (decode_rgb(encoded(image, "PNG")) == 255).all()


def test_half_alpha_is_half_white() -> None:
    found = decode_rgb(encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 128)), "PNG"))
    assert_close(found, np.full((2, 2, 3), (255, 127, 127), np.uint8), 1)


def test_a_transparent_palette_entry_is_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.putpixel((1, 0), 1)
    for pillow_format in ("PNG", "GIF"):
        found = decode_rgb(encoded(image, pillow_format, transparency=0))
        assert found[0].tolist() == [[255, 255, 255], [10, 20, 30]]


def test_a_transparent_colour_of_rgb_is_white() -> None:
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    assert decode_rgb(encoded(image, "PNG", transparency=(1, 2, 3)))[0].tolist() == [[255, 255, 255], [9, 9, 9]]


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_grey_and_palette_become_rgb(mode: str) -> None:
    image = picture().convert(mode)
    assert (decode_rgb(encoded(image, "PNG")) == np.asarray(image.convert("RGB"))).all()


def test_the_first_frame_counts() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for pillow_format, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})):
        data = encoded(frames[0], pillow_format, save_all=True, append_images=frames[1:], **options)
        assert isinstance(both(data), Facts)
        assert decode_rgb(data)[0, 0].tolist() == [255, 0, 0]


def test_pixels_can_be_written_to() -> None:
    assert decode_rgb(sample("jpg")).flags.writeable


def test_damage_is_a_rejection_when_pixels_are_asked_for() -> None:
    with pytest.raises(ImageRejected):
        decode_rgb(sample("jpg")[:300])


def test_threads_get_what_one_thread_gets() -> None:
    inputs = [sample(name) for name in WRITERS] * 4
    expected = [decode_rgb(data) for data in inputs]
    found: list[np.ndarray | None] = [None] * len(inputs)

    def work(first: int) -> None:
        for index in range(first, len(inputs), 4):
            found[index] = decode_rgb(inputs[index])

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True) if a is not None)
    assert None not in [None if a is None else 0 for a in found]


# --- Crops ---


def crop_of(data: bytes, *, box: tuple[int, int, int, int] | None = None, size: int = 64, flip: bool = False) -> Any:
    """The square that `decode_crop` makes of ``box`` (top, left, rows, columns), by default of the whole image."""

    def plan(height: int, width: int) -> Crop:
        top, left, rows, columns = box or (0, 0, height, width)
        return Crop(top=top, left=left, rows=rows, columns=columns, height=size, width=size, flip=flip)

    out = np.full((size, size, 3), 77, dtype=np.uint8)
    decode_crop(data, plan, out)
    return out


def test_the_fast_decoders_are_installed_for_tests() -> None:
    assert can_decode_crops()


def test_opencv_starts_no_threads_of_its_own() -> None:
    decoders = crops._fast_decoders()
    assert decoders is not None
    decoders[1].setNumThreads(3)
    crops._fast_decoders.cache_clear()
    crops._fast_decoders()
    assert decoders[1].getNumThreads() == 1


@pytest.mark.parametrize("pillow_format", ["JPEG", "PNG"])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("width", [200, 800])  # of which the JPEG is decoded whole, and at a fraction
def test_a_crop_shows_its_box_and_is_mirrored_where_asked(pillow_format: str, flip: bool, width: int) -> None:
    height = width * 3 // 4
    data = encoded(picture(width, height), pillow_format, **({"quality": 95} if pillow_format == "JPEG" else {}))
    box = (height // 3, width // 2, height // 2, width // 4)
    x = 255 * (box[1] + (np.arange(64) + 0.5) * box[3] / 64 - 0.5) / (width - 1)  # red is the column, green the row
    y = 255 * (box[0] + (np.arange(64) + 0.5) * box[2] / 64 - 0.5) / (height - 1)
    expected = np.stack(np.broadcast_arrays(x[None, ::-1] if flip else x[None], y[:, None]), axis=-1)
    assert_close(crop_of(data, box=box, flip=flip)[..., :2], expected.astype(np.uint8), 6)


@pytest.fixture
def decoded_shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """What simplejpeg decodes, call by call."""
    decoders = crops._fast_decoders()
    assert decoders is not None
    shapes: list[tuple[int, ...]] = []

    class Spy:
        decode_jpeg_header = staticmethod(decoders[0].decode_jpeg_header)

        @staticmethod
        def decode_jpeg(*args: Any, **options: Any) -> np.ndarray:
            pixels = decoders[0].decode_jpeg(*args, **options)
            shapes.append(pixels.shape[:2])
            return pixels

    monkeypatch.setattr(crops, "_fast_decoders", lambda: (Spy, decoders[1]))
    return shapes


def test_large_jpegs_are_decoded_at_a_fraction_and_never_below_the_crop(decoded_shapes: list[Any]) -> None:
    data = encoded(picture(801, 601), "JPEG", quality=95)
    for rows, columns in ((601, 601), (300, 300), (129, 129), (127, 127), (601, 70), (70, 801)):
        crop_of(data, box=(0, 0, rows, columns), size=64)
    assert decoded_shapes == [(76, 101), (151, 201), (301, 401), (601, 801), (601, 801), (601, 801)]


def test_a_bomb_is_not_handed_to_the_fast_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    decoders = crops._fast_decoders()
    assert decoders is not None
    monkeypatch.setattr(decoders[0], "decode_jpeg", lambda *_, **__: pytest.fail("handed to it"))
    data = bytearray(sample("jpg"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = (50_000).to_bytes(2, "big") * 2
    assert HARD_MAX_PIXELS < 50_000**2
    refused = refusal_of(crop_of, bytes(data))
    assert refused is not None
    assert refused[0] is Reason.TOO_LARGE


def test_a_sliver_of_a_jpeg_at_half_its_size_keeps_a_column() -> None:
    out = np.empty((200, 1, 3), dtype=np.uint8)
    crop = Crop(top=0, left=3, rows=400, columns=2, height=200, width=1)  # columns 1.5 to 2.5 of the half
    decode_crop(encoded(picture(600, 400), "JPEG", quality=95), lambda _height, _width: crop, out)
    assert_close(out[:, 0, 0], np.full(200, 255 * 3.5 / 599).astype(np.uint8), 4)


def test_what_shrinks_is_averaged_not_skipped() -> None:
    pixels = np.zeros((512, 512, 3), np.uint8)
    pixels[:, ::8] = 240
    assert (crop_of(encoded(Image.fromarray(pixels), "PNG")) == 30).all()


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "gif"])
def test_every_format_gives_the_crop_of_its_pixels(name: str) -> None:
    assert_close(crop_of(sample(name), box=(2, 4, 20, 30)), crop_of(sample("png"), box=(2, 4, 20, 30)), 12)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("pillow_format", ["JPEG", "PNG"])
def test_the_box_is_one_of_the_upright_image(orientation: int, pillow_format: str) -> None:
    upright = np.asarray(picture())
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, pillow_format, exif=exif, **({"quality": 95} if pillow_format == "JPEG" else {}))
    assert_close(crop_of(data, box=(3, 20, 9, 18)), crop_of(sample("png"), box=(3, 20, 9, 18)), 12)


def test_an_orientation_in_xmp_turns_a_crop_too() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description tiff:Orientation="3"/></rdf:RDF></x:xmpmeta>'
    data = encoded(Image.fromarray(np.asarray(picture())[::-1, ::-1].copy()), "JPEG", quality=95, xmp=xmp)
    assert_close(decode_rgb(data), np.asarray(picture()))
    assert_close(crop_of(data), crop_of(sample("png")), 12)


def turned_by(byteorder: str) -> bytes:
    """APP1 with an EXIF orientation of 3, by hand: Pillow writes one byte order only."""
    pack = f"{'<' if byteorder == 'II' else '>'}2sHIHHHIHHI"
    return b"Exif\0\0" + struct.pack(pack, byteorder.encode(), 42, 8, 1, 0x0112, 3, 1, 3, 0, 0)


@pytest.mark.parametrize("byteorder", ["II", "MM"])
@pytest.mark.parametrize("fill", [0, 1, 3])  # bytes that may stand before any marker
def test_an_orientation_is_seen_in_both_byte_orders_and_behind_fill_bytes(byteorder: str, fill: int) -> None:
    upside_down = Image.fromarray(np.asarray(picture())[::-1, ::-1].copy())
    data = encoded(upside_down, "JPEG", quality=95, exif=turned_by(byteorder))
    data = data.replace(b"\xff\xe1", b"\xff" * fill + b"\xff\xe1", 1)
    assert_close(decode_rgb(data), np.asarray(picture()))
    assert_close(crop_of(data), crop_of(sample("png")), 12)


def colour_cases() -> dict[str, bytes]:
    """Pixels that only their colour mode explains."""
    palette, grey = picture().convert("P"), np.linspace(0, 65535, 64 * 5).astype(np.uint16).reshape(5, 64)
    return {
        "cmyk": sample("jpg", "CMYK"),
        "grey jpg": sample("jpg", "L"),
        "rgb jpg": encoded(picture(), "JPEG", quality=95, keep_rgb=True),
        "444 jpg": encoded(picture(), "JPEG", quality=95, subsampling=0),
        "grey": encoded(picture().convert("L"), "PNG"),
        "bits": encoded(picture().convert("1"), "PNG"),
        "palette": encoded(palette, "PNG"),
        "transparent palette": encoded(palette, "PNG", transparency=3),
        "16 bits": encoded(Image.fromarray(grey), "PNG"),
        "alpha": encoded(Image.new("RGBA", (20, 20), (255, 0, 0, 128)), "PNG"),
        "exif": encoded(picture(), "JPEG", quality=95, exif=b"Exif\0\0garbage that is no TIFF header \x01\x12"),
    }


@pytest.mark.parametrize("name", sorted(colour_cases()))
def test_a_whole_image_as_a_crop_is_its_rgb(name: str) -> None:
    data = colour_cases()[name]
    pixels = decode_rgb(data)
    height, width = pixels.shape[:2]
    out = np.empty((height, width, 3), dtype=np.uint8)
    decode_crop(data, lambda h, w: Crop(top=0, left=0, rows=h, columns=w, height=h, width=w), out)
    assert_close(out, pixels, 14)


def test_a_smaller_output_shows_the_middle() -> None:
    out = np.empty((10, 20, 3), dtype=np.uint8)
    decode_crop(sample("png"), lambda h, w: Crop(top=0, left=0, rows=h, columns=w, height=h, width=w), out)
    assert (out == np.asarray(picture())[7:17, 10:30]).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 900), (900, 1), (3, 2000)])
def test_crops_of_slivers(shape: tuple[int, int]) -> None:
    data = encoded(Image.new("RGB", shape, (200, 100, 50)), "JPEG", quality=95)
    assert_close(crop_of(data), np.full((64, 64, 3), (200, 100, 50), np.uint8), 6)


def refusal_of(decode: Callable[[bytes], Any], data: bytes) -> tuple[Reason, str] | None:
    try:
        decode(data)
    except ImageRejected as rejected:
        return rejected.reason, rejected.detail
    return None


@pytest.mark.parametrize("name", ["jpg", "progressive", "png"])
def test_crops_refuse_what_decode_rgb_refuses_in_the_same_words(name: str) -> None:
    data = sample(name)
    for percent in range(0, 100, 7):
        cut = data[: len(data) * percent // 100]
        assert refusal_of(crop_of, cut) == refusal_of(decode_rgb, cut)
    assert refusal_of(crop_of, data[: len(data) // 3]) is not None


def test_crops_are_the_same_in_any_thread() -> None:
    inputs = [sample(name) for name in WRITERS] * 8
    expected = [crop_of(data) for data in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(crop_of, inputs))
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def noise_jpeg(size: tuple[int, int], quality: int) -> bytes:
    stream = BytesIO()
    Image.fromarray(np.random.default_rng(size).integers(0, 256, (*size, 3), np.uint8)).save(
        stream, "JPEG", quality=quality
    )
    return stream.getvalue()


def test_a_head_that_was_seen_before_vouches_for_nothing_after_it() -> None:
    whole = noise_jpeg((9, 7), 80)
    facts = plain_jpeg(whole)
    assert facts == Facts(7, 9, "jpg", "RGB")
    scan = whole.index(b"\xff\xda")
    for stop in [*range(scan - 3, scan + 20), len(whole) - 2, len(whole) - 1]:
        plain_jpeg(whole)  # seen again
        assert plain_jpeg(whole[:stop]) is None
    assert plain_jpeg(whole[:scan] + b"\xff\xda\xff\xff" + whole[scan + 4 :]) is None  # a header longer than the rest
    assert plain_jpeg(whole) == facts


def test_heads_that_were_seen_are_told_apart_and_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes FF DA may stand within a segment: what follows them then decides too."""
    monkeypatch.setattr(plain, "_MAX_HEADS", 5)
    images = [noise_jpeg((height, width), 75) for height in range(1, 5) for width in range(1, 5)]
    for data in [*images, *reversed(images), *images]:
        height, width = Image.open(BytesIO(data)).size[::-1]
        assert plain_jpeg(data) == Facts(width, height, "jpg", "RGB")
        assert len(plain._heads) <= 5
    comment = b"\xff\xfe\x00\x08\xff\xda\x00\x0c??"
    odd = [data[:2] + comment + data[2:] for data in images]
    assert [plain_jpeg(data) for data in odd] == [plain_jpeg(data) for data in images]
    assert not any(len(head) < 20 for head in plain._heads)
