"""The files of a data set as an enemy has them, one function for each kind."""

import csv
import io
from collections.abc import Callable
from typing import Any, NamedTuple

from ccu_jax.data.readers import fashion200k_labels as fashion_labels
from ccu_jax.data.readers import hatefulmemes_splits as hatefulmemes_lists
from ccu_jax.data.readers import mmimdb
from tests.fuzz.archives import packed
from tests.fuzz.contents import (
    Random,
    Tree,
    dumped,
    link,
    maybe,
    node,
    put,
    string,
    touched,
    value,
)
from tests.fuzz.pictures import SMALL, picture


class Case(NamedTuple):
    """What is planted below the folder that a reader is given, and its settings."""

    dataset: str
    tree: Tree
    settings: dict[str, Any]


def mmimdb_case(rng: Random) -> Case:
    """MM-IMDb: `split.json`, a file of JSON and a poster for each movie."""
    texts = posters = "dataset"
    if rng.random() < 0.1:
        texts, posters = "labels", "images"
    above = rng.choice(("mmimdb/", *[""] * 5))
    ids = [f"{rng.randrange(9):07d}" for _ in range(rng.randint(1, 3))]
    splits: Any = {"train": ids[:], "dev": [], "test": []}
    for name in splits:
        while rng.random() < 0.25:
            splits[name].append(rng.choice(ids) if rng.random() < 0.3 else value(rng))
    if rng.random() < 0.1:
        splits = touched(rng, splits)
    index = maybe(rng, dumped(rng, splits), 0.05)
    tree: Tree = {}
    put(tree, f"{above}split.json", node(rng, index, "mmimdb/split.json", 0.03))
    for i in ids:
        movie = {
            "plot": ["A plot, long.", string(rng), f"{string(rng)}::{string(rng)}"],
            "genres": rng.sample([*mmimdb.GENRES, "News", string(rng)], 3),
            "title": string(rng),
        }
        text = maybe(rng, dumped(rng, touched(rng, movie, 0.06)), 0.1)
        put(tree, f"{above}{texts}/{i}.json", node(rng, text, "secret.json"))
        found = node(rng, picture(rng), "secret.png")
        put(tree, f"{above}{posters}/{i}.jpeg", found)
    if rng.random() < 0.05:
        tree[f"{above}{texts}/{rng.choice(('0000077.json', 'x.json', 'a'))}"] = b"{}"
    if rng.random() < 0.03:
        tree[f"{above}{texts}"] = link(rng, "mmimdb/dataset")
    if rng.random() < 0.02:
        tree["mmimdb"] = link(rng, "mmimdb")
    if rng.random() < 0.03:
        tree = {"mmimdb.tar.gz": link(rng, "secret.tar.gz")}
    elif rng.random() < 0.05:
        tree = {"mmimdb.tar.gz": packed(rng, tree)}
    settings = {"plot_policy": rng.choice(("longest", "first"))}
    return Case("mmimdb", tree, settings)


def fashion_line(rng: Random) -> tuple[bytes, str]:
    """A line of a label file of dresses, and the path of its picture."""
    product = str(rng.randrange(1, 9))
    sub = rng.choice((*fashion_labels.SUB_CATEGORIES["dress"], "a_b"))
    columns = [
        f"women/dresses/{sub}/{product}/{product}_{rng.randrange(3)}.jpeg",
        rng.choice(("-1.780000", "0", string(rng))),
        rng.choice(("blue dress", string(rng), f"a {string(rng)} dress {string(rng)}")),
    ]
    path = columns[0]
    if rng.random() < 0.15:
        columns[rng.randrange(3)] = string(rng)
    if rng.random() < 0.1:
        columns[0] = columns[0].replace(*rng.choice((("women/", ""), ("/", "//"))), 1)
        columns[0] = columns[0].replace("dresses", rng.choice(("skirts", "..", "")))
    if rng.random() < 0.03:
        columns[0] = columns[0].replace("dresses", "skirts")
    if rng.random() < 0.05:
        columns.insert(rng.randrange(4), string(rng))
    line = "\t".join(columns).encode("utf-8", "surrogatepass")
    return maybe(rng, line, 0.08), path


