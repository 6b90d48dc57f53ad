"""What the memes of the sample edition show and say: clip art, and a sentence with it.

A sentence is about one of four kinds of things, and so is a picture. Whether the two go
together can be told from neither alone. All sentences are invented.
"""

import colorsys
import io
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from ccu_jax.data.samples import posters


class Kind(NamedTuple):
    """Things that are alike; sentences name none of them, but say what they do."""

    pictures: str  # numbers of the clip art
    hues: tuple[float, float]  # of most backgrounds
    sayings: tuple[str, ...]


KINDS = (
    Kind(
        "0017 0018 0024 0029 0034 0071 0101 0116 0119 0124 "
        "0132 0146 0149 0154 0157 0159 0177 0186 0190 0191",
        (0.25, 0.45),
        (
            "feed it twice a day",
            "it sleeps on my feet",
            "stroke it behind the ears",
            "it ran into the woods",
            "it wants its belly scratched",
            "it chased the postman",
            "it snores and twitches",
            "it shed hair on the carpet",
        ),
    ),
    Kind(
        "0267 0298 0299 0306 0311 0321 0323 0329 0342 0345 "
        "0359 0362 0365 0376 0387 0398 0410 0416 0417 0449",
        (0.08, 0.16),
        (
            "eat it while it is warm",
            "it tastes of summer",
            "cut it into eight slices",
            "we had two for breakfast",
            "it melts on the tongue",
            "the recipe needs more sugar",
            "it goes well with tea",
            "swallow the last bite",
        ),
    ),
    Kind(
        "1251 1259 1295 1297 1302 1307 1308 1311 1312 1317 "
        "1319 1323 1333 1382 1383 1384 1385 1395 1405 1406",
        (0.55, 0.65),
        (
            "drive it to the coast",
            "fill the tank before noon",
            "the engine starts at last",
            "it needs new brakes",
            "the horn woke the street",
            "we ride it to work",
            "overtake on the left",
            "it stalls at every crossing",
        ),
    ),
    Kind(
        "0202 0208 0222 0225 0227 0228 0231 0232 0233 0235 "
        "0236 0237 0239 0240 0244 0245 0248 0252 0253 0254",
        (0.8, 0.95),
        (
            "the roof leaks again",
            "paint the front door blue",
            "we moved in last spring",
            "the rent went up",
            "nobody lives upstairs",
            "close the shutters at dusk",
            "the hall smells of plaster",
            "the cellar is full of boxes",
        ),
    ),
)
_TINTED = 0.85  # backgrounds in the hues of the kind
_OPENERS = (
    "",
    "when they say",
    "my aunt insists",
    "monday again and",
    "note to self",
    "everyone agrees",
    "me at six",
    "they told us",
    "breaking news",
    "once more",
    "you know what",
    "somebody wrote",
)
_ENDINGS = (
    "",
    "and that is that",
    "so wish me luck",
    "before the rain comes",
    "and nobody asked why",
    "like every tuesday",
    "because we can",
    "for the third time this week",
    "said the neighbour",
    "or so i heard",
    "thanks for asking",
    "what a day",
    "and then we laughed about it for an hour",
    "but please do not tell anybody until friday",
)
# Sentences that go with no picture at all.
_NUMBERS = ["three", "seven", "eleven", "forty", "zero"]
_NAMES = ["wednesday", "gravity", "silence", "october", "yesterday"]
_CLAIMS = (
    "{0} is a louder colour than {1}",
    "{1} weighs more than {0}",
    "the square root of {1} is {0}",
    "{0} times {1} makes a triangle",
    "{1} has {0} corners and no middle",
)


def sentence(rng: np.random.Generator, kind: int) -> str:
    """Something that is true of things of a kind, and of no others."""
    return _told(rng, _one(rng, KINDS[kind].sayings))


def nonsense(rng: np.random.Generator) -> str:
    """Something that is true of nothing."""
    return _told(rng, _one(rng, _CLAIMS).format(_one(rng, _NUMBERS), _one(rng, _NAMES)))


def _told(rng: np.random.Generator, saying: str) -> str:
    parts = (_one(rng, _OPENERS), saying, _one(rng, _ENDINGS))
    return " ".join(part for part in parts if part)


def _one(rng: np.random.Generator, pool):
    return pool[rng.integers(len(pool))]


def draw(rng: np.random.Generator, kind: int) -> bytes:
    """A picture of a thing of a kind on a background of its own, as PNG.

    Without the sentence: the official files have it as a text of its own, too, and
    memes with one picture then have the very same one.
    """
    name = _one(rng, KINDS[kind].pictures.split())
    size = rng.integers(100, 141, 2)
    hues = KINDS[kind].hues if rng.random() < _TINTED else rng.random(2)
    canvas = _background(rng, *size.tolist(), rng.permutation(hues))
    _put(rng, canvas, posters.cutout(f"images/{name}.jpg"))
    file = io.BytesIO()
    Image.fromarray(canvas).save(file, "png", compress_level=4)
    return file.getvalue()


def _background(rng: np.random.Generator, width: int, height: int, hues) -> np.ndarray:
    """uint8 [height, width, 3]: two colours in a wavy gradient, and discs of a third.

    Various enough that no two are nearly the same; even stripes make small files.
    """
    first, second, third = (
        np.array(
            colorsys.hsv_to_rgb(
                (hue + rng.normal(0, 0.03)) % 1,
                rng.uniform(0.2, 0.75),
                rng.uniform(0.55, 1),
            )
        )
        for hue in (*hues, rng.random())
    )
    y, x = np.mgrid[0:height, 0:width] / height
    angle = rng.uniform(0, 2 * np.pi)
    along = np.cos(angle) * x + np.sin(angle) * y
    across = np.cos(angle) * y - np.sin(angle) * x
    wave = rng.uniform(0.05, 0.2) * np.sin(rng.uniform(3, 15) * across + 6 * angle)
    along = along + wave
    mix = np.round(20 * (along - along.min()) / np.ptp(along)) / 20
    image = first + mix[..., None] * (second - first)
    image = Image.fromarray((255 * image).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(rng.integers(3, 7)):
        radius = rng.uniform(0.12, 0.35) * width
        left, top = rng.uniform(-radius, width), rng.uniform(-radius, height)
        shade = third * rng.uniform(0.6, 1)
        pen.ellipse(
            (left, top, left + 2 * radius, top + 2 * radius),
            fill=tuple((255 * shade).astype(int).tolist()),
        )
    return np.array(image)


def _put(rng: np.random.Generator, canvas: np.ndarray, picture: Image.Image) -> None:
    """Draws a thing somewhere on the canvas; its white lets the ground through."""
    height, width = canvas.shape[:2]
    share = rng.uniform(0.65, 0.95)
    scale = share * min(width / picture.width, height / picture.height)
    size = [max(4, int(scale * side)) for side in picture.size]
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    left = int(rng.integers(0, width - size[0] + 1))
    top = int(rng.integers(0, height - size[1] + 1))
    part = canvas[top : top + size[1], left : left + size[0]]
    part[:] = part * np.asarray(picture, np.uint16) // 255
