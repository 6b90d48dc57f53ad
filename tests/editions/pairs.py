"""Plants the defects that files of people's own have into a folder of pairs."""

import io
import json
import os
import pathlib
from collections import Counter
from typing import Any

import numpy as np
from PIL import Image

from tests.editions.defects import Defect

_INDEX = "pairs.jsonl"
_ODD = "has an impossible character"
_TYPE = "is no string"
_ORIENTATION = 0x0112  # the EXIF tag
# Lines of their own: what they are, how they differ from a good row, why they are
# skipped. A value of `...` takes the key away.
_BAD: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("a path above the folder", {"image": "../../etc/passwd"}, "picture outside"),
    ("an absolute path", {"image": "/etc/passwd"}, "picture outside"),
    ("a path of Windows", {"image": "C:\\Windows\\win.ini"}, "picture outside"),
    ("a link out of the folder", {"image": "images/link.jpg"}, "picture outside"),
    ("a linked folder", {"image": "images/away/a.jpg"}, "picture outside"),
    ("a NUL in a file's name", {"image": "images/a\0.jpg"}, f"image {_ODD}"),
    ("a line break in an id", {"id": "a\nb"}, f"id {_ODD}"),
    ("half a character in a group", {"group": "\ud800"}, f"group {_ODD}"),
    ("a NUL in a label", {"label": "a\0b", "labels": ...}, f"label {_ODD}"),
    ("an id of 600 characters", {"id": "i" * 600}, "id too long"),
    ("a group of 600 characters", {"group": "g" * 600}, "group too long"),
    (
        "a label of 600 characters",
        {"label": "l" * 600, "labels": ...},
        "label too long",
    ),
    ("a list as text", {"text": ["a"]}, f"text {_TYPE}"),
    ("an object as picture", {"image": {"path": "a"}}, f"image {_TYPE}"),
    ("a truth value as id", {"id": True}, f"id {_TYPE}"),
    ("a fraction as group", {"group": 1.5}, f"group {_TYPE}"),
    ("a list as split", {"split": ["train"]}, f"split {_TYPE}"),
    ("an object as label", {"label": {"a": 1}, "labels": ...}, f"label {_TYPE}"),
    ("a string as labels", {"labels": "a"}, "labels are no list of strings"),
    ("an unknown split", {"split": "tset"}, "split unknown"),
    ("no label at all", {"label": ..., "labels": ...}, "no label"),
    (
        "nothing to see or read",
        {"image": None, "text": " "},
        "neither image nor text",
    ),
    ("no name", {"id": ..., "image": ...}, "neither id nor image names the row"),
)
# The same, in bytes.
_RAW = (
    ("a torn line", b'{"id": "torn", "image": "images/', "line is no valid JSON"),
    ("nesting without end", b"[" * 100_000, "line is no valid JSON"),
    ("a list", b'["images/1.jpg", "text", "label"]', "line is no JSON object"),
    ("a line of 2 MiB", b"x" * (2 << 20), "line too long"),
    ("Latin-1", b'{"id": "a", "text": "caf\xe9"}', "line is not UTF-8"),
    ("an empty line", b"", None),
    ("a blank line", b" \t", None),
)


def plant(root: pathlib.Path, seed: int) -> list[Defect]:
    """Adds the defects to a written edition.

    Args:
        root: The folder with `pairs.jsonl` and `images`.
        seed: Says which rows and lines get them.

    Returns:
        Every trap, and whatever else a loader counts there.
    """
    edition = _Edition(root, seed)
    _plant_a_group_in_two_splits(edition)
    _plant_a_copy(edition)
    _plant_unfit_pictures(edition)
    _plant_odd_pictures(edition)
    _plant_odd_rows(edition)
    edition.note_the_rest()
    _write_index(edition)
    return edition.traps


