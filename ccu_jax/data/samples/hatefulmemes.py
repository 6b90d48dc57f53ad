"""The sample edition of Hateful Memes: harmless memes of clip art and a sentence.

A sentence is about one of four kinds of objects, and an image shows an object of one
kind. The label is 1 if the kinds differ, so as in the official files it cannot be
predicted from the image or the sentence alone. All sentences are invented.
"""

import json
import pathlib
import shutil
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator, default_rng
from PIL import Image, ImageDraw

from ccu_jax.data.readers.base import Progress
from ccu_jax.data.samples.drawing import (
    CONTENT,
    STAGE,
    choose,
    encode_pixels,
    hsv_to_rgb,
    load_cutout,
    multiply_image,
    sample_oriented_grid,
    scale_and_flip,
)

# Official numbers of distinct memes, and approximate shares with label 1. "dev_both"
# is in both dev files.
_SPLITS = {
    "train": (8500, 0.36),
    "dev_both": (400, 0.40),
    "dev_seen": (100, 0.90),
    "dev_unseen": (140, 0.29),
    "test_seen": (1000, 0.49),
    "test_unseen": (2000, 0.375),
}
# Share of the memes with label 1 whose sentence suffices (Kiela et al. 2020).
_TEXT_SUFFICES = 0.2
# Of the memes with label 0: the share with the image of a meme with label 1 and another
# sentence, and the share with the sentence of a meme with label 1 and another image.
_TEXT_CONFOUNDERS, _IMAGE_CONFOUNDERS = 0.4, 0.4
_MIN_ID, _MIN_FIVE_DIGITS, _END_ID = 1235, 10_000, 98_765
_TINTED = 0.85  # fraction of backgrounds in the hues of their kind
_CONTENT = CONTENT["hatefulmemes"]
_KINDS = list(_CONTENT["kinds"].values())


class _Meme(NamedTuple):
    """A meme whose image is not yet drawn."""

    image: int  # index among the images of its split
    image_kind: int
    text_kind: int  # -1: the sentence matches no kind
    text: str
    label: int


