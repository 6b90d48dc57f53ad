"""A user's own pairs: three ways to write them down, and what can be wrong there."""

import collections
import csv
import hashlib
import io
import json
import os
import zipfile

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from ccu_jax.config.schema import Data
from ccu_jax.data import load
from ccu_jax.data import near_duplicates as duplicates
from ccu_jax.data.readers import pairs, pairs_index
from ccu_jax.data.readers import untrusted_files as files
from ccu_jax.data.readers.base import Counts, SkipExample
from ccu_jax.data.samples import editions
from ccu_jax.errors import UserError


def quiet(what, done, total):
    """A progress callback that says nothing."""


def picture(colour="red", size=(12, 8)):
    """An encoded picture of one colour."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def rows(number, **more):
    """Valid rows of two classes, alternating."""
    return [
        {"image": f"images/{n}.png", "text": f"a thing {n}", "label": "xy"[n % 2]}
        | more
        for n in range(number)
    ]


@pytest.fixture
def root(tmp_path):
    """An empty folder for pairs, with one for pictures in it."""
    (tmp_path / "pairs" / "images").mkdir(parents=True)
    return tmp_path / "pairs"


@pytest.fixture
def folder(root):
    """A function that writes pairs.jsonl and a picture for each row that has one."""

    def write(given, **settings):
        for row in given:
            if isinstance(row, dict) and str(row.get("image")).startswith("images/"):
                (root / row["image"]).write_bytes(picture())
        lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in given]
        (root / "pairs.jsonl").write_bytes(b"\n".join(lines))
        return Data(dir=str(root), **settings)

    return write


def opened(config, workdir=None):
    """The source, its readable examples, and the counts."""
    place = pairs.locate(config, workdir)
    counts = Counts("pairs", config.strict)
    source = pairs.open_pairs(config, place, counts, None)
    examples = []
    for key in source.keys:
        try:
            examples.append(source.read(key))
        except SkipExample as reason:
            counts.skip(str(reason), source.row_name(key))
    return source, examples, counts.numbers


def signature(config):
    """The mark of the files as they are now."""
    return pairs.signature(config, pairs.locate(config, None))


def by_id(examples):
    """The examples by their ids."""
    return {example.id: example for example in examples}


# --- splits ---------------------------------------------------------------------------


def test_the_clip_art_is_what_it_always_was():
    source, examples, counts = opened(Data())
    assert counts == {"read": 1408} and source.metric == "accuracy"
    assert collections.Counter(e.split for e in examples) == {
        "train": 915,
        "validation": 211,
        "test": 282,
    }
    whole = repr([tuple(example)[:6] for example in examples]).encode()
    assert hashlib.md5(whole).hexdigest() == "7fb8bd5d41b18967ec82aa89f1a4fcce"


def test_rows_of_a_group_share_a_split_and_the_shares_hold(folder):
    given = rows(200)
    for n, row in enumerate(given):
        row["group"] = f"g{n // 3}"
    _, examples, _ = opened(folder(given))
    splits = collections.defaultdict(set)
    for example in examples:
        splits[example.group].add(example.split)
    assert all(len(found) == 1 for found in splits.values())
    share = collections.Counter(example.split for example in examples)
    assert abs(share["test"] - 40) < 6 and abs(share["validation"] - 30) < 6


def test_the_split_is_stratified_and_does_not_depend_on_the_order(folder):
    _, first, _ = opened(folder(rows(100)))
    for label in "xy":
        test = [e for e in first if e.split == "test" and e.labels == (label,)]
        assert abs(len(test) - 10) <= 1
    _, second, _ = opened(folder(rows(100)[::-1]))
    assert by_id(first) == by_id(second) and first != second


def test_a_split_in_the_index_is_taken_over(folder):
    given = rows(12)
    for n, row in enumerate(given):
        row["split"] = ("train", "dev", "Test", "valid")[n % 4]
    _, examples, counts = opened(folder(given))
    wanted = {"dev": "validation", "valid": "validation", "Test": "test"}
    for row in given:
        split = wanted.get(row["split"], row["split"])
        assert by_id(examples)[row["image"]].split == split
    assert counts == {"read": 12}
    splits = [example.split for example in examples]
    assert splits == sorted(splits, key=["train", "validation", "test"].index)


def test_a_split_that_the_index_leaves_out_is_cut_from_train(folder):
    given = rows(100, split="train")
    for n, row in enumerate(given):
        row["group"] = f"g{n // 2}"
        row["split"] = "test" if n < 20 else "train"
    given[20]["group"] = "g0"  # a group in two splits is not torn further
    _, examples, counts = opened(folder(given, validation_fraction=0.25))
    found = by_id(examples)
    assert all(
        (found[f"images/{n}.png"].split == "test") == (n < 20) for n in range(99)
    )
    assert found["images/20.png"].split == "train"
    moved = [e for e in examples if e.split == "validation"]
    assert abs(len(moved) - 20) <= 2
    assert not {e.group for e in moved} & {e.group for e in examples if e not in moved}
    assert counts["noted: train row taken for validation"] == len(moved)
    none = opened(folder(given, validation_fraction=0.0))[1]
    assert not [e for e in none if e.split == "validation"]


def test_a_group_in_two_splits_is_told_or_refused(folder):
    given = rows(8)
    for n, row in enumerate(given):
        row |= {
            "group": f"g{n // 2}",
            "split": ("train", "test", "dev", "train")[n % 4],
        }
    assert opened(folder(given))[2]["noted: group with rows in two splits"] == 4
    with pytest.raises(
        UserError, match="pairs.jsonl: 4 groups have rows in two splits"
    ):
        opened(folder(given, strict=True))


# --- what a row says ------------------------------------------------------------------


def test_a_row_may_lack_its_picture_or_its_text(folder):
    given = rows(6)
    given[0] |= {"image": None, "id": "no picture"}
    given[1]["text"] = None
    given[2]["text"] = " \n"
    _, examples, counts = opened(folder(given))
    found = by_id(examples)
    assert found["no picture"].image is None and found["no picture"].text
    for name in ("images/1.png", "images/2.png"):
        assert found[name].text is None and found[name].image == picture()
    assert counts == {"read": 6}


def test_labels_make_a_multi_label_data_set(folder):
    given = rows(6)
    lists = (["b"], ["a", "b", "a"], [], ["c", ""], [" a "])
    for row, labels in zip(given, lists, strict=False):
        del row["label"]
        row["labels"] = labels
    given[5]["labels"] = None  # and a label
    source, examples, _ = opened(folder(given))
    assert source.multi_label and source.metric == "micro_f1"
    assert source.classes == ("a", "b", "c", "y")
    found = [by_id(examples)[row["image"]].labels for row in given]
    assert found == [("b",), ("a", "b"), (), ("c",), ("a",), ("y",)]
    source, _, _ = opened(folder(rows(4)))
    assert not source.multi_label and source.metric == "accuracy"


def test_a_row_that_is_left_out_does_not_make_the_set_multi_label(folder):
    source, _, counts = opened(folder([*rows(4), {"id": "a", "labels": ["b"]}]))
    assert counts["skipped: neither image nor text"] == 1 and not source.multi_label
    assert source.classes == ("x", "y")


def test_numbers_serve_as_ids_labels_and_groups(folder):
    given = rows(4)
    for n, row in enumerate(given):
        row |= {"id": n, "label": n % 2, "group": 10**30}
    source, examples, _ = opened(folder(given))
    assert source.classes == ("0", "1") and set(by_id(examples)) == set("0123")
    assert {example.group for example in examples} == {"1" + "0" * 30}


def test_odd_characters_in_a_text_are_no_loss(folder):
    given = rows(4)
    texts = ["a\0b", "\ud800 broken", "one\u0085line\u2028still", "\0"]
    for row, text in zip(given, texts, strict=True):
        row["text"] = text
    _, examples, _ = opened(folder(given))
    found = [by_id(examples)[row["image"]] for row in given]
    assert [e.text for e in found] == ["a b", "\ufffd broken", texts[2], None]
    assert [len(example.notes) for example in found] == [1, 1, 0, 1]
    assert found[0].notes == ("noted: NUL characters in a text",)
    assert found[1].notes == ("noted: broken characters in a text",)


LONG = "i" * 600
BAD = [
    (b"{not json", "line is no valid JSON"),
    (b'{"id": "a"} {"id": "b"}', "line is no valid JSON"),
    (b"[" * 200_000, "line is no valid JSON"),
    (b'{"id": 1%s}' % (b"0" * 9999), "line is no valid JSON"),
    (b"[1]", "line is no JSON object"),
    (b"null", "line is no JSON object"),
    (b"x" * (files.MAX_LINE_BYTES + 1), "line too long"),
    (b'{"id": "caf\xe9"}', "line is not UTF-8"),
    ({"id": "images/0.png", "text": "a", "label": "x"}, "id already used"),
    ({"image": "images/0.png", "label": "x"}, "id already used"),
    ({"text": "a", "label": "x"}, "neither id nor image names the row"),
    ({"id": "", "text": "a", "label": "x"}, "neither id nor image names the row"),
    ({"id": ["a"], "text": "a", "label": "x"}, "id is no string"),
    ({"id": True, "text": "a", "label": "x"}, "id is no string"),
    ({"id": "a", "text": ["a"], "label": "x"}, "text is no string"),
    ({"id": "a", "image": {}, "text": "a", "label": "x"}, "image is no string"),
    ({"id": "a", "text": "a", "label": "x", "group": 1.5}, "group is no string"),
    ({"id": "a", "text": "a", "label": "x", "split": []}, "split is no string"),
    ({"id": "a", "text": "a", "label": {"x": 1}}, "label is no string"),
    ({"id": "a", "text": "a", "labels": "x"}, "labels are no list of strings"),
    ({"id": "a", "text": "a", "labels": [None]}, "labels are no list of strings"),
    ({"id": "a", "text": "a", "labels": [["x"]]}, "label is no string"),
    ({"id": "a", "text": "a", "label": "x", "split": "tset"}, "split unknown"),
    ({"id": "a", "text": "a"}, "no label"),
    ({"id": "a", "text": "a", "label": ""}, "no label"),
    ({"id": "a", "label": "x"}, "neither image nor text"),
    ({"id": LONG, "text": "a", "label": "x"}, "id too long"),
    ({"id": "a", "text": "a", "label": "x", "group": LONG}, "group too long"),
    ({"id": "a", "text": "a", "label": LONG}, "label too long"),
    ({"id": "a\0", "text": "a", "label": "x"}, "id has an impossible character"),
    ({"id": "a\nb", "text": "a", "label": "x"}, "id has an impossible character"),
    ({"id": "\ud800", "text": "a", "label": "x"}, "id has an impossible character"),
    ({"id": "a", "text": "a", "label": "x\0"}, "label has an impossible character"),
    ({"id": "a\u2028b", "text": "a", "label": "x"}, "id has an impossible character"),
    (
        {"id": "# a", "text": "a", "label": "x"},
        "id begins as a comment in a list of ids does",
    ),
    ({"image": "a\0.png", "label": "x"}, "image has an impossible character"),
    ({"image": "images/none.png", "label": "x"}, "image missing"),
    ({"image": "p" * 300 + ".png", "label": "x"}, "image missing"),
    ({"image": "images/0.png/a", "label": "x"}, "image missing"),
    ({"image": "images", "label": "x"}, "image is no plain file"),
    ({"image": "pipe", "label": "x"}, "image is no plain file"),
    ({"image": "/etc/passwd", "label": "x"}, "image outside of the folder"),
    ({"image": "../secret", "label": "x"}, "image outside of the folder"),
    ({"image": "..\\secret", "label": "x"}, "image outside of the folder"),
    ({"image": "images/../../secret", "label": "x"}, "image outside of the folder"),
    ({"image": "C:/secret", "label": "x"}, "image outside of the folder"),
    ({"image": "link", "label": "x"}, "image outside of the folder"),
    ({"image": "away/secret", "label": "x"}, "image outside of the folder"),
    ({"image": "loop", "label": "x"}, "image cannot be read"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD, ids=lambda value: str(value)[:40])
def test_a_row_that_cannot_be_used_is_counted_or_refused(folder, root, bad, reason):
    (root.parent / "secret").write_bytes(picture("blue"))
    (root / "link").symlink_to("../secret")
    (root / "away").symlink_to("..")
    (root / "loop").symlink_to("loop")
    os.mkfifo(root / "pipe")
    if isinstance(bad, dict):
        bad = json.dumps(bad).encode()
    given = [*rows(2), b"  ", bad, *rows(4)[2:]]
    source, examples, counts = opened(folder(given))
    assert counts == {"read": 5, f"skipped: {reason}": 1}
    assert sorted(e.id for e in examples) == [row["image"] for row in rows(4)]
    assert {example.image for example in examples} == {picture()}
    with pytest.raises(
        UserError, match=rf"pairs.jsonl line 4( \(.*\))?: {reason}"
    ) as e:
        opened(folder(given, strict=True))
    assert "\n" not in str(e.value)


def test_an_index_without_one_fit_row_is_refused_with_all_counts(folder, tmp_path):
    config = folder([b"[1]", b"[2]", b"{", {"id": "a"}])
    with pytest.raises(
        UserError, match=r"no usable row left \(4 read, 2 skipped: line"
    ):
        load(config, tmp_path / "w", quiet)


def test_a_label_that_names_every_row_is_no_label(folder, monkeypatch):
    monkeypatch.setattr(pairs, "MAX_CLASSES", 5)
    given = [{"id": str(n), "text": "a", "label": f"title {n}"} for n in range(6)]
    with pytest.raises(UserError, match="6 different labels in 6 rows; a label is one"):
        opened(folder(given))


@hypothesis.settings(max_examples=30, deadline=None, database=None)
@hypothesis.given(st.lists(st.binary(max_size=60), max_size=6))
def test_no_line_whatever_is_in_it_costs_another_row(tmp_path_factory, junk):
    root = tmp_path_factory.mktemp("junk")
    good = [{"id": f"id{n}", "text": "a", "label": "xy"[n % 2]} for n in range(4)]
    lines = [json.dumps(row).encode() for row in good]
    for n, line in enumerate(junk):
        lines.insert((3 * n) % len(lines), line)
    (root / "pairs.jsonl").write_bytes(b"\n".join(lines))
    assert {e.id for e in opened(Data(dir=str(root)))[1]} >= {
        "id0",
        "id1",
        "id2",
        "id3",
    }
    (root / "pairs.jsonl").unlink()
    lines = [f"{row['id']},a,{row['label']}".encode() for row in good]
    for n, line in enumerate(junk):
        lines.insert((3 * n) % len(lines), line)
    (root / "pairs.csv").write_bytes(b"\n".join([b"id,text,label", *lines]))
    assert {e.id for e in opened(Data(dir=str(root)))[1]} >= {
        "id0",
        "id1",
        "id2",
        "id3",
    }


# --- CSV ------------------------------------------------------------------------------


def table(root, given, columns, delimiter=",", encoding="utf-8", end="\r\n"):
    """Writes pairs.csv as a spreadsheet would."""
    with (root / "pairs.csv").open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(
            file,
            columns,
            delimiter=delimiter,
            lineterminator=end,
            extrasaction="ignore",
        )
        writer.writeheader()
        writer.writerows(given)
    return Data(dir=str(root))


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_table_gives_the_same_rows_as_json_lines(folder, root, delimiter, encoding):
    given = rows(9, group="g")
    for n, row in enumerate(given):
        row |= {"id": f"id{n}", "split": ("train", "test", "dev")[n % 3]}
        row["text"] = f'"a, b; c"\tof\r\n\u00e9t\u00e9 | {n}'.replace("\r", "")
    wanted = opened(folder(given))
    (root / "pairs.jsonl").unlink()
    columns = ["split", "label", "text", "id", "image", "group", "author"]
    found = opened(table(root, given, columns, delimiter, encoding))
    assert found[1] == wanted[1] and found[0].classes == wanted[0].classes
    assert found[2] == wanted[2]


@hypothesis.settings(max_examples=30, deadline=None, database=None)
@hypothesis.given(st.lists(st.text(max_size=20), min_size=1, max_size=5))
def test_any_text_comes_through_a_table(tmp_path_factory, texts):
    root = tmp_path_factory.mktemp("table")
    texts = [text.replace("\r", "").encode(errors="ignore").decode() for text in texts]
    texts = ["text " + text for text in texts]
    given = [{"id": f"id{n}", "text": t, "label": "x"} for n, t in enumerate(texts)]
    _, examples, counts = opened(table(root, given, ["id", "text", "label"]))
    # A byte-order mark within a line is taken for one at its beginning.
    wanted = [text.replace("\0", " ").strip() for text in texts]
    found = [by_id(examples)[row["id"]].text for row in given]
    if "\ufeff" not in "".join(texts):
        assert found == wanted and counts == {"read": len(texts)}


def test_labels_of_a_table_are_separated_by_bars(root):
    given = [
        {"id": 1, "text": "a", "labels": "x|y"},
        {"id": 2, "text": "a", "labels": ""},
        {"id": 3, "text": "a", "labels": " y | z |"},
    ]
    source, examples, _ = opened(table(root, given, ["id", "text", "labels"]))
    found = {name: e.labels for name, e in by_id(examples).items()}
    assert found == {"1": ("x", "y"), "2": (), "3": ("y", "z")} and source.multi_label


def test_a_column_of_labels_leaves_the_column_of_one_label_to_rows_without(root):
    given = [
        {"id": 1, "text": "a", "label": "x", "labels": ""},
        {"id": 2, "text": "a", "label": "x", "labels": "y|z"},
        {"id": 3, "text": "a", "label": "", "labels": ""},
    ]
    _, examples, _ = opened(table(root, given, ["id", "text", "label", "labels"]))
    found = {name: e.labels for name, e in by_id(examples).items()}
    assert found == {"1": ("x",), "2": ("y", "z"), "3": ()}


def test_broken_rows_of_a_table_are_counted_and_cost_no_other(root):
    lines = [
        b"id,text,label",
        b"1,a,x",
        b'2,"never closed,x',
        b"3,a,x",
        b'4,"a"b,x',
        b"5,a",
        b"6,a,b,x",
        b",,",
        b"",
        b"7,caf\xe9,x",
        b'8,"a\nb",x',
        b"9,%s,x" % (b"l" * (csv.field_size_limit() + 1)),
        b"10,%s,x" % (b"m" * (files.MAX_LINE_BYTES + 1)),
        b'11,"torn',
        b'%s",x' % (b"m" * (files.MAX_LINE_BYTES + 1)),
        b'12,"a,\nb",x',
        b"13,a\0b,x",
    ]
    (root / "pairs.csv").write_bytes(b"\n".join(lines))
    _, examples, counts = opened(Data(dir=str(root)))
    assert sorted(map(int, by_id(examples))) == [1, 3, 8, 12, 13]
    assert by_id(examples)["8"].text == "a\nb"
    assert by_id(examples)["13"].text == "a b" and by_id(examples)["13"].notes
    assert counts == {
        "read": 14,
        "skipped: line is no valid CSV": 3,
        "skipped: other number of fields than the header": 2,
        "skipped: line is not UTF-8": 1,
        "skipped: line too long": 3,
    }
    with pytest.raises(UserError, match="pairs.csv line 3: line is no valid CSV"):
        opened(Data(dir=str(root), strict=True))


def test_a_row_of_a_table_is_named_by_its_first_line(root):
    (root / "pairs.csv").write_bytes(b'id,text,label\n1,"a\nb",x\n\n2,"a\nb",\n3,a,x')
    with pytest.raises(UserError, match=r"pairs.csv line 5 \(2\): no label"):
        opened(Data(dir=str(root), strict=True))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"file,caption,class", "it names 'file', 'caption', 'class'"),
        (b"image;text;class", "it names 'image', 'text', 'class'"),
        (b"text,label", "it names 'text', 'label'"),
        (b"image,label,Label ", "two columns are named 'label'"),
        (b"\xe9,label", "it names none"),
        (b'"image,label', "it names none"),
        (b"x" * (files.MAX_LINE_BYTES + 1), "it names none"),
    ],
)
def test_a_table_without_the_needed_columns_is_refused(root, header, message):
    (root / "pairs.csv").write_bytes(header + b"\na,b,c\n")
    with pytest.raises(UserError, match=message) as caught:
        opened(Data(dir=str(root)))
    assert "pairs.csv" in str(caught.value) and "\n" not in str(caught.value)


def test_an_empty_table_is_refused(root):
    (root / "pairs.csv").write_bytes(b"\n \n")
    with pytest.raises(UserError, match="the first line must name the columns.* none"):
        opened(Data(dir=str(root)))


# --- folders named after classes ------------------------------------------------------


def classes(root, names):
    """Writes a picture, or a text, at each of these paths."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        data = f"text of {name}".encode() if name.endswith(".txt") else picture()
        (root / name).write_bytes(data)
    return Data(dir=str(root))


