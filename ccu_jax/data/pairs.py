"""Pairs of a picture and a text in a folder with one `pairs.jsonl`.

Each line is one JSON object: `image` (path below the folder, may be absent or null),
`text` (may be absent or null), `label` (a string) or `labels` (a list of strings), and
optionally `id`, `group` (rows to be forgotten together) and `split`.
"""

import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from ccu_jax.config import Data
from ccu_jax.data.source import (
    SPLITS,
    Counts,
    Example,
    Place,
    Progress,
    Reader,
    Source,
    digest,
)
from ccu_jax.errors import UserError

CLIPART = pathlib.Path(__file__).parent / "clipart"
INDEX = "pairs.jsonl"
_ALIASES = {"val": "validation", "valid": "validation", "dev": "validation"}


class Row(NamedTuple):
    """A checked line of `pairs.jsonl`; `split` is "" where the file names none."""

    line: int
    id: str
    group: str
    image: pathlib.Path | None
    text: str | None
    labels: tuple[str, ...]
    split: str


def locate(config: Data, workdir: pathlib.Path, progress: Progress) -> Place:
    """The user's folder, or the clip art that travels with the package."""
    del workdir, progress
    if config.dir is None:
        root, edition = CLIPART, "clipart"
    else:
        root, edition = pathlib.Path(config.dir).expanduser(), "own"
    if not root.is_dir():
        raise UserError(f"data.dir: there is no folder {root}")
    if not (root / INDEX).is_file():
        raise UserError(
            f"data.dir: {root} holds no {INDEX}; it needs one JSON object a line with "
            '"image", "text" and "label"'
        )
    return Place(root, edition)


def signature(config: Data, place: Place) -> str:
    """Hash of the index and, for a user's folder, when its picture folders changed."""
    del config
    index = (place.root / INDEX).read_bytes()
    if place.edition == "clipart":
        return digest(index)
    # Only folders that pictures lie in: a workdir may be below the root, too.
    names = set(re.findall(rb'"image"\s*:\s*"([^"]+)/[^"/]*"', index))
    folders = [place.root / os.fsdecode(name) for name in sorted(names)]
    return digest(index, *(str(f.stat().st_mtime_ns) for f in folders if f.is_dir()))


def open_pairs(config: Data, place: Place, counts: Counts) -> Source:
    """Reads the index; pictures are read one at a time by `Source.examples`.

    Raises:
        UserError: a line that is no valid row, a repeated id, a path that leaves the
            folder; a row that must be skipped when `config.strict`.
    """
    root = place.root.resolve()
    rows, multi_label, seen = [], False, {}
    for line, entry in _lines(place.root / INDEX):
        counts.add("read")
        row = _row(root, line, entry)
        if row.id in seen:
            raise UserError(
                f"{INDEX} line {line}: id {row.id!r} is already on line {seen[row.id]}"
                '; give the rows an "id" of their own'
            )
        seen[row.id] = line
        multi_label |= "labels" in entry
        if reason := _unusable(row, entry):
            counts.skip(reason, f"{INDEX} line {line} ({row.id})")
        else:
            rows.append(row)
    classes = tuple(sorted({label for row in rows for label in row.labels}))
    rows = split_rows(rows, test=config.test, validation=config.validation)
    if shared := _groups_in_two_splits(rows):
        if counts.strict:
            raise UserError(f"{INDEX}: {shared} groups have rows in two splits")
        counts.add("groups with rows in two splits", shared)

    def examples(split: str) -> Iterator[Example]:
        for row in (row for row in rows if row.split == split):
            image = row.image.read_bytes() if row.image else None
            yield Example(row.id, row.group, image, row.text, row.labels, row.split)

    return Source(classes, multi_label, len(rows), examples)


