"""A sample in the pairs format: drawn tiles of land seen from above, and metadata.

All tiles and metadata are synthetic: they show no real place. The edition shows how
such data can be stored: one class per tile, several tiles per scene, a split by scene.
"""

import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.random import Generator, default_rng

from ccu_jax.data.readers.base import Progress
from ccu_jax.data.samples.drawing import (
    CONTENT,
    choose,
    encode_jpeg,
    make_grid,
    make_mask,
    rotate_axes,
    sample_field,
    write_pairs,
)

_Color = tuple[float, float, float]
_CONTENT = CONTENT["satellite"]
_OWN_METADATA = 0.7  # fraction of tiles with metadata typical of their class
_SCENE_CLASS = 0.75  # fraction of tiles with the main class of their scene
_MIXED = 0.75  # fraction of tiles that show a second class
_SWAPPED = 0.15  # fraction of tiles that mostly show the second class
_LABEL_NOISE = 0.05  # fraction of tiles with a random label
_GREY = 0.35  # fraction of tiles with almost no color
# Percent of red, green and blue.
_ROOFS = np.array([(62, 34, 26), (50, 42, 36), (58, 56, 54), (30, 38, 22)]) / 100
_HALLS = np.array([(80, 80, 78), (60, 63, 66), (46, 46, 46), (36, 42, 50)]) / 100
_FIELDS = np.array([(30, 42, 16), (55, 52, 26), (46, 36, 24), (40, 50, 24)]) / 100


def write(root: pathlib.Path, rows: int, seed: int, progress: Progress) -> None:
    """Writes `pairs.jsonl` and `images/` of the generated land tiles."""
    rng = default_rng([seed, 0])
    sizes = rng.integers(2, 5, rows)
    write_pairs(root, rows, sizes, seed, _draw_scene, "s", progress)


def _draw_scene(seed: int, scene: int, num_tiles: int) -> Iterator[dict]:
    """Yields the rows of one scene's tiles; see `write_pairs`."""
    rng = default_rng([seed, 1, scene])
    names = list(_LANDS)
    shares = [land.share for land in _LANDS.values()]
    main = str(rng.choice(names, p=shares))
    sensor, direction = (
        str(rng.choice(_CONTENT[n])) for n in ("sensors", "directions")
    )
    for _ in range(num_tiles):
        is_main = rng.random() < _SCENE_CLASS
        cover = main if is_main else str(rng.choice(names, p=shares))
        second = str(rng.choice(names))
        share = float(rng.uniform(0.15, 0.49)) if rng.random() < _MIXED else 0.0
        winter = _LANDS[cover].winter_fraction
        rest = (1 - winter) / 3
        season = str(rng.choice(list(_CONTENT["months"]), p=[winter, rest, rest, rest]))
        text = _invent_metadata(rng, cover, season, sensor, direction)
        classes = (second, cover) if rng.random() < _SWAPPED else (cover, second)
        image = _draw_tile(rng, *classes, share, season == "winter")
        label = str(rng.choice(names)) if rng.random() < _LABEL_NOISE else cover
        yield {"image": image, "text": text, "label": label}


def _invent_metadata(
    rng: Generator, cover: str, season: str, sensor: str, direction: str
) -> str:
    is_own = rng.random() < _OWN_METADATA
    described = cover if is_own else str(rng.choice(list(_LANDS)))
    elevation = _LANDS[described].elevation * rng.lognormal(0, 0.6)
    step = 10 if elevation < 1000 else 100
    text = choose(rng, _CONTENT["forms"]).format(
        sensor=sensor,
        month=rng.choice(_CONTENT["months"][season]),
        season=season,
        direction=direction,
        Direction=direction.capitalize(),
        region=rng.choice(_CONTENT["regions"][described]),
        elevation=int(elevation / step) * step,
        number=int(rng.integers(1000, 9999)),
        sky=rng.choice(_CONTENT["skies"]),
    )
    return text[0].upper() + text[1:]


def _draw_tile(
    rng: Generator, cover: str, second: str, share: float, is_winter: bool
) -> bytes:
    """Draws a tile as a JPEG; `share` < 0.5 is the second class's area fraction."""
    size = int(rng.integers(64, 81))
    image = _LANDS[cover].draw(rng, size)
    if share:
        x, _ = rotate_axes(*make_grid(size), rng.uniform(0, 2 * np.pi))
        edge = x + 0.25 * sample_field(rng, size, 5)
        mask = make_mask(np.quantile(edge, 1 - share) - edge, 0.05)[..., None]
        image = image + mask * (_LANDS[second].draw(rng, size) - image)
    grey = image.mean(axis=2, keepdims=True)
    if is_winter:
        image = 0.6 * image + 0.4 * (grey * np.array([1.05, 1.0, 0.92]))
    if rng.random() < _GREY:
        image = 0.15 * image + 0.85 * grey
    # Relief and uneven light keep tiles from being near-duplicates.
    image = image * (1 + 0.14 * sample_field(rng, size, 3)[..., None])
    # Simulate sensor gain, haze, clouds and noise.
    image = image * rng.uniform(0.7, 1.25) * rng.normal(1, 0.12, 3)
    haze = rng.uniform(0, 0.5) if rng.random() < 0.6 else 0.0
    image = image + haze * (np.array([0.75, 0.8, 0.85]) - image)
    if rng.random() < 0.4:
        cloud = make_mask(0.9 - sample_field(rng, size, 4), 0.8)[..., None]
        image = image + cloud * rng.uniform(0.5, 0.9) * (0.95 - image)
    image = image + rng.normal(0, rng.uniform(0.005, 0.04), image.shape)
    return encode_jpeg(image, int(rng.integers(75, 92)))


