"""From an encoded picture, whatever it is, to a square of pixels: decoded once."""

import contextlib
import io
import threading
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ccu_jax.data.readers.base import SkipExample

# No other format is tried: some of Pillow's run programs or have no use here.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
MAX_PIXELS = 120_000_000  # a larger picture is taken for a decompression bomb
_MAX_SIDE = 1_000_000  # pixels: Pillow spends more on a row than on a pixel
_LARGE = 40_000_000  # pixels that are worth a note
_HEAVY = 10_000_000  # pixels that are decoded one picture at a time
_TILE = 1000  # pixels a side of what is converted at once of a heavy picture
_GREY = ("1", "L", "LA", "I", "F")
_TRANSPARENT = ("RGBA", "LA", "PA", "La", "RGBa")
_ORIENTATION = 0x0112  # the EXIF tag of how the camera was held
_alone = threading.Lock()


class Picture(NamedTuple):
    """A decoded picture: uint8 `[S, S, 3]`, RGB, and what is worth telling of it."""

    square: np.ndarray
    notes: tuple[str, ...]


def decode(data: bytes, size: int, trim: bool = False) -> Picture:
    """Decodes a picture, fits it into a square and pads it with white.

    Transparent parts become white, a turn noted in EXIF is ignored, and of an
    animation the first frame is taken.

    Args:
        data: An encoded picture, in any of FORMATS.
        size: S, side of the square in pixels.
        trim: Whether an even margin around the picture is cut off first.

    Raises:
        SkipExample: "image empty", "not an image", "image too large" or "image
            damaged" (broken off, say).
    """
    from PIL import Image

    with _quiet(), _opened(data) as image:
        notes = _notes(image)
        # Before decoding: at a fraction of its size the ratio is rounded.
        width, height = fitted(*image.size, size)
        least = (8 if trim else 2) * size
        # A JPEG can be decoded at a fraction of its size: much faster, less memory.
        image.draft(None, fitted(*image.size, least))
        heavy = image.width * image.height > _HEAVY
        with _alone if heavy else contextlib.nullcontext():
            try:
                image.load()
                image, box = _reduced(image, least) if heavy else (_rgb(image), None)
            except MemoryError:
                raise
            except Exception as error:  # Pillow's are of any kind
                raise SkipExample("image damaged") from error
            if trim:
                image, box = image.crop(_content(image)), None
                width, height = fitted(*image.size, size)
            image = image.resize((width, height), Image.Resampling.BICUBIC, box)
    canvas = Image.new("RGB", (size, size), "white")
    canvas.paste(image, ((size - width) // 2, (size - height) // 2))
    return Picture(np.asarray(canvas), notes)


def fitted(width: int, height: int, size: int) -> tuple[int, int]:
    """Width and height, in the same ratio, with `size` as the longer side."""
    longer = max(width, height)
    return (
        max(1, (2 * width * size + longer) // (2 * longer)),
        max(1, (2 * height * size + longer) // (2 * longer)),
    )


def _opened(data: bytes):
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise SkipExample("image too large") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's are of any kind
        raise SkipExample("not an image" if data else "image empty") from error
    if image.width * image.height > MAX_PIXELS or max(image.size) > _MAX_SIDE:
        raise SkipExample("image too large")
    if not image.width * image.height:
        raise SkipExample("image empty")
    return image


def _notes(image) -> tuple[str, ...]:
    """What a reader of the report would want to know of a picture that is used."""
    mode = image.mode
    found = {
        "greyscale image": mode.split(";")[0] in _GREY,
        "CMYK image": mode == "CMYK",
        "palette image": mode in ("P", "PA"),
        "transparent image": mode in _TRANSPARENT or "transparency" in image.info,
        "progressive JPEG": "progressive" in image.info,
        "16-bit image": mode.startswith("I"),
        "animated image": _animated(image),
        "image above 40 megapixels": image.width * image.height > _LARGE,
        "EXIF turn ignored": "exif" in image.info and _turned(image),
    }
    return tuple(f"noted: {what}" for what, true in found.items() if true)


def _animated(image) -> bool:
    try:  # which looks for a second frame, and may find what is none
        return getattr(image, "is_animated", False)
    except Exception:
        return False


def _turned(image) -> bool:
    try:
        return image.getexif().get(_ORIENTATION, 1) not in (0, 1)
    except Exception:  # whatever stands there, the pixels do not depend on it
        return False


def _content(image) -> tuple[int, int, int, int]:
    """The box of what differs clearly from the corner's colour, or all of it."""
    from PIL import Image, ImageChops

    corner = Image.new("RGB", image.size, image.getpixel((0, 0)))
    # Compressed pictures are never quite even.
    differs = (
        ImageChops.difference(image, corner)
        .convert("L")
        .point(lambda value: 255 if value > 20 else 0)
    )
    return differs.getbbox() or (0, 0, *image.size)


def _reduced(image, least: int):
    """A picture as RGB, its longer side divided, but not below `least` pixels.

    Also the box of it that the picture fills, for the last row and column may be less.
    Piece by piece: converted as a whole it would take its memory several times.
    """
    from PIL import Image

    by = max(1, max(image.size) // least)
    across, down = (-(-side // by) for side in image.size)
    reduced = Image.new("RGB", (across, down))
    step = max(1, _TILE // by)
    for x in range(0, across, step):
        for y in range(0, down, step):
            ends = min((x + step) * by, image.width), min((y + step) * by, image.height)
            piece = _rgb(image.crop((x * by, y * by, *ends)))
            reduced.paste(piece.reduce(by) if by > 1 else piece, (x, y))
    return reduced, (0, 0, image.width / by, image.height / by)


def _rgb(image):
    """The picture as RGB: composited on white, 16-bit greys scaled."""
    from PIL import Image

    if image.mode.startswith("I"):
        grey = (np.asarray(image) // 256).clip(0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode in _TRANSPARENT or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


_at_work = 0
_saved: contextlib.ExitStack | None = None
_counting = threading.Lock()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of Pillow's while any thread decodes.

    It warns of pictures from 89 million pixels on (our own limit is checked) and of
    damage that is counted here. Filters belong to the whole process: the first thread
    in sets them, the last one out puts them back.
    """
    global _at_work, _saved
    with _counting:
        if not _at_work:
            _saved = contextlib.ExitStack()
            _saved.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        _at_work += 1
    try:
        yield
    finally:
        with _counting:
            _at_work -= 1
            if not _at_work and _saved:
                _saved.close()
