"""The sample edition of Fashion200k: drawn clothes with invented titles."""

import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.random import Generator, default_rng
from PIL import Image

from ccu_jax.data.readers.base import Progress
from ccu_jax.data.readers.fashion200k import FOLDERS, LABEL_FILES, SUB_CATEGORIES
from ccu_jax.data.samples.drawing import (
    CONTENT,
    STAGE,
    choose,
    encode_jpeg,
    invent_word,
    make_mask,
    rotate_axes,
)

_NUM_VIEWS_SHARES = (0.2, 0.25, 0.25, 0.2, 0.1)  # of products with 1, 2, ... images
_NOISE = 0.05  # fraction of products whose images show another category
_OWN_WORDS = 0.8  # fraction of typical words from the product's category
_PATTERNS = ("plain", "striped", "checked", "polka-dot", "floral", "colorblock")
_PATTERN_PERCENT = (44, 16, 12, 10, 12, 6)
_CONTENT = CONTENT["fashion200k"]
_COLORS = _CONTENT["colors"]
_CATEGORIES = _CONTENT["categories"]
_Kind = tuple[str, str]  # category and sub-category


class _Garment(NamedTuple):
    """A product; its views differ only in pose and light."""

    category: str
    length: float
    hem: float
    sleeve: float
    waist: float
    colors: np.ndarray  # float [2, 3], RGB in [0, 1]: the cloth and its pattern
    pattern: str  # a key of _PATTERNS
    scale: float  # of the pattern
    background: np.ndarray  # float [3], RGB in [0, 1]


def write(root: pathlib.Path, rows: int, seed: int, progress: Progress) -> None:
    """Writes the edition in the layout of the official folder `fashion-200k/`."""
    (root / "labels").mkdir()
    done = product = 0
    for name, size in zip(LABEL_FILES, _split_rows(rows), strict=True):
        category, end = LABEL_FILES[name][0], done + size
        with (root / "labels" / name).open("w", encoding="utf-8", newline="\n") as file:
            while done < end:
                rng = default_rng([seed, product])
                views = min(end - done, 1 + int(rng.choice(5, p=_NUM_VIEWS_SHARES)))
                number = _make_product_id(product, seed)
                for line in _write_product(root, rng, category, number, views):
                    progress(STAGE, done, rows)
                    file.write(line)
                    done += 1
                product += 1


def _split_rows(rows: int) -> list[int]:
    """Splits rows among label files in the official proportions, at least 1 each."""
    num_lines = [category["num_lines"] for category in _CATEGORIES.values()]
    shares = np.concatenate(num_lines)
    exact = 1 + (rows - len(shares)) * shares / shares.sum()
    sizes = exact.astype(int)
    sizes[np.argsort(sizes - exact, kind="stable")[: rows - sizes.sum()]] += 1
    return sizes.tolist()


def _make_product_id(product: int, seed: int) -> str:
    # The factor is coprime to the modulus, so ids are unique.
    return str(10_000_000 + (48_271_003 * (product + 1) + 7919 * seed) % 90_000_000)


def _write_product(
    root: pathlib.Path, rng: Generator, category: str, number: str, num_views: int
) -> Iterator[str]:
    """Writes the images of a product and yields each one's line of the label file."""
    kind = depicted = _sample_kind(rng, category)
    if rng.random() < _NOISE:
        wrong = choose(rng, [name for name in SUB_CATEGORIES if name != category])
        depicted = _sample_kind(rng, wrong)
    color, colors = _sample_colors(rng)
    start = 1 if color == "multicolor" else 0  # multicolor is never plain
    pattern = _PATTERNS[start + _sample_index(rng, _PATTERN_PERCENT[start:])]
    title = _invent_title(rng, kind, color, pattern)
    garment = _sample_garment(rng, depicted, colors, pattern)
    plural = next(folder for folder, name in FOLDERS.items() if name == category)
    folder = f"women/{plural}/{kind[1]}/{number}"
    (root / folder).mkdir(parents=True)
    # Indices have gaps, as where a detector did not find the garment.
    indices = np.sort(rng.permutation(num_views + int(rng.integers(3)))[:num_views])
    for index in indices.tolist():
        path = f"{folder}/{number}_{index}.jpeg"
        (root / path).write_bytes(_draw_view(rng, garment))
        yield f"{path}\t{-0.05 - rng.gamma(2, 0.8):.6f}\t{title}\n"


