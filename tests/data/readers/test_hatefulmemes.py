"""Hateful Memes: rows of both phases, splits and labels. All content is invented."""

import json

import pytest

from ccu_jax.data.readers import hatefulmemes
from ccu_jax.data.readers.base import MARKER
from ccu_jax.errors import UserError
from tests.data.readers.layouts import (
    Layout,
    dump_lines,
    encode_image,
    meme,
    read_rows,
    write_files,
    write_hatefulmemes,
)


def first_phase(number, label=None):
    """A line of the first phase; without a label the field is absent."""
    field = "" if label is None else f'"label":{label},'
    image = f"img\\/{number:05d}.png"
    return f'{{"id":{number},"img":"{image}",{field}"text":"a thing {number}"}}\n'


def write_lists(root, **lists):
    """Writes lists of memes (or lines) and their images."""
    files: dict[str, bytes | str] = {}
    for name, rows in lists.items():
        lines = [
            row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows
        ]
        files[f"{name}.jsonl"] = "".join(lines)
        for line in lines:
            files[json.loads(line)["img"]] = encode_image()
    write_files(root, files)
    return Layout("hatefulmemes", root, root / "train.jsonl", {})


def append(layout, rows, name="train"):
    with (layout.root / f"{name}.jsonl").open("ab") as file:
        file.write(dump_lines(rows))
    images = [r["img"] for r in rows if str(r.get("img", "")).startswith("img/0")]
    write_files(layout.root, dict.fromkeys(images, encode_image()))


@pytest.fixture
def layout(tmp_path):
    return write_hatefulmemes(tmp_path)


def ids_by_split(examples):
    return {
        split: sorted(e.id for e in examples.values() if e.split == split)
        for split in ("train", "validation", "test")
    }


# --- lists and splits -----------------------------------------------------------------


def test_both_phases_write_the_same_rows(tmp_path):
    lists = {"train": [1235, 64322], "dev": [2, 3], "test": [4]}
    found = []
    for name, row in (("first", lambda n: first_phase(n, n % 2)), ("second", meme)):
        rows = {split: [row(n) for n in numbers] for split, numbers in lists.items()}
        layout = write_lists(tmp_path / name, **rows)
        _, examples, counts = read_rows(layout.config())
        found.append({i: e._replace(notes=()) for i, e in examples.items()})
        num_zeros = counts.pop("noted: id without its leading zeros", 0)
        assert num_zeros == (4 if name == "first" else 0)
        assert counts == {"read": 5}
    assert found[0] == found[1]
    example = found[0]["01235"]
    assert (example.group, example.labels) == ("01235", ("hateful",))
    assert found[0]["00004"].labels == ("not-hateful",)


def test_second_phase_takes_precedence_over_the_first(tmp_path):
    layout = write_lists(
        tmp_path / "data",
        train=[meme(1), meme(2)],
        dev_seen=[meme(21), meme(22), meme(23)],
        dev_unseen=[meme(23), meme(24)],
        dev=[first_phase(21, 1), first_phase(22, 0), first_phase(23, 0)],
        test_seen=[meme(31)],
        test_unseen=[meme(41)],
        test=[first_phase(31), first_phase(41, 0), first_phase(50, 1)],
    )
    _, examples, counts = read_rows(layout.config())
    assert ids_by_split(examples) == {
        "train": ["00001", "00002"],
        "validation": ["00021", "00022", "00023", "00024"],
        "test": ["00031", "00041", "00050"],
    }
    assert examples["00023"].labels == examples["00041"].labels == ("hateful",)
    assert counts == {
        "read": 10,
        "noted: id in two dev files": 4,
        "noted: label differs in two dev files": 1,
        "noted: id in two test files": 1,
        "noted: label differs in two test files": 1,
        "noted: id without its leading zeros": 1,
        "skipped: no label": 1,
    }