def _blend_colors(field: np.ndarray, low: _Color, high: _Color) -> np.ndarray:
    start, end = np.array(low), np.array(high)
    return start + field.clip(0, 1)[..., None] * (end - start)


def _sample_axes(rng: Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the pixel coordinates x and y in a randomly rotated frame."""
    return rotate_axes(*make_grid(size), rng.uniform(0, np.pi))


def _draw_water(rng: Generator, size: int) -> np.ndarray:
    along, _ = _sample_axes(rng, size)
    waves = np.sin(rng.uniform(14, 30) * along + 1.5 * sample_field(rng, size, 4))
    depth = 0.45 + 0.2 * sample_field(rng, size, 2) + 0.05 * waves
    return _blend_colors(depth, (0.03, 0.12, 0.24), (0.18, 0.42, 0.48))


def _draw_forest(rng: Generator, size: int) -> np.ndarray:
    fine = sample_field(rng, size, size // 4)
    crowns = 0.5 + 0.22 * fine + 0.16 * sample_field(rng, size, 6)
    return _blend_colors(crowns, (0.04, 0.14, 0.06), (0.24, 0.38, 0.16))


def _draw_farmland(rng: Generator, size: int) -> np.ndarray:
    x, y = _sample_axes(rng, size)
    columns = np.digitize(x, np.sort(rng.uniform(-1.2, 1.2, rng.integers(2, 5))))
    rows = np.digitize(y, np.sort(rng.uniform(-1.2, 1.2, rng.integers(2, 5))))
    index = rng.integers(0, len(_FIELDS), 36)[columns * 6 + rows]
    furrows = np.sin(40 * np.where(index % 2, x, y)) * 0.04
    texture = furrows + 0.03 * sample_field(rng, size, 10)
    return _FIELDS[index] + texture[..., None]


def _draw_buildings(
    num_blocks_range: tuple[float, float],
    street_width: float,
    roofs: np.ndarray,
    rng: Generator,
    size: int,
) -> np.ndarray:
    num_blocks = rng.uniform(*num_blocks_range)
    x, y = _sample_axes(rng, size)
    x, y = (x + 3) * num_blocks / 2, (y + 3) * num_blocks / 2
    index = rng.integers(0, len(roofs), (40, 40))[x.astype(int), y.astype(int)]
    image = roofs[index]
    image[(x % 1 < street_width) | (y % 1 < street_width)] = (0.40, 0.40, 0.38)
    return image + 0.05 * sample_field(rng, size, size // 3)[..., None]


def _draw_desert(rng: Generator, size: int) -> np.ndarray:
    along, _ = _sample_axes(rng, size)
    dunes = np.sin(rng.uniform(6, 16) * along + 2.2 * sample_field(rng, size, 4))
    sand = 0.55 + 0.2 * dunes + 0.12 * sample_field(rng, size, 3)
    return _blend_colors(sand, (0.50, 0.36, 0.22), (0.86, 0.74, 0.54))


def _draw_snow(rng: Generator, size: int) -> np.ndarray:
    ridges = 1 - np.abs(sample_field(rng, size, int(rng.integers(4, 9))))
    rock = make_mask(1.0 - sample_field(rng, size, 5), 0.3)[..., None]
    white = _blend_colors(0.35 + 0.5 * ridges, (0.50, 0.58, 0.68), (0.96, 0.97, 0.99))
    return white + rock * (np.array([0.34, 0.32, 0.30]) - white)


def _draw_wetland(rng: Generator, size: int) -> np.ndarray:
    reeds = 0.5 + 0.2 * sample_field(rng, size, 12) + 0.15 * sample_field(rng, size, 4)
    land = _blend_colors(reeds, (0.18, 0.22, 0.10), (0.44, 0.44, 0.26))
    distance = np.abs(sample_field(rng, size, int(rng.integers(4, 7)))) - 0.3
    creeks = make_mask(distance, 0.25)[..., None]
    return land + creeks * (np.array([0.10, 0.18, 0.22]) - land)


class _Land(NamedTuple):
    """A land cover class with its typical metadata."""

    share: float  # of all tiles
    elevation: float  # metres
    winter_fraction: float  # share of the tiles taken in winter
    draw: Callable[[Generator, int], np.ndarray]


_draw_houses = functools.partial(_draw_buildings, (5, 8), 0.26, _ROOFS)
_draw_halls = functools.partial(_draw_buildings, (1.6, 3.2), 0.16, _HALLS)
_LANDS = {
    "desert": _Land(0.10, 700, 0.3, _draw_desert),
    "farmland": _Land(0.18, 150, 0.2, _draw_farmland),
    "forest": _Land(0.16, 500, 0.2, _draw_forest),
    "industrial": _Land(0.11, 60, 0.3, _draw_halls),
    "residential": _Land(0.16, 90, 0.3, _draw_houses),
    "snow": _Land(0.09, 2200, 0.7, _draw_snow),
    "water": _Land(0.11, 10, 0.3, _draw_water),
    "wetland": _Land(0.09, 8, 0.3, _draw_wetland),
}
