"""Generates hostile data sets, with one function per layout."""

import csv
import io
from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

from ccu_jax.data.readers.fashion200k import LABEL_FILES, SUB_CATEGORIES
from ccu_jax.data.readers.hatefulmemes import FILES, TRAIN
from ccu_jax.data.readers.mmimdb import GENRES
from tests.fuzz.archives import pack_tree
from tests.fuzz.contents import (
    SMALL,
    Tree,
    add_node,
    draw_image,
    draw_link,
    draw_string,
    draw_value,
    dump_json,
    maybe_mutate,
    mutate_value,
)


class Case(NamedTuple):
    """A data set: its files, as paths below the data folder, and data settings."""

    dataset: str
    tree: Tree
    settings: dict[str, Any]


def _maybe_link(
    rng: Random, tree: Tree, path: str, secret: str, probability: float
) -> None:
    """Replaces the node at `path` with a hostile link with some probability."""
    if rng.random() < probability:
        tree[path] = draw_link(rng, secret)


def draw_mmimdb(rng: Random) -> Case:
    texts = posters = "dataset"
    if rng.random() < 0.1:
        texts, posters = "labels", "images"
    prefix = rng.choice(("mmimdb/", *[""] * 5))
    ids = [f"{rng.randrange(9):07d}" for _ in range(rng.randint(1, 3))]
    splits: Any = {"train": ids[:], "dev": [], "test": []}
    for name in splits:
        while rng.random() < 0.25:
            entry = rng.choice(ids) if rng.random() < 0.3 else draw_value(rng)
            splits[name].append(entry)
    if rng.random() < 0.1:
        splits = mutate_value(rng, splits)
    index = maybe_mutate(rng, dump_json(rng, splits), 0.05)
    tree: Tree = {}
    add_node(rng, tree, f"{prefix}split.json", index, "mmimdb/split.json", 0.03)
    for id_ in ids:
        author = f"{draw_string(rng)}::{draw_string(rng)}"
        movie = {
            "plot": ["A plot, long.", draw_string(rng), author],
            "genres": rng.sample([*GENRES, "News", draw_string(rng)], 3),
            "title": draw_string(rng),
        }
        text = maybe_mutate(rng, dump_json(rng, mutate_value(rng, movie, 0.06)), 0.1)
        add_node(rng, tree, f"{prefix}{texts}/{id_}.json", text, "secret.json")
        poster = draw_image(rng)
        add_node(rng, tree, f"{prefix}{posters}/{id_}.jpeg", poster, "secret.png")
    if rng.random() < 0.05:
        tree[f"{prefix}{texts}/{rng.choice(('0000077.json', 'x.json', 'a'))}"] = b"{}"
    _maybe_link(rng, tree, f"{prefix}{texts}", "mmimdb/dataset", 0.03)
    _maybe_link(rng, tree, "mmimdb", "mmimdb", 0.02)
    if rng.random() < 0.03:
        tree = {"mmimdb.tar.gz": draw_link(rng, "secret.tar.gz")}
    elif rng.random() < 0.05:
        tree = {"mmimdb.tar.gz": pack_tree(rng, tree)}
    return Case("mmimdb", tree, {"plot_policy": rng.choice(("longest", "first"))})


def _draw_label(rng: Random) -> tuple[bytes, str]:
    """Returns a line of a label file for dresses, and the path of its image."""
    product = str(rng.randrange(1, 9))
    sub = rng.choice((*SUB_CATEGORIES["dress"], "a_b"))
    path = f"women/dresses/{sub}/{product}/{product}_{rng.randrange(3)}.jpeg"
    title = f"a {draw_string(rng)} dress {draw_string(rng)}"
    score = rng.choice(("-1.780000", "0", draw_string(rng)))
    columns = [path, score, rng.choice(("blue dress", draw_string(rng), title))]
    if rng.random() < 0.15:
        columns[rng.randrange(3)] = draw_string(rng)
    if rng.random() < 0.1:
        columns[0] = columns[0].replace(*rng.choice((("women/", ""), ("/", "//"))), 1)
    if rng.random() < 0.1:
        columns[0] = columns[0].replace("dresses", rng.choice(("skirts", "..", "")))
    if rng.random() < 0.05:
        columns.insert(rng.randrange(4), draw_string(rng))
    line = "\t".join(columns).encode("utf-8", "surrogatepass")
    return maybe_mutate(rng, line, 0.08), path