def test_folders_of_pictures_are_classes_with_a_text_beside_each(root):
    (root / "images").rmdir()
    config = classes(root, ["cat/1.jpg", "cat/1.txt", "cat/2.PNG", "big dog/1.webp"])
    source, examples, counts = opened(config)
    assert source.classes == ("big dog", "cat") and counts == {"read": 3}
    found = by_id(examples)
    assert found["cat/1.jpg"].text == "text of cat/1.txt"
    assert found["cat/2.PNG"].text is None and found["cat/2.PNG"].labels == ("cat",)
    assert found["big dog/1.webp"].image == picture()
    assert source.row_name(source.keys[0]) in found


def test_a_level_of_splits_above_the_classes_is_taken_over(root):
    names = [
        f"{s}/{c}/{n}.jpg" for s in ("train", "Val", "test") for c in "ab" for n in "12"
    ]
    _, examples, counts = opened(classes(root, [*names, "docs/figure.png"]))
    assert counts == {"read": 12}
    for example in examples:
        split, label, _ = example.id.split("/")
        assert example.split == {"Val": "validation"}.get(split, split)
        assert example.labels == (label,)


def test_a_class_may_be_called_like_a_split(root):
    source, _, _ = opened(classes(root, ["test/1.jpg", "exam/1.jpg"]))
    assert source.classes == ("exam", "test")


