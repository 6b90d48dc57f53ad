"""MM-IMDb (Arevalo et al., 2017) in its official layout: posters, plots, 23 genres.

    mmimdb/split.json              {"train": [ids], "dev": [ids], "test": [ids]}
    mmimdb/dataset/<id>.json       "genres", "plot" (a list of texts), ...
    mmimdb/dataset/<id>.jpeg       the poster

Get it from http://lisi1.unal.edu.co/mmimdb/ ; nothing is ever downloaded here.
"""

import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from ccu_jax.config import Data
from ccu_jax.data.source import Counts, Example, Place, Progress, Reader, Source, digest
from ccu_jax.errors import UserError

MARKER = "SYNTHETIC.txt"  # a file of this name tells a sample edition from the real one
PAGE = "http://lisi1.unal.edu.co/mmimdb/"

# By falling frequency, as everywhere in the literature on this data set.
GENRES = (
    "Drama",
    "Comedy",
    "Romance",
    "Thriller",
    "Crime",
    "Action",
    "Adventure",
    "Horror",
    "Documentary",
    "Mystery",
    "Sci-Fi",
    "Fantasy",
    "Family",
    "Biography",
    "War",
    "History",
    "Music",
    "Animation",
    "Musical",
    "Western",
    "Sport",
    "Short",
    "Film-Noir",
)

_OFFICIAL_SPLITS = {"train": "train", "validation": "dev", "test": "test"}


def locate(config: Data, workdir: pathlib.Path, progress: Progress) -> Place:
    """The user's folder, or a sample edition written below the working folder.

    A folder that the user names is never replaced by the sample edition.
    """
    if config.plot_policy not in ("longest", "first"):
        raise UserError(
            f"data.plot_policy: {config.plot_policy!r} is neither 'longest' nor 'first'"
        )
    if config.dir is None:
        from ccu_jax.data import sample  # here: it is also a program of its own

        root = workdir / "sample" / "mmimdb"
        rows, seed = config.sample_rows, config.sample_seed
        sample.ensure_mmimdb(root, rows, seed, progress)
        return Place(root, "sample")
    root = _root(pathlib.Path(config.dir).expanduser())
    edition = "sample" if (root / MARKER).is_file() else "official"
    return Place(root, edition)


def signature(config: Data, place: Place) -> str:
    """Hash of `split.json` and of when the folder with the files last changed."""
    split = (place.root / "split.json").read_bytes()
    if place.edition == "sample" and config.dir is None:
        return digest(split, (place.root / MARKER).read_bytes())
    return digest(split, *(str(f.stat().st_mtime_ns) for f in _folders(place.root)))


def open_mmimdb(config: Data, place: Place, counts: Counts) -> Source:
    """Reads `split.json` and looks which files there are.

    Raises:
        UserError: malformed `split.json`; most of the files missing.
    """
    ids = _splits(place.root / "split.json")
    texts, posters = _folders(place.root)
    listed = {i for split in ids.values() for i in split}
    there = {name: set(os.listdir(name)) for name in {texts, posters}}
    kinds = ((texts, ".json", "texts"), (posters, ".jpeg", "posters"))
    for folder, ending, what in kinds:
        missing = sum(i + ending not in there[folder] for i in listed)
        if 2 * missing > len(listed):
            raise UserError(
                f"{folder} lacks {missing} of the {len(listed)} {what} ({ending}) that "
                f"split.json lists: unpack mmimdb.tar.gz again, see {PAGE}"
            )
    extra = {name[:-5] for name in there[texts] if name.endswith(".json")} - listed
    counts.add("read", len(listed))
    counts.add("ignored: .json file that split.json does not list", len(extra))

    def examples(split: str) -> Iterator[Example]:
        for i in ids[_OFFICIAL_SPLITS[split]]:
            if example := _example(i, split, texts, posters, config, counts):
                yield example

    return Source(GENRES, True, len(listed), examples)


