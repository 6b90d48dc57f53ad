"""Decoding: every kind of picture becomes a square, or a reason why not."""

import concurrent.futures
import io

import numpy as np
import pytest
from PIL import Image

from ccu_jax.data.preparation.images import decode
from ccu_jax.data.readers.base import SkipExample


def picture(colour="red", size=(12, 8), mode="RGB", kind="PNG", **options):
    """An encoded picture of one colour."""
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, kind, **options)
    return file.getvalue()


def grain(size=(40, 30), kind="PNG", **options):
    file, rng = io.BytesIO(), np.random.default_rng(0)
    image = rng.integers(0, 255, (*size[::-1], 3), np.uint8)
    Image.fromarray(image).save(file, kind, **options)
    return file.getvalue()


def test_a_wide_picture_keeps_its_ratio_between_white_bars():
    image = decode(picture("red", (40, 20)), 16).pixels
    assert (image[4:12] == [255, 0, 0]).all()
    assert (image[:4] == 255).all() and (image[12:] == 255).all()


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "I;16"])
def test_every_mode_becomes_rgb(mode):
    image = Image.new("RGB", (9, 9), "white").convert(mode.replace(";16", ""))
    if mode == "I;16":
        image = Image.fromarray(np.full((9, 9), 65535, np.uint16))
    file = io.BytesIO()
    image.save(file, "PNG")
    square = decode(file.getvalue(), 8).pixels
    assert square.shape == (8, 8, 3) and square.min() == 255


def test_cmyk_becomes_rgb_and_hidden_colours_become_white():
    cmyk = decode(picture((0, 255, 255, 0), mode="CMYK", kind="JPEG"), 12).pixels
    assert np.abs(cmyk[6].astype(int) - [255, 0, 0]).max() < 30
    clear = decode(picture((9, 9, 9, 0), mode="RGBA"), 8).pixels
    assert (clear == 255).all()


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture(size=(20, 10), kind="JPEG", exif=exif)


def test_the_turn_noted_in_exif_is_ignored():
    assert (decode(turned(), 20).pixels[:4] == 255).all()


def animated():
    file = io.BytesIO()
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


@pytest.mark.parametrize(
    "data, notes",
    [
        (picture(), []),
        (picture(kind="JPEG"), []),
        (picture(9, mode="L"), ["greyscale image"]),
        (picture(0, mode="1"), ["greyscale image"]),
        (picture(9, mode="I;16"), ["greyscale image", "16-bit image"]),
        (picture((9, 9), mode="LA"), ["greyscale image", "transparent image"]),
        (picture(mode="RGBA"), ["transparent image"]),
        (picture(0, mode="P"), ["palette image"]),
        (picture(0, mode="P", transparency=0), ["palette image", "transparent i"]),
        (picture(0, mode="CMYK", kind="JPEG"), ["CMYK image"]),
        (grain(kind="JPEG", progressive=True), ["progressive JPEG"]),
        (turned(), ["EXIF turn ignored"]),
        (animated(), ["palette image", "animated image"]),
        (
            picture(size=(9000, 6000), kind="JPEG", quality=10),
            ["image above 40 megapixels"],
        ),
    ],
)
def test_what_is_unusual_about_a_picture_is_noted(data, notes):
    found = decode(data, 12)
    assert found.pixels.shape == (12, 12, 3)
    assert len(found.notes) == len(notes)
    for note, wanted in zip(found.notes, notes, strict=True):
        assert note.startswith(f"noted: {wanted}")


BAD = [
    (b"", "image empty"),
    (b"<html>not found</html>", "not an image"),
    (grain((300, 300), "JPEG")[:-4000], "image damaged"),
    (grain((300, 300))[:60_000], "image damaged"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    (picture(0, (11_000, 11_000), mode="1"), "image too large"),
    (picture(0, (20_000, 20_000), mode="1"), "image too large"),
]


@pytest.mark.parametrize("data, reason", BAD)
def test_what_is_no_whole_picture_is_named(data, reason):
    with pytest.raises(SkipExample, match=reason):
        decode(data, 8)


def test_a_picture_of_a_hundred_megapixels_is_decoded_in_small():
    data = picture("red", (8000, 12_000), kind="JPEG", quality=10)
    square = decode(data, 12).pixels
    assert np.abs(square[6, 6].astype(int) - [255, 0, 0]).max() < 9


def test_threads_decode_the_same_images():
    many = [data for data, _ in BAD] + [grain((50 + n, 40)) for n in range(20)]

    def attempt(data):
        try:
            return decode(data, 16).pixels.tobytes()
        except SkipExample as reason:
            return str(reason)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(attempt, many * 3))
    assert together == [attempt(data) for data in many] * 3


def test_trimming_takes_an_even_margin_away():
    image = Image.new("RGB", (100, 100), "white")
    image.paste("red", (40, 45, 60, 55))
    file = io.BytesIO()
    image.save(file, "PNG")
    whole, cut = (decode(file.getvalue(), 20, trim).pixels for trim in (False, True))
    assert (whole[10, 0] == 255).all() and (cut[10] == [255, 0, 0]).all()
