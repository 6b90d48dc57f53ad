"""Plants defects in the sample edition of Hateful Memes."""

import json
import pathlib
import shutil
import tarfile
from collections import Counter
from typing import Any

import numpy as np

from ccu_jax.data.samples.hatefulmemes import format_phase_1
from tests.editions.images import OUTSIDE, damage_images

_NEW = {"id": 99_001, "img": "img/99001.png", "label": 0, "text": "a"}
_NEW_LINE = format_phase_1(_NEW).encode()
# Changed fields of a row.
_FIELDS: tuple[tuple[list[str], dict[str, Any]], ...] = (
    (["skipped: label is neither 0 nor 1"], {"label": [1]}),
    (["skipped: no label"], {"label": -1}),
    (["noted: non-ASCII text"], {"text": "one\u0085line"}),
    (["noted: row without text"], {"text": "  "}),
    (["noted: id is not the image's"], {"id": 98_999}),
)
# Further lines of train.jsonl.
_LINES = (
    (
        "skipped: img is no path below img/",
        format_phase_1(_NEW | {"img": "img/" + OUTSIDE}).encode(),
    ),
    ("skipped: line is not UTF-8", _NEW_LINE.replace(b'"a"', b'"\xff\xfe"')),
    ("skipped: line is no valid JSON", b"[" * 200_000),
)


def plant(root: pathlib.Path, seed: int) -> Counter[str]:
    """Plants defects and returns by how much they change the counts.

    With an even seed it also packs the images into an archive.
    """
    data = root / "data"
    lines = (data / "train.jsonl").read_text("ascii").splitlines()
    train = [json.loads(line) for line in lines]
    free = iter(_unrelated_rows(data, train, seed))
    counts = damage_images(data / next(free)["img"] for _ in train)
    for keys, fields in _FIELDS:
        next(free).update(fields)
        counts.update(keys)
    again = next(free)
    content = b"\n".join(
        [format_phase_1(row).encode() for row in [*train, again]]
        + [line for _, line in _LINES]
    )
    # An unescaped U+0085 is no line break.
    (data / "train.jsonl").write_bytes(content.replace(b"\\u0085", b"\xc2\x85"))
    counts.update(key for key, _ in _LINES)
    counts["skipped: id listed twice"] += 1
    counts["noted: file without final newline"] += 1
    dev = (data / "dev_seen.jsonl").read_bytes() + json.dumps(again).encode() + b"\n"
    (data / "dev_seen.jsonl").write_bytes(b"\xef\xbb\xbf" + dev.replace(b"\n", b"\r\n"))
    counts["skipped: id is in the train split too"] += 1
    if seed % 2 == 0:
        counts.update(_pack(data))
    return counts


def _unrelated_rows(
    data: pathlib.Path, train: list[dict[str, Any]], seed: int
) -> list[dict[str, Any]]:
    """Returns rows that share no image or text, and whose ids have five digits."""
    paths = (data / "img").glob("*.png")
    images = {f"img/{path.name}": path.read_bytes() for path in paths}
    num_images = Counter(images.values())
    num_texts = Counter(row["text"] for row in train)
    rows = [
        row
        for row in train
        if num_images[images[row["img"]]] == num_texts[row["text"]] == 1
        and row["id"] >= 10_000
    ]
    order = np.random.default_rng([seed, 9]).permutation(len(rows))
    return [rows[index] for index in order]


def _pack(data: pathlib.Path) -> Counter[str]:
    """Packs `img/` into an archive with a member that would be written elsewhere."""
    with tarfile.open(data / "img.tar.gz", "w:gz", compresslevel=1) as archive:
        archive.add(data / "img", "img")
        archive.addfile(tarfile.TarInfo(OUTSIDE))
    shutil.rmtree(data / "img")
    return Counter(
        {
            "noted: images in img.tar.gz": 1,
            "skipped: archive member outside of the folder": 1,
            # The link out of the folder is not even extracted.
            "skipped: archive member is no plain file": 1,
            "skipped: image missing": 1,
            "skipped: image outside of the folder": -1,
        }
    )
