"""Decodes images of all supported formats into square RGB arrays."""

import contextlib
import io
import threading
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops

from ccu_jax.data.readers.base import SkipExample

# Pillow warns about large and damaged images; this module rejects both itself.
# `warnings.catch_warnings` is not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")

# Pillow's remaining formats are disabled: some of them run external programs.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
MAX_IMAGE_PIXELS = 120_000_000  # larger images are treated as decompression bombs
_MAX_SIDE = 1_000_000  # pixels: Pillow needs more time for a row than for a pixel
_LARGE_PIXELS = 40_000_000  # larger images are counted
_HEAVY_PIXELS = 10_000_000  # larger images are decoded one at a time
_TILE = 1000  # side of the tiles in which heavy images are converted, pixels
_GREY_MODES = ("1", "L", "LA", "I", "F")
_TRANSPARENT_MODES = ("RGBA", "LA", "PA", "La", "RGBa")
_EXIF_ORIENTATION = 0x0112
_CONTENT_THRESHOLD = 20  # of 255; compression changes even areas by less than that
_heavy_lock = threading.Lock()  # bounds the memory of threads that decode


class DecodedImage(NamedTuple):
    """An image scaled and padded to S x S pixels."""

    pixels: np.ndarray  # uint8 [S, S, 3], RGB
    notes: tuple[str, ...]  # names of counts to increase


def decode(data: bytes, size: int, crop_margins: bool = False) -> DecodedImage:
    """Decodes an image, scales it to fit into a square and pads it with white.

    Transparent pixels become white, the EXIF orientation is ignored, and an animation
    is reduced to its first frame. `crop_margins` first crops uniform margins. Raises
    SkipExample: "image empty", "not an image", "image too large" or "image damaged".
    """
    with _open_image(data) as image:
        notes = _find_notes(image)
        # Computed before decoding: the reduced size of a JPEG rounds the aspect ratio.
        width, height = fit_within(*image.size, size)
        min_size = (8 if crop_margins else 2) * size
        # A JPEG can be decoded at a fraction of its size, with less time and memory.
        image.draft(None, fit_within(*image.size, min_size))
        is_heavy = image.width * image.height > _HEAVY_PIXELS
        with _heavy_lock if is_heavy else contextlib.nullcontext():
            try:
                image.load()
                reduced = _reduce_image(image, min_size) if is_heavy else None
                rgb, box = reduced or (_to_rgb(image), None)
            except MemoryError:
                raise
            except Exception as error:  # Pillow raises exceptions of any type
                raise SkipExample("image damaged") from error
            if crop_margins:
                rgb, box = rgb.crop(_find_content_box(rgb)), None
                width, height = fit_within(*rgb.size, size)
            rgb = rgb.resize((width, height), Image.Resampling.BICUBIC, box)
    canvas = Image.new("RGB", (size, size), "white")
    canvas.paste(rgb, ((size - width) // 2, (size - height) // 2))
    return DecodedImage(np.asarray(canvas), notes)


def fit_within(width: int, height: int, size: int) -> tuple[int, int]:
    """Returns width and height scaled so that the longer side is `size` pixels."""
    longer = max(width, height)
    return (
        max(1, (2 * width * size + longer) // (2 * longer)),
        max(1, (2 * height * size + longer) // (2 * longer)),
    )


def _open_image(data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise SkipExample("image too large") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises exceptions of any type
        raise SkipExample("not an image" if data else "image empty") from error
    if image.width * image.height > MAX_IMAGE_PIXELS or max(image.size) > _MAX_SIDE:
        raise SkipExample("image too large")
    if not image.width * image.height:
        raise SkipExample("image empty")
    return image


def _find_notes(image: Image.Image) -> tuple[str, ...]:
    """Returns a note for each unusual property of a usable image."""
    mode = image.mode
    is_animated = is_rotated = False
    with contextlib.suppress(Exception):  # Pillow raises any type for damaged files
        is_animated = getattr(image, "is_animated", False)
    with contextlib.suppress(Exception):
        if "exif" in image.info:
            is_rotated = image.getexif().get(_EXIF_ORIENTATION, 1) not in (0, 1)
    properties = {
        "grayscale image": mode.split(";")[0] in _GREY_MODES,
        "CMYK image": mode == "CMYK",
        "palette image": mode in ("P", "PA"),
        "transparent image": mode in _TRANSPARENT_MODES or "transparency" in image.info,
        "progressive JPEG": "progressive" in image.info,
        "16-bit image": mode.startswith("I"),
        "animated image": is_animated,
        "image above 40 megapixels": image.width * image.height > _LARGE_PIXELS,
        "EXIF orientation ignored": is_rotated,
    }
    return tuple(f"noted: {name}" for name, applies in properties.items() if applies)


def _find_content_box(image: Image.Image) -> tuple[int, int, int, int]:
    """Returns the bounding box of the pixels that differ from the corner's color."""
    corner = Image.new("RGB", image.size, image.getpixel((0, 0)))
    difference = ImageChops.difference(image, corner).convert("L")
    differs = difference.point(lambda x: 255 if x > _CONTENT_THRESHOLD else 0)
    return differs.getbbox() or (0, 0, *image.size)


def _reduce_image(
    image: Image.Image, min_size: int
) -> tuple[Image.Image, tuple[float, float, float, float]]:
    """Converts to RGB and downscales by an integer, to at least `min_size` pixels.

    Also returns the box that the image covers in the result: the last row and column
    may be covered only partly.
    """
    # Converting all pixels at once takes several times the memory of the image.
    factor = max(1, max(image.size) // min_size)
    width, height = (-(-side // factor) for side in image.size)
    reduced = Image.new("RGB", (width, height))
    step = max(1, _TILE // factor)
    for x in range(0, width, step):
        for y in range(0, height, step):
            right = min((x + step) * factor, image.width)
            bottom = min((y + step) * factor, image.height)
            tile = _to_rgb(image.crop((x * factor, y * factor, right, bottom)))
            reduced.paste(tile.reduce(factor) if factor > 1 else tile, (x, y))
    return reduced, (0, 0, image.width / factor, image.height / factor)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Converts to RGB: composites on white and scales 16-bit greys to 8 bits."""
    if image.mode.startswith("I"):
        grey = (np.asarray(image) // 256).clip(0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode in _TRANSPARENT_MODES or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