def _pack_images(rng: Random, tree: Tree, prefix: str, folder: str, archive: str):
    """Sometimes replaces the folder of images with an archive."""
    is_damaged = rng.random() < 0.03
    if not is_damaged and rng.random() >= 0.05:
        return
    paths = [path for path in tree if path.startswith(prefix + folder)]
    inside = {path.removeprefix(prefix): tree.pop(path) for path in paths}
    if is_damaged:
        add_node(rng, tree, prefix + archive, b"PK\5\6", "secret.tar.gz", 0.6)
    else:
        tree[prefix + archive] = pack_tree(rng, inside)


def draw_fashion200k(rng: Random) -> Case:
    prefix = rng.choice(("fashion-200k/", "fashion200k/", *[""] * 8))
    tree: Tree = {f"{prefix}labels/{name}": b"" for name in LABEL_FILES}
    for split in ("train", "test"):
        lines = [_draw_label(rng) for _ in range(rng.randint(1, 3))]
        data = rng.choice((b"\n", b"\n", b"\r\n", b"\n\n")).join(t for t, _ in lines)
        name = f"{prefix}labels/dress_{split}_detect_all.txt"
        del tree[name]
        add_node(rng, tree, name, data + b"\n", "labels.txt", 0.03)
        for _, path in lines:
            add_node(rng, tree, prefix + path, draw_image(rng), "secret.png")
    if rng.random() < 0.1:
        odd = rng.choice(("b\udcff", "d\n", "\x1b", "dresses/b\udcff", "dresses/x\ty"))
        tree[f"{prefix}women/{odd}/1.jpeg"] = b"a"
    for name in ("women", "women/dresses", "labels"):
        _maybe_link(rng, tree, prefix + name, f"fashion/{name}", 0.02)
    _pack_images(rng, tree, prefix, "women/", "women.tar.gz")
    if rng.random() < 0.02:
        tree = {"fashion-200k": draw_link(rng, "fashion")}
    settings: dict[str, Any] = {"task": rng.choice(("category", "sub_category"))}
    settings |= {"mask_category_words": rng.random() < 0.5}
    return Case("fashion200k", tree, settings | {"tirg_dot_token": rng.random() < 0.3})


def draw_hatefulmemes(rng: Random) -> Case:
    prefix = rng.choice(("data/", "data/", "a/", "a/data/", *[""] * 8))
    tree: Tree = {}
    for name in (TRAIN, *rng.sample(FILES, 2)):
        lines = []
        for _ in range(rng.randint(1, 3)):
            number = rng.randrange(30)
            row = {
                "id": rng.choice((number, f"{number:05d}", draw_string(rng))),
                "img": f"img/{number:05d}.png",
                "label": rng.choice((0, 1)),
                "text": rng.choice(("a cat", draw_string(rng))),
            }
            if rng.random() < 0.1:
                row["img"] = rng.choice(("img/", "")) + draw_string(rng)
            line = dump_json(rng, mutate_value(rng, row))
            lines.append(maybe_mutate(rng, line, 0.08))
            path = f"{prefix}img/{number:05d}.png"
            add_node(rng, tree, path, draw_image(rng), "a.png")
        data = b"\n".join(lines) + rng.choice((b"", b"\n", b"\r\n", b"\n\n"))
        add_node(rng, tree, prefix + name, data, "memes/train.jsonl", 0.04)
    if rng.random() < 0.05:
        odd = rng.choice(("\u00e9.png", "# a.png", " a.png", "#.png", "a b.png", "a.b"))
        tree[f"{prefix}img/{odd}"] = draw_image(rng)
        row = {"img": f"img/{odd}", "label": 1, "text": "a"}
        tree[f"{prefix}train.jsonl"] = dump_json(rng, row)
    _maybe_link(rng, tree, f"{prefix}img", "memes/img", 0.03)
    _pack_images(rng, tree, prefix, "img/", rng.choice(("img.tar.gz", "img.zip")))
    if rng.random() < 0.02:
        other = rng.choice(("b\n/", "b/", "b/data/"))
        tree |= {other + k.removeprefix(prefix): v for k, v in tree.items()}
    if rng.random() < 0.02:
        tree = {"data": draw_link(rng, "memes")}
    return Case("hatefulmemes", tree, {})


def _draw_pair(rng: Random) -> dict[str, Any]:
    number, string = rng.randrange(5), draw_string(rng)
    row: dict[str, Any] = {
        "id": rng.choice((f"r{rng.randrange(40)}", rng.randrange(40), string)),
        "image": f"images/{number}.png",
        "text": rng.choice(("a thing", draw_string(rng))),
        "label": rng.choice(("x", "y", draw_string(rng))),
        "split": rng.choice(("train", "train", "val", "test", "", draw_string(rng))),
        "group": rng.choice((f"g{number}", draw_string(rng))),
    }
    for name in ("id", "group", "split", "image"):
        if rng.random() < 0.25:
            del row[name]
    if rng.random() < 0.2:
        row["image"] = draw_string(rng)
    if rng.random() < 0.2:
        more = rng.choice(([], ["x"], [draw_string(rng)]))
        row["labels"] = [row.pop("label"), *more]
    return row


