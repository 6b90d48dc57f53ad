"""Plants the defects of the real Fashion200k, and worse ones, in a sample edition."""

import pathlib
import struct
import zlib
from typing import NamedTuple

import numpy as np

from ccu_jax.data.readers.fashion200k_labels import FOLDERS, LABEL_FILES
from ccu_jax.data.samples.fashion200k import draw_garment, draw_view
from tests.editions.defects import Defect

# Rows that no loader may use: what is wrong, the line's bytes, how it is counted.
# {} is the folder of a category, as in "women/dresses".
_COLUMNS = "skipped: row has the wrong number of columns"
_PATH = "skipped: path is not of the known form"
_NEW = b"{}/sample_kinds/31415926/31415926"
_ROWS = (
    ("a row of two columns", _NEW + b"_1.jpeg\tblue wrap sample", _COLUMNS),
    ("a row of four columns", _NEW + b"_2.jpeg\t-1.500000\tblue\tsample", _COLUMNS),
    ("a path that leads out", b"../../etc/passwd\t-1.500000\tblue sample", _PATH),
    (
        "a path that leads out later",
        b"{}/../../../../etc/31415926/passwd.jpeg\t-1.500000\tblue sample",
        _PATH,
    ),
    ("an absolute path", b"/etc/passwd\t-1.500000\tblue sample", _PATH),
    ("a NUL byte in a path", _NEW + b"\0.jpeg\t-1.500000\tblue sample", _PATH),
    ("another file than a .jpeg", _NEW + b".exe\t-1.500000\tblue sample", _PATH),
    (
        "a line of more than 1 MiB",
        _NEW + b"_3.jpeg\t-1.500000\t" + b"blue " * 230_000,
        "skipped: line too long",
    ),
    (
        "a line that is not UTF-8",
        _NEW + b"_4.jpeg\t-1.500000\tcaf\xe9 sample",
        "skipped: line is not UTF-8",
    ),
    ("a blank line", b"", None),
)
_TWICE, _OTHER = "noted: doubly encoded title", "noted: non-ASCII title"
_CONTROL = "noted: control characters in a title"
# Titles for all rows of a product; {} is the noun of its category.
_TITLES = (
    ("UTF-8 taken for Latin-1", "blue women\u00e2\u0080\u0099s {}", (_TWICE, _OTHER)),
    ("the same, put in lower case", "black boucl\u00e3\u00a9 {}", (_TWICE, _OTHER)),
    ("UTF-8 taken for cp1252", "red girl\u00e2\u20ac\u2122s {}", (_TWICE, _OTHER)),
    ("letters that are not ASCII", "white cr\u00eape {}", (_OTHER,)),
    ("U+0085 in a title", "gray striped\u0085linen {}", (_CONTROL,)),
    ("a NUL byte in a title", "green\0 wrap {}", (_CONTROL,)),
    ("marks in a title", "black st. ives & co. ? {}", ()),
    ("only the noun", "{}", ("noted: title with nothing but masked words",)),
    ("an empty title", "", ("noted: empty title",)),
)
_OPEN_END = "top_train_detect_all.txt"


class _Product(NamedTuple):
    """Lines of one product, which follow each other."""

    file: str
    first: int  # its first line, from 0
    size: int


def plant(root: pathlib.Path, seed: int) -> list[Defect]:
    """Adds the traps to a sample edition; see `Writer`."""
    rng = np.random.default_rng([seed, 1 << 32])
    labels = {name: root / "labels" / name for name in LABEL_FILES}
    lines = {name: path.read_bytes().split(b"\n")[:-1] for name, path in labels.items()}
    products = _products(lines)
    products = [products[n] for n in rng.permutation(len(products))]
    parted = next(p for p in products if p.size > 1 and "train" in p.file)
    products.remove(parted)
    traps = []
    for trap, title, counted in _TITLES:
        traps += _retitle(lines, products.pop(), trap, title, counted)
    traps += _spoil(root, [_path(lines, products.pop()) for _ in range(9)])
    traps.append(_part(lines, parted))  # moves lines: numbers of lines hold from here
    for number, (trap, line, counted) in enumerate(_ROWS):
        name = list(LABEL_FILES)[number % len(LABEL_FILES)]
        line = line.replace(b"{}", f"women/{_plural(name)}".encode())
        traps.append(Defect(trap, _append(lines, name, line), counted))
    traps += _misplace(root, lines, products[0], rng)
    for name, rows in lines.items():
        labels[name].write_bytes(b"\n".join(rows) + b"\n" * (name != _OPEN_END))
    traps.append(Defect("no end of the last line", f"labels/{_OPEN_END}", None))
    return traps


def _products(lines: dict[str, list[bytes]]) -> list[_Product]:
    found: list[_Product] = []
    for file, rows in lines.items():
        before = None
        for number, row in enumerate(rows):
            folder = row.split(b"\t")[0].rpartition(b"/")[0]
            if folder == before:
                found[-1] = found[-1]._replace(size=found[-1].size + 1)
            else:
                found.append(_Product(file, number, 1))
            before = folder
    return found