def test_what_else_lies_in_the_folder_of_a_class_is_told(root, tmp_path):
    names = [
        "a/1.jpg",
        "a/2.txt",
        "a/notes.pdf",
        "a/more/1.jpg",
        "b/1.jpg",
        "b/.DS_Store",
    ]
    config = classes(
        root, [*names, "b/._1.jpg", "__MACOSX/b/1.jpg", "runs/x/figure.png"]
    )
    (tmp_path / "away").mkdir()
    (tmp_path / "away" / "1.jpg").write_bytes(picture("blue"))
    (tmp_path / "away" / "1.txt").write_text("secret")
    (root / "away").symlink_to(tmp_path / "away")
    (root / "b" / "2.jpg").symlink_to(tmp_path / "away" / "1.jpg")
    (root / "b" / "3.jpg").write_bytes(picture())
    (root / "b" / "3.txt").symlink_to(tmp_path / "away" / "1.txt")
    (root / "b" / "4.jpg").write_bytes(picture())
    (root / "b" / "4.txt").write_bytes(b"caf\xe9")
    _, examples, counts = opened(config)
    assert sorted(by_id(examples)) == ["a/1.jpg", "b/1.jpg"]
    assert counts == {
        "read": 5,
        "ignored: text without image": 1,
        "ignored: file that is neither image nor text": 1,
        "ignored: folder in a class's folder": 1,
        "skipped: image outside of the folder": 1,
        "skipped: text outside of the folder": 1,
        "skipped: text is not UTF-8": 1,
    }