class _Edition:
    """The rows of a written edition, and the traps that were planted in it."""

    def __init__(self, root: pathlib.Path, seed: int):
        self.root, self.rng = root, np.random.default_rng([seed, 9])
        text = (root / _INDEX).read_text("utf-8")
        self.rows: list[dict[str, Any]] = [
            json.loads(line) for line in text.split("\n")[:-1]
        ]
        self.traps: list[Defect] = []
        order = self.rng.permutation(len(self.rows))
        self.free = [self.rows[place] for place in order]  # nothing is planted there
        self.usable = {row["id"] for row in self.rows}
        self._looked_at: set[str] = set()

    def take(self) -> dict[str, Any]:
        """A row in which nothing is planted yet."""
        return self.free.pop()

    def put(self, trap: str, where: str, counted: str | None = None) -> None:
        """Lists a trap."""
        self.traps.append(Defect(trap, where, counted))

    def path(self, row: dict[str, Any]) -> pathlib.Path:
        """A row's picture."""
        return self.root / row["image"]

    def note_the_rest(self) -> None:
        """Lists what a loader notes of pictures that are no traps."""
        rest = [row for row in self.rows if row["id"] in self.usable and row["image"]]
        rest = [row for row in rest if row["id"] not in self._looked_at]
        found = Counter(note for row in rest for note in _notes(self.path(row)))
        for note, number in found.items():
            self.traps.append(Defect("no trap", "images", f"noted: {note}", number))

    def put_odd(self, trap: str, row: dict[str, Any]) -> None:
        """Lists a picture that is used and odd, by looking at it."""
        self._looked_at.add(row["id"])
        for note in _notes(self.path(row)) or [None]:
            self.put(trap, row["id"], note and f"noted: {note}")


def _notes(path: pathlib.Path) -> list[str]:
    """What there is to note of a picture, by its header."""
    with Image.open(path) as image:
        found = {
            "greyscale image": image.mode in ("1", "L", "LA", "I;16"),
            "CMYK image": image.mode == "CMYK",
            "palette image": image.mode == "P",
            "transparent image": image.mode in ("RGBA", "LA"),
            "progressive JPEG": "progressive" in image.info,
            "16-bit image": image.mode == "I;16",
            "animated image": getattr(image, "n_frames", 1) > 1,
            "EXIF turn ignored": image.getexif().get(_ORIENTATION, 1) != 1,
        }
    return [note for note, true in found.items() if true]


def _plant_a_group_in_two_splits(edition: _Edition) -> None:
    members: dict[str, list[dict[str, Any]]] = {}
    for row in edition.free:
        members.setdefault(row["group"], []).append(row)
    rows = next(rows for rows in members.values() if len(rows) > 1)
    rows[0]["split"] = "test" if rows[0]["split"] == "train" else "train"
    # Left whole from here on: the trap needs both splits.
    edition.free = [row for row in edition.free if row["group"] != rows[0]["group"]]
    where, counted = rows[0]["group"], "noted: group with rows in two splits"
    edition.put("a group in two splits", where, counted)


def _plant_a_copy(edition: _Edition) -> None:
    original = edition.take()
    copy = original | {"id": "copy", "image": "images/copy.jpg", "group": "copy"}
    edition.path(copy).write_bytes(edition.path(original).read_bytes())
    edition.rows.append(copy)
    edition.usable.add("copy")
    edition.put("a picture twice", "copy", "noted: near-duplicate image")


