"""Planted defects, and what a reader must count for them."""

import struct
import zlib
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple


class Defect(NamedTuple):
    """A defect that was planted in a sample edition."""

    description: str
    where: str  # file, file and line, or the row's id
    count: str | None  # the key of `Counts.numbers` it must add to; None: no key
    number: int = 1  # by how much


def expected_counts(defects: Iterable[Defect]) -> dict[str, int]:
    """Returns the counts that a reader must report for all defects."""
    counts: Counter[str] = Counter()
    for defect in defects:
        if defect.count is not None:
            counts[defect.count] += defect.number
    return dict(counts)


def bomb() -> bytes:
    """A PNG of a few KiB that would unfold to 12000 x 11000 pixels."""
    width, height = 12000, 11000

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    # One bit a pixel; each line begins with the number of its filter, 0 for none.
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((1 + width // 8) * height), 9)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
