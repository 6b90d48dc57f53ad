"""A user's own pairs: fields of the rows, labels and splits."""

import collections
import hashlib
import json
import re

import hypothesis
import pytest
from hypothesis import strategies as st

from ccu_jax.config.schema import Data
from ccu_jax.data.readers import pairs
from ccu_jax.errors import UserError
from tests.data.readers.layouts import (
    dump_lines,
    encode_image,
    make_pairs,
    read_rows,
    write_files,
)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "pairs" / "images").mkdir(parents=True)
    return tmp_path / "pairs"


@pytest.fixture
def write(root):
    """Writes pairs.jsonl, and an image for each row that names one."""

    def run(rows, **settings):
        names = [str(row.get("image")) for row in rows]
        images = [name for name in names if re.fullmatch(r"images/\d+\.png", name)]
        write_files(root, dict.fromkeys(images, encode_image()))
        write_files(root, {"pairs.jsonl": dump_lines(rows)})
        return Data(dir=str(root), **settings)

    return run


def test_clip_art_is_unchanged():
    source, examples, counts = read_rows(Data())
    assert counts == {"read": 1408}
    assert source.metric == "accuracy"
    splits = collections.Counter(example.split for example in examples.values())
    assert splits == {"train": 915, "validation": 211, "test": 282}
    content = repr([tuple(example)[:6] for example in examples.values()]).encode()
    assert hashlib.md5(content).hexdigest() == "7fb8bd5d41b18967ec82aa89f1a4fcce"


def test_split_is_stratified_keeps_groups_and_does_not_depend_on_the_order(write):
    rows = make_pairs(200)
    for n, row in enumerate(rows):
        row["group"] = f"g{n % 2}-{n // 6}"
    examples = read_rows(write(rows)).examples
    splits = {example.group: example.split for example in examples.values()}
    assert all(splits[example.group] == example.split for example in examples.values())
    sizes = collections.Counter((e.split, e.labels) for e in examples.values())
    for label in "xy":
        assert abs(sizes["test", (label,)] - 20) <= 3
        assert abs(sizes["validation", (label,)] - 15) <= 3
    reordered = read_rows(write(rows[::-1])).examples
    assert reordered == examples
    assert list(reordered) != list(examples)


def test_splits_of_the_index_are_kept(write):
    splits = {"train": "train", "dev": "validation", "Test": "test"}
    splits["valid"] = "validation"
    rows = [row | {"split": [*splits][n % 4]} for n, row in enumerate(make_pairs(12))]
    _, examples, counts = read_rows(write(rows))
    for row in rows:
        assert examples[row["image"]].split == splits[row["split"]]
    assert counts == {"read": 12}


def test_split_that_the_index_does_not_name_is_taken_from_train(write):
    rows = make_pairs(100)
    for n, row in enumerate(rows):
        row |= {"group": f"g{n // 2}", "split": "test" if n < 20 else "train"}
    rows[20]["group"] = "g0"  # a group in two splits is not split further
    _, examples, counts = read_rows(write(rows, validation_fraction=0.25))
    for n in range(100):
        assert (examples[f"images/{n}.png"].split == "test") == (n < 20)
    assert examples["images/20.png"].split == "train"
    validation = [e.group for e in examples.values() if e.split == "validation"]
    assert abs(len(validation) - 20) <= 2
    elsewhere = {e.group for e in examples.values() if e.split != "validation"}
    assert elsewhere.isdisjoint(validation)
    assert counts["noted: train row taken for validation"] == len(validation)
    examples = read_rows(write(rows, validation_fraction=0)).examples.values()
    assert {example.split for example in examples} == {"train", "test"}


def test_group_in_two_splits_is_noted_or_an_error(write):
    rows = make_pairs(8)
    for n, row in enumerate(rows):
        split = ("train", "test", "dev", "train")[n % 4]
        row |= {"group": f"g{n // 2}", "split": split}
    counts = read_rows(write(rows)).counts
    assert counts["noted: group with rows in two splits"] == 4
    with pytest.raises(UserError, match="pairs.jsonl: 4 groups have rows in more th"):
        read_rows(write(rows, strict=True))


def test_images_and_texts_may_be_absent_and_texts_are_cleaned(write):
    rows = make_pairs(6)
    rows[0] |= {"image": None, "id": "no image"}
    rows[1]["text"] = None
    rows[2]["text"] = " \n"
    rows[3]["text"] = "one\u0085line\u2028\0\ud800"
    _, examples, counts = read_rows(write(rows))
    assert examples["no image"].image is None
    assert examples["no image"].text == "a thing 0"
    for name in ("images/1.png", "images/2.png"):
        assert examples[name].text is None
        assert examples[name].image == encode_image()
    assert examples["images/3.png"].text == "one\u0085line\u2028 \ufffd"
    notes = ("noted: NUL characters in a text", "noted: broken characters in a text")
    assert counts == {"read": 6} | dict.fromkeys(notes, 1)


