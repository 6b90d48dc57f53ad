"""Plants the defects of the real MM-IMDb, and hostile ones, in a sample edition."""

import io
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from ccu_jax.data.readers.untrusted_files import MAX_TEXT_BYTES
from ccu_jax.data.samples.mmimdb import load_genres, write_movie
from tests.editions.defects import Defect, bomb

_Spoil = Callable[[pathlib.Path], Any]  # gets the path of a movie without its ending


def _fields(**fields: Any) -> _Spoil:
    """Sets fields of the .json file; None takes one out."""

    def spoil(path: pathlib.Path) -> None:
        file = path.with_suffix(".json")
        movie = json.loads(file.read_text("ascii")) | fields
        movie = {name: value for name, value in movie.items() if value is not None}
        file.write_text(json.dumps(movie, indent=4), "ascii")

    return spoil


def _bytes(name: str, data: bytes | None) -> _Spoil:
    """Replaces a file's content; None takes the file away."""

    def spoil(path: pathlib.Path) -> None:
        file = path.with_suffix(name)
        file.unlink() if data is None else file.write_bytes(data)

    return spoil


def _saved(mode: str, kind: str = "jpeg", **options: Any) -> _Spoil:
    """Saves the poster in another mode or format."""

    def spoil(path: pathlib.Path) -> None:
        file = path.with_suffix(".jpeg")
        image = Image.open(io.BytesIO(file.read_bytes())).convert(mode)
        image.save(file, kind, **options)

    return spoil


def _cut(path: pathlib.Path) -> None:
    file = path.with_suffix(".jpeg")
    file.write_bytes(file.read_bytes()[:-200])


def _endless(path: pathlib.Path) -> None:
    os.truncate(path.with_suffix(".json"), MAX_TEXT_BYTES + 1)  # sparse: takes no space


def _led_outside(path: pathlib.Path) -> None:
    file = path.with_suffix(".jpeg")
    file.unlink()
    file.symlink_to(pathlib.Path("..", "..", "..", "elsewhere.jpeg"))


def _huge(path: pathlib.Path) -> None:
    rng = np.random.default_rng(int(path.name))
    path.with_suffix(".jpeg").write_bytes(_huge_poster(rng))


def _turn() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held sideways
    return exif


_LONG = "A keeper of the lighthouse counts the ships of a long and foggy winter."
_BROKEN = "noted: broken characters in a text"
_SPOILT: tuple[tuple[str, str | None, _Spoil], ...] = (
    ("no plot", "skipped: no plot", _fields(plot=None)),
    ("only blank plots", "skipped: no plot", _fields(plot=["", "  ::somebody"])),
    ("plot is a number", "skipped: no plot", _fields(plot=7)),
    ("plot is one text", None, _fields(plot=_LONG)),
    ("number among the plots", None, _fields(plot=[7, _LONG])),
    (
        "plot with its author",
        "noted: plot ends in ::author",
        _fields(plot=["Short.", f"{_LONG}::Ann Example <ann@example.org>"]),
    ),
    ("non-ASCII plot", "noted: non-ASCII text", _fields(plot=[f"Caf\u00e9: {_LONG}"])),
    (
        "NUL in the plot",
        "noted: NUL characters in a text",
        _fields(plot=[f"Winter.\0{_LONG}"]),
    ),
    (
        "half of a UTF-16 pair in the plot",
        _BROKEN,
        _fields(plot=[f"Winter. \ud83d {_LONG}"]),
    ),
    ("no genres", "skipped: none of the 23 genres", _fields(genres=None)),
    ("only News", "skipped: none of the 23 genres", _fields(genres=["News"])),
    (
        "genres are an object",
        "skipped: none of the 23 genres",
        _fields(genres={"Drama": 1}),
    ),
    *(
        (f"{genre} among the genres", f"ignored: genre {genre}", _fields(genres=both))
        for genre in ("News", "Adult", "Talk-Show", "Reality-TV")
        for both in (["Drama", genre],)
    ),
    (
        "invented genre",
        "ignored: unknown genre",
        _fields(genres=["Drama", "Puppetry", "Puppetry", 7]),
    ),
    ("no text file", "skipped: text file missing", _bytes(".json", None)),
    ("empty JSON", "skipped: text file is no valid JSON", _bytes(".json", b"")),
    ("cut JSON", "skipped: text file is no valid JSON", _bytes(".json", b'{"plot": [')),
    (
        "deeply nested JSON",
        "skipped: text file is no valid JSON",
        _bytes(".json", b"[" * 200_000),
    ),
    (
        "JSON list",
        "skipped: text file is no JSON object",
        _bytes(".json", b'["Drama"]'),
    ),
    ("JSON number", "skipped: text file is no JSON object", _bytes(".json", b"17")),
    (
        "JSON in Latin-1",
        "skipped: text file is not UTF-8",
        _bytes(".json", b'{"genres": ["Drama"], "plot": ["Caf\xe9"]}'),
    ),
    ("text file of 16 MiB", "skipped: text file too large", _endless),
    ("no poster", "skipped: image missing", _bytes(".jpeg", None)),
    ("empty poster", "skipped: image empty", _bytes(".jpeg", b"")),
    (
        "HTML saved as .jpeg",
        "skipped: not an image",
        _bytes(".jpeg", b"<html><body>404 Not Found</body></html>"),
    ),
    ("truncated poster", "skipped: image damaged", _cut),
    (
        "poster is a link out of the folder",
        "skipped: image outside of the folder",
        _led_outside,
    ),
    (
        "PNG of 12000 x 11000 pixels named .jpeg",
        "skipped: image too large",
        lambda path: path.with_suffix(".jpeg").write_bytes(bomb()),
    ),
    ("poster of 6000 x 9000 pixels", "noted: image above 40 megapixels", _huge),
    ("greyscale poster", "noted: greyscale image", _saved("L")),
    ("CMYK poster", "noted: CMYK image", _saved("CMYK")),
    ("progressive poster", "noted: progressive JPEG", _saved("RGB", progressive=True)),
    ("EXIF turn", "noted: EXIF turn ignored", _saved("RGB", exif=_turn())),
    ("PNG named .jpeg", None, _saved("RGB", "png")),
)


