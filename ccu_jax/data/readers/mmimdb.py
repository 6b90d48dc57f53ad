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
from typing import Any, NamedTuple

from ccu_jax.config.schema import Data
from ccu_jax.data.readers.base import (
    MARKER,
    Counts,
    Example,
    Location,
    Reader,
    SkipExample,
    Source,
    Unpack,
)
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

# By falling frequency, the order of the literature on this data set.
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


class Key(NamedTuple):
    """A movie that `split.json` lists."""

    id: str
    split: str


class _Layout(NamedTuple):
    """The folder of a release, and the names of the folders in it."""

    folder: Folder
    texts: str  # holds the .json files
    posters: str


def open_mmimdb(
    config: Data, location: Location, counts: Counts, unpack: Unpack
) -> Source:
    """Opens MM-IMDb; raises UserError if most files of `split.json` are missing."""
    root = RELEASE.find_root(location.root)
    if root is None:
        archive = location.root / ARCHIVE
        counts.add(f"noted: images in {ARCHIVE}")
        root = RELEASE.find_root(unpack(archive))
        if root is None:
            raise UserError(
                f"{archive} holds no mmimdb/{INDEX} and mmimdb/dataset/: get it again "
                f"from {PAGE}"
            )
        if (root / MARKER).is_file():  # unknown when the location was named
            counts.add(f"noted: {ARCHIVE} holds a sample edition")
    layout = _Layout(Folder(root), *_folder_names(root))
    keys = _read_keys(layout, counts)
    _check_files(layout, {key.id for key in keys}, counts)
    policy = config.plot_policy

    def read(key: Key) -> Example:
        return _read_movie(layout, key, policy)

    return Source(GENRES, True, "micro_f1", keys, read, lambda key: key.id)


def choose_plot(plots: list[str], policy: str) -> tuple[str, tuple[str, ...]] | None:
    """Returns the first or the longest plot without `::author`, and notes to count.

    Returns None if no plot has any text.
    """
    cleaned = [
        _clean_plot(plot) for plot in (plots if policy == "longest" else plots[:1])
    ]
    chosen = max(cleaned, key=lambda plot: len(plot[0]), default=("", ()))
    return chosen if chosen[0] else None


def _clean_plot(plot: str) -> tuple[str, tuple[str, ...]]:
    """Returns a plot as it is stored, and notes to count."""
    full, notes = clean_text(plot)
    text = _AUTHOR.sub("", full or "").strip()
    if text != (full or ""):
        notes += ("noted: plot ends in ::author",)
    if not text.isascii():
        notes += ("noted: non-ASCII text",)
    return text, notes


def _folder_names(root: pathlib.Path) -> tuple[str, str]:
    """Returns the folders of the .json and .jpeg files; some copies separate them."""
    if (root / "labels").is_dir() and (root / "images").is_dir():
        return "labels", "images"
    return "dataset", "dataset"


def _read_index(layout: _Layout) -> dict[str, list[Any]]:
    """Returns the content of `split.json`; the entries of its lists are unchecked."""
    try:
        text = layout.folder.read_text(INDEX, INDEX, 4 * MAX_TEXT_BYTES)
        splits = parse_json(text, INDEX)
        for name in _OFFICIAL_SPLITS.values():
            if not isinstance(splits, dict) or not isinstance(splits.get(name), list):
                raise SkipExample(f'{INDEX} has no list "{name}"')
    except SkipExample as reason:
        raise UserError(
            f"{layout.folder.root}: {reason}; use that of {ARCHIVE}, see {PAGE}"
        ) from None
    return splits


def _read_keys(layout: _Layout, counts: Counts) -> list[Key]:
    """Returns the movies, train first, in the order of `split.json`."""
    splits = _read_index(layout)
    keys: dict[str, Key] = {}
    for split, name in _OFFICIAL_SPLITS.items():
        counts.add("read", len(splits[name]))
        for position, id_ in enumerate(splits[name], start=1):
            entry = f'{INDEX} "{name}" entry {position}'
            # Also keeps "../" out of file names.
            if not isinstance(id_, str) or not re.fullmatch("[0-9]{7,8}", id_):
                counts.skip("id is not 7 digits", entry)
            elif id_ in keys:
                counts.skip("id listed twice", f"{entry} ({id_})")
            else:
                keys[id_] = Key(id_, split)
    return list(keys.values())


def _check_files(layout: _Layout, listed: set[str], counts: Counts) -> None:
    """Raises UserError if more than half of the files are missing."""
    root = layout.folder.root
    for name, ending in ((layout.texts, ".json"), (layout.posters, ".jpeg")):
        existing = {file for file in os.listdir(root / name) if file.endswith(ending)}
        expected = {id_ + ending for id_ in listed}
        num_missing = len(expected - existing)
        if 2 * num_missing > len(listed):
            raise UserError(
                f"{root / name} lacks {num_missing} of the {len(listed)} {ending} "
                f"files that {INDEX} lists: unpack {ARCHIVE} again, see {PAGE}"
            )
        if ending == ".json":
            num_unlisted = len(existing - expected)
            counts.add(f"ignored: .json file that {INDEX} does not list", num_unlisted)


def _read_movie(layout: _Layout, key: Key, policy: str) -> Example:
    folder, what = layout.folder, "text file"
    movie = parse_json(folder.read_text(f"{layout.texts}/{key.id}.json", what), what)
    if not isinstance(movie, dict):
        raise SkipExample(f"{what} is no JSON object")
    plots = [plot for plot in _as_list(movie.get("plot")) if isinstance(plot, str)]
    plot = choose_plot(plots, policy)
    if plot is None:
        raise SkipExample("no plot")
    text, notes = plot
    genres = _as_list(movie.get("genres"))
    labels = tuple(genre for genre in GENRES if genre in genres)
    if not labels:
        raise SkipExample(f"none of the {len(GENRES)} genres")
    # Reports show the names of counts, so no other name of the files becomes one.
    notes += tuple(
        f"ignored: genre {genre}" for genre in _RARE_GENRES if genre in genres
    )
    if any(genre not in (*GENRES, *_RARE_GENRES) for genre in genres):
        notes += ("ignored: unknown genre",)
    poster = folder.read(f"{layout.posters}/{key.id}.jpeg", "image")
    return Example(key.id, key.id, poster, text, labels, key.split, notes)


def _as_list(value: Any) -> list[Any]:
    """Returns a list as it is, a text as a list of one, and [] for anything else."""
    value = [value] if isinstance(value, str) else value
    return value if isinstance(value, list) else []


def _files(root: pathlib.Path) -> dict[str, bool]:
    folders = [(root / name).is_dir() for name in _folder_names(root)]
    return {INDEX: (root / INDEX).is_file(), "dataset/": all(folders)}


def _watched(root: pathlib.Path) -> list[pathlib.Path]:
    is_packed = RELEASE.find_root(root) is None
    return [root / name for name in ((ARCHIVE,) if is_packed else _folder_names(root))]


RELEASE = Release(
    title="MM-IMDb",
    remedy=f"get {ARCHIVE} from {PAGE}",
    sample_root="mmimdb",
    lists=(INDEX,),
    images=("dataset", "labels", "images"),
    subfolders=("mmimdb",),
    inner_folders=("dataset", "images", "labels"),
    files=_files,
    watched=_watched,
    archive=ARCHIVE,
)
READER = Reader(RELEASE.locate, RELEASE.signature, open_mmimdb)
