"""MM-IMDb (Arevalo et al., 2017) in its official layout: posters, plots, 23 genres.

    mmimdb/split.json              {"train": [ids], "dev": [ids], "test": [ids]}
    mmimdb/dataset/<id>.json       "genres", "plot" (a list of texts), ...
    mmimdb/dataset/<id>.jpeg       the poster

Or the archive `mmimdb.tar.gz` of these files. Get it from
http://lisi1.unal.edu.co/mmimdb/ ; this module downloads nothing.
"""

import os
import pathlib
import re
from collections.abc import Collection
from typing import Any

from ccu_jax.config.schema import Data
from ccu_jax.data.readers import base
from ccu_jax.data.readers.base import Counts, Example, SkipExample
from ccu_jax.data.readers.releases import Release
from ccu_jax.data.readers.untrusted_files import (
    MAX_TEXT_BYTES,
    Folder,
    clean_text,
    parse_json,
)
from ccu_jax.errors import UserError

PAGE = "http://lisi1.unal.edu.co/mmimdb/"
ARCHIVE = "mmimdb.tar.gz"
INDEX = "split.json"

# In descending order of frequency, as in the literature on this data set.
_GENRES = """
    Drama Comedy Romance Thriller Crime Action Adventure Horror Documentary Mystery
    Sci-Fi Fantasy Family Biography War History Music Animation Musical Western Sport
    Short Film-Noir
"""
GENRES = tuple(_GENRES.split())
# Also in the official files; the authors leave them out.
_RARE_GENRES = ("News", "Adult", "Talk-Show", "Reality-TV")

_OFFICIAL_SPLITS = {"train": "train", "validation": "dev", "test": "test"}
_AUTHOR = re.compile(r"::[^:\n]{0,80}$")  # IMDb appends it to a plot


def open_mmimdb(
    config: Data, location: base.Location, counts: Counts, unpack: base.Unpack
) -> base.Source:
    """Opens MM-IMDb; raises UserError if most of the listed files are missing."""
    root = RELEASE.find_root(location.root)
    if root is None:
        archive = location.root / ARCHIVE
        counts.add(f"noted: images in {ARCHIVE}")
        root = RELEASE.find_root(unpack(archive))
        if root is None:
            raise UserError(
                f"{archive} lacks mmimdb/{INDEX} or mmimdb/dataset/: download it again "
                f"from {PAGE}"
            )
        if (root / base.MARKER).is_file():  # unknown before unpacking
            counts.add(f"noted: {ARCHIVE} holds a sample edition")
    folder, (texts, posters) = Folder(root), _find_folder_names(root)
    keys = _read_keys(folder, counts)
    _check_files(folder.root / texts, ".json", keys, counts)
    _check_files(folder.root / posters, ".jpeg", keys, counts)

    def read(key: tuple[str, str]) -> Example:
        id_, split = key
        text = folder.read_text(f"{texts}/{id_}.json", "text file")
        plot, labels, notes = _parse_movie(text, config.plot_policy)
        poster = folder.read(f"{posters}/{id_}.jpeg", "image")
        return Example(id_, id_, poster, plot, labels, split, notes)

    rows = [*keys.items()]
    return base.Source(GENRES, True, "micro_f1", rows, read, lambda row: row[0])


def _read_keys(folder: Folder, counts: Counts) -> dict[str, str]:
    """Returns `{id: split}` of all movies: training rows first, in index order."""
    keys: dict[str, str] = {}
    try:
        index = parse_json(folder.read_text(INDEX, INDEX, 4 * MAX_TEXT_BYTES), INDEX)
        for name in _OFFICIAL_SPLITS.values():
            if not isinstance(index, dict) or not isinstance(index.get(name), list):
                raise SkipExample(f'{INDEX} has no list "{name}"')
    except SkipExample as reason:
        raise UserError(
            f"{folder.root}: {reason}; restore {INDEX} from {ARCHIVE}, see {PAGE}"
        ) from None
    for split, name in _OFFICIAL_SPLITS.items():
        counts.add("read", len(index[name]))
        for position, id_ in enumerate(index[name], start=1):
            entry = f'{INDEX} "{name}" entry {position}'
            # Also keeps "../" out of file names.
            if not isinstance(id_, str) or not re.fullmatch("[0-9]{7,8}", id_):
                counts.skip("id is not 7 digits", entry)
            elif id_ in keys:
                counts.skip("id listed twice", f"{entry} ({id_})")
            else:
                keys[id_] = split
    return keys