def choose_plot(plots: list[str], policy: str) -> str | None:
    """One plot of a movie: the first or the longest (the first of equals).

    Args:
        plots: Texts; one may end in the `::author` that IMDb adds, which is cut off.
        policy: "longest" or "first".

    Returns:
        The plot, or None if it (or each) is blank.
    """
    cleaned = [re.sub(r"::[^:\n]{0,80}$", "", plot.strip()).strip() for plot in plots]
    if policy == "longest":
        return max(cleaned, key=len, default="") or None
    return (cleaned or [""])[0] or None


def _root(given: pathlib.Path) -> pathlib.Path:
    """The folder with split.json: the given one, one below, or one above."""
    if not given.is_dir():
        raise UserError(f"data.dir: no folder {given}; get MM-IMDb from {PAGE}")
    candidates = [given, given / "mmimdb"]
    if given.name in ("dataset", "images", "labels"):
        candidates.append(given.absolute().parent)
    for root in candidates:
        index, folders = (root / "split.json").is_file(), _folders(root)
        if index and all(folder.is_dir() for folder in folders):
            return root
        if index:
            raise UserError(
                f"data.dir: {root} holds split.json but no folder dataset/: unpack "
                f"mmimdb.tar.gz completely, see {PAGE}"
            )
        if folders[0].is_dir():
            raise UserError(
                f"data.dir: {root} holds {folders[0].name}/ but no split.json: unpack "
                f"mmimdb.tar.gz completely, see {PAGE}"
            )
    raise UserError(
        f"data.dir: neither {given} nor {given / 'mmimdb'} holds split.json and "
        f"dataset/: unpack mmimdb.tar.gz there, see {PAGE}"
    )


def _folders(root: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Where the .json and the .jpeg files are; one re-arranged layout is known."""
    if (root / "labels").is_dir() and (root / "images").is_dir():
        return root / "labels", root / "images"
    return root / "dataset", root / "dataset"


def _splits(path: pathlib.Path) -> dict[str, list[str]]:
    try:
        splits = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: no valid JSON ({error}); see {PAGE}") from None
    seen: set[str] = set()
    for name in _OFFICIAL_SPLITS.values():
        ids = splits.get(name) if isinstance(splits, dict) else None
        if not isinstance(ids, list):
            raise UserError(f'{path}: no list "{name}"; see {PAGE}')
        for i in ids:
            # This also keeps "../" out of the names of files.
            if not isinstance(i, str) or not re.fullmatch("[0-9]{7,8}", i):
                raise UserError(f'{path}: "{name}" lists {i!r}, not an id of 7 digits')
            if i in seen:
                raise UserError(f"{path}: id {i} is listed twice")
            seen.add(i)
    return splits


def _example(
    i: str,
    split: str,
    texts: pathlib.Path,
    posters: pathlib.Path,
    config: Data,
    counts: Counts,
) -> Example | None:
    """The movie, or None where it cannot be used (the reason is counted)."""
    try:
        movie: Any = json.loads((texts / f"{i}.json").read_text("utf-8"))
    except FileNotFoundError:
        return counts.skip("text file missing", i)
    except (ValueError, RecursionError):
        return counts.skip("text file is no valid JSON", i)
    movie = movie if isinstance(movie, dict) else {}
    genres = _strings(movie.get("genres"))
    for genre in genres:
        if genre not in GENRES:
            counts.add(f"ignored: genre {genre}")
    plot = choose_plot(_strings(movie.get("plot")), config.plot_policy)
    labels = tuple(genre for genre in GENRES if genre in genres)
    if plot is None:
        return counts.skip("no plot", i)
    if not labels:
        return counts.skip("none of the 23 genres", i)
    try:
        poster = (posters / f"{i}.jpeg").read_bytes()
    except FileNotFoundError:
        return counts.skip("poster missing", i)
    return Example(i, i, poster, plot, labels, split)


def _strings(value: Any) -> list[str]:
    value = [value] if isinstance(value, str) else value
    return [x for x in value if isinstance(x, str)] if isinstance(value, list) else []


READER = Reader(locate, signature, open_mmimdb, decoder="tfds")
