"""From encoded pictures to stored squares, and from stored rows to batches."""

import io
import pathlib
import warnings

import numpy as np

from ccu_jax.config import Data
from ccu_jax.data.source import SPLITS, Counts, Example, Progress, Source

# No other format is tried: some of Pillow's run programs or have no use here.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
MAX_PIXELS = 120_000_000  # a larger picture is taken for a decompression bomb


class Unusable(Exception):
    """A picture that cannot be decoded; the message is the reason that is counted."""


def picture_size(data: bytes) -> tuple[int, int]:
    """Width and height in pixels from the header alone.

    Raises:
        Unusable: no picture, or one too large to decode.
    """
    with _opened(data) as image:
        return image.size


def square(data: bytes, size: int, trim: bool = False) -> np.ndarray:
    """Decodes a picture, fits it into a square and pads it with white.

    Transparent parts become white, a turn noted in EXIF is ignored, and of an
    animation the first frame is taken.

    Args:
        data: An encoded picture, in any format that Pillow reads.
        size: S, side of the square in pixels.
        trim: Whether an even margin around the picture is cut off first.

    Returns:
        uint8 [S, S, 3], RGB.

    Raises:
        Unusable: see `picture_size`; or broken off, or damaged.
    """
    from PIL import Image

    with _opened(data) as image:
        # Before decoding: at a fraction of its size the ratio is rounded.
        width, height = fitted(*image.size, size)
        # A JPEG can be decoded at a fraction of its size: much faster, less memory.
        image.draft(None, fitted(*image.size, (8 if trim else 2) * size))
        try:
            image.load()
            image = _rgb(image)
        except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:
            raise Unusable("picture damaged") from error
    if trim:
        image = image.crop(_content(image))
        width, height = fitted(*image.size, size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (size, size), "white")
    canvas.paste(image, ((size - width) // 2, (size - height) // 2))
    return np.asarray(canvas)


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


def fitted(width: int, height: int, size: int) -> tuple[int, int]:
    """Width and height, in the same ratio, with `size` as the longer side."""
    longer = max(width, height)
    return (
        max(1, (2 * width * size + longer) // (2 * longer)),
        max(1, (2 * height * size + longer) // (2 * longer)),
    )


def _opened(data: bytes):
    from PIL import Image

    with warnings.catch_warnings():
        # Pillow warns from 89 million pixels on; our own limit is checked below.
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise Unusable("picture too large") from error
        except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:
            raise Unusable("not a picture" if data else "picture empty") from error
    if image.width * image.height > MAX_PIXELS:
        raise Unusable("picture too large")
    return image


def _rgb(image):
    """The picture as RGB: composited on white, 16-bit greys scaled."""
    from PIL import Image

    if image.mode.startswith("I"):
        grey = (np.asarray(image) // 256).clip(0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


class Squares:
    """An .npy file of pictures, uint8 [N, S, S, 3], written one at a time.

    N need not be known before. It is written like any file and not through a memory
    map, where a full disk would kill the process instead of raising OSError.
    """

    def __init__(self, path: pathlib.Path, size: int):
        """Opens `path` for squares with `size` pixels a side."""
        self._size, self._rows = size, 0
        self._file = path.open("wb")
        self._header()

    def add(self, image: np.ndarray | None) -> None:
        """Appends a square, or zeros where there is no picture."""
        shape = (self._size, self._size, 3)
        image = np.zeros(shape, np.uint8) if image is None else image
        if image.shape != shape or image.dtype != np.uint8:
            raise ValueError(f"not a square of {shape}: {image.shape}, {image.dtype}")
        self._file.write(image.tobytes())
        self._rows += 1

    def _header(self) -> int:
        # NumPy leaves room in the header for a first axis that grows.
        self._file.seek(0)
        shape = (self._rows, self._size, self._size, 3)
        entry = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, entry)
        return self._file.tell()

    def __enter__(self) -> "Squares":
        """Nothing to do: the file is open."""
        return self

    def __exit__(self, *error: object) -> None:
        """Writes the final header and closes the file."""
        if error[0] is None:
            self._header()
        self._file.close()


def store_with_pillow(
    source: Source,
    path: pathlib.Path,
    config: Data,
    counts: Counts,
    progress: Progress,
) -> list[Example]:
    """Decodes every picture into an array on the disk, one at a time.

    Args:
        source: The opened data set.
        path: The .npy file to write: uint8 [N, S, S, 3], a missing picture all zeros.
        config: Size of the pictures, and whether margins are cut off.
        counts: Told of the rows whose picture cannot be used; these are left out.
        progress: Called with (what, done, total).

    Returns:
        The N used rows in order, with `image` cut down to b"" (or None).
    """
    used: list[Example] = []
    size = config.image_size
    rows = (example for split in SPLITS for example in source.examples(split))
    with Squares(path, size) as squares:
        for done, example in enumerate(rows):
            progress("decoding pictures", done, source.rows)
            try:
                image = example.image  # b"" is a picture that cannot be used
                image = None if image is None else square(image, size, config.trim)
            except Unusable as reason:
                counts.skip(str(reason), example.id)
                continue
            squares.add(image)
            used.append(example._replace(image=None if image is None else b""))
    progress("decoding pictures", source.rows, source.rows)
    return used


def batches(
    rows: np.ndarray, batch: int, steps: int, seed: int, start: int = 0
) -> np.ndarray:
    """The plan: which row stands at which place of which step.

    It is cut from an endless row of permutations, one for each epoch, so every row
    comes once an epoch and no row is dropped; a batch may straddle two epochs. Each
    entry depends on `rows`, `batch`, `seed`, and its step only: resuming at a step
    gives what an uninterrupted run would have had, on any number of hosts.

    Args:
        rows: int [M], the rows to draw from, M > 0; may be fewer than `batch`.
        batch: Rows in one step, over all devices and hosts.
        steps: Number of steps to plan.
        seed: Any integer >= 0.
        start: First step of the plan.

    Returns:
        int32 [steps, batch], the plan of the steps `start` to `start + steps - 1`.
    """
    rows = np.asarray(rows, np.int32)
    if rows.ndim != 1 or not len(rows):
        raise ValueError(f"rows must be a non-empty vector, not {rows.shape}")
    first, last = start * batch, (start + steps) * batch
    epochs = range(first // len(rows), -(-last // len(rows)))
    drawn = [np.random.default_rng([seed, epoch]).permutation(rows) for epoch in epochs]
    flat = np.concatenate([*drawn, rows[:0]])
    skipped = epochs.start * len(rows)
    return flat[first - skipped : last - skipped].reshape(steps, batch)
