"""Draws the clothes of the Fashion200k sample edition, each from several sides."""

import io
import math

import numpy as np
from PIL import Image, ImageDraw

from ccu_jax.data.samples.garment_outlines import Polygon, outline
from ccu_jax.data.samples.garments import Garment


def view(rng: np.random.Generator, garment: Garment) -> bytes:
    """One picture of a garment, as JPEG of 60 to 100 pixels a side.

    Its pose, the part of it that is seen, the light and what is behind it are drawn
    anew each time.
    """
    draw = rng.random(16).tolist()
    cloth, marks = outline(garment, 0.1 + 0.9 * draw[0], draw[1] - 0.5)
    left, right, bottom = _box(cloth)
    ratio = (right - left) / bottom * math.exp(0.5 * (draw[2] - 0.5))
    height = 72 + int(28 * draw[3])
    width = min(100, max(60, int(height * ratio)))
    places = _places(draw[4:10], (left, right, bottom), width, height)
    a, b, c, d, e, f = places
    alpha, ink = _masks(places, (width, height), cloth, marks)
    x = np.arange(width, dtype=np.float32)
    y = np.arange(height, dtype=np.float32)[:, None]
    dyed = _cloth(garment, a * x + b * y + e, c * x + d * y + f, 0.8 + 0.35 * draw[10])
    dyed *= (1 - 0.45 * ink)[..., None]
    ground = _ground(rng, garment, width, height)
    dyed += 0.5 * (ground - garment.ground)  # the light is as uneven on the cloth
    shadow = int(3 + 5 * draw[11]), int(12 * draw[12]) - 6
    ground *= (1 - 0.4 * draw[13] * np.roll(alpha, shadow, (0, 1)))[..., None]
    ground += alpha[..., None] * (dyed - ground)
    grain = rng.integers(-9, 10, (height, width, 1), np.int8)
    pixels = (ground + grain).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg", quality=70 + int(20 * draw[14]))
    return file.getvalue()


def _box(cloth: list[Polygon]) -> tuple[float, float, float]:
    """Left, right and lowest of the outline."""
    points = [point for fill, corners in cloth if fill for point in corners]
    across = [x for x, _ in points]
    return min(across), max(across), max(y for _, y in points)


def _places(draw, box, width, height) -> tuple[float, ...]:
    """What of the garment is seen where: (a, b, c, d, e, f).

    The pixel (x, y) shows the place (a x + b y + e, c x + d y + f) of the outline.
    """
    left, right, bottom = box
    close = 1.0 if draw[0] < 0.85 else 0.6 + 0.8 * draw[0]
    turn = 0.5 * (draw[1] - 0.5)
    step = max(bottom / height, (right - left) / width) / close / (0.78 + 0.3 * draw[2])
    wide = step * math.exp(0.3 * (draw[3] - 0.5))
    sign = 1 if draw[0] * 1000 % 2 < 1 else -1  # mirrored
    a, b = sign * wide * math.cos(turn), sign * step * math.sin(turn)
    c, d = -wide * math.sin(turn), step * math.cos(turn)
    loose = 0.16 if close == 1.0 else 0.8 * (1 - 1 / close) + 0.1
    middle_x = (left + right) / 2 + (right - left) * loose * (draw[4] - 0.5)
    middle_y = bottom / 2 + bottom * loose * (draw[5] - 0.5)
    e = middle_x - a * width / 2 - b * height / 2
    f = middle_y - c * width / 2 - d * height / 2
    return a, b, c, d, e, f


def _masks(places, size, cloth, marks) -> tuple[np.ndarray, np.ndarray]:
    """Where cloth is, and where marks on it are: float32 [H, W] in [0, 1]."""
    a, b, c, d, e, f = places
    scale = 2 / (a * d - b * c)  # drawn at twice the size, for smooth edges

    def place(points):
        return [
            ((d * (x - e) - b * (y - f)) * scale, (a * (y - f) - c * (x - e)) * scale)
            for x, y in points
        ]

    masks = []
    for polygons in (cloth, marks):
        mask = Image.new("L", (2 * size[0], 2 * size[1]))
        pen = ImageDraw.Draw(mask)
        for fill, points in polygons:
            if len(points) == 2:
                pen.line(place(points), fill, 3)
            else:
                pen.polygon(place(points), fill)
        masks.append(np.asarray(mask.reduce(2), np.float32) / 255)
    return masks[0], masks[1]


def _cloth(garment: Garment, u, v, light: float) -> np.ndarray:
    """The cloth's colours float32 [H, W, 3] at the garment's places u and v."""
    k = 2.2 * garment.scale
    match garment.pattern:
        case "striped":
            share = np.sin(k * (v if garment.round else u)) > 0
        case "checked":
            share = 0.5 * ((np.sin(k * u) > 0) + (np.sin(k * v) > 0.2))
        case "dotted":
            share = np.sin(k * u) * np.sin(k * v) > 0.45
        case "floral":
            share = np.sin(k * u + 2 * np.sin(k * v)) * np.sin(k * v + 1.5 * u) > 0.25
        case "blocked":
            share = v > garment.length * (0.25 + 0.1 * garment.scale)
        case _:
            share = None
    many, deep = garment.folds
    shade = (
        light
        - deep * np.sin(many * u + np.sin(1.3 * v + many))
        - 0.1 * np.minimum(u * u, 2)
    )
    first, second = garment.colours
    dyed = first if share is None else first + share[..., None] * (second - first)
    # Dark cloth shines where it is lit, else its folds could not be seen.
    return shade[..., None] * (dyed + 40) - 40


def _ground(rng, garment, width, height) -> np.ndarray:
    """What is behind: light, but uneven; float32 [H, W, 3]."""
    spots = (
        garment.ground + rng.normal(-18, 36, (4, 3, 1)) + rng.normal(0, 6, (4, 3, 3))
    )
    small = Image.fromarray(spots.clip(0, 255).astype(np.uint8))
    large = small.resize((width, height), Image.Resampling.BILINEAR)
    ground = np.array(large, np.float32)
    # A floor, a curtain, or the edge of a shadow.
    level, slope, turned, dark = rng.random(4).tolist()
    across, down = (height, width) if turned < 0.3 else (width, height)
    first = ((0.2 + level) * down + (slope - 0.5) * np.arange(across)).astype(int)
    darker = np.arange(down)[:, None] > first
    darker = darker.T if turned < 0.3 else darker
    ground -= (20 + 60 * dark) * darker[..., None]
    return ground