def _sample_kind(rng: Generator, category: str) -> _Kind:
    index = _sample_index(rng, _CATEGORIES[category]["shares"])
    return category, SUB_CATEGORIES[category][index]


def _sample_index(rng: Generator, shares: Sequence[float]) -> int:
    """Samples an index with probability proportional to its share."""
    return int(rng.choice(len(shares), p=np.array(shares) / np.sum(shares)))


def _sample_colors(rng: Generator) -> tuple[str, np.ndarray]:
    """Samples a color name and the RGB colors of cloth and pattern, float [2, 3]."""
    name = list(_COLORS)[_sample_index(rng, [share for share, *_ in _COLORS.values()])]
    _, *rgb = _COLORS[name]
    colors = rng.uniform(20, 240, (2, 3))
    if rgb:
        colors[0] = rgb + rng.normal(0, 10, 3)
        if rng.random() < 0.5:  # a lighter or darker shade
            sign = 1 if colors[0].mean() < 128 else -1
            colors[1] = colors[0] + sign * rng.uniform(40, 90)
    return name, colors.clip(0, 255) / 255


def _invent_title(rng: Generator, kind: _Kind, color: str, pattern: str) -> str:
    """Invents a title such as "blue striped linen wrap dress", up to 76 characters."""
    (category, sub_category), words = kind, []
    if rng.random() < 0.3:
        words.append(invent_word(rng))
    if rng.random() < 0.6 and pattern != "plain":
        words.append(pattern)
    for _ in range(int(rng.choice(7, p=(0.1, 0.37, 0.32, 0.13, 0.05, 0.02, 0.01)))):
        words.append(_sample_style_word(rng, kind))
    if rng.random() < 0.25:
        parts = sub_category.split("_")
        words.append(choose(rng, [w for w in parts[:-1] if w != "and"] or parts[:1]))
    if not words:
        words.append(_sample_style_word(rng, kind))
    is_usual = rng.random() < _CATEGORIES[category]["usual_noun"]
    noun = category if is_usual else choose(rng, _CONTENT["synonyms"][category])
    words = list(dict.fromkeys([color, *words, noun]))
    while len(" ".join(words)) > 76:
        words.pop(1)
    return " ".join(words)


def _sample_style_word(rng: Generator, kind: _Kind) -> str:
    """Samples a style word typical of the category, of another category, or of none."""
    if rng.random() < 0.3:
        return choose(rng, _CONTENT["common_words"])
    if rng.random() > _OWN_WORDS:
        kind = _sample_kind(rng, choose(rng, list(_CATEGORIES)))
    category, sub_category = kind
    words = _CONTENT["typical_words"][category]
    if rng.random() < 0.5:
        first = 2 * SUB_CATEGORIES[category].index(sub_category)
        words = words[first : first + 2]
    return choose(rng, words)


def _sample_garment(
    rng: Generator, kind: _Kind, colors: np.ndarray, pattern: str
) -> _Garment:
    category, sub_category = kind
    names, ranges = SUB_CATEGORIES[category], _CATEGORIES[category]
    fraction = (names.index(sub_category) + rng.random()) / len(names)
    low, high = ranges["length"]
    hem, sleeve, waist = (
        float(rng.uniform(*ranges[name])) for name in ("hem", "sleeve", "waist")
    )
    scale, background = float(rng.uniform(2.5, 8)), rng.uniform(0.65, 1, 3)
    length = low + (high - low) * fraction
    sizes = (length, hem, sleeve, waist)
    return _Garment(category, *sizes, colors, pattern, scale, background)