def test_dev_files_are_the_test_split_if_no_test_file_has_labels(tmp_path):
    train = [meme(n) for n in range(10_000, 10_200)]
    layout = write_lists(
        tmp_path / "data",
        train=train,
        dev=[meme(20_001), meme(20_002)],
        test=[first_phase(30_001), first_phase(30_002)],
    )
    _, examples, counts = read_rows(layout.config(validation_fraction=0.25))
    splits = ids_by_split(examples)
    assert splits["test"] == ["20001", "20002"]
    assert 30 < len(splits["validation"]) < 70
    assert len(splits["validation"]) + len(splits["train"]) == 200
    assert counts["skipped: no label"] == 2
    assert counts["noted: no labelled test file: the dev files are the test set"] == 1
    # Validation rows are chosen by a hash of the id alone.
    layout.list_file.write_bytes(dump_lines(train[50:]))
    fewer = ids_by_split(read_rows(layout.config(validation_fraction=0.25)).examples)
    removed = {f"{n}" for n in range(10_000, 10_050)}
    assert set(fewer["validation"]) == set(splits["validation"]) - removed
    more = ids_by_split(read_rows(layout.config(validation_fraction=0.5)).examples)
    assert set(fewer["validation"]) < set(more["validation"])


def test_validation_is_taken_from_train_without_dev_files(layout):
    (layout.root / "dev_seen.jsonl").unlink()
    append(layout, [meme(n) for n in range(10, 60)])
    _, examples, counts = read_rows(layout.config(validation_fraction=0.5))
    assert counts["noted: no labelled dev file: validation is a part of train"] == 1
    assert 10 < len(ids_by_split(examples)["validation"]) < 45


def test_lists_without_rows_to_train_or_test_on_are_an_error(layout):
    train = layout.list_file.read_bytes()
    layout.list_file.write_bytes(b"")
    with pytest.raises(UserError, match="no usable row left"):
        read_rows(layout.config())
    layout.list_file.write_bytes(train)
    for name in ("dev_seen", "test_seen"):
        (layout.root / f"{name}.jsonl").unlink()
    with pytest.raises(UserError, match="no row to test on: none with a label in any"):
        read_rows(layout.config())


def test_repeated_ids_are_skipped(layout):
    append(layout, [meme(1)])
    append(layout, [meme(2), meme(4), meme(5)], "test_seen")
    counts = read_rows(layout.config()).counts
    assert counts == {
        "read": 10,
        "skipped: id listed twice": 2,
        "skipped: id is in the train split too": 1,
        "skipped: id is in the dev split too": 1,
    }


def test_texts_with_both_labels_are_counted_in_train_alone(tmp_path):
    texts = {1: "other", 2: "both", 3: "both", 4: "both", 6: "one", 8: "one"}
    layout = write_lists(
        tmp_path / "data",
        train=[meme(n, text=text) for n, text in texts.items()],
        dev_seen=[meme(10, text="other"), meme(11, text="a"), meme(12, text="a")],
        test_seen=[meme(20, text="b"), meme(21, text="b")],
    )
    counts = read_rows(layout.config()).counts
    assert counts == {"read": 11, "noted: text with both labels": 1}


def test_final_line_without_newline_is_read_and_noted(layout):
    layout.list_file.write_bytes(layout.list_file.read_bytes().rstrip())
    counts = read_rows(layout.config()).counts
    assert counts == {"read": 6, "noted: file without final newline": 1}


# --- fields ---------------------------------------------------------------------------

LABELS = [(value, "hateful") for value in (1, True, "1")]
LABELS += [(value, "not-hateful") for value in (0, False, "0")]
LABELS += [(value, "no label") for value in (None, -1, "-1", ...)]
LABELS += [
    (value, "label is neither 0 nor 1")
    for value in (2, "x", "", [1], {}, 0.5, float("nan"))
]


@pytest.mark.parametrize("value, expected", LABELS)
def test_missing_label_is_not_taken_for_0(layout, value, expected):
    row = meme(7, label=value)
    if value is ...:
        del row["label"]
    append(layout, [row])
    _, examples, counts = read_rows(layout.config())
    if expected in hatefulmemes.CLASSES:
        assert examples["00007"].labels == (expected,)
    else:
        assert counts == {"read": 7, f"skipped: {expected}": 1}


