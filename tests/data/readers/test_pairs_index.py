"""Rows of a user's own pairs: CSV files, folders named after classes, which folder."""

import csv
import os
import pathlib
import time

import pytest

from ccu_jax.config.schema import Data
from ccu_jax.data.readers.untrusted_files import MAX_LINE_BYTES
from ccu_jax.errors import UserError
from tests.data.readers.layouts import (
    compute_signature,
    dump_lines,
    encode_image,
    open_source,
    read_rows,
    write_files,
    write_pairs,
)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "pairs").mkdir()
    return tmp_path / "pairs"


def write_table(root, rows, columns, delimiter=",", encoding="utf-8"):
    """Writes pairs.csv as a spreadsheet program does."""
    with (root / "pairs.csv").open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return Data(dir=str(root))


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_csv_file_gives_the_same_rows_as_json_lines(root, delimiter, encoding):
    rows = [
        {"id": f"id{n}", "label": "xy"[n % 2], "split": ("train", "test", "dev")[n % 3]}
        | {"text": f'"a, b; c"\tof\n\u00e9t\u00e9 | {n}', "group": "g"}
        for n in range(9)
    ]
    (root / "pairs.jsonl").write_bytes(dump_lines(rows))
    expected = read_rows(Data(dir=str(root)))
    (root / "pairs.jsonl").unlink()
    columns = ["split", "label", "text", "id", "group", "author"]
    actual = read_rows(write_table(root, rows, columns, delimiter, encoding))
    assert actual.source.classes == expected.source.classes
    assert (actual.examples, actual.counts) == (expected.examples, expected.counts)


def test_bars_separate_labels_and_a_single_label_fills_in(root):
    rows = [
        {"id": 1, "text": "a", "label": "x", "labels": ""},
        {"id": 2, "text": "a", "label": "x", "labels": " y | z |"},
        {"id": 3, "text": "a", "label": "", "labels": ""},
    ]
    config = write_table(root, rows, ["id", "text", "label", "labels"])
    source, examples, _ = read_rows(config)
    assert source.multi_label
    labels = [example.labels for example in examples.values()]
    assert sorted(labels) == [(), ("x",), ("y", "z")]
    for row in rows:
        del row["label"]
    labels = read_rows(write_table(root, rows, ["id", "text", "labels"])).examples
    assert labels["1"].labels == ()


def test_broken_rows_are_skipped_and_cost_no_other(root):
    long = b"m" * (MAX_LINE_BYTES + 1)
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
        b"10,%s,x" % long,
        b'11,"torn',
        b'%s",x' % long,
        b'12,"a,\nb",x',
        b"13,a\0b,x",
    ]
    (root / "pairs.csv").write_bytes(b"\n".join(lines))
    _, examples, counts = read_rows(Data(dir=str(root)))
    assert sorted(map(int, examples)) == [1, 3, 8, 12, 13]
    assert examples["8"].text == "a\nb"
    assert examples["13"].text == "a b"
    assert counts == {
        "read": 14,
        "noted: NUL characters in a text": 1,
        "skipped: line is no valid CSV": 3,
        "skipped: other number of fields than the header": 2,
        "skipped: line is not UTF-8": 1,
        "skipped: line too long": 3,
    }
    with pytest.raises(UserError, match="pairs.csv line 3: line is no valid CSV"):
        read_rows(Data(dir=str(root), strict=True))
    # A row of several lines is named by the first of them.
    (root / "pairs.csv").write_bytes(b'id,text,label\n1,"a\nb",x\n\n2,"a\nb",\n3,a,x')
    with pytest.raises(UserError, match=r"pairs.csv line 5 \(2\): no label"):
        read_rows(Data(dir=str(root), strict=True))


def test_open_quotes_cost_their_own_rows_in_linear_time(root):
    config, start_s = Data(dir=str(root)), time.process_time()
    (root / "pairs.csv").write_bytes(b"id,text,label\n" + b'a","\n' * 20_000)
    skipped = "skipped: line is no valid CSV"
    assert read_rows(config).counts == {"read": 20_000, skipped: 20_000}
    good = b"".join(b"r%d,a text,%c\n" % (n, b"xy"[n % 2]) for n in range(9000))
    (root / "pairs.csv").write_bytes(b'id,text,label\nodd,"a,x\n' + good)
    assert read_rows(config).counts == {"read": 9001, skipped: 1}
    assert time.process_time() - start_s < 8


@pytest.mark.parametrize(
    "header, message",
    [
        (b"file,caption,class", "it names 'file', 'caption', 'class'"),
        (b"image;text;class", "it names 'image', 'text', 'class'"),
        (b"text,label", "it names 'text', 'label'"),
        (b"image,label,Label ", "two columns named 'label'; rename one"),
        (b"\xe9,label", "it names none"),
        (b'"image,label', "it names none"),
        (b"x" * (MAX_LINE_BYTES + 1), "it names none"),
        (b"\n \n", "the first line must name the columns.* it names 'a', 'b', 'c'"),
    ],
)
def test_csv_file_without_the_needed_columns_is_an_error(root, header, message):
    (root / "pairs.csv").write_bytes(header + b"\na,b,c\n")
    with pytest.raises(UserError, match=f"pairs.csv: .*{message}") as error:
        open_source(Data(dir=str(root)))
    assert "\n" not in str(error.value)


def write_classes(root, names):
    """Writes an image, or a text, at each of these paths."""
    files = {n: f"text of {n}" if n[-4:] == ".txt" else encode_image() for n in names}
    write_files(root, files)
    return Data(dir=str(root))


