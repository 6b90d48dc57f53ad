"""The clothes of the Fashion200k sample edition, before they are drawn: their measures.

Lengths are in units of half a garment's shoulders. Nobody wears it.
"""

import math
from typing import NamedTuple

import numpy as np


class Cut(NamedTuple):
    """What the garments of a sub-category have in common; ranges to draw from."""

    kind: str  # "body", "skirt" or "pants"
    length: tuple[float, float]
    hem: tuple[float, float]  # half of its width
    sleeve: tuple[float, float] = (0.0, 0.0)  # length; below 0.3 there is none
    waist: tuple[float, float] = (0.6, 0.9)
    front: str = ""  # "open", "buttons", "quilted", "pockets", "collar" or nothing
    bare: float = 0.0  # share that leaves the shoulders free


class Garment(NamedTuple):
    """One garment; each of its views shows the same."""

    cut: Cut
    length: float
    hem: float
    sleeve: float
    waist: float
    hip: float
    neck: tuple[float, float]  # half of its width, and its depth
    round: bool  # the neck, else pointed
    bare: bool
    flare: float  # of sleeves
    fringe: float  # how uneven its edge is
    colours: np.ndarray  # float32 [2, 3], in [0, 255]
    pattern: str
    scale: float  # of the pattern
    folds: tuple[float, float]  # how many, and how deep
    ground: np.ndarray  # float32 [3]: the colour behind it


CUTS = {
    "cocktail_dresses": Cut("body", (3.6, 4.6), (0.8, 1.5), (0, 0.6), (0.6, 0.75)),
    "prom_and_formal_dresses": Cut(
        "body", (5.0, 6.4), (1.4, 2.8), (0, 0.4), (0.55, 0.7), bare=0.6
    ),
    "mini_and_short_dresses": Cut("body", (2.9, 3.9), (0.9, 1.6), (0, 1.8)),
    "casual_and_day_dresses": Cut("body", (3.3, 4.8), (1.0, 1.8), (0, 1.8), (0.7, 1.0)),
    "maxi_and_long_dresses": Cut("body", (5.0, 6.5), (1.0, 2.0), (0, 1.2), bare=0.2),
    "gowns": Cut("body", (5.5, 7.0), (1.2, 3.0), (0, 2.2), (0.55, 0.75), bare=0.4),
    "casual_jackets": Cut(
        "body", (2.2, 3.3), (0.9, 1.2), (1.6, 2.5), (0.8, 1.0), "open"
    ),
    "leather_jackets": Cut(
        "body", (1.8, 2.5), (0.8, 1.0), (2.0, 2.5), (0.75, 0.9), "open"
    ),
    "waistcoats_and_gilets": Cut(
        "body", (1.9, 3.4), (0.9, 1.2), (0, 0), (0.7, 1.0), "open"
    ),
    "padded_and_down_jackets": Cut(
        "body", (2.1, 3.6), (0.9, 1.3), (1.9, 2.5), (0.9, 1.2), "quilted"
    ),
    "blazers_and_suit_jackets": Cut(
        "body", (2.2, 3.0), (0.9, 1.15), (1.8, 2.5), (0.7, 0.9), "collar"
    ),
    "denim_jackets": Cut(
        "body", (1.8, 2.4), (0.8, 1.0), (1.9, 2.4), (0.8, 0.9), "pockets"
    ),
    "fur_jackets": Cut("body", (1.9, 3.2), (1.0, 1.5), (1.5, 2.5), (0.9, 1.3), "open"),
    "leggings": Cut("pants", (4.0, 5.0), (0.18, 0.28), waist=(0.55, 0.7)),
    "wide-leg_and_palazzo_pants": Cut("pants", (4.2, 5.4), (0.6, 1.1)),
    "cropped_pants": Cut("pants", (2.8, 3.9), (0.25, 0.6)),
    "skinny_pants": Cut("pants", (4.0, 4.9), (0.2, 0.3), front="pockets"),
    "straight-leg_pants": Cut("pants", (4.2, 5.0), (0.34, 0.46), front="pockets"),
    "full_length_pants": Cut("pants", (4.3, 5.2), (0.3, 0.6)),
    "harem_pants": Cut("pants", (3.6, 4.6), (0.22, 0.35), (0.3, 0.6)),
    "cargo_pants": Cut("pants", (3.8, 4.9), (0.35, 0.5), front="pockets"),
    "mid_length_skirts": Cut("skirt", (2.4, 3.4), (0.7, 1.7)),
    "mini_skirts": Cut("skirt", (1.3, 2.0), (0.8, 1.5)),
    "knee_length_skirts": Cut("skirt", (1.9, 2.7), (0.7, 1.6)),
    "maxi_skirts": Cut("skirt", (3.6, 4.8), (0.8, 2.0)),
    "long_sleeved_tops": Cut("body", (1.8, 3.0), (0.75, 1.2), (1.6, 2.5), (0.7, 1.0)),
    "short_sleeve_tops": Cut("body", (1.7, 2.8), (0.7, 1.2), (0.5, 1.1), (0.7, 1.0)),
    "shirts": Cut("body", (2.1, 3.0), (0.8, 1.1), (0.6, 2.5), (0.75, 1.0), "buttons"),
    "sleeveless_and_tank_tops": Cut("body", (1.7, 2.8), (0.7, 1.2), (0, 0), bare=0.15),
    "t-shirts": Cut("body", (1.9, 2.6), (0.8, 1.0), (0.5, 0.9), (0.8, 1.0)),
    "blouses": Cut("body", (1.9, 2.9), (0.8, 1.4), (0.6, 2.4), (0.7, 1.1), "buttons"),
}


def design(
    rng: np.random.Generator, sub: str, colours: np.ndarray, pattern: str
) -> Garment:
    """A garment of a sub-category.

    Args:
        rng: Where the choices come from.
        sub: A key of CUTS.
        colours: float [2, 3] in [0, 255]; the second is that of the pattern.
        pattern: "plain", "striped", "checked", "dotted", "floral" or "blocked".
    """
    cut = CUTS[sub]
    draw = rng.random(16).tolist()
    ranges = zip((cut.length, cut.hem, cut.sleeve, cut.waist), draw, strict=False)
    length, hem, sleeve, waist = (low + (high - low) * x for (low, high), x in ranges)
    return Garment(
        cut,
        length,
        hem,
        sleeve,
        waist,
        hip=max(waist + 0.05, 0.75 + 0.35 * draw[4]),
        neck=(0.2 + 0.35 * draw[5], 0.1 + 0.8 * draw[6] ** 2),
        round=draw[7] < 0.5,
        bare=draw[8] < cut.bare,
        flare=0.15 + 0.35 * draw[9] ** 2,
        fringe=0.1 if sub == "fur_jackets" else 0.02 * draw[10],
        colours=np.asarray(colours, np.float32),
        pattern=pattern,
        scale=math.exp(0.2 + 1.3 * draw[11]),
        folds=(2 + 8 * draw[12], 0.04 + 0.2 * draw[13] ** 2),
        ground=(232 - 60 * draw[14] ** 3 + 22 * rng.random(3)).astype(np.float32),
    )