IMAGES = [
    *("img/../secret.png", "../secret.png", "/secret.png", "img//secret.png"),
    *("img/sub/secret.png", "img\\..\\secret.png", "img/..\\secret.png"),
    *("img/..", "img/.", "img/", "img/a\nb.png", "img/a\0.png", "img/\ud800.png"),
    *("secret.png", "", 7, ["img/1.png"], None, "img/# a.png", "img/ a.png"),
]


@pytest.mark.parametrize("image", IMAGES, ids=ascii)
def test_path_out_of_the_image_folder_is_not_followed(layout, image):
    root = layout.root
    for folder in (root.parent, root, root / "img", root / "img" / "sub"):
        write_files(folder, {"secret.png": encode_image()})
    append(layout, [meme(7, img=image)])
    _, examples, counts = read_rows(layout.config())
    assert counts == {"read": 7, "skipped: img is no path below img/": 1}
    assert len(examples) == 6


@pytest.mark.parametrize("name", ["a" * 5000, "C:secret", "..secret", "%2e%2e"])
def test_odd_name_of_an_image_is_skipped(layout, name):
    append(layout, [meme(7, img=f"img/{name}.png")])
    _, examples, counts = read_rows(layout.config())
    assert sum(n for key, n in counts.items() if key.startswith("skipped: ")) == 1
    assert len(examples) == 6


NO_TEXT, NOT_ASCII = "noted: row without text", "noted: non-ASCII text"


@pytest.mark.parametrize(
    "text, expected, notes",
    [
        (None, None, [NO_TEXT]),
        ("", None, [NO_TEXT]),
        (" \n", None, [NO_TEXT]),
        (7, None, [NO_TEXT]),
        ("caf\u00e9", "caf\u00e9", [NOT_ASCII]),
        ("a\0b", "a b", ["noted: NUL characters in a text"]),
        ("\ud800", "\ufffd", ["noted: broken characters in a text", NOT_ASCII]),
        ("x\u0085y", "x\u0085y", [NOT_ASCII]),
    ],
)
def test_texts_are_cleaned_and_noted(layout, text, expected, notes):
    append(layout, [meme(7, text=text)])
    example = read_rows(layout.config()).examples["00007"]
    assert (example.text, list(example.notes)) == (expected, notes)


@pytest.mark.parametrize(
    "id_, note",
    [
        ("00007", None),
        (7, "noted: id without its leading zeros"),
        ("7", "noted: id without its leading zeros"),
        (None, "noted: id is not the image's"),
        (8, "noted: id is not the image's"),
        (True, "noted: id is not the image's"),
        ([1], "noted: id is not the image's"),
        (7.0, "noted: id is not the image's"),
    ],
)
def test_id_that_is_not_the_image_name_is_noted(layout, id_, note):
    append(layout, [meme(7, id=id_)])
    example = read_rows(layout.config()).examples["00007"]
    assert example.notes == ((note,) if note else ())


# --- where the files lie --------------------------------------------------------------


def test_release_is_found_in_a_subfolder_of_any_name(layout, tmp_path):
    (tmp_path / "downloads").mkdir()
    layout.root.rename(tmp_path / "downloads" / "memes")
    config = layout._replace(root=tmp_path / "downloads").config()
    assert len(read_rows(config).examples) == 6
    write_hatefulmemes(tmp_path / "downloads" / "second release")
    with pytest.raises(UserError, match="several copies of .* such as .*/memes or .*/"):
        read_rows(config)


def test_marker_of_the_sample_edition_lies_above_the_lists(layout, tmp_path):
    locate = hatefulmemes.READER.locate
    assert locate(layout.config(), tmp_path).edition == "official"
    (layout.root.parent / MARKER).write_text("")
    assert locate(layout.config(), tmp_path).edition == "sample"
