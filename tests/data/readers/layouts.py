"""Small data sets in the layout of each reader, and a way to read them."""

import functools
import io
import json
import pathlib
from collections.abc import Callable
from typing import NamedTuple

from PIL import Image

from ccu_jax.config.schema import Data
from ccu_jax.data import DATASETS
from ccu_jax.data.readers.base import Counts, Example, SkipExample, Source
from ccu_jax.data.readers.fashion200k import LABEL_FILES

SPLITS = ("train", "train", "train", "train", "validation", "test")


class Layout(NamedTuple):
    """A data set of six rows on disk; their texts are "a thing 0" to "a thing 5"."""

    dataset: str
    root: pathlib.Path
    list_file: pathlib.Path  # lists the training rows
    images: dict[str, pathlib.Path]  # of each row, by id

    def config(self, **settings) -> Data:
        return Data(dataset=self.dataset, dir=str(self.root), **settings)

    @property
    def image_folder(self) -> pathlib.Path:
        """The folder below the root that holds all images."""
        first = next(iter(self.images.values()))
        return self.root / first.relative_to(self.root).parts[0]


class Rows(NamedTuple):
    """What a reader returns for a data set."""

    source: Source
    examples: dict[str, Example]  # by id
    counts: dict[str, int]


def ignore_progress(stage: str, done: int, total: int) -> None:
    pass


def refuse_to_unpack(path: pathlib.Path) -> pathlib.Path:
    raise AssertionError(f"{path}: no archive was expected")


def open_source(
    config: Data, unpack: Callable[[pathlib.Path], pathlib.Path] = refuse_to_unpack
) -> tuple[Source, Counts]:
    reader = DATASETS[config.dataset]
    counts = Counts(str(config.dir), config.strict)
    location = reader.locate(config, pathlib.Path("no workdir"))
    return reader.open(config, location, counts, unpack), counts


def read_rows(config: Data, **options) -> Rows:
    """Reads a data set and counts its rows as preparation does."""
    source, counts = open_source(config, **options)
    examples = {}
    for key in source.keys:
        try:
            example = source.read(key)
        except SkipExample as reason:
            counts.skip(str(reason), source.row_name(key))
            continue
        for note in example.notes:
            counts.add(note)
        assert example.id not in examples
        examples[example.id] = example
    return Rows(source, examples, counts.numbers)


def compute_signature(config: Data) -> str:
    reader = DATASETS[config.dataset]
    return reader.compute_signature(
        config, reader.locate(config, pathlib.Path("no workdir"))
    )


def encode_image(color="red", size=(12, 8), format_="PNG", **options) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, format_, **options)
    return file.getvalue()


def row_image(index: int) -> bytes:
    return encode_image((20 * index, 0, 90))


def write_files(root: pathlib.Path, files: dict[str, bytes | str]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        data = content.encode() if isinstance(content, str) else content
        (root / name).write_bytes(data)


def dump_lines(rows: list) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def _write(folder, dataset, name, list_file, lists, images) -> Layout:
    root = folder / name
    pixels = {path: row_image(i) for i, path in enumerate(images.values())}
    write_files(root, lists | pixels)
    paths = {id_: root / path for id_, path in images.items()}
    return Layout(dataset, root, root / list_file, paths)


def make_pairs(num_rows: int) -> list[dict]:
    """Returns rows of two classes, alternating, whose ids are the images' paths."""
    return [
        {"image": f"images/{i}.png", "text": f"a thing {i}", "label": "xy"[i % 2]}
        for i in range(num_rows)
    ]


def write_pairs(folder: pathlib.Path, index: str = "pairs.jsonl") -> Layout:
    images = {row["image"]: row["image"] for row in make_pairs(6)}
    pairs = zip(make_pairs(6), SPLITS, strict=True)
    rows = [row | {"split": split} for row, split in pairs]
    content = dump_lines(rows)
    if index == "pairs.csv":
        lines = (",".join(values) for values in (rows[0], *(r.values() for r in rows)))
        content = "".join(f"{line}\n" for line in lines)
    return _write(folder, "pairs", "pairs", index, {index: content}, images)


def write_mmimdb(folder: pathlib.Path) -> Layout:
    ids = [f"{i:07d}" for i in range(6)]
    splits = {"train": ids[:4], "dev": ids[4:5], "test": ids[5:]}
    files: dict[str, bytes | str] = {"split.json": json.dumps(splits)}
    for i, id_ in enumerate(ids):
        movie = {"title": "A", "genres": ["War", "Drama"], "plot": [f"a thing {i}"]}
        files[f"dataset/{id_}.json"] = json.dumps(movie)
    images = {id_: f"dataset/{id_}.jpeg" for id_ in ids}
    return _write(folder, "mmimdb", "mmimdb", "split.json", files, images)


def write_fashion200k(folder: pathlib.Path) -> Layout:
    files = {f"labels/{name}": "" for name in LABEL_FILES}
    images = {}
    for i, split in enumerate(SPLITS):
        id_ = f"women/dresses/gowns/{i}/{i}_0"
        images[id_] = f"{id_}.jpeg"
        name = "test" if split == "test" else "train"
        files[f"labels/dress_{name}_detect_all.txt"] += f"{id_}.jpeg\t-1\ta thing {i}\n"
    list_file = "labels/dress_train_detect_all.txt"
    return _write(folder, "fashion200k", "fashion-200k", list_file, files, images)


def meme(number: int, **fields) -> dict:
    """A row in the form of the second phase."""
    row = {"id": f"{number:05d}", "img": f"img/{number:05d}.png"}
    return row | {"label": number % 2, "text": f"a thing {number}"} | fields


def write_hatefulmemes(folder: pathlib.Path) -> Layout:
    rows = [meme(i) for i in range(6)]
    lists = {"train": rows[:4], "dev_seen": rows[4:5], "test_seen": rows[5:]}
    files = {f"{name}.jsonl": dump_lines(part) for name, part in lists.items()}
    images = {row["id"]: row["img"] for row in rows}
    return _write(folder, "hatefulmemes", "data", "train.jsonl", files, images)


LAYOUTS = {
    "jsonl": write_pairs,
    "csv": functools.partial(write_pairs, index="pairs.csv"),
    "mmimdb": write_mmimdb,
    "fashion200k": write_fashion200k,
    "hatefulmemes": write_hatefulmemes,
}
RELEASES = ("mmimdb", "fashion200k", "hatefulmemes")
LINE_LAYOUTS = ("jsonl", "csv", "fashion200k", "hatefulmemes")
