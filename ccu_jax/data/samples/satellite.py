"""A worked example: generated tiles that look like land from above, invented metadata.

No satellite and no real place is behind it: everything is drawn and written by this
file and its neighbour. It shows the form in which such data may be kept (one class a
tile, several tiles a scene, a split by scene).
"""

import functools
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ccu_jax.data.readers.base import Progress
from ccu_jax.data.samples import pairs_edition
from ccu_jax.data.samples.tiles import draw


class _Land(NamedTuple):
    """What the metadata of a class lean to."""

    share: float  # of all tiles
    words: tuple[str, ...]  # of the region
    height: float  # of the ground, metres, typically
    winter: float  # share of the tiles taken in winter


_LANDS = {
    "desert": _Land(0.10, ("basin", "plateau", "dune field", "dry valley"), 700, 0.3),
    "farmland": _Land(0.18, ("plain", "river plain", "lowland", "village"), 150, 0.2),
    "forest": _Land(0.16, ("reserve", "hills", "upland", "timber district"), 500, 0.2),
    "industrial": _Land(0.11, ("harbour", "junction", "ring road", "quarter"), 60, 0.3),
    "residential": _Land(0.16, ("suburb", "quarter", "ring road", "village"), 90, 0.3),
    "snow": _Land(0.09, ("glacier", "pass", "upland", "summit"), 2200, 0.7),
    "water": _Land(0.11, ("bay", "lake", "harbour", "strait"), 10, 0.3),
    "wetland": _Land(0.09, ("delta", "estuary", "lowland", "reserve"), 8, 0.3),
}
_MONTHS = {
    "winter": ("December", "January", "February"),
    "spring": ("March", "April", "May"),
    "summer": ("June", "July", "August"),
    "autumn": ("September", "October", "November"),
}
_SENSORS = ("Alba-2", "Corvus", "Meridian-1", "Terrascope")
_DIRECTIONS = ("northern", "southern", "eastern", "western", "inner", "outer")
_FORMS = (
    "{sensor}, {month}. {Direction} {word}, {height} m. {sky}.",
    "{season} pass of {sensor} over the {direction} {word}; {height} m; {sky}.",
    "Scene {number}: {word}, {direction} part. {month}, {sensor}. {sky}.",
    "{direction} {word}, {season}, elevation {height} m, {sensor}, {sky}.",
)
_SKIES = ("clear", "thin haze", "scattered cloud", "low sun", "good visibility")
_OWN = 0.7  # a word of the region fits the tile's class
_KIND = 0.75  # a tile has the class that its scene is mostly of
_SWAPPED = 0.15  # tiles whose picture shows more of another class than of theirs
_MISTAKEN = 0.05  # tiles with a wrong label


def write(root: pathlib.Path, rows: int, seed: int, progress: Progress) -> None:
    """Writes `pairs.jsonl` and `images/`."""
    sizes = pairs_edition.cut(
        np.random.default_rng([seed, 0]).integers(2, 5, rows), rows
    )
    pairs_edition.write(
        root, sizes, seed, functools.partial(_scene, seed), "s", progress
    )


def _scene(seed: int, scene: int, tiles: int) -> Iterator[dict]:
    """The rows of one scene, each with its picture's bytes."""
    rng = np.random.default_rng([seed, 1, scene])
    names = list(_LANDS)
    shares = [land.share for land in _LANDS.values()]
    kind = str(rng.choice(names, p=shares))
    sensor, direction = str(rng.choice(_SENSORS)), str(rng.choice(_DIRECTIONS))
    for _ in range(tiles):
        cover = kind if rng.random() < _KIND else str(rng.choice(names, p=shares))
        beside = str(rng.choice(names))
        share = float(rng.uniform(0.15, 0.49)) if rng.random() < 0.75 else 0.0
        season = _season(rng, _LANDS[cover].winter)
        text = _metadata(rng, cover, season, sensor, direction)
        shown = (beside, cover) if rng.random() < _SWAPPED else (cover, beside)
        picture = draw(rng, *shown, share, season == "winter")
        label = str(rng.choice(names)) if rng.random() < _MISTAKEN else cover
        yield {"picture": picture, "text": text, "label": label}


def _season(rng: np.random.Generator, winter: float) -> str:
    rest = (1 - winter) / 3
    return str(rng.choice(list(_MONTHS), p=[winter, rest, rest, rest]))


def _metadata(
    rng: np.random.Generator, cover: str, season: str, sensor: str, direction: str
) -> str:
    land = _LANDS[cover if rng.random() < _OWN else str(rng.choice(list(_LANDS)))]
    height = land.height * rng.lognormal(0, 0.6)
    step = 10 if height < 1000 else 100
    form = _FORMS[rng.integers(len(_FORMS))]
    text = form.format(
        sensor=sensor,
        month=rng.choice(_MONTHS[season]),
        season=season,
        direction=direction,
        Direction=direction.capitalize(),
        word=rng.choice(land.words),
        height=int(height / step) * step,
        number=int(rng.integers(1000, 9999)),
        sky=rng.choice(_SKIES),
    )
    return text[0].upper() + text[1:]