def _plant_unfit_pictures(edition: _Edition) -> None:
    bomb = io.BytesIO()
    Image.new("1", (12_000, 11_000)).save(bomb, "png")
    contents = {
        "image missing": lambda data: None,
        "image empty": lambda data: b"",
        "image damaged": lambda data: data[: len(data) * 6 // 10],
        "not an image": lambda data: b"<!DOCTYPE html><title>Not found</title>\n",
        "image too large": lambda data: bomb.getvalue(),
        "image is no plain file": lambda data: None,
    }
    for reason, content in contents.items():
        row = edition.take()
        path = edition.path(row)
        data = content(path.read_bytes())
        if data is None:
            path.unlink()
        else:
            path.write_bytes(data)
        if reason == "image is no plain file":
            path.mkdir()
        edition.usable.remove(row["id"])
        edition.put(f"an unfit picture: {reason}", row["id"], f"skipped: {reason}")


def _plant_odd_pictures(edition: _Edition) -> None:
    """Pictures that are used; their names still end in .jpg."""
    exif = Image.Exif()
    exif[_ORIENTATION] = 6
    forms: dict[str, tuple[str, str, dict[str, Any]]] = {
        "CMYK": ("CMYK", "jpeg", {}),
        "a palette": ("P", "png", {}),
        "transparency, and colours behind it": ("RGBA", "png", {}),
        "16 bits": ("I;16", "png", {}),
        "a progressive JPEG": ("RGB", "jpeg", {"progressive": True}),
        "an animation": ("RGB", "gif", {"save_all": True}),
        "a turn in EXIF": ("RGB", "jpeg", {"exif": exif}),
        "a TIFF": ("RGB", "tiff", {}),
    }
    for trap, (mode, kind, options) in forms.items():
        row = edition.take()
        path = edition.path(row)
        with Image.open(path) as image:
            image = image.convert("RGB")
        if mode == "I;16":
            wide = np.asarray(image.convert("L")).astype(np.uint16) * 257
            image = Image.fromarray(wide)
        else:
            image = image.convert(mode)
        if mode == "RGBA":
            image.putalpha(Image.linear_gradient("L").resize(image.size))
        if kind == "gif":
            options = options | {"append_images": [image.rotate(90)]}
        image.save(path, kind, **options)
        edition.put_odd(trap, row)


def _plant_odd_rows(edition: _Edition) -> None:
    """Rows that are used; most of what is odd about them is no loss."""
    changes: dict[str, Any] = {
        "a NUL in a text": lambda row: {"text": row["text"] + "\0."},
        "half a character in a text": lambda row: {"text": "\ud83d " + row["text"]},
        "U+0085 and U+2028 in a text": lambda row: {"text": "a\u0085b\u2028c"},
        "no text": lambda row: {"text": None},
        "no picture": lambda row: {"image": None},
        "a blank text": lambda row: {"text": " \n"},
        "a number as group": lambda row: {"group": 7},
        "a split in capitals": lambda row: {"split": row["split"].upper()},
        "a path with backslashes": lambda row: {
            "image": row["image"].replace("/", "\\")
        },
        "a key that nobody reads": lambda row: {"author": ["Ana Example"]},
    }
    noted = {
        "a NUL in a text": "noted: NUL characters in a text",
        "half a character in a text": "noted: broken characters in a text",
    }
    for trap, change in changes.items():
        row = edition.take()
        new = change(row)
        if "\\" in (new.get("image") or ""):
            edition.put_odd("no trap", row)  # before it has another name
        row |= new
        edition.put(trap, row["id"], noted.get(trap))


def _write_index(edition: _Edition) -> None:
    """Writes the index with the further lines, and says where they are."""
    good = edition.take()
    os.symlink("../../outside.jpg", edition.root / "images" / "link.jpg")
    os.symlink("../..", edition.root / "images" / "away")
    further = [*_RAW, ("an id twice", json.dumps(good).encode(), "id already used")]
    for number, (trap, change, reason) in enumerate(_BAD):
        row = good | {"id": f"trap-{number}", "group": f"trap-{number}"} | change
        row = {key: value for key, value in row.items() if value is not ...}
        full = "image outside of the folder" if reason == "picture outside" else reason
        further.append((trap, json.dumps(row).encode(), full))
    # Somewhere behind the first row and before the last.
    places = edition.rng.integers(1, len(edition.rows), len(further))
    lines: list[bytes] = []
    for number, row in enumerate(edition.rows):
        for place, (trap, line, reason) in zip(places, further, strict=True):
            if place == number:
                lines.append(line)
                where = f"{_INDEX} line {len(lines)}"
                edition.put(trap, where, reason and f"skipped: {reason}")
        lines.append(
            json.dumps(row, ensure_ascii="\u2028" not in str(row["text"])).encode()
        )
    lines[0] = b"\xef\xbb\xbf" + lines[0]
    lines[-1] += b"\r"
    edition.put("a byte-order mark", f"{_INDEX} line 1")
    edition.put("CR LF", f"{_INDEX} line {len(lines)}")
    # No line break at the end either.
    (edition.root / _INDEX).write_bytes(b"\n".join(lines))