def fashion_case(rng: Random) -> Case:
    """Fashion200k: ten label files, of which two are not empty, and pictures."""
    above = rng.choice(("fashion-200k/", "fashion200k/", *[""] * 8))
    tree: Tree = {f"{above}labels/{name}": b"" for name in fashion_labels.LABEL_FILES}
    for split in ("train", "test"):
        lines = [fashion_line(rng) for _ in range(rng.randint(1, 3))]
        data = rng.choice((b"\n", b"\n", b"\r\n", b"\n\n")).join(t for t, _ in lines)
        name = f"{above}labels/dress_{split}_detect_all.txt"
        put(tree, name, node(rng, data + b"\n", "labels.txt", 0.03))
        for _, path in lines:
            put(tree, above + path, node(rng, picture(rng), "secret.png"))
    if rng.random() < 0.1:
        odd = rng.choice(("b\udcff", "d\n", "\x1b", "dresses/b\udcff", "dresses/x\ty"))
        tree[f"{above}women/{odd}/1.jpeg"] = b"a"
    for name in ("women", "women/dresses", "labels"):
        if rng.random() < 0.02:
            tree[above + name] = link(rng, f"fashion/{name}")
    if rng.random() < 0.02:
        tree = {k: v for k, v in tree.items() if "women" not in k}
        tree[f"{above}women.tar.gz"] = node(rng, b"a", "secret.tar.gz", 0.7) or b""
    elif rng.random() < 0.04:
        apart = [path for path in tree if path.startswith(f"{above}women/")]
        women = {path.removeprefix(above): tree.pop(path) for path in apart}
        tree[f"{above}women.tar.gz"] = packed(rng, women)
    if rng.random() < 0.02:
        tree = {"fashion-200k": link(rng, "fashion")}
    settings = {
        "task": rng.choice(("category", "sub_category")),
        "mask_category_words": rng.random() < 0.5,
        "tirg_dot_token": rng.random() < 0.3,
    }
    return Case("fashion200k", tree, settings)


def memes_case(rng: Random) -> Case:
    """Hateful Memes: lists and pictures."""
    above = rng.choice(("data/", "data/", "a/", "a/data/", *[""] * 8))
    tree: Tree = {}
    names = [hatefulmemes_lists.TRAIN, *rng.sample(hatefulmemes_lists.FILES, 2)]
    for name in names:
        lines = []
        for _ in range(rng.randint(1, 3)):
            number = rng.randrange(30)
            row = {
                "id": rng.choice((number, f"{number:05d}", string(rng))),
                "img": f"img/{number:05d}.png",
                "label": rng.choice((0, 1)),
                "text": rng.choice(("a cat", string(rng))),
            }
            if rng.random() < 0.1:
                row["img"] = rng.choice(("img/", "")) + string(rng)
            lines.append(maybe(rng, dumped(rng, touched(rng, row), True), 0.08))
            put(tree, f"{above}img/{number:05d}.png", node(rng, picture(rng), "a.png"))
        data = b"\n".join(lines) + rng.choice((b"", b"\n", b"\r\n", b"\n\n"))
        put(tree, above + name, node(rng, data, "memes/train.jsonl", 0.04))
    if rng.random() < 0.05:
        odd = rng.choice(("\u00e9.png", "# a.png", " a.png", "#.png", "a b.png", "a.b"))
        row = {"img": f"img/{odd}", "label": 1, "text": "a"}
        tree[f"{above}img/{odd}"] = picture(rng)
        tree[f"{above}train.jsonl"] = dumped(rng, row, True)
    if rng.random() < 0.03:
        tree[f"{above}img"] = link(rng, "memes/img")
    if rng.random() < 0.03:
        tree = {k: v for k, v in tree.items() if "img" not in k}
        name = rng.choice(("img.tar.gz", "img.zip"))
        tree[above + name] = node(rng, b"PK\5\6", "secret.tar.gz", 0.6) or b""
    elif rng.random() < 0.05:
        apart = [path for path in tree if path.startswith(f"{above}img/")]
        img = {path.removeprefix(above): tree.pop(path) for path in apart}
        tree[f"{above}img.tar.gz"] = packed(rng, img)
    if rng.random() < 0.02:
        other = rng.choice(("b\n/", "b/", "b/data/"))
        tree |= {other + k.removeprefix(above): v for k, v in tree.items()}
    if rng.random() < 0.02:
        tree = {"data": link(rng, "memes")}
    return Case("hatefulmemes", tree, {})


def pair(rng: Random) -> dict[str, Any]:
    """A row of a user's own pairs."""
    number = rng.randrange(5)
    row: dict[str, Any] = {
        "id": rng.choice((f"r{rng.randrange(40)}", rng.randrange(40), string(rng))),
        "image": f"images/{number}.png",
        "text": rng.choice(("a thing", string(rng))),
        "label": rng.choice(("x", "y", string(rng))),
        "split": rng.choice(("train", "train", "val", "test", "", string(rng))),
        "group": rng.choice((f"g{number}", string(rng))),
    }
    for name in ("id", "group", "split", "image"):
        if rng.random() < 0.25:
            del row[name]
    if rng.random() < 0.2:
        row["image"] = string(rng)
    if rng.random() < 0.2:
        row["labels"] = [row.pop("label"), *rng.choice(([], ["x"], [string(rng)]))]
    return row


