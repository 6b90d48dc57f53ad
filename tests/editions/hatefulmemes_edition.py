"""A written sample edition of Hateful Memes, to be changed and written anew."""

import gzip
import io
import json
import pathlib
import shutil
import tarfile
from collections import Counter
from typing import Any

import numpy as np

from ccu_jax.data.readers.base import digest
from ccu_jax.data.samples.hatefulmemes import format_phase_1
from tests.editions.defects import Defect

SMALL = 10_000  # ids below it have a leading zero
# From img/ it leads out of the sample edition; nothing is there.
OUTSIDE = "../../../outside.png"
_LISTS = ("train", "dev_seen", "dev_unseen", "test_seen", "test_unseen")


class Edition:
    """The rows of a written edition, and the traps that were planted in it.

    Args:
        data: The folder with the lists.
        seed: Says which rows get traps, and whether the pictures will be packed.
    """

    def __init__(self, data: pathlib.Path, seed: int):
        self.data, self.packed = data, seed % 2 == 0
        self.traps: list[Defect] = []
        self.rows: dict[str, list[dict[str, Any]]] = {}
        for name in _LISTS:
            text = (data / f"{name}.jsonl").read_text("ascii")
            self.rows[name] = [json.loads(line) for line in text.splitlines()]
        self.raw: dict[str, list[bytes]] = {}  # further lines of the lists
        self.unused: list[dict[str, Any]] = []  # rows that a loader leaves out
        copies = self.copies()
        # Nothing that a loader counts is due to these rows so far.
        free = [
            row
            for row in self.rows["train"]
            if row["id"] >= SMALL and copies[self._mark(self.picture(row))] == 1
        ]
        order = np.random.default_rng([seed, 4]).permutation(len(free))
        self._free = [free[place] for place in order]

    def picture(self, row: dict[str, Any]) -> pathlib.Path:
        """The picture of a row."""
        return self.data / row["img"]

    def copies(self) -> Counter[str]:
        """How many files have the same content, for each content."""
        paths = (path for path in (self.data / "img").iterdir() if path.is_file())
        return Counter(map(self._mark, paths))

    def _mark(self, path: pathlib.Path) -> str:
        return digest(path.read_bytes())

    def take(self, label: int | None = None) -> dict[str, Any]:
        """A training row that has no trap so far."""
        for place, row in enumerate(self._free):
            if label in (None, row["label"]):
                return self._free.pop(place)
        raise ValueError("too few memes for all traps")

    def note(self, trap: str, where: Any, counted: str | None, number=1) -> None:
        """Lists a trap; `where` may be a row of train."""
        where = f"train.jsonl, {where['img']}" if isinstance(where, dict) else where
        if number:
            self.traps.append(Defect(trap, where, counted, number))

    def drop(self, trap: str, row: dict[str, Any], reason: str) -> None:
        """Lists a trap for which a loader leaves the row out at once."""
        self.unused.append(row)
        self.note(trap, row, f"skipped: {reason}")

    def write(self) -> None:
        """Writes the lists anew, with some differences that must not matter."""
        self.note("a byte-order mark", "dev_seen.jsonl", None)
        self.note("lines that end in CR LF", "test_unseen.jsonl", None)
        self.note(
            "no final newline", "dev_unseen.jsonl", "noted: file without final newline"
        )
        for name, rows in self.rows.items():
            line = format_phase_1 if name in ("train", "dev", "test") else json.dumps
            lines = [line(row).encode() for row in rows] + self.raw.get(name, [])
            # As it is: not every way to cut a file into lines leaves it whole.
            lines = [line.replace(b"\\u0085", b"\xc2\x85") for line in lines]
            end = b"\r\n" if name == "test_unseen" else b"\n"
            content = end.join(lines) + end * (name != "dev_unseen")
            content = b"\xef\xbb\xbf" * (name == "dev_seen") + content
            (self.data / f"{name}.jsonl").write_bytes(content)

    def pack(self) -> None:
        """Puts `img/` into `img.tar.gz`, with a member that would land elsewhere."""
        folder = self.data / "img"

        def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
            info.mtime = info.uid = info.gid = 0
            info.uname = info.gname = ""
            info.mode = 0o755 if info.isdir() else 0o644
            return info

        with (
            (self.data / "img.tar.gz").open("wb") as file,
            gzip.GzipFile("", "wb", 1, file, mtime=0) as packed,
            tarfile.open(fileobj=packed, mode="w") as archive,
        ):
            archive.add(folder, "img", filter=plain)  # in the order of the names
            archive.addfile(plain(tarfile.TarInfo(OUTSIDE)), io.BytesIO())
        shutil.rmtree(folder)
        self.note("img.tar.gz for img/", "img.tar.gz", "noted: images in img.tar.gz")
        self.note(
            "a member that would lie elsewhere",
            "img.tar.gz",
            "skipped: archive member outside of the folder",
        )
