"""Draws the posters of the sample edition: clip art on a background of its own."""

import colorsys
import functools
import io

import numpy as np
from PIL import Image, ImageFilter

from ccu_jax.data.clipart import CLIPART


@functools.cache
def cutout(name: str) -> Image.Image:
    """A clip art picture without the white around it."""
    image = Image.open(CLIPART / name).convert("RGB")
    ink = np.asarray(image).min(axis=2) < 235
    if not ink.any():
        return image
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    return image.crop((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))


def draw(
    rng: np.random.Generator, pictures: list[str], hues: tuple[float, float]
) -> bytes:
    """A portrait poster as JPEG.

    Args:
        rng: Size, colours, texture and places; the same state gives the same bytes.
        pictures: One to three paths below the clip art's folder, drawn large.
        hues: The two colours of the background lean to them; in [0, 1).

    Returns:
        JPEG, 90 to 120 pixels wide and about 1.5 times as high.
    """
    width = int(rng.integers(90, 121))
    height = int(width * rng.uniform(1.4, 1.6))
    canvas = _background(rng, width, height, hues)
    band = height / len(pictures)
    for place, name in enumerate(pictures):
        _put(rng, canvas, cutout(name), place * band, band)
    file = io.BytesIO()
    Image.fromarray(canvas).save(file, "jpeg", quality=int(rng.integers(80, 93)))
    return file.getvalue()


def _background(
    rng: np.random.Generator, width: int, height: int, hues: tuple[float, float]
) -> np.ndarray:
    """uint8 [height, width, 3]: two colours in a wavy gradient with grain."""
    colours = []
    for hue in hues:
        shade = (hue + rng.normal(0, 0.04)) % 1, rng.uniform(0.25, 0.6)
        colours.append(colorsys.hsv_to_rgb(*shade, rng.uniform(0.65, 1)))
    y, x = np.mgrid[0:height, 0:width] / height
    angle, wave = rng.uniform(0, 2 * np.pi), rng.uniform(0, 12)
    along = np.cos(angle) * x + np.sin(angle) * y
    across = np.cos(angle) * y - np.sin(angle) * x
    along = along + 0.08 * np.sin(wave * across * np.pi + rng.uniform(0, 6))
    mix = (along - along.min()) / np.ptp(along)
    first, second = np.array(colours)
    image = first + mix[..., None] * (second - first)
    coarse = rng.normal(0, rng.uniform(0.02, 0.12), (height // 8, width // 8))
    grain = Image.fromarray(coarse.astype(np.float32)).resize((width, height))
    image = image + np.asarray(grain)[..., None]
    return (255 * image.clip(0, 1)).astype(np.uint8)


def _put(
    rng: np.random.Generator,
    canvas: np.ndarray,
    picture: Image.Image,
    top: float,
    band: float,
) -> None:
    """Draws a picture into a band of the canvas; its white lets the ground through."""
    height, width = canvas.shape[:2]
    share = rng.uniform(0.8, 1.0)
    scale = min(share * width / picture.width, share * band / picture.height)
    size = [max(4, int(scale * side)) for side in picture.size]
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.2:
        picture = picture.filter(ImageFilter.SMOOTH)
    left = int(rng.integers(0, max(1, width - size[0] + 1)))
    above = int(top + rng.uniform(0, max(0.0, band - size[1])))
    part = canvas[above : above + size[1], left : left + size[0]]
    ink = np.asarray(picture, np.uint16)[: part.shape[0], : part.shape[1]]
    part[:] = part * ink // 255
