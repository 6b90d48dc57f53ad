"""Helpers of the sample editions: drawing, invented words, and the pairs format."""

import colorsys
import functools
import io
import json
import pathlib
import tomllib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.random import Generator, default_rng
from PIL import Image

from ccu_jax.data.readers.base import CLIPART, Progress

STAGE = "writing the sample edition"
# The texts and clip art of each sample edition.
_CONTENT_PATH = pathlib.Path(__file__).with_name("content.toml")
CONTENT: dict[str, Any] = tomllib.loads(_CONTENT_PATH.read_text("utf-8"))
_SYLLABLES = "ba do fen gri ha jo kel lu mar nim or pel ru sta tov ul ven wi yas zo"
_SPLIT_FRACTIONS = {"train": 0.65, "validation": 0.15, "test": 0.2}


def sample_field(rng: Generator, size: int, cells: int) -> np.ndarray:
    """Samples a smooth random field, float32 [size, size], `cells` bumps across."""
    coarse = rng.standard_normal((cells + 1, cells + 1), np.float32)
    field = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(field)


def make_grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the x and y coordinates of pixels, each [size, size] from -1 to 1."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    return x * (2 / (size - 1)) - 1, y * (2 / (size - 1)) - 1


def rotate_axes(
    x: np.ndarray, y: np.ndarray, angle: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the coordinates x and y in a frame rotated by `angle` radians."""
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return cos * x + sin * y, cos * y - sin * x


def make_mask(distance: np.ndarray, width: float) -> np.ndarray:
    """Returns 1 where the distance is negative, else 0, with a soft edge of `width`."""
    return 1 / (1 + np.exp(np.clip(distance / (width / 4), -30, 30)))


def encode_jpeg(image: np.ndarray, quality: int) -> bytes:
    """Encodes an image with values in [0, 1], [H, W] or [H, W, 3], as a JPEG."""
    pixels = (255 * image.clip(0, 1) + 0.5).astype(np.uint8)
    return encode_pixels(pixels, "jpeg", quality=quality)


def encode_pixels(pixels: np.ndarray, file_type: str, **options: int) -> bytes:
    """Encodes a uint8 image, [H, W] or [H, W, 3]; `options` are passed to Pillow."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, file_type, **options)
    return file.getvalue()


def hsv_to_rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    """Converts HSV, with the hue taken modulo 1, to RGB, float [3] in [0, 1]."""
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value))


def sample_oriented_grid(
    rng: Generator, width: int, height: int
) -> tuple[float, np.ndarray, np.ndarray]:
    """Samples an angle; returns it and the pixel coordinates along and across it."""
    y, x = np.mgrid[0:height, 0:width] / height
    angle = rng.uniform(0, 2 * np.pi)
    cos, sin = np.cos(angle), np.sin(angle)
    return angle, cos * x + sin * y, cos * y - sin * x


@functools.cache
def load_cutout(name: str) -> Image.Image:
    """Loads a clip-art image and crops away its white margin."""
    image = Image.open(CLIPART / name).convert("RGB")
    is_ink = np.asarray(image).min(axis=2) < 235
    if not is_ink.any():
        return image
    rows, columns = np.flatnonzero(is_ink.any(1)), np.flatnonzero(is_ink.any(0))
    return image.crop((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))


def scale_and_flip(rng: Generator, image: Image.Image, scale: float) -> Image.Image:
    """Scales an image and mirrors it with probability 1/2."""
    size = (max(4, int(scale * image.width)), max(4, int(scale * image.height)))
    image = image.resize(size, Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def multiply_image(canvas: np.ndarray, image: Image.Image, left: int, top: int) -> None:
    """Multiplies the canvas by an image in place; white pixels leave it unchanged."""
    area = canvas[top : top + image.height, left : left + image.width]
    ink = np.asarray(image, np.uint16)[: area.shape[0], : area.shape[1]]
    area[:] = area * ink // 255


def choose(rng: Generator, pool: Sequence[str]) -> str:
    """Samples an element of `pool` uniformly."""
    return pool[int(rng.integers(len(pool)))]


def invent_word(rng: Generator) -> str:
    """Invents a word of two or three syllables."""
    return "".join(rng.choice(_SYLLABLES.split(), rng.integers(2, 4)))


def write_pairs(
    root: pathlib.Path,
    rows: int,
    group_sizes: np.ndarray,
    seed: int,
    draw_group: Callable[[int, int, int], Iterator[dict]],
    prefix: str,
    progress: Progress,
) -> None:
    """Writes `pairs.jsonl` and the folder `images`; rows of a group share a split.

    Args:
        root: the new folder.
        rows: number of rows to write.
        group_sizes: rows of each group; those that would exceed `rows` are cut off.
        seed: seed of the split and the rows.
        draw_group: yields the rows of a group, given the seed, the group's index and
            its size, as dicts of "image" (encoded), "text", and "label" or "labels".
        prefix: first letter of the group names.
        progress: called with (stage, done, total).
    """
    (root / "images").mkdir()
    ends, done = np.cumsum(group_sizes), 0
    last = int(np.searchsorted(ends, rows))
    sizes = [*group_sizes[:last].tolist(), rows - int(ends[last] - group_sizes[last])]
    with (root / "pairs.jsonl").open("w", encoding="utf-8", newline="\n") as index:
        for group, split in enumerate(_assign_splits(sizes, seed)):
            name = f"{prefix}{group:05d}"
            for number, row in enumerate(draw_group(seed, group, sizes[group]), 1):
                progress(STAGE, done, rows)
                path = f"images/{name}-{number}.jpg"
                (root / path).write_bytes(row.pop("image"))
                row = {"id": f"{name}-{number}", "image": path} | row
                index.write(json.dumps(row | {"group": name, "split": split}) + "\n")
                done += 1


def _assign_splits(sizes: list[int], seed: int) -> list[str]:
    """Assigns groups to splits in random order, in the proportions _SPLIT_FRACTIONS."""
    order = default_rng([seed, 1]).permutation(len(sizes))
    ends = np.cumsum(np.array(sizes)[order])
    limits = np.cumsum(list(_SPLIT_FRACTIONS.values())) * ends[-1]
    index = np.searchsorted(limits, ends - np.array(sizes)[order] / 2)
    names, splits = list(_SPLIT_FRACTIONS), [""] * len(sizes)
    for group, split in zip(order, index, strict=True):
        splits[group] = names[min(int(split), len(names) - 1)]
    return splits