def _retitle(
    lines: dict[str, list[bytes]],
    product: _Product,
    trap: str,
    title: str,
    counted: tuple[str, ...],
) -> list[Defect]:
    """Another title for all rows of a product."""
    where = _path(lines, product)
    title = title.format(LABEL_FILES[product.file][0])
    for number in range(product.first, product.first + product.size):
        path, score, _ = lines[product.file][number].split(b"\t")
        lines[product.file][number] = b"\t".join((path, score, title.encode()))
    return [Defect(trap, where, key, product.size) for key in counted or (None,)]


def _spoil(root: pathlib.Path, paths: list[str]) -> list[Defect]:
    """Damages a picture each, in every way in which one can be no picture."""
    missing, link, folder, empty, page, short, bomb, copy, original = paths
    for path in (missing, link, folder):
        (root / path).unlink()
    traps = [Defect("a missing picture", missing, "skipped: image missing")]
    try:
        (root / link).symlink_to("../" * 12 + "elsewhere.jpeg")
        outside = "skipped: image outside of the folder"
    except OSError:  # a system without links
        outside = "skipped: image missing"
    traps.append(Defect("a link that leads out of the folder", link, outside))
    (root / folder).mkdir()
    no_file = "skipped: image is no plain file"
    traps.append(Defect("a folder named as a picture", folder, no_file))
    (root / empty).write_bytes(b"")
    traps.append(Defect("an empty file", empty, "skipped: image empty"))
    (root / page).write_text("<!doctype html><title>404 Not Found</title>\n")
    traps.append(Defect("HTML named as a picture", page, "skipped: not an image"))
    data = (root / short).read_bytes()
    (root / short).write_bytes(data[: len(data) // 2])
    traps.append(Defect("half of a JPEG", short, "skipped: image damaged"))
    (root / bomb).write_bytes(_png(12_000, 11_000))
    traps.append(Defect("132 million pixels", bomb, "skipped: image too large"))
    (root / copy).write_bytes((root / original).read_bytes())
    traps.append(Defect(f"a copy of {original}", copy, "noted: near-duplicate image"))
    unlisted = original.replace(".jpeg", "9.jpeg")
    (root / unlisted).write_bytes(data)
    ignored = "ignored: image that no label file lists"
    traps.append(Defect("a picture that no row names", unlisted, ignored))
    return traps


def _part(lines: dict[str, list[bytes]], product: _Product) -> Defect:
    """Moves a row of a product to the other split."""
    row = lines[product.file].pop(product.first)
    lines[product.file.replace("train", "test")].append(row)
    where = row.split(b"/")[3].decode()
    return Defect("a product in two splits", where, "noted: product in two splits")


def _misplace(
    root: pathlib.Path, lines: dict[str, list[bytes]], product: _Product, rng
) -> list[Defect]:
    """Rows that would be good ones elsewhere, or the first time."""
    told = b"\t-2.500000\tblue layered sample"
    name, path = product.file, _path(lines, product)
    twice = _append(lines, name, path.encode() + told)
    other = next(name for name in LABEL_FILES if f"/{_plural(name)}/" not in path)
    new = f"women/{_plural(name)}/sample_kinds/27182818/27182818"
    wrong = _append(lines, other, f"{new}_0.jpeg".encode() + told)
    colours = np.array([[0.35, 0, 0.35], [0, 0, 0]])
    garment = draw_garment(rng, "top", "t-shirts", colours, "polka-dot")
    (root / new).parent.mkdir(parents=True)
    (root / f"{new}_1.jpeg").write_bytes(draw_view(rng, garment))
    unknown = _append(lines, name, f"{new}_1.jpeg".encode() + told + b"\r")
    category = "skipped: path is of another category than the label file"
    return [
        Defect("a path listed twice", twice, "skipped: path listed twice"),
        Defect("a row in the file of another category", wrong, category),
        # It matters to data.task=sub_category alone.
        Defect("a sub-category that there is not, and a CR", unknown, None),
    ]


def _plural(file: str) -> str:
    category = LABEL_FILES[file][0]
    return next(folder for folder, name in FOLDERS.items() if name == category)


def _path(lines: dict[str, list[bytes]], product: _Product) -> str:
    """That of its first picture."""
    return lines[product.file][product.first].split(b"\t")[0].decode()


def _append(lines: dict[str, list[bytes]], file: str, line: bytes) -> str:
    lines[file].append(line)
    return f"labels/{file} line {len(lines[file])}"


def _png(width: int, height: int) -> bytes:
    """A black PNG, without ever holding its pixels."""
    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    pixels = b"".join(packer.compress(row * 100) for _ in range(height // 100))
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)),
        (b"IDAT", pixels + packer.flush()),
        (b"IEND", b""),
    )
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in chunks:
        checked = kind + body
        data += struct.pack(">I", len(body)) + checked
        data += struct.pack(">I", zlib.crc32(checked))
    return data
