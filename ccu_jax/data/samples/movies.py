"""Invents the movies of the sample edition of MM-IMDb."""

import json
import pathlib
from typing import Any

import numpy as np

from ccu_jax.data.samples import posters, topics

_NUM_GENRES = (0.25, 0.45, 0.30)  # share of movies with one, two, three genres
_NOISE = 0.05  # movies whose genres have nothing to do with their content
_TOLD = 0.85  # a genre of the movie shows in its plots
_SHOWN = 0.9  # a picture on the poster is of a genre of the movie
_TINTED = 0.8  # a colour of the background leans to the hue of a genre
_OWN_WORDS = 8  # words a genre gives to the plots of a movie
_OTHER_WORDS = 6  # words from anywhere
_FILLER = 0.2  # sentences without any such word


def write_movie(
    rng: np.random.Generator, tops: tuple[topics.Topic, ...], path: pathlib.Path
) -> None:
    """Writes a movie's .json and .jpeg.

    Args:
        rng: Where all choices come from; the same state gives the same bytes.
        tops: What movies are about: `topics.topics()`.
        path: The files' path without an ending.
    """
    genres, seen = _genres(rng, tops)
    pictures = _pictures(rng, tops, seen)
    movie = _movie(rng, tops, genres, _words(rng, tops, seen))
    path.with_suffix(".json").write_text(json.dumps(movie, indent=4), "ascii")
    path.with_suffix(".jpeg").write_bytes(posters.draw(rng, pictures, _hues(rng, seen)))


def _genres(rng: np.random.Generator, tops) -> tuple[list[int], list[int]]:
    """The genres that are written down, and those that plot and poster are about."""
    shares = np.array([topic.share for topic in tops])
    drawn = []
    for _ in range(2):
        number = rng.choice([1, 2, 3], p=_NUM_GENRES)
        drawn.append(
            rng.choice(len(tops), number, replace=False, p=shares / shares.sum())
        )
    written, other = (sorted(genres.tolist()) for genres in drawn)
    return written, other if rng.random() < _NOISE else written


def _pictures(rng: np.random.Generator, tops, seen: list[int]) -> list[str]:
    """One to three pictures, mostly from the genres' own."""
    number = int(rng.choice([1, 2, 3], p=[0.4, 0.5, 0.1]))
    about = rng.permutation(np.resize(rng.permutation(seen), number))
    chosen = [
        tops[genre if rng.random() < _SHOWN else rng.integers(len(tops))].pictures
        for genre in about
    ]
    # Some pictures are seen more often than others.
    return [pool[int(len(pool) * rng.random() ** 1.5)] for pool in chosen]


def _hues(rng: np.random.Generator, seen: list[int]) -> tuple[float, float]:
    """Two hues that lean to genres; with the golden ratio frequent ones lie apart."""
    about = np.resize(rng.permutation(seen), 2)
    tinted = rng.random(2) < _TINTED
    hues = np.where(tinted, about * 0.618034 % 1, rng.random(2))
    return float(hues[0]), float(hues[1])


def _words(rng: np.random.Generator, tops, seen: list[int]) -> list[str]:
    """What the plots of a movie are about: words of its genres among others."""
    told = [genre for genre in seen if rng.random() < _TOLD]
    words = [w for genre in told for w in rng.choice(tops[genre].words, _OWN_WORDS)]
    others = rng.integers(len(tops), size=_OTHER_WORDS)
    words += [rng.choice(tops[genre].words) for genre in others]
    return [str(word) for word in words]


def _movie(
    rng: np.random.Generator, tops, genres: list[int], words: list[str]
) -> dict[str, Any]:
    """The content of the .json file; any key but two may be missing."""
    title, year = topics.invent_title(rng), int(rng.integers(1930, 2013))
    sizes = [int(rng.integers(6, 10))]
    sizes += rng.integers(1, 5, rng.integers(0, 4)).tolist()
    rng.shuffle(sizes)
    plots = [topics.invent_plot(rng, words, size, _FILLER) for size in sizes]
    canonical = title.removeprefix("The ") + ", The"
    movie = {
        "title": title,
        "kind": "movie",
        "year": year,
        "genres": [tops[genre].genre for genre in genres],
        "plot": plots,
        "plot outline": topics.invent_plot(rng, words, 1, _FILLER),
        "rating": round(float(rng.uniform(2, 9)), 1),
        "votes": int(rng.integers(5, 50_000)),
        "runtimes": [str(rng.integers(60, 180))],
        "languages": ["English", "Fran\u00e7ais"][: rng.integers(1, 3)],
        "countries": ["UK"],
        "color info": ["Color" if year > 1950 else "Black and White"],
        "director": [_person(rng)],
        "cast": [_person(rng) for _ in range(rng.integers(1, 6))],
        "canonical title": canonical,
        "long imdb title": f"{title} ({year})",
        "long imdb canonical title": f"{canonical} ({year})",
        "smart canonical title": canonical,
    }
    needed = ("title", "genres", "plot")
    return {k: v for k, v in movie.items() if k in needed or rng.random() < 0.85}


def _person(rng: np.random.Generator) -> dict[str, str]:
    first, last = topics.invent_name(rng), topics.invent_name(rng) + "\u00e9"
    name, canonical = f"{first} {last}", f"{last}, {first}"
    return {
        "name": name,
        "long imdb name": name,
        "canonical name": canonical,
        "long imdb canonical name": canonical,
    }
