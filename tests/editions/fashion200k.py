"""Plants defects in the sample edition of Fashion200k."""

import itertools
import pathlib
from collections import Counter

import numpy as np

from ccu_jax.data.readers.fashion200k import LABEL_FILES
from tests.editions.images import damage_images

_NEW = b"women/dresses/sample_kinds/31415926/31415926"
_REST = b"\t-1.500000\tblue sample"
_OUTSIDE = b"women/dresses/../../../../etc/31415926/passwd.jpeg"
# Further lines of a label file.
_LINES = {
    "skipped: row has the wrong number of columns": _NEW + b"_1.jpeg\tblue sample",
    "skipped: path is not of the known form": _OUTSIDE + _REST,
    "skipped: line too long": _NEW + b"_3.jpeg\t-1.500000\t" + b"blue " * 230_000,
    "skipped: line is not UTF-8": _NEW + b"_4.jpeg\t-1.500000\tcaf\xe9 sample",
    "skipped: image missing": _NEW + b"_5.jpeg" + _REST,
}
# Titles of all rows of a product, and what is noted; {} is the noun of its category.
_TITLES = (
    ("black boucl\u00e3\u00a9 {}", "doubly encoded title", "non-ASCII title"),
    ("gray striped\u0085linen {}", "control characters in a title"),
    ("{}", "title with nothing but masked words"),
    ("", "empty title"),
)


def plant(root: pathlib.Path, seed: int) -> Counter[str]:
    """Plants defects and returns by how much they change the counts."""
    files = {name: root / "labels" / name for name in LABEL_FILES}
    lines = {name: path.read_bytes().splitlines() for name, path in files.items()}
    products = [
        (name, list(rows))
        for name in lines
        for _, rows in itertools.groupby(lines[name], lambda row: row.split(b"/")[3])
    ]
    order = np.random.default_rng([seed, 9]).permutation(len(products))
    products = [products[index] for index in order]
    ambiguous = next(p for p in products if len(p[1]) > 1 and "dress_train" in p[0])
    products.remove(ambiguous)
    counts: Counter[str] = Counter()
    for (title, *notes), (name, rows) in zip(_TITLES, products, strict=False):
        title = title.format(LABEL_FILES[name][0]).encode()
        for row in rows:
            path, score, _ = row.split(b"\t")
            lines[name][lines[name].index(row)] = b"\t".join((path, score, title))
        counts.update({f"noted: {note}": len(rows) for note in notes})
    rest = products[len(_TITLES) :]
    paths = (root / rows[0].split(b"\t")[0].decode() for _, rows in rest)
    counts.update(damage_images(paths))
    lines["dress_train_detect_all.txt"].remove(ambiguous[1][0])
    lines["dress_test_detect_all.txt"].append(ambiguous[1][0])
    counts["noted: product in two splits"] += 1
    lines["dress_test_detect_all.txt"] += [*_LINES.values(), ambiguous[1][0]]
    counts.update([*_LINES])
    counts["skipped: path listed twice"] += 1
    lines["top_test_detect_all.txt"] += [b"", _NEW + b"_6.jpeg" + _REST + b"\r"]
    counts["skipped: path is of another category than the label file"] += 1
    (root / "women" / "tops" / "9.jpeg").write_bytes(b"unlisted")
    counts["ignored: image that no label file lists"] += 1
    for name, path in files.items():
        path.write_bytes(b"\n".join(lines[name]))  # without a final newline
    return counts
