"""The sample edition of MM-IMDb: invented movies in the official layout.

Each genre has a fixed, arbitrary part of the clip art library: its posters show these
images, and its plots use their words. All sentences, titles and names are invented.
"""

import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator, default_rng
from PIL import Image, ImageFilter

from ccu_jax.data.readers.base import CLIPART, Progress
from ccu_jax.data.samples.drawing import (
    CONTENT,
    STAGE,
    choose,
    encode_pixels,
    hsv_to_rgb,
    invent_word,
    load_cutout,
    multiply_image,
    sample_oriented_grid,
    scale_and_flip,
)

_SPLITS = {"train": 0.6, "dev": 0.1, "test": 0.3}
_NUM_MOVIES = 25959
_STOP_WORDS = {"and", "the", "with", "from", "for"}
_EXCLUDED_WORDS = {"sex", "sexy", "nude", "gallows"}  # unsuitable for posters
_GENRE_COUNT_SHARES = (0.25, 0.45, 0.30)  # of movies with one, two, three genres
_NOISE = 0.05  # fraction of movies whose content does not match their labels
_MENTIONED = 0.85  # fraction of a movie's genres that its plots mention
_OWN_IMAGES = 0.9  # fraction of poster images that match a genre of the movie
_TINTED = 0.8  # fraction of background colors near the hue of a genre
_FILLER = 0.2  # fraction of sentences without a genre's words
_GENRE_WORDS, _OTHER_WORDS = 8, 6  # sampled per mentioned genre, and of all genres
_CONTENT = CONTENT["mmimdb"]


class _Genre(NamedTuple):
    """A genre with its part of the clip art library."""

    name: str
    share: float  # of the movies of MM-IMDb, in (0, 1)
    images: list[str]  # paths below the clip art folder
    words: list[str]  # repeated as often as they occur in the library


def write(root: pathlib.Path, rows: int, seed: int, progress: Progress) -> None:
    """Writes the edition in the layout of the official archive's folder `mmimdb/`."""
    (root / "dataset").mkdir()
    rng = default_rng([seed, 0])
    ids = [f"{number:07d}" for number in rng.choice(4_000_000, rows, False) + 5]
    genres = _load_genres()
    for number, name in enumerate(ids):
        progress(STAGE, number, rows)
        rng = default_rng([seed, 1, number])
        _write_movie(rng, genres, root / "dataset" / name)
    ends = np.cumsum([round(share * rows) for share in _SPLITS.values()])
    parts = np.split(np.array(ids), ends[:-1])
    splits = {name: part.tolist() for name, part in zip(_SPLITS, parts, strict=True)}
    (root / "split.json").write_text(json.dumps(splits, indent=4), "ascii")


def _load_genres() -> list[_Genre]:
    """Loads the 23 genres in the official order."""
    genres, genre_of = {}, {}
    for name, content in _CONTENT["genres"].items():
        genres[name] = _Genre(name, content["num_movies"] / _NUM_MOVIES, [], [])
        genre_of |= dict.fromkeys(content["folders"].split(), name)
    index = (CLIPART / "pairs.jsonl").read_text("utf-8")
    for row in (json.loads(line) for line in index.split("\n") if line):
        words = set(re.findall(r"\b[a-z]{3,14}\b", row["text"])) - _STOP_WORDS
        if words & _EXCLUDED_WORDS:
            continue
        folder = row["source"].rpartition("/")[0]
        if "roadsign" in row["text"]:  # some are in the parent folder
            folder = "transportation/roadsigns"
        while folder not in genre_of:
            folder = folder.rpartition("/")[0]
        genre = genres[genre_of[folder]]
        genre.images.append(row["image"])
        genre.words.extend(sorted(words))
    return list(genres.values())


def _write_movie(rng: Generator, genres: Sequence[_Genre], path: pathlib.Path) -> None:
    """Writes a movie's .json and .jpeg files; `path` has no suffix."""
    labels, content = (_sample_genres(rng, genres) for _ in range(2))
    if rng.random() >= _NOISE:
        content = labels
    images = _sample_images(rng, genres, content)
    movie = _invent_movie(rng, genres, labels, _sample_words(rng, genres, content))
    path.with_suffix(".json").write_text(json.dumps(movie, indent=4), "ascii")
    # With the golden ratio the hues of frequent genres lie far apart.
    hues = np.resize(rng.permutation(content), 2) * 0.618034 % 1
    hues = np.where(rng.random(2) < _TINTED, hues, rng.random(2))
    path.with_suffix(".jpeg").write_bytes(_draw_poster(rng, images, hues))


def _sample_genres(rng: Generator, genres: Sequence[_Genre]) -> list[int]:
    """Samples the indices of one to three genres in proportion to their shares."""
    shares = np.array([genre.share for genre in genres])
    count = rng.choice([1, 2, 3], p=_GENRE_COUNT_SHARES)
    chosen = rng.choice(len(genres), count, replace=False, p=shares / shares.sum())
    return sorted(chosen.tolist())