def _images(rng: Random, tree: Tree) -> None:
    for number in range(5):
        put(tree, f"images/{number}.png", node(rng, SMALL[number], "secret.png"))
    if rng.random() < 0.05:
        tree["images"] = link(rng, "images")
    if rng.random() < 0.05:
        odd = rng.choice((b"\xff", "caf\u00e9".encode("latin-1"))).decode(
            "utf-8", "surrogateescape"
        )
        tree[f"images{odd}/0.png"] = SMALL[0]


def jsonl_case(rng: Random) -> Case:
    """A user's own pairs in `pairs.jsonl`."""
    above = rng.choice(("a/", "b\n/", *[""] * 9))
    lines = [
        maybe(rng, dumped(rng, touched(rng, pair(rng), 0.05), True), 0.06)
        for _ in range(rng.randint(2, 6))
    ]
    data = b"\n".join(lines) + rng.choice((b"", b"\n"))
    if rng.random() < 0.03:
        data = data.replace(b"images/", b"images\xff/")
    tree: Tree = {}
    put(tree, "pairs.jsonl", node(rng, data, "pairs.jsonl", 0.04))
    if rng.random() < 0.01:
        tree["pairs.csv"] = b"id,label\n"
    _images(rng, tree)
    if rng.random() < 0.02:
        other = rng.choice(("c\x1b/", "c/", "d/"))
        tree |= {other + path: found for path, found in tree.items()}
    tree = {above + path: found for path, found in tree.items()}
    if rng.random() < 0.01:
        tree = {"a": link(rng, "pairs")}
    return Case("pairs", tree, {"group": rng.choice(("own", "text", "image"))})


def csv_case(rng: Random) -> Case:
    """A user's own pairs in `pairs.csv`."""
    rows = [pair(rng) for _ in range(rng.randint(2, 6))]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if rng.random() < 0.1:
        columns.append(rng.choice(("", "id", "more", string(rng))))
    file = io.StringIO()
    writer = csv.writer(
        file,
        delimiter=rng.choice(",;\t"),
        quoting=rng.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL)),
        lineterminator=rng.choice(("\n", "\r\n")),
    )
    writer.writerow(columns)
    for row in rows:
        values = [row.get(name, "") for name in columns]
        values = ["|".join(map(str, v)) if isinstance(v, list) else v for v in values]
        if rng.random() < 0.1:
            values = values[: rng.randrange(len(values) + 1)] + ["a"] * rng.randrange(3)
        writer.writerow(values)
    data = file.getvalue().encode("utf-8", "surrogatepass")
    head = 0 if rng.random() < 0.1 else data.index(b"\n") + 1
    data = data[:head] + maybe(rng, data[head:], 0.5)
    tree: Tree = {}
    put(tree, "pairs.csv", node(rng, data, "pairs.csv", 0.04))
    _images(rng, tree)
    return Case("pairs", tree, {})


_NAMES = ("train", "Val", "test", "cats", "dogs", "a b", " c", ".d", "# e", "caf\udce9")
_FILES = ("1.png", "2.JPG", " 3.png", ".4.png", "5.png", "\udcff.png", "a\\b.png", "#")


def folders_case(rng: Random) -> Case:
    """Pictures in folders that are named after classes."""
    tree: Tree = {}
    names = rng.sample((*_NAMES, "x\ny", "x\x1b", "=1+1", "e\u0301", "l" * 250), 3)
    if rng.random() < 0.4:
        names = [f"{split}/{name}" for split in ("train", "test") for name in names[:2]]
    for name in names:
        for file in rng.sample(_FILES, 2):
            put(tree, f"{name}/{file}", node(rng, picture(rng), "secret.png", 0.15))
            if rng.random() < 0.6:
                stem, text = (
                    file.rpartition(".")[0],
                    maybe(rng, string(rng).encode("utf-8", "surrogatepass")),
                )
                put(tree, f"{name}/{stem}.txt", node(rng, text, "secret.txt", 0.15))
        if rng.random() < 0.05:
            tree[f"{name}/below/1.png"] = b"a"
        if rng.random() < 0.03:
            tree[name] = link(rng, "images")
    return Case("pairs", tree, {})


CASES: dict[str, Callable[[Random], Case]] = {
    "mmimdb": mmimdb_case,
    "fashion200k": fashion_case,
    "hatefulmemes": memes_case,
    "jsonl": jsonl_case,
    "csv": csv_case,
    "folders": folders_case,
}