def _check_files(
    folder: pathlib.Path, ending: str, ids: Collection[str], counts: Counts
) -> None:
    """Raises UserError if more than half of the files `<id><ending>` are missing."""
    existing = {name for name in os.listdir(folder) if name.endswith(ending)}
    expected = {id_ + ending for id_ in ids}
    num_missing = len(expected - existing)
    if 2 * num_missing > len(ids):
        raise UserError(
            f"{folder} lacks {num_missing} of the {len(ids)} {ending} files listed in "
            f"{INDEX}: unpack {ARCHIVE} again, see {PAGE}"
        )
    if ending == ".json":
        num_unlisted = len(existing - expected)
        counts.add(f"ignored: .json file that {INDEX} does not list", num_unlisted)


def _parse_movie(
    text: str, plot_policy: str
) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Returns the plot, the genres and the notes of a movie's .json file."""
    movie = parse_json(text, "text file")
    if not isinstance(movie, dict):
        raise SkipExample("text file is no JSON object")
    plots = [plot for plot in _as_list(movie.get("plot")) if isinstance(plot, str)]
    candidates = plots if plot_policy == "longest" else plots[:1]
    plot, notes = max(
        map(_clean_plot, candidates), key=lambda plot: len(plot[0]), default=("", ())
    )
    if not plot:
        raise SkipExample("no plot")
    genres = _as_list(movie.get("genres"))
    labels = tuple(genre for genre in GENRES if genre in genres)
    if not labels:
        raise SkipExample(f"none of the {len(GENRES)} genres")
    # Reports show the names of counts, so these must not contain unknown genres.
    rare_genres = (genre for genre in _RARE_GENRES if genre in genres)
    notes += tuple(f"ignored: genre {genre}" for genre in rare_genres)
    if any(genre not in (*GENRES, *_RARE_GENRES) for genre in genres):
        notes += ("ignored: unknown genre",)
    return plot, labels, notes


def _clean_plot(plot: str) -> tuple[str, tuple[str, ...]]:
    """Removes `::author` from the end of a plot; returns the plot and notes."""
    full, notes = clean_text(plot)
    text = _AUTHOR.sub("", full or "").strip()
    if text != (full or ""):
        notes += ("noted: plot ends in ::author",)
    if not text.isascii():
        notes += ("noted: non-ASCII text",)
    return text, notes


def _as_list(value: Any) -> list[Any]:
    """Returns a list unchanged, `[value]` for a string, and [] for other values."""
    value = [value] if isinstance(value, str) else value
    return value if isinstance(value, list) else []


def _find_folder_names(root: pathlib.Path) -> tuple[str, str]:
    """Returns the names of the folders with the .json and with the .jpeg files."""
    if (root / "labels").is_dir() and (root / "images").is_dir():
        return "labels", "images"
    return "dataset", "dataset"


class _MmimdbRelease(Release):
    """MM-IMDb, whose images are in the folder of the texts or in a separate folder."""

    def has_images(self, root: pathlib.Path) -> bool:
        return all((root / name).is_dir() for name in _find_folder_names(root))

    def list_watched_paths(self, root: pathlib.Path) -> list[pathlib.Path]:
        is_packed = self.find_root(root) is None
        names = (ARCHIVE,) if is_packed else _find_folder_names(root)
        return [root / name for name in names]


RELEASE = _MmimdbRelease(
    title="MM-IMDb",
    remedy=f"get {ARCHIVE} from {PAGE}",
    sample_root="mmimdb",
    lists=(INDEX,),
    image_folders=("dataset", "labels", "images"),
    subfolders=("mmimdb",),
    inner_folders=("dataset", "images", "labels"),
    archive=ARCHIVE,
)
READER = base.Reader(RELEASE.locate, RELEASE.compute_signature, open_mmimdb)