def _sample_images(
    rng: Generator, genres: Sequence[_Genre], content: list[int]
) -> list[str]:
    """Samples the paths of one to three images, mostly of the movie's genres."""
    count = int(rng.choice([1, 2, 3], p=[0.4, 0.5, 0.1]))
    pools = []
    for genre in rng.permutation(np.resize(rng.permutation(content), count)).tolist():
        is_own = rng.random() < _OWN_IMAGES
        pools.append(genres[genre if is_own else int(rng.integers(len(genres)))].images)
    # The first images of a genre are used more often.
    return [pool[int(len(pool) * rng.random() ** 1.5)] for pool in pools]


def _sample_words(
    rng: Generator, genres: Sequence[_Genre], content: list[int]
) -> list[str]:
    mentioned = [genre for genre in content if rng.random() < _MENTIONED]
    words = [
        w for genre in mentioned for w in rng.choice(genres[genre].words, _GENRE_WORDS)
    ]
    any_genres = rng.integers(len(genres), size=_OTHER_WORDS)
    words += [rng.choice(genres[genre].words) for genre in any_genres]
    return [str(word) for word in words]


def _invent_movie(
    rng: Generator, genres: Sequence[_Genre], labels: list[int], words: list[str]
) -> dict[str, Any]:
    """Invents the content of a movie's .json file, without some optional keys."""
    title = f"The {rng.choice(_CONTENT['adjectives'])} {rng.choice(_CONTENT['nouns'])}"
    title += " II" if rng.random() < 0.1 else ""
    year = int(rng.integers(1930, 2013))
    sizes = [int(rng.integers(6, 10))]
    sizes += rng.integers(1, 5, rng.integers(0, 4)).tolist()
    rng.shuffle(sizes)
    canonical = title.removeprefix("The ") + ", The"
    movie = {
        "title": title,
        "kind": "movie",
        "year": year,
        "genres": [genres[label].name for label in labels],
        "plot": [_invent_plot(rng, words, size) for size in sizes],
        "plot outline": _invent_plot(rng, words, 1),
        "rating": round(float(rng.uniform(2, 9)), 1),
        "votes": int(rng.integers(5, 50_000)),
        "runtimes": [str(rng.integers(60, 180))],
        "languages": ["English", "Fran\u00e7ais"][: rng.integers(1, 3)],
        "countries": ["UK"],
        "color info": ["Color" if year > 1950 else "Black and White"],
        "director": [_invent_person(rng)],
        "cast": [_invent_person(rng) for _ in range(rng.integers(1, 6))],
        "canonical title": canonical,
        "long imdb title": f"{title} ({year})",
        "long imdb canonical title": f"{canonical} ({year})",
        "smart canonical title": canonical,
    }
    required = ("title", "genres", "plot")
    return {k: v for k, v in movie.items() if k in required or rng.random() < 0.85}


def _invent_plot(rng: Generator, words: list[str], num_sentences: int) -> str:
    sentences = []
    for _ in range(num_sentences):
        kind = "fillers" if rng.random() < _FILLER else "sentences"
        form = choose(rng, _CONTENT[kind])
        sentence = form.format(*rng.choice(words, 3), name="{}")
        names = [invent_word(rng).capitalize() for _ in range(sentence.count("{}"))]
        sentences.append(sentence.format(*names))
    return " ".join(sentences)


def _invent_person(rng: Generator) -> dict[str, str]:
    first = invent_word(rng).capitalize()
    last = invent_word(rng).capitalize() + "\u00e9"
    names = {"name": f"{first} {last}", "canonical name": f"{last}, {first}"}
    prefixes = ("", "long imdb ")
    return {p + key: name for key, name in names.items() for p in prefixes}


def _draw_poster(rng: Generator, images: list[str], hues: np.ndarray) -> bytes:
    width = int(rng.integers(90, 121))
    height = int(width * rng.uniform(1.4, 1.6))
    canvas = _draw_background(rng, width, height, hues)
    band = height / len(images)
    for index, name in enumerate(images):
        cutout = load_cutout(name)
        share = rng.uniform(0.8, 1.0)
        scale = min(share * width / cutout.width, share * band / cutout.height)
        image = scale_and_flip(rng, cutout, scale)
        if rng.random() < 0.2:
            image = image.filter(ImageFilter.SMOOTH)
        left = int(rng.integers(0, max(1, width - image.width + 1)))
        slack = max(0.0, band - image.height)
        multiply_image(canvas, image, left, int(index * band + rng.uniform(0, slack)))
    return encode_pixels(canvas, "jpeg", quality=int(rng.integers(80, 93)))


def _draw_background(
    rng: Generator, width: int, height: int, hues: np.ndarray
) -> np.ndarray:
    """Draws a wavy gradient of two colors with grain, uint8 [height, width, 3]."""
    first, second = (
        hsv_to_rgb(
            hue + rng.normal(0, 0.04), rng.uniform(0.25, 0.6), rng.uniform(0.65, 1)
        )
        for hue in hues.tolist()
    )
    _, along, across = sample_oriented_grid(rng, width, height)
    wave = rng.uniform(0, 12)
    along = along + 0.08 * np.sin(wave * across * np.pi + rng.uniform(0, 6))
    mix = (along - along.min()) / np.ptp(along)
    image = first + mix[..., None] * (second - first)
    coarse = rng.normal(0, rng.uniform(0.02, 0.12), (height // 8, width // 8))
    grain = Image.fromarray(coarse.astype(np.float32)).resize((width, height))
    image = image + np.asarray(grain)[..., None]
    return (255 * image.clip(0, 1)).astype(np.uint8)
