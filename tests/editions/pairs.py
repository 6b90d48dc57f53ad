"""Plants defects in a sample edition in the pairs format."""

import json
import os
import pathlib
from collections import Counter
from typing import Any

import numpy as np

from tests.editions.images import damage_images

# Fields of further rows; `...` removes one.
_ROWS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("skipped: image outside of the folder", {"image": "images/away/a.jpg"}),
    ("skipped: group has an impossible character", {"group": "\ud800"}),
    ("skipped: id too long", {"id": "i" * 600}),
    ("skipped: no label", {"label": ..., "labels": ...}),
    ("skipped: neither image nor text", {"image": None, "text": " "}),
    ("skipped: id already used", {}),
)
_LINES = (
    ("skipped: line is no valid JSON", b'{"id": "torn", "image": "images/'),
    ("skipped: line too long", b"x" * (2 << 20)),
    ("skipped: line is not UTF-8", b'{"id": "a", "text": "caf\xe9"}'),
)
# Changed fields of rows that are used nevertheless.
_FIELDS: tuple[tuple[list[str], dict[str, Any]], ...] = (
    (["noted: NUL characters in a text"], {"text": "a\0."}),
    (["noted: broken characters in a text"], {"text": "\ud83d a"}),
    ([], {"text": "a\u0085b\u2028c"}),
    ([], {"text": " \n"}),
    ([], {"group": 7}),
    ([], {"author": ["Ana Example"]}),
)


def plant(root: pathlib.Path, seed: int) -> Counter[str]:
    """Plants defects and returns by how much they change the counts."""
    index = root / "pairs.jsonl"
    rows = [json.loads(line) for line in index.read_text("utf-8").splitlines()]
    sizes = Counter(row["group"] for row in rows)
    row = next(row for row in rows if sizes[row["group"]] > 1)
    row["split"] = "test" if row["split"] == "train" else "train"
    order = np.random.default_rng([seed, 9]).permutation(len(rows))
    free = iter([rows[i] for i in order if rows[i]["group"] != row["group"]])
    counts = damage_images(root / next(free)["image"] for _ in rows)
    counts["noted: group with rows in two splits"] += 1
    for keys, fields in _FIELDS:
        next(free).update(fields)
        counts.update(keys)
    (root / "images" / "away").symlink_to(os.path.join("..", ".."))
    lines = [json.dumps(row).encode() for row in rows]
    good = next(free)
    for number, (key, fields) in enumerate(_ROWS):
        new = good | ({"id": f"new-{number}"} if fields else {}) | fields
        new = {name: value for name, value in new.items() if value is not ...}
        lines.insert(1 + 3 * number, json.dumps(new).encode())
        counts[key] += 1
    for number, (key, line) in enumerate(_LINES):
        lines.insert(2 + 7 * number, line)
        counts[key] += 1
    # A byte-order mark, blank lines and a missing final newline do not matter.
    lines[5:5] = [b"", b" \t"]
    index.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    return counts
