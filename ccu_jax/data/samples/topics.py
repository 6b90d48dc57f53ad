"""What the sample edition is about: clip art and words for each of the 23 genres.

Each genre gets a part of the clip art library; which one is arbitrary, but fixed. All
sentences, titles and names are invented.
"""

import json
import re
from typing import NamedTuple

import numpy as np

from ccu_jax.data.clipart import CLIPART, INDEX

# Folders of the library and the movies of the real data set (of 25,959) per genre.
_GENRES: dict[str, tuple[tuple[str, ...], int]] = {
    "Drama": (("people",), 13967),
    "Comedy": (("people/stickmen", "recreation/party"), 8592),
    "Romance": (("plants/flowers", "recreation/holiday/valentines"), 5364),
    "Thriller": (("tools",), 5192),
    "Crime": (("office",), 3838),
    "Action": (("transportation",), 3550),
    "Adventure": (("transportation/boating", "animals/birds", "animals/fish"), 2710),
    "Horror": (("animals/bugs",), 2703),
    "Documentary": (("geography",), 2082),
    "Mystery": (("buildings",), 2057),
    "Sci-Fi": (("geography/astronomy", "office/telephone"), 1991),
    "Fantasy": (("animals", "animals/fantasy", "animals/dinosaurs"), 1933),
    "Family": (("animals/mammals",), 1668),
    "Biography": (("people/clothing",), 1343),
    "War": (("transportation/vehicles",), 1335),
    "History": (("food", "food/meats_and_eggs", "food/breads_and_carbs"), 1143),
    "Music": (("recreation/music",), 1045),
    "Animation": (("recreation", "recreation/toys", "recreation/games"), 997),
    "Musical": (("food/beverages",), 841),
    "Western": (("plants", "plants/trees"), 705),
    "Sport": (("recreation/sports",), 634),
    "Short": (("food/fruit", "food/vegetables", "food/desserts"), 471),
    "Film-Noir": (("transportation/roadsigns",), 338),
}
_DULL = {"and", "the", "with", "from", "for"}
_UNFIT = {"sex", "sexy", "nude", "gallows"}  # not on a poster that anybody may see
_ROADSIGN = "roadsign"  # such pictures also lie in the folder above

# {0}, {1} and {2} are words of a topic, {name} is an invented name.
_SENTENCES = (
    "{name} finds a {0} behind the {1}.",
    "Then a {0} turns up beside the {1}.",
    "Nobody expects the {0}, least of all the {1}.",
    "Between {0} and {1} there is little time for sleep.",
    "All that remains is {0} and {1}.",
    "{name} would give every {0} for one {1}.",
    "The {0} belongs to the {1} or to nobody.",
    "It begins with a {0} and ends with a {1}.",
    "A letter mentions the {0}, the {1} and the {2}.",
    "For {name} it is {0} or {1}, never {2}.",
)
_FILLERS = (
    "{name} has not been home for years.",
    "Nobody in the town wants to talk about it.",
    "What looks like a favour soon becomes a debt.",
    "The summer is long and the money is short.",
    "{name} and {name} meet again after the funeral.",
    "A promise made in haste has to be kept.",
    "On the last evening everything is said at once.",
    "There is one night left to put things right.",
    "Everybody lies, and {name} knows why.",
    "The family keeps a secret that was never theirs.",
)
_SYLLABLES = "ba do fen gri ha jo kel lu mar nim or pel ru sta tov ul ven wi yas zo"
_ADJECTIVES = (
    "Paper Silent Second Hollow Golden Borrowed Distant Crooked Patient Winter Broken "
    "Gentle Restless Hidden Sunken Last"
)
_NOUNS = (
    "Lighthouse Promise Harbour Orchard Mirror Letter Staircase Parade Island Clock "
    "Bridge Neighbour Garden Window Season Shadow"
)


class Topic(NamedTuple):
    """One genre of the sample edition."""

    genre: str
    share: float  # of the movies of the real data set, in (0, 1)
    pictures: tuple[str, ...]  # paths below the clip art's folder
    words: tuple[str, ...]  # a frequent word stands there as often as it is used


def topics() -> tuple[Topic, ...]:
    """The 23 topics in the official order of the genres."""
    index = (CLIPART / INDEX).read_text("utf-8")
    rows = [json.loads(line) for line in index.split("\n") if line]
    folder_of = {folder: g for g, (folders, _) in _GENRES.items() for folder in folders}
    pictures: dict[str, list[str]] = {genre: [] for genre in _GENRES}
    words: dict[str, list[str]] = {genre: [] for genre in _GENRES}
    for row in rows:
        found = set(re.findall(r"\b[a-z]{3,14}\b", row["text"])) - _DULL
        if found & _UNFIT:
            continue
        folder = row["source"].rpartition("/")[0]
        if _ROADSIGN in row["text"]:
            folder = "transportation/roadsigns"
        while folder not in folder_of:  # the nearest folder above that has a genre
            folder = folder.rpartition("/")[0]
        genre = folder_of[folder]
        pictures[genre].append(row["image"])
        words[genre] += sorted(found)
    return tuple(
        Topic(genre, total / 25959, tuple(pictures[genre]), tuple(words[genre]))
        for genre, (_, total) in _GENRES.items()
    )


def invent_name(rng: np.random.Generator) -> str:
    """A name of two or three syllables."""
    return "".join(rng.choice(_SYLLABLES.split(), rng.integers(2, 4))).capitalize()


def invent_title(rng: np.random.Generator) -> str:
    """A title such as "The Paper Lighthouse"."""
    adjective, noun = rng.choice(_ADJECTIVES.split()), rng.choice(_NOUNS.split())
    return f"The {adjective} {noun}" + (" II" if rng.random() < 0.1 else "")


def invent_plot(
    rng: np.random.Generator, words: list[str], sentences: int, filler: float
) -> str:
    """Sentences with words in random order, some of them without any.

    Args:
        rng: Where the choices come from.
        words: The words to choose from.
        sentences: Number of sentences.
        filler: Probability that a sentence says nothing about a topic.
    """
    told = []
    for _ in range(sentences):
        pool = _FILLERS if rng.random() < filler else _SENTENCES
        sentence = pool[rng.integers(len(pool))].format(
            *rng.choice(words, 3), name="{}"
        )
        names = (invent_name(rng) for _ in range(sentence.count("{}")))
        told.append(sentence.format(*names))
    return " ".join(told)