def _draw_view(rng: Generator, garment: _Garment) -> bytes:
    """Draws a garment in a random pose and light as a JPEG."""
    extent = 2 * max(garment.hem, 1.0 + 0.6 * garment.sleeve)
    height = int(rng.integers(72, 101))
    ratio = extent / garment.length * np.exp(rng.uniform(-0.25, 0.25))
    width = int(np.clip(height * ratio, 60, 100))
    step = max(garment.length / height, extent / width) / rng.uniform(0.7, 1.05)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    x = (x - width / 2) * step + extent * rng.uniform(-0.08, 0.08)
    y = (y - height / 2) * step * np.exp(rng.uniform(-0.15, 0.15))
    u, v = rotate_axes(x, y, rng.uniform(-0.2, 0.2))
    v = v + garment.length * rng.uniform(0.43, 0.57)
    mask = make_mask(
        _compute_outline_distance(garment, u, v, rng.uniform(0.2, 1.0)), 2 * step
    )
    background = garment.background + _sample_light(rng, width, height)
    folds = np.sin(rng.uniform(2, 8) * u + np.sin(1.3 * v))
    shade = rng.uniform(0.8, 1.15) - rng.uniform(0.02, 0.1) * folds
    # The offset makes folds visible on dark cloth.
    cloth = shade[..., None] * (_color_cloth(garment, u, v) + 0.15) - 0.15
    cloth = cloth + 0.5 * (background - garment.background)
    image = background + mask[..., None] * (cloth - background)
    image = image + rng.normal(0, 0.02, (height, width, 1))
    return encode_jpeg(image, int(rng.integers(70, 90)))


def _compute_outline_distance(
    garment: _Garment, u: np.ndarray, v: np.ndarray, spread: float
) -> np.ndarray:
    """Returns the approximate distance from the garment's outline, negative inside.

    `u` and `v` are pixel coordinates from the garment's middle and top; `spread`, in
    [0, 1], sets the angle of sleeves or legs.
    """
    length, side = garment.length, np.abs(u)
    outside = np.maximum(-v, v - length)
    if garment.category == "skirt":
        heights, widths = (0, 0.75, length), (garment.waist, 0.9, garment.hem)
        return np.maximum(outside, side - np.interp(v, heights, widths))
    if garment.category == "pants":
        heights = (1.2, length)
        center = np.interp(v, heights, (0.45, garment.hem + 0.05 + 0.4 * spread))
        leg = np.abs(side - center) - np.interp(v, heights, (0.45, garment.hem))
        hips = side - np.interp(v, (0, 0.8), (garment.waist, 0.9))
        return np.maximum(outside, np.where(v < 1.2, hips, leg))
    heights = (0, 0.2, 0.95, min(1.7, 0.8 * length), length)
    widths = (0.4, 0.98, 0.8, garment.waist, garment.hem)
    neckline = 0.3 - v - 0.8 * side
    body = np.maximum.reduce([outside, neckline, side - np.interp(v, heights, widths)])
    if garment.sleeve < 0.3:
        return body
    along, across = rotate_axes(side - 0.75, v - 0.25, np.pi / 2 - 0.2 - 0.9 * spread)
    end = np.abs(along - garment.sleeve / 2) - garment.sleeve / 2
    return np.minimum(body, np.maximum(end, np.abs(across) - 0.27))


def _color_cloth(garment: _Garment, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Returns the color of the cloth at each pixel, [H, W, 3]."""
    k, (first, second) = garment.scale, garment.colors
    match garment.pattern:
        case "striped":
            mix = np.sin(k * v) > 0
        case "checked":
            mix = 0.5 * ((np.sin(k * u) > 0) + 1.0 * (np.sin(k * v) > 0.2))
        case "polka-dot":
            mix = np.sin(k * u) * np.sin(k * v) > 0.45
        case "floral":
            mix = np.sin(k * u + 2 * np.sin(k * v)) * np.sin(k * v + 1.5 * u) > 0.25
        case "colorblock":
            mix = v > garment.length * (0.2 + 0.05 * k)
        case _:
            mix = np.zeros_like(u)
    return first + mix[..., None] * (second - first)


def _sample_light(rng: Generator, width: int, height: int) -> np.ndarray:
    """Samples a smooth brightness offset with a darker floor or wall, [H, W, 1]."""
    spots = rng.normal(-0.05, 0.12, (4, 3)).astype(np.float32)
    light = np.asarray(Image.fromarray(spots).resize((width, height)))
    edge = rng.uniform(0.3, 1.3) * height + rng.uniform(-0.5, 0.5) * np.arange(width)
    floor = np.arange(height)[:, None] > edge
    return (light - rng.uniform(0.05, 0.25) * floor)[..., None]