def split_rows(rows: list[Row], *, test: float, validation: float) -> list[Row]:
    """Gives a split to each row without one: the same for all rows of a group.

    In every stratum (groups with equal labels) the groups stand in the order of their
    hash; the first ones go to test, the next to validation, the rest to train. What
    rounding leaves over is carried to the next stratum, so the shares hold overall.

    Args:
        rows: Rows with unique ids.
        test: Share of the rows for test, in [0, 1).
        validation: Likewise.
    """
    named = {row.group: row.split for row in reversed(rows) if row.split}
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.group not in named:
            groups.setdefault(row.group, []).append(row)
    strata: dict[tuple[str, ...], list[str]] = {}
    for group, members in groups.items():
        labels = tuple(sorted({label for row in members for label in row.labels}))
        strata.setdefault(labels, []).append(group)
    owed = {"test": 0.0, "validation": 0.0}
    for labels in sorted(strata):
        ordered = sorted(strata[labels], key=lambda group: digest("split", group))
        total = sum(len(groups[group]) for group in ordered)
        owed["test"] += test * total
        owed["validation"] += validation * total
        for group in ordered:
            size = len(groups[group])
            named[group] = "train"
            for name, rest in owed.items():
                if rest >= size / 2 and rest > 0:
                    named[group] = name
                    owed[name] -= size
                    break
    return [row._replace(split=row.split or named[row.group]) for row in rows]


def _groups_in_two_splits(rows: list[Row]) -> int:
    splits: dict[str, set[str]] = {}
    for row in rows:
        splits.setdefault(row.group, set()).add(row.split)
    return sum(len(found) > 1 for found in splits.values())


def _lines(path: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
    # Split at "\n" only: str.splitlines would also cut inside of texts (U+0085).
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                entry = json.loads(raw.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                where = f"{path} line {line}"
                raise UserError(f"{where}: no valid JSON ({error})") from None
            if not isinstance(entry, dict):
                raise UserError(f"{path} line {line}: not a JSON object")
            yield line, entry


def _row(root: pathlib.Path, line: int, entry: dict[str, Any]) -> Row:
    where = f"{INDEX} line {line}"
    image = _string(entry, "image", where)
    id_ = _string(entry, "id", where) or image
    if not id_:
        raise UserError(f'{where}: neither "id" nor "image"; one must name the row')
    labels = entry.get("labels", [entry["label"]] if entry.get("label") else [])
    if not isinstance(labels, list) or not all(
        isinstance(label, str) and label for label in labels
    ):
        raise UserError(f'{where}: "label" must be a string, "labels" a list of them')
    split = _string(entry, "split", where) or ""
    split = _ALIASES.get(split, split)
    if split and split not in SPLITS:
        raise UserError(f"{where}: split {split!r} is none of {', '.join(SPLITS)}")
    text = (_string(entry, "text", where) or "").strip()
    return Row(
        line=line,
        id=id_,
        group=_string(entry, "group", where) or id_,
        image=_inside(root, image, where) if image else None,
        text=text or None,
        labels=tuple(dict.fromkeys(labels)),
        split=split,
    )


def _string(entry: dict[str, Any], name: str, where: str) -> str | None:
    value = entry.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)  # ids are often written as numbers
    if value is not None and not isinstance(value, str):
        raise UserError(f'{where}: "{name}" must be a string, not {value!r}')
    if value and "\0" in value:
        raise UserError(f'{where}: "{name}" holds a NUL character')
    return value


def _inside(root: pathlib.Path, name: str, where: str) -> pathlib.Path:
    """The file's path; refuses a name (or link) that leads out of the folder."""
    path = root / name
    if pathlib.PurePath(name).is_absolute() or not path.resolve().is_relative_to(root):
        raise UserError(f"{where}: image {name!r} lies outside of {root}")
    return path


def _unusable(row: Row, entry: dict[str, Any]) -> str | None:
    if not row.labels and "labels" not in entry:
        return "no label"
    if row.image is None and row.text is None:
        return "neither picture nor text"
    if row.image is not None and not row.image.is_file():
        return "picture file missing"
    return None


READER = Reader(locate, signature, open_pairs, decoder="pillow")