def test_labels_of_a_used_row_make_the_data_set_multi_label(write):
    rows = [*make_pairs(6), {"id": "a", "labels": ["skipped"]}]
    assert not read_rows(write(rows)).source.multi_label
    lists = (["b"], ["a", "b", "a"], [], ["c", ""], [" a "])
    for row, labels in zip(rows, lists, strict=False):
        del row["label"]
        row["labels"] = labels
    rows[5]["labels"] = None  # its `label` counts
    source, examples, counts = read_rows(write(rows))
    assert counts == {"read": 7, "skipped: neither image nor text": 1}
    assert source.multi_label
    assert source.metric == "micro_f1"
    assert source.classes == ("a", "b", "c", "y")
    labels = [examples[row["image"]].labels for row in rows[:6]]
    assert labels == [("b",), ("a", "b"), (), ("c",), ("a",), ("y",)]


def test_ids_labels_and_groups_may_be_numbers(write):
    rows = [row | {"id": n, "group": 10**30} for n, row in enumerate(make_pairs(4))]
    source, examples, _ = read_rows(write([row | {"label": 7} for row in rows]))
    assert source.classes == ("7",)
    assert set(examples) == set("0123")
    assert {example.group for example in examples.values()} == {"1" + "0" * 30}


VALID = {"id": "a", "text": "a", "label": "x"}
BAD_ROWS = {
    "id already used": [{"id": "images/0.png"}, {"id": None, "image": "images/0.png"}],
    "neither id nor image names the row": [{"id": None}, {"id": ""}],
    "id is no string": [{"id": ["a"]}, {"id": True}],
    "text is no string": [{"text": ["a"]}],
    "image is no string": [{"image": {}}],
    "group is no string": [{"group": 1.5}],
    "split is no string": [{"split": []}],
    "label is no string": [{"label": {"x": 1}}, {"labels": [["x"]]}],
    "labels are no list of strings": [{"labels": "x"}, {"labels": [None]}],
    "split unknown": [{"split": "tset"}],
    "no label": [{"label": None}, {"label": ""}],
    "neither image nor text": [{"text": None}],
    "id too long": [{"id": "i" * 600}],
    "group too long": [{"group": "g" * 600}],
    "label too long": [{"label": "l" * 600}],
    "id has an impossible character": [
        {"id": id_} for id_ in ("a\0", "a\nb", "\ud800", "a\u2028b", "a\x9b31mb")
    ],
    "group has an impossible character": [{"group": "a\x85b"}],
    "label has an impossible character": [{"label": "x\0"}],
    "id begins as a comment in a list of ids does": [{"id": "# a"}],
    "image has an impossible character": [{"image": "a\0.png"}],
}
BAD_IMAGES = {
    "missing": ["p" * 300 + ".png", "images/0.png/a", "a/" * 500_000],
    "is no plain file": ["images", ".", "./", ".//."],
    "outside of the folder": [
        *("/etc/passwd", "../secret", "..\\secret"),
        *("C:/secret", "images/../../secret", "away/secret"),
    ],
}
BAD_ROWS |= {
    f"image {reason}": [{"image": image} for image in images]
    for reason, images in BAD_IMAGES.items()
}


@pytest.mark.parametrize(
    "fields, reason",
    [(fields, reason) for reason, rows in BAD_ROWS.items() for fields in rows],
    ids=lambda value: ascii(value)[:40],
)
def test_unusable_row_is_skipped(write, root, fields, reason):
    (root.parent / "secret").write_bytes(encode_image("blue"))
    (root / "away").symlink_to("..")
    rows = [*make_pairs(2), VALID | fields, *make_pairs(4)[2:]]
    _, examples, counts = read_rows(write(rows))
    assert counts == {"read": 5, f"skipped: {reason}": 1}
    assert sorted(examples) == [row["image"] for row in make_pairs(4)]
    assert {example.image for example in examples.values()} == {encode_image()}
    message = rf"pairs.jsonl line 3( \(.*\))?: {reason}"
    with pytest.raises(UserError, match=message) as error:
        read_rows(write(rows, strict=True))
    assert "\n" not in str(error.value)


def test_label_that_names_every_row_is_an_error(write, monkeypatch):
    monkeypatch.setattr(pairs, "MAX_CLASSES", 5)
    rows = [VALID | {"id": str(n), "label": f"title {n}"} for n in range(6)]
    with pytest.raises(UserError, match="6 distinct labels in 6 rows, at most"):
        read_rows(write(rows))


@hypothesis.settings(max_examples=30, deadline=None, database=None)
@hypothesis.given(lines=st.lists(st.binary(max_size=60), max_size=6))
@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.csv"])
def test_no_line_costs_another_row(tmp_path_factory, name, lines):
    root = tmp_path_factory.mktemp("pairs")
    rows = [VALID | {"id": f"id{n}"} for n in range(4)]
    good = [json.dumps(row).encode() for row in rows]
    if name.endswith("csv"):
        good = [f"{row['id']},a,x".encode() for row in rows]
    for n, line in enumerate(lines):
        good.insert((3 * n) % len(good), line)
    header = [b"id,text,label"] if name.endswith("csv") else []
    (root / name).write_bytes(b"\n".join([*header, *good]))
    assert set(read_rows(Data(dir=str(root))).examples) >= {row["id"] for row in rows}