def plant(root: pathlib.Path, seed: int) -> list[Defect]:
    """Adds movies to the lists, all but one spoilt, and entries that name no movie."""
    index, tops, traps = root / "split.json", load_genres(), []
    splits = json.loads(index.read_text("ascii"))
    lists = list(splits.values())
    first = lists[0][0]

    def add(number: int, i: str, spoil: _Spoil, trap: str, counted: str | None) -> None:
        rng = np.random.default_rng([seed, 2, number])
        write_movie(rng, tops, root / "dataset" / i)
        spoil(root / "dataset" / i)
        lists[number % len(lists)].append(i)
        traps.append(Defect(trap, i, counted))

    def copied(path: pathlib.Path) -> None:
        poster = path.with_name(f"{first}.jpeg").read_bytes()
        path.with_suffix(".jpeg").write_bytes(poster)

    for number, (trap, counted, spoil) in enumerate(_SPOILT):
        add(number, i := f"{4_100_000 + number}", spoil, trap, counted)
        if counted == _BROKEN:
            traps.append(Defect("what takes its place", i, "noted: non-ASCII text"))
    same = "noted: near-duplicate image"
    add(len(_SPOILT), "0000001", lambda path: None, "leading zeros in an id", None)
    add(len(_SPOILT) + 1, "4200000", copied, "poster of another movie", same)
    for entry in ("../../elsewhere", "tt0000002", 17, ["0000003"], None):
        lists[-1].append(entry)
        where = f"split.json: {json.dumps(entry)}"
        traps.append(Defect("entry is no id", where, "skipped: id is not 7 digits"))
    lists[-1].append(first)  # a movie for training must not be one for testing, too
    traps.append(Defect("listed in two splits", first, "skipped: id listed twice"))
    for i in ("4300000", "4300001"):
        rng = np.random.default_rng([seed, 3, int(i)])
        write_movie(rng, tops, root / "dataset" / i)
        ignored = "ignored: .json file that split.json does not list"
        traps.append(Defect("movie that no list names", i, ignored))
    index.write_text(json.dumps(splits, indent=4), "ascii")
    return traps


def _huge_poster(rng: np.random.Generator) -> bytes:
    """A poster of 6000 x 9000 pixels as JPEG: a few large even blocks, below a MiB."""
    blocks = rng.integers(0, 256, (6, 4, 3), np.uint8)
    image = Image.fromarray(blocks).resize((6000, 9000), Image.Resampling.NEAREST)
    file = io.BytesIO()
    image.save(file, "jpeg", quality=30, optimize=True)
    return file.getvalue()
