"""MM-IMDb (Arevalo et al., 2017) in its official layout: posters, plots, 23 genres.

    mmimdb/split.json              {"train": [ids], "dev": [ids], "test": [ids]}
    mmimdb/dataset/<id>.json       "genres", "plot" (a list of texts), ...
    mmimdb/dataset/<id>.jpeg       the poster

Or the archive `mmimdb.tar.gz` that holds them. Get it from
http://lisi1.unal.edu.co/mmimdb/ ; nothing is ever downloaded here.
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
    digest,
)
from ccu_jax.data.readers.untrusted_files import (
    MAX_TEXT_BYTES,
    Folder,
    clean_text,
    decode_utf8,
    parse_json,
    reject_external_links,
)
from ccu_jax.errors import UserError

PAGE = "http://lisi1.unal.edu.co/mmimdb/"
ARCHIVE = "mmimdb.tar.gz"
INDEX = "split.json"

# By falling frequency, as everywhere in the literature on this data set.
GENRES = tuple(
    [
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
    ]
)
# The official files have these, too; the authors leave them out.
_RARE = ("News", "Adult", "Talk-Show", "Reality-TV")

_OFFICIAL_SPLITS = {"train": "train", "validation": "dev", "test": "test"}
# IMDb puts the author's name behind a plot.
_AUTHOR = re.compile(r"::[^:\n]{0,80}$")


class Key(NamedTuple):
    """A movie that `split.json` lists."""

    id: str
    split: str


class _Layout(NamedTuple):
    """Where the files of the movies are."""

    folder: Folder
    texts: str  # name of the folder with the .json files
    posters: str


def locate(config: Data, workdir: pathlib.Path) -> Location:
    """Returns the user's folder, or the sample edition below the working folder.

    A folder that the user names is never replaced by the sample edition.

    Raises:
        UserError: nothing there that could be read; what is missing.
    """
    if config.plot_policy not in ("longest", "first"):
        raise UserError(
            f"data.plot_policy: {config.plot_policy!r} is neither 'longest' nor 'first'"
        )
    if config.dir is None:
        return Location(workdir / "sample" / "mmimdb", "sample")
    given = pathlib.Path(os.path.expanduser(config.dir))
    root = _unpacked(given)
    if root is None and (given / ARCHIVE).is_file():
        root = given
    if root is None:
        raise _refusal(given)
    above = given.absolute().parent
    reject_external_links(
        {root / ARCHIVE: root, root: above if root == above else given}
    )
    return Location(root, "sample" if (root / MARKER).is_file() else "official")


def signature(config: Data, place: Location) -> str:
    """Hash of `split.json` and of when the folder with the files last changed.

    Of an archive only its size and age are looked at.
    """
    if _unpacked(place.root) is None:
        status = (place.root / ARCHIVE).stat()
        return digest(ARCHIVE, str(status.st_size), str(status.st_mtime_ns))
    layout = _Layout(Folder(place.root), *_names(place.root))
    index, _ = _index(layout)
    if place.edition == "sample" and config.dir is None:
        return digest(index, (place.root / MARKER).read_bytes())
    folders = (place.root / name for name in (layout.texts, layout.posters))
    return digest(index, *(str(folder.stat().st_mtime_ns) for folder in folders))


def open_mmimdb(
    config: Data, place: Location, counts: Counts, unpack: Unpack
) -> Source:
    """Reads `split.json` and looks which files there are.

    Raises:
        UserError: no `split.json` that can be read; most of the files missing.
    """
    root = _unpacked(place.root)
    if root is None:
        counts.add(f"noted: images in {ARCHIVE}")
        root = _unpacked(unpack(place.root / ARCHIVE))
        if root is None:
            raise UserError(
                f"{place.root / ARCHIVE} holds no mmimdb/{INDEX} and mmimdb/dataset/: "
                f"get it again from {PAGE}"
            )
        if (root / MARKER).is_file():  # seen too late to call the place a sample
            counts.add(f"noted: {ARCHIVE} holds a sample edition")
    layout = _Layout(Folder(root), *_names(root))
    keys = _keys(layout, counts)
    _check_listed(layout, {key.id for key in keys}, counts)
    policy = config.plot_policy

    def read(key: Key) -> Example:
        return _example(layout, key, policy)

    return Source(GENRES, True, "micro_f1", keys, read, lambda key: key.id)


def choose_plot(plots: list[str], policy: str) -> tuple[str, tuple[str, ...]] | None:
    """One plot of a movie: the first or the longest (the first of equals).

    Args:
        plots: Texts; one may end in the `::author` that IMDb adds, which is cut off.
        policy: "longest" or "first".

    Returns:
        The plot and what was noted on it, or None if it (or each) is blank.
    """
    clean = [_clean(plot) for plot in (plots if policy == "longest" else plots[:1])]
    chosen = max(clean, key=lambda plot: len(plot[0]), default=("", ()))
    return chosen if chosen[0] else None


def _clean(plot: str) -> tuple[str, tuple[str, ...]]:
    """A plot as it can be stored and shown, and what had to be done for that."""
    whole, notes = clean_text(plot)
    text = _AUTHOR.sub("", whole or "").strip()
    if text != (whole or ""):
        notes += ("noted: plot ends in ::author",)
    if not text.isascii():
        notes += ("noted: non-ASCII text",)
    return text, notes


def _unpacked(given: pathlib.Path) -> pathlib.Path | None:
    """The folder with split.json: the given one, one below, or one above."""
    for root in _candidates(given):
        folders = (root / name for name in _names(root))
        if (root / INDEX).is_file() and all(folder.is_dir() for folder in folders):
            return root
    return None


def _candidates(given: pathlib.Path) -> list[pathlib.Path]:
    above = given.name in ("dataset", "images", "labels")
    return [given, given / "mmimdb", *([given.absolute().parent] if above else [])]


def _refusal(given: pathlib.Path) -> UserError:
    """What is missing in a folder that cannot be read, and where to get it."""
    remedy = f"unpack {ARCHIVE} completely, see {PAGE}"
    if not given.is_dir():
        return UserError(f"data.dir: no folder {given}; get MM-IMDb from {PAGE}")
    for root in _candidates(given):
        name = _names(root)[0]
        if (root / INDEX).is_file():
            return UserError(
                f"data.dir: {root} holds {INDEX} but no folder dataset/: {remedy}"
            )
        if (root / name).is_dir():
            return UserError(f"data.dir: {root} holds {name}/ but no {INDEX}: {remedy}")
    return UserError(
        f"data.dir: neither {given} nor {given / 'mmimdb'} holds {INDEX} and dataset/, "
        f"or {ARCHIVE}: get MM-IMDb from {PAGE}"
    )


def _names(root: pathlib.Path) -> tuple[str, str]:
    """Where the .json and the .jpeg files are; one re-arranged layout is known."""
    if (root / "labels").is_dir() and (root / "images").is_dir():
        return "labels", "images"
    return "dataset", "dataset"


def _index(layout: _Layout) -> tuple[bytes, dict[str, list[Any]]]:
    """`split.json`, as it is and parsed; its lists may hold anything."""
    try:
        raw = layout.folder.read(INDEX, INDEX, 4 * MAX_TEXT_BYTES)
        splits = parse_json(decode_utf8(raw, INDEX), INDEX)
        for name in _OFFICIAL_SPLITS.values():
            if not isinstance(splits, dict) or not isinstance(splits.get(name), list):
                raise SkipExample(f'{INDEX} has no list "{name}"')
    except SkipExample as reason:
        raise UserError(
            f"{layout.folder.root}: {reason}; take the one of {ARCHIVE}, see {PAGE}"
        ) from None
    return raw, splits


def _keys(layout: _Layout, counts: Counts) -> list[Key]:
    """The movies in the order of the file; entries that name none are counted."""
    _, splits = _index(layout)
    keys: dict[str, Key] = {}
    for split, name in _OFFICIAL_SPLITS.items():
        counts.add("read", len(splits[name]))
        for place, i in enumerate(splits[name], start=1):
            # This also keeps "../" out of the names of files.
            if not isinstance(i, str) or not re.fullmatch("[0-9]{7,8}", i):
                counts.skip("id is not 7 digits", f'{INDEX} "{name}" entry {place}')
            elif i in keys:
                counts.skip("id listed twice", f'{INDEX} "{name}" entry {place} ({i})')
            else:
                keys[i] = Key(i, split)
    return list(keys.values())


def _check_listed(layout: _Layout, listed: set[str], counts: Counts) -> None:
    """Refuses a half-unpacked archive, and counts what no list names."""
    root = layout.folder.root
    for name, ending in ((layout.texts, ".json"), (layout.posters, ".jpeg")):
        if not (root / name).resolve().is_relative_to(root):
            raise UserError(
                f"{root / name} is a link out of its folder: set data.dir to a folder "
                f"that holds both {INDEX} and the files"
            )
        there = {file for file in os.listdir(root / name) if file.endswith(ending)}
        named = {i + ending for i in listed}
        missing = len(named - there)
        if 2 * missing > len(listed):
            raise UserError(
                f"{root / name} lacks {missing} of the {len(listed)} {ending} files "
                f"that {INDEX} lists: unpack {ARCHIVE} again, see {PAGE}"
            )
        if ending == ".json":
            counts.add(
                f"ignored: .json file that {INDEX} does not list", len(there - named)
            )


def _example(layout: _Layout, key: Key, policy: str) -> Example:
    """The movie; raises SkipExample."""
    folder, what = layout.folder, "text file"
    movie = parse_json(folder.text(f"{layout.texts}/{key.id}.json", what), what)
    if not isinstance(movie, dict):
        raise SkipExample(f"{what} is no JSON object")
    plots = [plot for plot in _listed(movie.get("plot")) if isinstance(plot, str)]
    plot = choose_plot(plots, policy)
    if plot is None:
        raise SkipExample("no plot")
    text, notes = plot
    genres = _listed(movie.get("genres"))
    labels = tuple(genre for genre in GENRES if genre in genres)
    if not labels:
        raise SkipExample(f"none of the {len(GENRES)} genres")
    # A name of the data is counted under that name only where it is a known one.
    ignored = {
        genre if genre in _RARE else None for genre in genres if genre not in GENRES
    }
    notes += tuple(f"ignored: genre {genre}" for genre in _RARE if genre in ignored)
    notes += ("ignored: unknown genre",) * (None in ignored)
    poster = folder.read(f"{layout.posters}/{key.id}.jpeg", "image")
    return Example(key.id, key.id, poster, text, labels, key.split, notes)


def _listed(value: Any) -> list[Any]:
    """The value, or a list of it where one text stands for a list."""
    value = [value] if isinstance(value, str) else value
    return value if isinstance(value, list) else []


READER = Reader(locate, signature, open_mmimdb)
