"""Draws pictures that look like X-rays of a chest: shades of grey, nothing real."""

from typing import NamedTuple

import numpy as np

from ccu_jax.data.samples.drawing import grid, jpeg, smooth, soft, turned


class Body(NamedTuple):
    """How one invented patient is built; all in units of half a picture."""

    lung: float  # height of the lungs, to each side of their middle
    breadth: float  # of a lung
    ribs: float  # arcs from top to bottom
    bend: float  # how much the arcs hang
    fat: float  # brightness of what lies around


def body(rng: np.random.Generator) -> Body:
    """An invented patient."""
    return Body(
        lung=float(rng.uniform(0.58, 0.76)),
        breadth=float(rng.uniform(0.30, 0.38)),
        ribs=float(rng.uniform(4.5, 7.0)),
        bend=float(rng.uniform(0.2, 0.9)),
        fat=float(rng.uniform(0.52, 0.70)),
    )


def draw(rng: np.random.Generator, patient: Body, shown: set[str]) -> bytes:
    """One study as a greyscale JPEG, 72 to 96 pixels a side.

    Args:
        rng: Pose, exposure and clutter, which differ from study to study.
        patient: Whose chest it is.
        shown: The findings that can be seen in it.
    """
    size = int(rng.integers(72, 97))
    x, y = _posed(rng, size)
    if "scoliosis" in shown:
        curve = rng.choice([-1, 1]) * rng.uniform(0.16, 0.26)
        x = x + curve * np.sin(2.6 * y + rng.uniform(-0.5, 0.5))
    side, other = rng.choice([-1, 1], 2).tolist()  # where findings of one side are
    image = patient.fat * soft(np.abs(x) - 0.98 + 0.25 * (y < -0.6), 0.1)
    image += 0.09 * smooth(rng, size, 4) + 0.04 * smooth(rng, size, 9)
    lungs = {}
    for s in (-1, 1):
        lungs[s] = _ellipse(x - 0.45 * s, y, patient.breadth, patient.lung)
        image -= (0.36 + rng.normal(0, 0.04)) * soft(lungs[s], 0.12)
    inside = soft(np.minimum(lungs[-1], lungs[1]), 0.06)
    arcs = patient.ribs * np.pi * (y + patient.bend * x * x)
    ribs = 0.13 * np.maximum(np.sin(arcs), 0)
    if "pneumothorax" in shown:
        image, ribs = _collapsed(image, ribs, lungs[side], x * side, y)
    image += ribs * inside
    if "fracture" in shown:
        image -= _broken(rng, x * other, y, inside)
    if "consolidation" in shown:
        image += _patch(rng, size, x * other, y) * soft(lungs[other], 0.1)
    if "nodule" in shown:
        image += _nodule(rng, x * side, y)
    image += 0.26 * soft(np.abs(x) - 0.10, 0.08)  # the spine
    wide = rng.uniform(0.26, 0.36) + 0.22 * ("cardiomegaly" in shown)
    image += 0.30 * soft(_ellipse(x - 0.14, y - 0.32, wide, 0.34), 0.08)
    image += 0.34 * soft(patient.lung - 0.1 - y + 0.25 * (np.abs(x) - 0.45) ** 2, 0.06)
    if "effusion" in shown:
        level = rng.uniform(-0.16, 0.12) + 0.4 * x * side
        image += 0.40 * soft(level - y, 0.06) * (x * side < 0)
    if "device" in shown:
        image = np.maximum(image, _device(rng, x, y))
    return _exposed(rng, image, size)


def _posed(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of the chest at each pixel: it is never held the same way twice."""
    x, y = turned(*grid(size), rng.normal(0, 0.08))
    zoom = rng.uniform(0.88, 1.12)
    x = (x - rng.normal(0, 0.09)) * zoom * rng.uniform(0.94, 1.06)
    return x, (y - rng.normal(0, 0.09)) * zoom


def _ellipse(x, y, breadth: float, height: float) -> np.ndarray:
    """Roughly the distance from an ellipse's edge, negative within."""
    distance = np.sqrt((x / breadth) ** 2 + (y / height) ** 2)
    return (distance - 1) * min(breadth, height)


def _collapsed(image, ribs, lung, x, y):
    """A dark rim on one side, without the lung's texture, and a bright line."""
    where = (x > 0.2) * soft(y - 0.1, 0.5)
    rim = soft(-lung - 0.18, 0.03) * soft(lung, 0.05) * where
    line = np.exp(-(((lung + 0.18) / 0.025) ** 2)) * where
    return image - 0.24 * rim + 0.24 * line, ribs * (1 - 0.8 * rim)


def _broken(rng, x, y, inside):
    """A dark slanting line through the ribs of one side."""
    along, across = turned(
        x - rng.uniform(0.35, 0.55), y - rng.uniform(-0.4, 0.2), rng.uniform(0.6, 1.0)
    )
    return 0.5 * np.exp(-((across / 0.045) ** 2)) * soft(np.abs(along) - 0.28, 0.05)


def _patch(rng, size, x, y):
    """A hazy, grainy patch."""
    far = np.hypot(x - rng.uniform(0.35, 0.55), y - rng.uniform(-0.35, 0.25))
    return (0.3 + 0.1 * smooth(rng, size, 16)) * soft(
        far - rng.uniform(0.24, 0.36), 0.2
    )


def _nodule(rng, x, y):
    """A small round spot in a lung."""
    far = np.hypot(x - rng.uniform(0.32, 0.58), y - rng.uniform(-0.45, 0.2))
    return 0.5 * soft(far - rng.uniform(0.09, 0.14), 0.05)


def _device(rng, x, y):
    """A bright box below the collarbone, and the wire that leads from it."""
    x0, y0 = rng.uniform(0.42, 0.56), rng.uniform(-0.58, -0.44)
    box = soft(np.maximum(np.abs(x - x0) - 0.15, np.abs(y - y0) - 0.11), 0.04)
    path = x0 - (x0 - 0.1) * np.clip((y - y0) / (0.35 - y0), 0, 1) ** 0.5
    wire = np.exp(-(((x - path) / 0.02) ** 2)) * ((y > y0) & (y < 0.35))
    return 0.98 * np.maximum(box, 0.85 * wire)


def _exposed(rng, image, size: int) -> bytes:
    """Exposure, a beam that fades, grain, and the edge of the plate."""
    x, y = grid(size)
    fade = rng.normal(0, 0.05) * x + rng.normal(0, 0.05) * y
    image = (image + fade) * rng.uniform(0.85, 1.15) + rng.normal(0, 0.04)
    image = image + rng.normal(0, rng.uniform(0.01, 0.03), image.shape)
    left, right, top, bottom = rng.integers(0, size // 9, 4) * (rng.random(4) < 0.4)
    plate = np.full((size, size), 0.02)
    inner = slice(top, size - bottom), slice(left, size - right)
    plate[inner] = image[inner]
    if rng.random() < 0.5:  # the letter of the side, as a bright mark
        row, column = rng.integers(2, 9), rng.choice([3, size - 9])
        plate[row : row + 6, column : column + 4] = 0.95
    return jpeg(plate, int(rng.integers(78, 93)))