def _draw_pairs_tree(rng: Random, name: str, data: bytes) -> Tree:
    """Returns a tree with the index `data` and five images, sometimes damaged."""
    tree: Tree = {}
    add_node(rng, tree, name, data, name, 0.04)
    for number in range(5):
        path = f"images/{number}.png"
        add_node(rng, tree, path, SMALL[number], "secret.png")
    _maybe_link(rng, tree, "images", "images", 0.05)
    if rng.random() < 0.05:
        odd = rng.choice((b"\xff", b"caf\xe9")).decode("utf-8", "surrogateescape")
        tree[f"images{odd}/0.png"] = SMALL[0]
    return tree


def draw_jsonl(rng: Random) -> Case:
    prefix = rng.choice(("a/", "b\n/", *[""] * 9))
    rows = [mutate_value(rng, _draw_pair(rng), 0.05) for _ in range(rng.randint(2, 6))]
    lines = [maybe_mutate(rng, dump_json(rng, row), 0.06) for row in rows]
    data = b"\n".join(lines) + rng.choice((b"", b"\n"))
    if rng.random() < 0.03:
        data = data.replace(b"images/", b"images\xff/")
    tree: Tree = _draw_pairs_tree(rng, "pairs.jsonl", data)
    if rng.random() < 0.01:
        tree["pairs.csv"] = b"id,label\n"
    if rng.random() < 0.02:
        other = rng.choice(("c\x1b/", "c/", "d/"))
        tree |= {other + path: node for path, node in tree.items()}
    tree = {prefix + path: node for path, node in tree.items()}
    if rng.random() < 0.01:
        tree = {"a": draw_link(rng, "pairs")}
    return Case("pairs", tree, {"group": rng.choice(("own", "text", "image"))})


def draw_csv(rng: Random) -> Case:
    rows = [_draw_pair(rng) for _ in range(rng.randint(2, 6))]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if rng.random() < 0.1:
        columns.append(rng.choice(("", "id", "more", draw_string(rng))))
    file = io.StringIO()
    delimiter = rng.choice(",;\t")
    quoting = rng.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL))
    end = rng.choice(("\n", "\r\n"))
    writer = csv.writer(file, delimiter=delimiter, quoting=quoting, lineterminator=end)
    writer.writerow(columns)
    for row in rows:
        values = [row.get(name, "") for name in columns]
        values = ["|".join(map(str, v)) if isinstance(v, list) else v for v in values]
        if rng.random() < 0.1:
            values = values[: rng.randrange(len(values) + 1)] + ["a"] * rng.randrange(3)
        writer.writerow(values)
    data = file.getvalue().encode("utf-8", "surrogatepass")
    head = 0 if rng.random() < 0.1 else data.index(b"\n") + 1
    data = data[:head] + maybe_mutate(rng, data[head:], 0.5)
    return Case("pairs", _draw_pairs_tree(rng, "pairs.csv", data), {})


_NAMES = ("train", "Val", "test", "cats", "dogs", "a b", " c", ".d", "# e", "caf\udce9")
_NAMES += ("x\ny", "x\x1b", "=1+1", "e\u0301", "l" * 250)
_FILES = ("1.png", "2.JPG", " 3.png", ".4.png", "5.png", "\udcff.png", "a\\b.png", "#")


def draw_class_folders(rng: Random) -> Case:
    tree: Tree = {}
    names = rng.sample(_NAMES, 3)
    if rng.random() < 0.4:
        names = [f"{split}/{name}" for split in ("train", "test") for name in names[:2]]
    for name in names:
        for file in rng.sample(_FILES, 2):
            path = f"{name}/{file}"
            add_node(rng, tree, path, draw_image(rng), "secret.png", 0.15)
            if rng.random() < 0.6:
                data = draw_string(rng).encode("utf-8", "surrogatepass")
                path = f"{name}/{file.rpartition('.')[0]}.txt"
                data = maybe_mutate(rng, data)
                add_node(rng, tree, path, data, "secret.txt", 0.15)
        if rng.random() < 0.05:
            tree[f"{name}/below/1.png"] = b"a"
        _maybe_link(rng, tree, name, "images", 0.03)
    return Case("pairs", tree, {})


CASES: dict[str, Callable[[Random], Case]] = {
    "mmimdb": draw_mmimdb,
    "fashion200k": draw_fashion200k,
    "hatefulmemes": draw_hatefulmemes,
    "jsonl": draw_jsonl,
    "csv": draw_csv,
    "folders": draw_class_folders,
}
