"""The defects of the real files, and some of hostile ones, for the sample edition."""

import json
import pathlib
import shutil

import numpy as np
from PIL import Image

from ccu_jax.data.samples.hatefulmemes import format_phase_1
from tests.editions.defects import Defect, bomb
from tests.editions.hatefulmemes_edition import OUTSIDE, SMALL, Edition

_FREE = 99_000  # the first of the ids that no meme has
_TWICE = "the very same words"


def plant(root: pathlib.Path, seed: int) -> list[Defect]:
    """Adds the traps to a sample edition and lists all that a loader counts there.

    With an even seed the pictures are then in `img.tar.gz`, as they are sometimes
    handed out; with an odd one they stay in `img/`.
    """
    edition = Edition(root / "data", seed)
    _pictures(edition)
    _link(edition)
    _labels(edition)
    _texts(edition)
    _ids(edition)
    _lines(edition)
    _lists(edition)
    _natural(edition)
    edition.write()
    if edition.packed:
        edition.pack()
    return edition.traps


def _pictures(edition: Edition) -> None:
    """Pictures of unusual kinds, damaged ones, and files that are no pictures."""
    for mode, trap, counted in (
        ("L", "a greyscale image", "noted: greyscale image"),
        ("P", "a picture with a palette", "noted: palette image"),
        ("RGBA", "colours hidden by transparency", "noted: transparent image"),
    ):
        row = edition.take()
        image = Image.open(edition.picture(row)).convert(mode)
        if mode == "RGBA":
            hidden = np.asarray(image).copy()
            hidden[::2, : image.width // 2] = 255, 0, 255, 0
            image = Image.fromarray(hidden)
        image.save(edition.picture(row))
        edition.note(trap, row, counted)
    whole = edition.picture(edition.take()).read_bytes()
    for content, trap, reason in (
        (whole[: len(whole) // 2], "a picture that is broken off", "image damaged"),
        (b"<html>Not found</html>", "a page saved as a picture", "not an image"),
        (b"", "an empty picture", "image empty"),
        (bomb(), "a decompression bomb", "image too large"),
    ):
        row = edition.take()
        edition.picture(row).write_bytes(content)
        edition.note(trap, row, f"skipped: {reason}")
    row = edition.take()
    edition.picture(row).unlink()
    edition.note("a picture that is not there", row, "skipped: image missing")
    row = edition.take()
    edition.picture(row).unlink()
    edition.picture(row).mkdir()
    edition.note("a folder for a picture", row, "skipped: image is no plain file")
    twin, row = edition.take(1), edition.take(0)
    shutil.copyfile(edition.picture(twin), edition.picture(row))
    edition.note(
        "the picture of another row, with the other label",
        row,
        "noted: near-duplicate image",
    )
    (edition.data / "img" / f"{_FREE}.png").write_bytes(whole[::-1])
    edition.note("a file that no list names", f"img/{_FREE}.png", None)


def _link(edition: Edition) -> None:
    """A picture that is a link to a file elsewhere."""
    row = edition.take()
    path = edition.picture(row)
    path.unlink()
    path.symlink_to(OUTSIDE)
    reasons = ["image outside of the folder"]
    if edition.packed:  # it does not even come out of the archive
        reasons = ["archive member is no plain file", "image missing"]
    for reason in reasons:
        edition.note("a link out of the folder", row, f"skipped: {reason}")


def _labels(edition: Edition) -> None:
    """Labels that are none, and ones that are written in another way."""
    for label in (2, "x", [1], 0.5):
        row = edition.take()
        row["label"] = label
        edition.drop(f"label {json.dumps(label)}", row, "label is neither 0 nor 1")
    for label in (None, -1):
        row = edition.take()
        row["label"] = label
        edition.drop(f"label {json.dumps(label)}", row, "no label")
    for label in ("1", True):
        row = edition.take(1)
        row["label"] = label
        edition.note(f"label {json.dumps(label)}", row, None)


def _texts(edition: Edition) -> None:
    """Texts with unusual characters or none, and one text with both labels."""
    for text, trap, *counted in (
        ("caf\u00e9 \u2615 at nine", "accents", "non-ASCII text"),
        ("one\u0085line", "a line break of Unicode", "non-ASCII text"),
        ("nothing \0 between", "a NUL character", "NUL characters in a text"),
        (
            "half a \ud83d pair",
            "half of a surrogate pair",
            "broken characters in a text",
            "non-ASCII text",
        ),
        ("  ", "a blank text", "row without text"),
        (None, "text null", "row without text"),
    ):
        row = edition.take()
        row["text"] = text
        for what in counted:
            edition.note(trap, row, f"noted: {what}")
    for label in (0, 1):
        row = edition.take(label)
        row["text"] = _TWICE
    edition.note(
        "a text that two rows have, with both labels",
        row,
        "noted: text with both labels",
    )


def _ids(edition: Edition) -> None:
    """Ids that are not the picture's, that come twice, or in two splits."""
    row = edition.take()
    row["id"] += 1
    edition.note("the id of another picture", row, "noted: id is not the image's")
    row = edition.take()
    del row["id"]
    edition.note("no id", row, "noted: id is not the image's")
    row = edition.take()
    edition.raw["train"] = [format_phase_1(row).encode()]
    edition.note("the same row again", row, "skipped: id listed twice")
    row = edition.take()
    again = row | {"id": f"{row['id']:05d}"}
    edition.raw["dev_seen"] = [json.dumps(again).encode()]
    edition.note(
        "a training row",
        f"dev_seen.jsonl, {row['img']}",
        "skipped: id is in the train split too",
    )


def _lines(edition: Edition) -> None:
    """Lines that are no rows, and paths that lead elsewhere."""
    added = edition.raw["train"]

    def add(line: bytes, trap: str, reason: str | None) -> None:
        number = len(edition.rows["train"]) + len(added) + 1
        added.append(line)
        counted = reason and f"skipped: {reason}"
        edition.note(trap, f"train.jsonl line {number}", counted)

    entry = {"id": _FREE + 1, "img": f"img/{_FREE + 1}.png", "label": 0, "text": "a"}
    images = ("img/" + OUTSIDE, OUTSIDE, "/outside.png", "img\\outside.png")
    for image in (*images, "img/..", "img/a\nb.png", "outside.png", "img/", 7, None):
        line = format_phase_1(entry | {"img": image}).encode()
        add(line, f"img {json.dumps(image)}", "img is no path below img/")
    line = format_phase_1(entry | {"text": "long " * (1 << 18)}).encode()
    add(line, "a line of more than a MiB", "line too long")
    line = format_phase_1(entry).encode()
    add(line.replace(b'"a"', b'"\xff\xfe"'), "a wrong encoding", "line is not UTF-8")
    add(line[:-9], "half a line", "line is no valid JSON")
    nested = b'{"text":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    add(nested, "lists in lists in lists", "line is no valid JSON")
    add(b"[1, 2]", "a list", "line is no JSON object")
    add(b"null", "null", "line is no JSON object")
    add(b" ", "a blank line", None)


def _lists(edition: Edition) -> None:
    """The lists of the first phase beside those of the second."""
    edition.rows["dev"] = edition.rows["dev_seen"]
    edition.note(
        "the list of the first phase, too",
        "dev.jsonl",
        "noted: id in two dev files",
        len(edition.rows["dev"]),
    )
    edition.rows["test"] = [
        {name: value for name, value in row.items() if name != "label"}
        for row in edition.rows["test_seen"]
    ]
    edition.note(
        "a list without labels",
        "test.jsonl",
        "skipped: no label",
        len(edition.rows["test"]),
    )


def _natural(edition: Edition) -> None:
    """Lists what a loader counts without any trap, by looking at what is there."""

    def note(what: str, where: str, counted: str, total: int) -> None:
        planted = sum(t.number for t in edition.traps if t.count == counted)
        edition.note(f"{what}, as in every edition", where, counted, total - planted)

    seen = {row["img"] for row in edition.rows["dev_seen"]}
    both = sum(row["img"] in seen for row in edition.rows["dev_unseen"])
    counted = "noted: id in two dev files"
    total = both + len(edition.rows["dev"])
    note("memes of both dev files", "dev_unseen.jsonl", counted, total)
    train = [row for row in edition.rows["train"] if row not in edition.unused]
    zeros = sum(row.get("id", SMALL) < SMALL for row in train)
    counted = "noted: id without its leading zeros"
    note("ids as numbers", "train.jsonl", counted, zeros)
    labels: dict[str, set[bool]] = {}
    for row in train:
        if (row["text"] or "").strip():
            labels.setdefault(row["text"], set()).add(row["label"] in (1, "1"))
    total = sum(len(found) == 2 for found in labels.values())
    counted = "noted: text with both labels"
    note("texts with pictures that do and do not go", "train.jsonl", counted, total)
    copies = edition.copies()
    total = sum(number - 1 for number in copies.values())
    counted = "noted: near-duplicate image"
    note("pictures with several sentences", "img/", counted, total)