def test_folders_are_classes_with_a_text_beside_each_image(root):
    names = ["cat/1.jpg", "cat/1.txt", "cat/2.PNG", "test/1.webp"]
    # The working folder of a run is no class.
    names += ["run/figure.png", "run/events.jsonl"]
    source, examples, counts = read_rows(write_classes(root, names))
    assert source.classes == ("cat", "test")  # a class may have the name of a split
    assert counts == {"read": 3}
    assert examples["cat/1.jpg"].text == "text of cat/1.txt"
    assert examples["cat/2.PNG"].text is None
    assert examples["cat/2.PNG"].labels == ("cat",)
    assert examples["test/1.webp"].image == encode_image()
    assert source.row_name(source.keys[0]) in examples


def test_folders_above_the_classes_may_be_splits(root):
    splits = {"train": "train", "Val": "validation", "test": "test"}
    names = [f"{s}/{c}/{n}.jpg" for s in splits for c in "ab" for n in "12"]
    _, examples, counts = read_rows(write_classes(root, [*names, "docs/figure.png"]))
    assert counts == {"read": 12}
    for id_, example in examples.items():
        split, label, _ = id_.split("/")
        assert (example.split, example.labels) == (splits[split], (label,))


def test_other_files_in_folders_of_classes_are_counted(root, tmp_path):
    names = ["a/1.jpg", "a/2.txt", "a/notes.pdf", "a/more/1.jpg", "b/1.jpg"]
    names += ["b/.DS_Store", "b/._1.jpg", "__MACOSX/b/1.jpg", "runs/x/figure.png"]
    config = write_classes(root, [*names, "b/3.jpg", "b/4.jpg"])
    write_classes(tmp_path / "away", ["1.jpg", "1.txt"])
    (root / "away").symlink_to(tmp_path / "away")
    (root / "b" / "2.jpg").symlink_to(tmp_path / "away" / "1.jpg")
    (root / "b" / "3.txt").symlink_to(tmp_path / "away" / "1.txt")
    (root / "b" / "4.txt").write_bytes(b"caf\xe9")
    _, examples, counts = read_rows(config)
    assert sorted(examples) == ["a/1.jpg", "b/1.jpg"]
    assert counts == {
        "read": 5,
        "ignored: text without image": 1,
        "ignored: file that is neither image nor text": 1,
        "ignored: folder in a class's folder": 1,
        "skipped: image outside of the folder": 1,
        "skipped: text outside of the folder": 1,
        "skipped: text is not UTF-8": 1,
    }


def test_rows_may_be_one_folder_below(tmp_path):
    expected = read_rows(write_pairs(tmp_path).config()).examples
    for name in ("__MACOSX", "other"):
        (tmp_path / name).mkdir()
    assert read_rows(Data(dir=str(tmp_path))).examples == expected
    config = write_classes(tmp_path / "data" / "animals", ["cat/1.jpg", "dog/1.jpg"])
    examples = read_rows(Data(dir=str(tmp_path / "data"))).examples
    assert examples == read_rows(config).examples


def test_ambiguous_folder_is_an_error(tmp_path):
    layout = write_pairs(tmp_path)
    write_files(tmp_path, {"copy/pairs.csv": "id", "third/pairs.csv": "id"})
    with pytest.raises(UserError, match="3 subfolders .* such as copy and pairs"):
        open_source(Data(dir=str(tmp_path)))
    (layout.root / "pairs.csv").write_text("id,text,label")
    with pytest.raises(UserError, match="pairs.jsonl and pairs.csv: remove one"):
        open_source(layout.config())
    config = write_classes(tmp_path / "one class", ["images/1.jpg", "images/2.jpg"])
    with pytest.raises(UserError, match="contains no pairs.jsonl or pairs.csv, and"):
        open_source(config)


def test_working_folder_below_does_not_change_the_signature(tmp_path):
    layout = write_pairs(tmp_path)
    classes = write_classes(tmp_path / "classes", ["cat/0.png", "dog/0.png"])
    for config in (layout.config(), classes):
        first = compute_signature(config)
        names = ["run/data/a.npy", "run/figure.png", "run/events.jsonl"]
        write_files(pathlib.Path(config.dir or ""), dict.fromkeys(names, b""))
        assert compute_signature(config) == first
    os.utime(tmp_path / "classes" / "cat", ns=(0, 0))
    second = compute_signature(classes)
    write_classes(tmp_path / "classes", ["fox/0.png"])
    assert len({first, second, compute_signature(classes)}) == 3


def test_all_folders_with_images_are_watched(root):
    lines = [
        b'{"image": "\\u00e9\\/1.png", "label": "x"}',
        b'{"image": "2.png", "label": "y"}',
        b'{"image": "../../etc/passwd", "label": "y"}',
        b'{"image": "nul\\u0000/a.png", "label": "y"}',
        b'{"image": 7, "label": "y"}',
    ]
    names = ["\u00e9/1.png", "2.png"]
    write_files(root, dict.fromkeys(names, encode_image()))
    (root / "pairs.jsonl").write_bytes(b"\n".join(lines))
    config, signatures = Data(dir=str(root)), set()
    for name in names:
        signatures.add(compute_signature(config))
        (root / "new").write_bytes(encode_image("blue", (99, 99)))
        os.replace(root / "new", root / name)
    assert len(signatures | {compute_signature(config)}) == 3