def write(root: pathlib.Path, rows: int, seed: int, progress: Progress) -> None:
    """Writes `data/img/` and five annotation files, as in the official archive."""
    data = root / "data"
    (data / "img").mkdir(parents=True)
    ids = _sample_ids(default_rng([seed, 0]), rows)
    totals = [total for total, _ in _SPLITS.values()]
    ends = (np.cumsum(totals) * rows // sum(totals)).tolist()
    entries: dict[str, list[dict[str, Any]]] = {}
    for part, (name, (_, share)) in enumerate(_SPLITS.items()):
        rng = default_rng([seed, 1, part])
        start = ends[part - 1] if part else 0
        memes = _invent_memes(rng, ends[part] - start, share)
        paths: dict[int, pathlib.Path] = {}
        entries[name] = []
        for done, meme in enumerate(memes, start):
            progress(STAGE, done, rows)
            path = data / "img" / f"{ids[done]}.png"
            if meme.image in paths:
                shutil.copyfile(paths[meme.image], path)
            else:
                rng = default_rng([seed, 2, part, meme.image])
                path.write_bytes(_draw_image(rng, _KINDS[meme.image_kind]))
                paths[meme.image] = path
            row = {"id": ids[done], "img": f"img/{path.name}"}
            entries[name].append(row | {"label": meme.label, "text": meme.text})
    dev_both = entries.pop("dev_both")
    rng = default_rng([seed, 3])
    for name in ("dev_seen", "dev_unseen"):
        joined = dev_both + entries[name]
        entries[name] = [joined[place] for place in rng.permutation(len(joined))]
    for name, rows_of_list in entries.items():
        # The official release has the train list of the contest's first phase, and the
        # dev and test lists of its second phase.
        format_row = format_phase_1 if name == "train" else json.dumps
        text = "".join(format_row(row) + "\n" for row in rows_of_list)
        (data / f"{name}.jsonl").write_text(text, "ascii", newline="\n")


def format_phase_1(row: dict[str, Any]) -> str:
    """Formats a row as in phase 1, where ids are numbers without leading zeros."""
    if isinstance(row.get("id"), str):
        row = row | {"id": int(row["id"])}
    return json.dumps(row, separators=(",", ":")).replace("/", "\\/")


def _sample_ids(rng: Generator, rows: int) -> list[str]:
    """Samples unique five-digit ids, of which every eleventh has a leading zero."""
    ids = _MIN_FIVE_DIGITS + rng.choice(_END_ID - _MIN_FIVE_DIGITS, rows, replace=False)
    count, range_ = len(ids[::11]), _MIN_FIVE_DIGITS - _MIN_ID
    ids[::11] = _MIN_ID + rng.choice(range_, count, replace=False)
    return [f"{number:05d}" for number in ids]


def _invent_memes(rng: Generator, total: int, share: float) -> list[_Meme]:
    """Invents a split's memes in random order; a fraction `share` has label 1."""
    num_ones = round(total * share)
    num_suffice = round(_TEXT_SUFFICES * num_ones)
    num_bases, num_zeros = num_ones - num_suffice, total - num_ones
    memes = []
    for image in range(num_bases):
        image_kind, text_kind = rng.choice(len(_KINDS), 2, replace=False).tolist()
        text = _invent_sentence(rng, text_kind)
        memes.append(_Meme(image, image_kind, text_kind, text, 1))
    images = iter(range(num_bases, total))
    for index in range(round(_TEXT_CONFOUNDERS * num_zeros) if num_bases else 0):
        base = memes[index % num_bases]
        kind, text = base.image_kind, _invent_sentence(rng, base.image_kind)
        memes.append(_Meme(base.image, kind, kind, text, 0))
    for index in range(round(_IMAGE_CONFOUNDERS * num_zeros) if num_bases else 0):
        base = memes[num_bases - 1 - index % num_bases]
        kind = base.text_kind
        memes.append(_Meme(next(images), kind, kind, base.text, 0))
    for _ in range(num_suffice):
        kind = int(rng.integers(len(_KINDS)))
        memes.append(_Meme(next(images), kind, -1, _invent_nonsense(rng), 1))
    while len(memes) < total:
        kind = int(rng.integers(len(_KINDS)))
        text = _invent_sentence(rng, kind)
        memes.append(_Meme(next(images), kind, kind, text, 0))
    return [memes[place] for place in rng.permutation(total)]


def _invent_sentence(rng: Generator, kind: int) -> str:
    return _embellish_sentence(rng, choose(rng, _KINDS[kind]["sentences"]))


def _invent_nonsense(rng: Generator) -> str:
    """Invents a sentence that is about no kind of object."""
    names = ("claims", "numbers", "nouns")
    claim, number, noun = (choose(rng, _CONTENT[name]) for name in names)
    return _embellish_sentence(rng, claim.format(number, noun))


def _embellish_sentence(rng: Generator, sentence: str) -> str:
    opener, ending = (choose(rng, _CONTENT[name]) for name in ("openers", "endings"))
    return " ".join(part for part in (opener, sentence, ending) if part)


def _draw_image(rng: Generator, kind: dict[str, Any]) -> bytes:
    """Draws an object of a kind on a background as a PNG, without the sentence."""
    name = choose(rng, kind["images"].split())
    width, height = rng.integers(100, 141, 2).tolist()
    hues = kind["hues"] if rng.random() < _TINTED else rng.random(2)
    canvas = _draw_background(rng, width, height, rng.permutation(hues))
    cutout = load_cutout(f"images/{name}.jpg")
    share = rng.uniform(0.65, 0.95)
    scale = share * min(width / cutout.width, height / cutout.height)
    image = scale_and_flip(rng, cutout, scale)
    left = int(rng.integers(0, width - image.width + 1))
    multiply_image(canvas, image, left, int(rng.integers(0, height - image.height + 1)))
    return encode_pixels(canvas, "png", compress_level=4)


def _draw_background(
    rng: Generator, width: int, height: int, hues: np.ndarray
) -> np.ndarray:
    """Draws a wavy gradient of two colors with discs of a third color.

    No two backgrounds are near-duplicates, and few colors keep the files small.
    """
    first, second, third = (
        hsv_to_rgb(
            hue + rng.normal(0, 0.03), rng.uniform(0.2, 0.75), rng.uniform(0.55, 1)
        )
        for hue in (*hues.tolist(), rng.random())
    )
    angle, along, across = sample_oriented_grid(rng, width, height)
    wave = rng.uniform(0.05, 0.2) * np.sin(rng.uniform(3, 15) * across + 6 * angle)
    along = along + wave
    mix = np.round(20 * (along - along.min()) / np.ptp(along)) / 20
    gradient = first + mix[..., None] * (second - first)
    image = Image.fromarray((255 * gradient).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(rng.integers(3, 7)):
        radius = rng.uniform(0.12, 0.35) * width
        left, top = rng.uniform(-radius, width), rng.uniform(-radius, height)
        color = (255 * (third * rng.uniform(0.6, 1))).astype(int).tolist()
        box = (left, top, left + 2 * radius, top + 2 * radius)
        pen.ellipse(box, fill=tuple(color))
    return np.array(image)
