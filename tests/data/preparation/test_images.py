"""Every kind of image is decoded into a square, or skipped for a reason."""

import concurrent.futures
import io
import struct

import numpy as np
import pytest
from PIL import Image

from ccu_jax.data.preparation.images import decode
from ccu_jax.data.readers.base import SkipExample
from tests.fuzz.contents import IMAGES, fix_png_checksums

RED = (255, 0, 0)


def encode(image, format_="PNG", **options):
    file = io.BytesIO()
    image.save(file, format_, **options)
    return file.getvalue()


def encode_flat(color="red", size=(12, 8), mode="RGB", format_="PNG", **options):
    return encode(Image.new(mode, size, color), format_, **options)


def encode_noise(size=(40, 30), format_="PNG", **options):
    pixels = np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), np.uint8)
    return encode(Image.fromarray(pixels), format_, **options)


def encode_rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode_flat(size=(20, 10), format_="JPEG", exif=exif)


def encode_animated():
    frames = [Image.new("RGB", (9, 9), color) for color in ("red", "blue")]
    return encode(frames[0], "GIF", save_all=True, append_images=frames[1:])


def test_wide_image_keeps_its_aspect_ratio_between_white_bars():
    pixels = decode(encode_flat("red", (40, 20)), 16).pixels
    assert (pixels[4:12] == RED).all()
    assert (pixels[:4] == 255).all() and (pixels[12:] == 255).all()
    assert (decode(encode_rotated(), 20).pixels[:4] == 255).all()  # EXIF is ignored


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "I;16"])
def test_white_stays_white_in_every_mode(mode):
    image = Image.new("RGB", (9, 9), "white").convert(mode.replace(";16", ""))
    if mode == "I;16":
        image = Image.fromarray(np.full((9, 9), 65535, np.uint16))
    pixels = decode(encode(image), 8).pixels
    assert pixels.shape == (8, 8, 3) and pixels.min() == 255


def test_lossy_images_keep_their_color_and_transparent_pixels_become_white():
    cmyk = encode_flat((0, 255, 255, 0), mode="CMYK", format_="JPEG")
    hundred_megapixels = encode_flat("red", (8000, 12_000), format_="JPEG", quality=10)
    for data, tolerance in ((cmyk, 30), (hundred_megapixels, 9)):
        pixels = decode(data, 12).pixels.astype(int)
        assert np.abs(pixels[6, 6] - RED).max() < tolerance
    assert (decode(encode_flat((9, 9, 9, 0), mode="RGBA"), 8).pixels == 255).all()


@pytest.mark.parametrize(
    "data, notes",
    [
        (encode_flat(format_="JPEG"), []),
        (encode_flat(9, mode="L"), ["grayscale image"]),
        (encode_flat(0, mode="1"), ["grayscale image"]),
        (encode_flat(9, mode="I;16"), ["grayscale image", "16-bit image"]),
        (encode_flat((9, 9), mode="LA"), ["grayscale image", "transparent image"]),
        (encode_flat(mode="RGBA"), ["transparent image"]),
        (encode_flat(0, mode="P"), ["palette image"]),
        (
            encode_flat(0, mode="P", transparency=0),
            ["palette image", "transparent image"],
        ),
        (encode_flat(0, mode="CMYK", format_="JPEG"), ["CMYK image"]),
        (encode_noise(format_="JPEG", progressive=True), ["progressive JPEG"]),
        (encode_rotated(), ["EXIF orientation ignored"]),
        (encode_animated(), ["palette image", "animated image"]),
        (encode_flat(size=(9000, 6000), format_="JPEG"), ["image above 40 megapixels"]),
    ],
)
def test_unusual_properties_are_noted(data, notes):
    decoded = decode(data, 12)
    assert decoded.pixels.shape == (12, 12, 3)
    assert decoded.notes == tuple(f"noted: {note}" for note in notes)


# A column of 100 million pixels.
HIGH = IMAGES["png 1"][:16] + struct.pack(">II", 1, 100_000_000) + IMAGES["png 1"][24:]
UNUSABLE = [
    (b"", "image empty"),
    (b"<html>not found</html>", "not an image"),
    (encode_noise((300, 300), "JPEG")[:-4000], "image damaged"),
    (encode_noise((300, 300))[:60_000], "image damaged"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    (encode_flat(0, (11_000, 11_000), mode="1"), "image too large"),
    (encode_flat(0, (20_000, 20_000), mode="1"), "image too large"),
    (fix_png_checksums(HIGH), "image too large"),
]


@pytest.mark.parametrize("data, reason", UNUSABLE)
def test_unusable_image_is_skipped_for_its_reason(data, reason):
    with pytest.raises(SkipExample, match=reason):
        decode(data, 8)


def test_threads_decode_the_same_images():
    images = [data for data, _ in UNUSABLE] + [
        encode_noise((50 + n, 40)) for n in range(20)
    ]

    def try_decode(data):
        try:
            return decode(data, 16).pixels.tobytes()
        except SkipExample as reason:
            return str(reason)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(try_decode, images * 3))
    assert results == [try_decode(data) for data in images] * 3


def test_margins_are_cropped_on_request():
    image = Image.new("RGB", (100, 100), "white")
    image.paste("red", (40, 45, 60, 55))
    full, cropped = (decode(encode(image), 20, crop).pixels for crop in (False, True))
    assert (full[10, 0] == 255).all() and (cropped[10] == RED).all()