def test_a_runs_own_folder_is_no_class(root):
    config = classes(root, ["a/1.jpg", "b/1.jpg", "run/figure.png"])
    (root / "run" / "events.jsonl").write_text("")
    assert opened(config)[0].classes == ("a", "b")


# --- which folder ---------------------------------------------------------------------


def test_the_index_may_lie_one_folder_below(folder, root):
    wanted = opened(folder(rows(4)))[1]
    (root.parent / "__MACOSX").mkdir()
    (root.parent / "other").mkdir()
    assert opened(Data(dir=str(root.parent)))[1] == wanted
    (root / "pairs.jsonl").unlink()
    (root.parent / "other").rmdir()
    config = classes(root, ["cat/1.jpg", "dog/1.jpg"])
    assert opened(Data(dir=str(root.parent)))[1] == opened(config)[1]


def test_a_folder_that_says_too_little_or_too_much_is_refused(folder, root, tmp_path):
    with pytest.raises(UserError, match="no folder .*/nowhere"):
        opened(Data(dir=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="pairs holds no pairs.jsonl or pairs.csv, and"):
        opened(classes(root, ["images/1.jpg", "images/2.jpg"]))
    config = folder(rows(2))
    for name in ("copy", "third"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pairs.csv").write_text("id,text,label")
    with pytest.raises(
        UserError, match="3 folders with an index, copy and pairs among"
    ):
        opened(Data(dir=str(tmp_path)))
    (root / "pairs.csv").write_text("id,text,label")
    with pytest.raises(UserError, match="pairs.jsonl and pairs.csv: remove one"):
        opened(config)
    (root / "pairs.jsonl").unlink()
    os.replace(root / "pairs.csv", tmp_path / "secret.csv")
    (root / "pairs.csv").symlink_to("../secret.csv")
    with pytest.raises(UserError, match="pairs.csv is a link out of its folder"):
        opened(config)


def test_an_archive_gives_the_rows_of_its_folder(folder, root, tmp_path):
    config = folder([*rows(8), b"{"], image_size=8, text_length=6, vocabulary=100)
    wanted = load(config, tmp_path / "w", quiet)
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(root.rglob("*")):
            archive.write(file, file.relative_to(tmp_path))
        archive.writestr("../outside", b"x")
    config = Data(dir=str(path), image_size=8, text_length=6, vocabulary=100)
    found = load(config, tmp_path / "v", quiet)
    assert found.counts == wanted.counts | {
        "skipped: archive member outside of the folder": 1
    }
    for name in ("id", "split", "labels", "image", "text"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))


@pytest.mark.parametrize("form", ["jsonl", "csv", "classes"])
def test_changed_files_are_noticed_and_a_workdir_below_is_not(folder, root, form):
    pictures = "images"
    if form == "classes":
        config, pictures = classes(root, ["cat/0.png", "dog/0.png"]), "cat"
    else:
        config = folder(rows(2))
    if form == "csv":
        (root / "pairs.jsonl").unlink()
        config = table(root, rows(2), ["image", "text", "label"])
    first = signature(config)
    assert signature(config) == first
    (root / "run" / "data").mkdir(parents=True)
    (root / "run" / "figure.png").write_bytes(picture())
    (root / "run" / "events.jsonl").write_text("")
    assert signature(config) == first
    (root / "new").write_bytes(picture("blue"))
    os.replace(root / "new", root / pictures / "0.png")
    second = signature(config)
    assert second != first
    if form == "classes":
        classes(root, ["fox/0.png"])
    else:
        index = root / f"pairs.{form}"
        index.write_bytes(index.read_bytes().replace(b"thing", b"THING"))
    assert signature(config) != second


def test_pictures_beside_the_index_or_behind_escapes_are_watched_too(root):
    (root / "\u00e9").mkdir()
    lines = [
        b'{"image": "\\u00e9\\/1.png", "label": "x"}',
        b'{"image": "2.png", "label": "y"}',
        b'{"image": "../../etc/passwd", "label": "y"}',
        b'{"image": "nul\\u0000/a.png", "label": "y"}',
    ]
    (root / "pairs.jsonl").write_bytes(b"\n".join(lines))
    for name in ("\u00e9/1.png", "2.png"):
        (root / name).write_bytes(picture())
    config, seen = Data(dir=str(root)), set()
    for name in ("\u00e9/1.png", "2.png"):
        seen.add(signature(config))
        (root / "new").write_bytes(picture("blue", (99, 99)))
        os.replace(root / "new", root / name)
    assert len(seen | {signature(config)}) == 3
    assert pairs_index.image_folders(root) == {"\u00e9", "", "../../etc", "nul\0"}


# --- the worked examples --------------------------------------------------------------


def test_the_settings_name_the_sample(tmp_path):
    place = pairs.locate(Data(sample="medical"), tmp_path)
    assert place == (tmp_path / "sample" / "medical", "sample")
    with pytest.raises(
        UserError, match="'lunar' is none of clipart, medical, satellite"
    ):
        opened(Data(sample="lunar"), tmp_path)


@pytest.fixture(scope="module", params=["medical", "satellite"])
def written(request, tmp_path_factory):
    """A worked example with 400 rows; not to be changed."""
    root = tmp_path_factory.mktemp(request.param) / "w"
    editions.ensure(request.param, root, 400, 0, quiet)
    return request.param, root


def test_groups_lie_in_one_split_and_the_shares_are_kept(written):
    _, root = written
    source, examples, counts = opened(Data(dir=str(root)))
    assert counts == {"read": 400} and len(source.classes) == 8
    share = collections.Counter(example.split for example in examples)
    assert abs(share["train"] - 260) < 10 and abs(share["validation"] - 60) < 10
    members = collections.Counter(example.group for example in examples)
    least, most = (1, 3) if source.multi_label else (1, 4)
    assert min(members.values()) >= least and max(members.values()) == most
    if source.multi_label:
        assert 20 < sum(not example.labels for example in examples) < 140


def test_no_two_pictures_are_nearly_the_same(written, tmp_path):
    _, root = written
    images = [_pixels(e.image, 48) for e in opened(Data(dir=str(root)))[1]]
    np.save(tmp_path / "image.npy", np.stack(images))
    found = duplicates.find_clusters(tmp_path / "image.npy", np.ones(400, bool), quiet)
    assert (found == np.arange(400)).all()
    assert all(min(_size(e.image)) >= 64 for e in opened(Data(dir=str(root)))[1][:20])


def test_picture_and_text_both_tell_something_and_neither_tells_all(written):
    _, root = written
    source, examples, _ = opened(Data(dir=str(root)))
    labels = np.array([[k in e.labels for k in source.classes] for e in examples])
    test = np.array([example.split != "train" for example in examples])
    bags = [_words(example.text) for example in examples]
    vocabulary = sorted(set.union(*bags), key=str)
    words = np.array([[word in bag for word in vocabulary] for bag in bags])
    small = np.stack([_pixels(e.image, 12) for e in examples]).reshape(400, -1)
    for view in (words, small / 255):
        view = view - view.mean(axis=0)
        alike = view @ view.T  # kernel ridge regression
        ridge = 0.05 * np.trace(alike) / 400 * np.eye((~test).sum())
        weights = np.linalg.solve(
            alike[~test][:, ~test] + ridge, labels[~test] - labels.mean(axis=0)
        )
        told = alike[test][:, ~test] @ weights
        better = [
            (told[labels[test, k], k][:, None] > told[~labels[test, k], k]).mean()
            for k in range(len(source.classes))
        ]
        assert 0.6 < np.mean(better) < 0.97, better


def _words(text):
    words = text.lower().split()
    return {*words, *zip(words, words[1:], strict=False)}


def _pixels(data, size):
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB").resize((size, size)))


def _size(data):
    with Image.open(io.BytesIO(data)) as image:
        return image.size
