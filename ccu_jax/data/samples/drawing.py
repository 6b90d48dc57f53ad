"""Smooth random fields: what the pictures of several sample editions are drawn with."""

import io

import numpy as np
from PIL import Image


def smooth(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """A random field, float32 `[size, size]`, roughly normal, `cells` bumps across."""
    coarse = rng.standard_normal((cells + 1, cells + 1), np.float32)
    field = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(field)


def grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y of the pixels `[size, size]`, from -1 to 1."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    return x * (2 / (size - 1)) - 1, y * (2 / (size - 1)) - 1


def turned(x: np.ndarray, y: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """The coordinates in a frame that is turned by `angle`, radians."""
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return cos * x + sin * y, cos * y - sin * x


def soft(distance: np.ndarray, width: float) -> np.ndarray:
    """1 well inside (distance < 0), 0 well outside, an edge of `width` between."""
    return 1 / (1 + np.exp(np.clip(distance / (width / 4), -30, 30)))


def jpeg(image: np.ndarray, quality: int) -> bytes:
    """Values in [0, 1], `[H, W]` (greyscale) or `[H, W, 3]`, as a JPEG."""
    file = io.BytesIO()
    pixels = (255 * image.clip(0, 1) + 0.5).astype(np.uint8)
    Image.fromarray(pixels).save(file, "jpeg", quality=quality)
    return file.getvalue()
