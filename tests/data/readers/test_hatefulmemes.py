"""Hateful Memes: the reader on hand-made and on written files, and its sample edition.

Nothing here is of the official files: all pictures and sentences are invented.
"""

import collections
import io
import json
import os
import re
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from ccu_jax.config.schema import Data
from ccu_jax.data import DATASETS
from ccu_jax.data import near_duplicates as duplicates
from ccu_jax.data.preparation import images as pictures
from ccu_jax.data.readers import archives as archive
from ccu_jax.data.readers import hatefulmemes
from ccu_jax.data.readers.base import MARKER, Counts, SkipExample
from ccu_jax.data.samples import editions
from ccu_jax.errors import UserError

SECOND = ("train", "dev_seen", "dev_unseen", "test_seen", "test_unseen")


def quiet(what, done, total):
    """A progress callback that says nothing."""


def png(number=0):
    """A small picture as PNG."""
    file = io.BytesIO()
    Image.new("RGB", (6, 4), (number % 256, 40, 90)).save(file, "png")
    return file.getvalue()


def first(number, text="a quiet day", **fields):
    """A row of the first release, byte by byte; `label=None` has no such field."""
    label = fields.get("label", number % 2)
    told = "" if label is None else f'"label":{label},'
    return f'{{"id":{number},"img":"img\\/{number:05d}.png",{told}"text":"{text}"}}'


def second(number, text="a quiet day", **fields):
    """A row of the second release."""
    label = fields.get("label", number % 2)
    told = "" if label is None else f'"label": {label}, '
    return (
        f'{{"id": "{number:05d}", "img": "img/{number:05d}.png", {told}'
        f'"text": "{text}"}}'
    )


def make(root, **lists):
    """An official-looking folder; each list is lines, its pictures are made, too."""
    (root / "img").mkdir(parents=True)
    for name, rows in lists.items():
        (root / f"{name}.jsonl").write_text("".join(row + "\n" for row in rows))
        for number in re.findall(r"img\\?/(\d{5})\.png", "".join(rows)):
            (root / "img" / f"{number}.png").write_bytes(png(int(number)))
    return root


def small(root):
    """Both dev and test files of the second phase, three rows each, one in common."""
    return make(
        root,
        train=[second(1235), second(12001), second(12002)],
        dev_seen=[second(20001), second(20002), second(20003)],
        dev_unseen=[second(20003), second(20004), second(20005)],
        test_seen=[second(30001), second(30002)],
        test_unseen=[second(40001), second(40002)],
    )


def opened(root, scratch=None, **settings):
    """The opened data set and its counts; archives are unpacked to `scratch`."""
    config = Data(dataset="hatefulmemes", dir=str(root), **settings)
    counts = Counts(str(root), config.strict)
    place = hatefulmemes.READER.locate(config, root)

    def unpack(path):
        return archive.unpack(path, scratch / path.name, counts, quiet)

    source = hatefulmemes.READER.open(config, place, counts, unpack)
    return source, counts.numbers


def read(root, scratch=None, **settings):
    """All examples that can be read by id, and the counts as a run has them."""
    source, numbers = opened(root, scratch, **settings)
    counts, examples = Counts(str(root), False), {}
    counts.numbers = numbers
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
    return examples, numbers


def ids_by_split(examples):
    """The sorted ids of each split."""
    found = collections.defaultdict(list)
    for example in examples.values():
        found[example.split].append(example.id)
    return {split: sorted(ids) for split, ids in found.items()}


# --- the official formats -------------------------------------------------------------


def test_both_ways_of_writing_a_row_are_read_alike(tmp_path):
    lists = {"dev": [2, 3], "test": [4], "train": [1235, 64322]}
    found = []
    for style in (first, second):
        root = tmp_path / style.__name__
        make(root, **{name: [style(n) for n in rows] for name, rows in lists.items()})
        examples, counts = read(root)
        found.append({i: e._replace(notes=()) for i, e in examples.items()})
        zeros = counts.pop("noted: id without its leading zeros", 0)
        assert zeros == (4 if style is first else 0)
        assert counts == {"read": 5, "noted: text with both labels": 1}
    assert found[0] == found[1]
    example = found[0]["01235"]
    assert example.group == "01235" and example.image == png(1235)
    assert example.labels == ("hateful",) and example.text == "a quiet day"
    assert found[0]["00004"].labels == ("not-hateful",)


def test_the_files_of_the_second_phase_make_three_splits(tmp_path):
    examples, counts = read(small(tmp_path / "data"))
    assert ids_by_split(examples) == {
        "train": ["01235", "12001", "12002"],
        "validation": ["20001", "20002", "20003", "20004", "20005"],
        "test": ["30001", "30002", "40001", "40002"],
    }
    assert counts["read"] == 12 and counts["noted: id in two dev files"] == 1


def test_files_of_both_phases_may_lie_together_and_the_second_one_is_right(tmp_path):
    root = small(tmp_path / "data")
    (root / "dev.jsonl").write_text(
        "".join(first(n) + "\n" for n in (20001, 20002)) + first(20003, label=0)
    )
    rows = [first(30001, label=None), first(30002, label=0), first(50000)]
    (root / "test.jsonl").write_text("\n".join(rows) + "\n")
    (root / "img" / "50000.png").write_bytes(png())
    examples, counts = read(root)
    assert len(examples) == 13 and "50000" in ids_by_split(examples)["test"]
    assert counts["noted: id in two dev files"] == 4
    assert counts["noted: label differs in two dev files"] == 1
    assert examples["20003"].labels == ("hateful",)
    assert counts["noted: id in two test files"] == 1
    assert counts["skipped: no label"] == 1
    assert counts["noted: file without final newline"] == 1
    assert counts["read"] - 1 == len(examples)


def test_without_a_labelled_test_file_the_dev_files_are_the_test_set(tmp_path):
    train = [first(n) for n in range(10_000, 10_200)]
    hidden = [first(n, label=None) for n in (30001, 30002)]
    dev = [first(n) for n in (20001, 20002)]
    root = make(tmp_path / "data", train=train, dev=dev, test=hidden)
    examples, counts = read(root, validation_fraction=0.25)
    splits = ids_by_split(examples)
    assert splits["test"] == ["20001", "20002"]
    assert 30 < len(splits["validation"]) < 70
    assert len(splits["validation"]) + len(splits["train"]) == 200
    assert counts["skipped: no label"] == 2
    assert counts["noted: no labelled test file: the dev files are the test set"] == 1
    # Which ones are kept apart goes by their ids alone.
    (root / "train.jsonl").write_text("\n".join(train[50:]) + "\n")
    fewer = ids_by_split(read(root, validation_fraction=0.25)[0])["validation"]
    gone = {f"{n}" for n in range(10_000, 10_050)}
    assert fewer == sorted(set(splits["validation"]) - gone)
    more = ids_by_split(read(root, validation_fraction=0.5)[0])["validation"]
    assert set(fewer) < set(more)


def test_a_label_that_is_not_there_is_never_taken_for_0(tmp_path):
    root = small(tmp_path / "data")
    told = ["null", "-1", '"-1"', "2", '"x"', "[1]", "{}", "0.5", "NaN", '""']
    lines = [first(n, label=label) for n, label in enumerate(told, 50)]
    lines += [first(60, label=None)]
    good = [first(n, label=label) for n, label in ((71, "true"), (72, '"1"'), (73, 1))]
    good += [first(n, label=label) for n, label in ((74, "false"), (75, '"0"'))]
    with (root / "train.jsonl").open("a") as file:
        file.write("\n".join(lines + good) + "\n")
    for number in [*range(50, 61), *range(71, 76)]:
        (root / "img" / f"{number:05d}.png").write_bytes(png())
    examples, counts = read(root)
    assert counts["skipped: no label"] == 4
    assert counts["skipped: label is neither 0 nor 1"] == 7
    labels = [examples[f"{n:05d}"].labels for n in range(71, 76)]
    assert labels == [("hateful",)] * 3 + [("not-hateful",)] * 2
    assert len(examples) == 12 + 5


def test_fields_in_any_order_marks_and_line_ends_do_not_matter(tmp_path):
    root = small(tmp_path / "data")
    before = read(root)[0]
    for path in root.glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        lines = [json.dumps(dict(reversed(row.items())), indent=None) for row in rows]
        path.write_bytes(
            b"\xef\xbb\xbf" + "\r\n\r\n".join([*lines, "   "]).encode() + b"\n"
        )
    examples, counts = read(root)
    assert examples == before and counts["read"] == 12


@pytest.mark.parametrize("name", ["img.tar.gz", "img.zip"])
@pytest.mark.parametrize("inside", ["img/", ""])
def test_pictures_may_lie_in_an_archive(tmp_path, name, inside):
    root = small(tmp_path / "data")
    before = read(root)[0]
    paths = sorted((root / "img").iterdir())
    if name.endswith(".zip"):
        with zipfile.ZipFile(root / name, "w") as packed:
            for path in paths:
                packed.write(path, inside + path.name)
    else:
        with tarfile.open(root / name, "w:gz") as packed:
            for path in paths:
                packed.add(path, inside + path.name)
    for path in paths:
        path.unlink()
    # An empty folder is what a stopped `tar` leaves; often there is none at all.
    examples, counts = read(root, tmp_path / "unpacked 1")
    assert examples == before
    assert counts[f"noted: images in {name}"] == 1
    (root / "img").rmdir()
    assert read(root, tmp_path / "unpacked 2")[0] == before


# --- where the files are --------------------------------------------------------------


def test_the_root_is_found_from_above_at_and_below(tmp_path, monkeypatch):
    root = small(tmp_path / "hateful_memes" / "data")
    (tmp_path / "hateful_memes" / "LICENSE.txt").write_text("")
    for given in (tmp_path, root.parent, root, root / "img"):
        assert len(read(given)[0]) == 12
        monkeypatch.chdir(given)
        assert len(read(".")[0]) == 12
    flat = small(tmp_path / "elsewhere" / "flat")
    for given in (flat.parent, flat, flat / "img"):
        assert len(read(given)[0]) == 12
    small(flat.parent / "second release" / "data")
    with pytest.raises(UserError, match="more than once: name one of"):
        read(flat.parent)


def test_what_is_missing_is_named_with_the_official_page(tmp_path):
    def refused(message, given):
        with pytest.raises(UserError, match=f"{message}.*") as error:
            read(given)
        assert hatefulmemes.PAGE in str(error.value) and "Meta" in str(error.value)
        assert "\n" not in str(error.value)

    refused("no folder", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused("no Hateful Memes in .* missing train.jsonl", tmp_path / "empty")
    root = small(tmp_path / "data")
    (root / "img").rename(tmp_path / "away")
    refused("data has no img/ or img.tar.gz", root)
    refused("data has no img/ or img.tar.gz", tmp_path)
    (tmp_path / "away").rename(root / "img")
    (root / "train.jsonl").unlink()
    refused("data has no train.jsonl", root)


def test_without_any_row_to_train_on_or_to_test_reading_ends(tmp_path):
    root = small(tmp_path / "data")
    for name in SECOND[1:]:
        (root / f"{name}.jsonl").unlink()
    with pytest.raises(UserError, match="no row to test on: none with a label in any of dev_seen"):
        opened(root)
    root = small(tmp_path / "other")
    (root / "train.jsonl").write_text("")
    with pytest.raises(UserError, match="no usable row left"):
        opened(root)


def test_the_signature_notices_changed_lists_and_pictures(tmp_path):
    root = small(tmp_path / "data")
    config = Data(dataset="hatefulmemes", dir=str(root))
    place = hatefulmemes.READER.locate(config, root)

    def signature():
        return hatefulmemes.READER.signature(config, place)

    seen = [signature()]
    assert seen == [signature()]
    (root / "dev_seen.jsonl").write_text(second(20001, label=0) + "\n")
    seen.append(signature())
    (root / "dev_seen.jsonl").rename(root / "dev.jsonl")
    seen.append(signature())
    os.utime(root / "img", (1, 1))
    seen.append(signature())
    assert len(set(seen)) == 4
    (root / "README.md").write_text("")
    assert signature() == seen[-1]


# --- rows that cannot be used, and rows of strangers ----------------------------------


def test_a_row_with_a_trap_is_left_out_and_counted(tmp_path):
    root = small(tmp_path / "data")
    (root / "img" / "12001.png").unlink()
    bad = [
        second(1235, text="again"),
        "[1, 2]",
        "{",
        second(12003)[:-20] + "a" * (1 << 20) + '"}',
        '{"id": 1' + "[" * 100_000 + "]" * 100_000 + "}",
    ]
    with (root / "train.jsonl").open("ab") as file:
        file.write("\n".join(bad).encode() + b"\n\xff" + second(1).encode() + b"\n")
    with (root / "test_seen.jsonl").open("a") as file:
        file.write("\n".join([second(12002), second(20001), second(30001)]))
    examples, counts = read(root)
    assert len(examples) == 11
    assert counts == {
        "read": 21,
        "noted: id in two dev files": 1,
        "noted: text with both labels": 1,
        "noted: file without final newline": 1,
        "skipped: image missing": 1,
        "skipped: id listed twice": 2,
        "skipped: line is no JSON object": 1,
        "skipped: line is no valid JSON": 2,
        "skipped: line too long": 1,
        "skipped: line is not UTF-8": 1,
        "skipped: id is in the train split too": 1,
        "skipped: id is in the dev split too": 1,
    }


@pytest.mark.parametrize(
    "image",
    [
        "img/../secret.png",
        "../secret.png",
        "/secret.png",
        "img//secret.png",
        "img/sub/secret.png",
        "img\\..\\secret.png",
        "img/..\\secret.png",
        "img/..",
        "img/.",
        "img/",
        "img/a\nb.png",
        "img/a\0.png",
        "img/\ud800.png",
        "secret.png",
        "",
        7,
        ["img/1.png"],
        None,
    ],
)
def test_a_path_that_leads_elsewhere_is_not_followed(tmp_path, image):
    root = small(tmp_path / "data")
    for folder in (tmp_path, root, root / "img"):
        (folder / "secret.png").write_bytes(png())
    (root / "img" / "sub").mkdir()
    (root / "img" / "sub" / "secret.png").write_bytes(png())
    row = {"id": 7, "img": image, "label": 0, "text": "x"}
    with (root / "train.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    examples, counts = read(root)
    assert counts["skipped: img is no path below img/"] == 1 and len(examples) == 12


@pytest.mark.parametrize("name", ["a" * 5000, "C:secret", "..secret", " ", "%2e%2e"])
def test_a_strange_name_of_a_picture_that_is_not_there_does_no_harm(tmp_path, name):
    root = small(tmp_path / "data")
    with (root / "train.jsonl").open("a") as file:
        file.write(json.dumps({"img": f"img/{name}.png", "label": 0}) + "\n")
    examples, counts = read(root)
    skipped = [reason for reason in counts if reason.startswith("skipped: ")]
    assert len(skipped) == 1 and len(examples) == 12


def test_links_out_of_the_folder_are_refused(tmp_path):
    root = small(tmp_path / "data")
    (tmp_path / "secret.png").write_bytes(png())
    path = root / "img" / "12001.png"
    path.unlink()
    path.symlink_to(tmp_path / "secret.png")
    loop = root / "img" / "12002.png"
    loop.unlink()
    loop.symlink_to(loop)
    examples, counts = read(root)
    assert counts["skipped: image outside of the folder"] == 1
    assert counts["skipped: image cannot be read"] == 1 and len(examples) == 10
    for name in ("train.jsonl", "img"):
        other = small(tmp_path / f"with a link for {name}")
        (other / name).rename(tmp_path / name)
        (other / name).symlink_to(tmp_path / name)
        with pytest.raises(UserError, match="is a link out of its folder"):
            read(other)


def test_random_damage_to_the_lists_is_counted_and_never_a_crash(tmp_path):
    root = small(tmp_path / "data")
    whole = {path: path.read_bytes() for path in root.glob("*.jsonl")}
    rng = np.random.default_rng(0)
    lost = 0
    for _ in range(150):
        for path, content in whole.items():
            data = bytearray(content)
            for place in rng.integers(len(data), size=rng.integers(1, 5)):
                data[place] = rng.choice([0, 10, 34, 44, 92, 123, 255, data[place] ^ 1])
            path.write_bytes(data)
        try:
            examples, counts = read(root)
        except UserError:
            continue  # nothing to train on was left
        skipped = sum(n for what, n in counts.items() if what.startswith("skipped:"))
        assert counts["read"] == len(examples) + skipped
        lost += skipped
    assert lost > 300


def test_neither_a_pipe_nor_a_folder_is_waited_for(tmp_path):
    root = small(tmp_path / "data")
    for name, make_it in (("12001", os.mkfifo), ("12002", os.mkdir)):
        (root / "img" / f"{name}.png").unlink()
        make_it(root / "img" / f"{name}.png")
    counts = read(root)[1]
    assert counts["skipped: image is no plain file"] == 2


def test_what_is_odd_about_a_text_or_an_id_is_noted(tmp_path):
    root = small(tmp_path / "data")
    odd = {
        "text": [None, "", " \n", 7, "caf\u00e9", "a\0b", "\ud800", "x\u0085y"],
        "id": [None, 51, "00051", True, [1], "51", 5.0],
    }
    rows = [{"text": text, "id": 50} for text in odd["text"]]
    rows += [{"text": "z", "id": id_} for id_ in odd["id"]]
    with (root / "train.jsonl").open("a", encoding="utf-8") as file:
        for number, row in enumerate(rows, 50):
            row |= {"img": f"img/{number:05d}.png", "label": 0}
            row["id"] = number if row["id"] == 50 else row["id"]
            half = isinstance(row["text"], str) and "\ud800" in row["text"]
            file.write(json.dumps(row, ensure_ascii=half) + "\n")
            (root / "img" / f"{number:05d}.png").write_bytes(png())
    examples, counts = read(root)
    assert len(examples) == 12 + len(rows)
    assert counts["noted: row without text"] == 4
    assert counts["noted: NUL characters in a text"] == 1
    assert counts["noted: broken characters in a text"] == 1
    assert counts["noted: non-ASCII text"] == 3
    assert counts["noted: id without its leading zeros"] == 8
    assert counts["noted: id is not the image's"] == 7
    texts = [examples[f"{number:05d}"].text for number in range(50, 58)]
    assert texts == [None] * 4 + ["caf\u00e9", "a b", "\ufffd", "x\u0085y"]


def test_texts_with_both_labels_are_counted_in_train_alone(tmp_path):
    lists = {
        "train": [
            second(1, "seen once"),
            second(2, "with both"),
            second(3, "with both"),
            second(4, "with both"),
            second(6, "with one"),
            second(8, "with one"),
        ],
        "dev_seen": [second(10, "seen once"), second(11, "dev"), second(12, "dev")],
        "test_seen": [second(20, "test"), second(21, "test")],
    }
    counts = opened(make(tmp_path / "data", **lists))[1]
    assert counts["noted: text with both labels"] == 1


def test_strict_reading_stops_at_the_first_bad_row(tmp_path):
    root = small(tmp_path / "data")
    assert len(read(root, strict=True)[0]) == 12
    with (root / "train.jsonl").open("a") as file:
        file.write(second(5, label=None) + "\n")
    with pytest.raises(UserError, match="train.jsonl line 4: no label"):
        opened(root, strict=True)


def test_rows_can_be_read_in_any_order_by_many_threads(tmp_path):
    source, _ = opened(small(tmp_path / "data"))
    assert source.metric == "auroc" and not source.multi_label
    assert source.classes == ("not-hateful", "hateful")
    once = [source.read(key) for key in source.keys]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            assert list(pool.map(source.read, source.keys)) == once
    assert [source.row_name(key) for key in source.keys] == [e.id for e in once]
    again, _ = opened(tmp_path / "data")
    assert list(again.keys) == list(source.keys)


# --- the sample edition ---------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A sample edition of 300 memes; not to be changed."""
    root = tmp_path_factory.mktemp("sample") / "memes"
    editions.ensure("hatefulmemes", root, 300, 3, quiet)
    return root


def lists_of(root):
    """The rows of all lists of a folder."""
    return {
        path.stem: [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for path in (root / "data").glob("*.jsonl")
    }


def test_the_sample_has_the_official_layout_and_shares(written):
    assert sorted(path.name for path in written.iterdir()) == [MARKER, "data"]
    lists = lists_of(written)
    assert set(lists) == set(SECOND)
    raw = (written / "data" / "train.jsonl").read_bytes()
    assert re.match(rb'\{"id":\d{4,5},"img":"img\\/\d{5}\.png","label":[01],', raw)
    raw = (written / "data" / "dev_seen.jsonl").read_bytes()
    assert re.match(rb'\{"id": "\d{5}", "img": "img/\d{5}\.png", "label": [01], ', raw)
    shares = {name: np.mean([r["label"] for r in rows]) for name, rows in lists.items()}
    expected = {"train": 0.36, "dev_seen": 0.5, "test_seen": 0.5}
    expected |= {"dev_unseen": 0.37, "test_unseen": 0.37}
    assert shares == pytest.approx(expected, abs=0.09)
    ids = {name: {int(r["id"]) for r in rows} for name, rows in lists.items()}
    shared = len(ids["dev_seen"] & ids["dev_unseen"])
    assert shared / len(ids["dev_seen"]) == pytest.approx(0.8, abs=0.1)
    distinct = set().union(*ids.values())
    assert len(distinct) == 300 == len(list((written / "data" / "img").iterdir()))
    for rows in lists.values():
        for row in rows:
            assert row["img"] == f"img/{int(row['id']):05d}.png"
            assert row["text"] == row["text"].lower().strip() and row["text"].isascii()


def test_the_label_of_a_sample_is_told_by_picture_and_text_together_only(written):
    rows = lists_of(written)["train"]
    content = {row["img"]: (written / "data" / row["img"]).read_bytes() for row in rows}
    for key in (lambda row: row["text"], lambda row: content[row["img"]]):
        labels = collections.defaultdict(set)
        for row in rows:
            labels[key(row)].add(row["label"])
        both = sum(len(found) == 2 for found in labels.values())
        assert both > 0.15 * len(labels)
    pairs = collections.Counter((row["text"], content[row["img"]]) for row in rows)
    assert max(pairs.values()) == 1


def test_pictures_of_the_sample_are_the_same_to_the_byte_or_clearly_different(
    written, tmp_path
):
    paths = sorted((written / "data" / "img").iterdir())
    content = [path.read_bytes() for path in paths]
    for data in content[:20]:
        with Image.open(io.BytesIO(data)) as image:
            assert image.format == "PNG" and image.mode == "RGB"
            assert all(100 <= side <= 140 for side in image.size)
    decoded = np.stack([pictures.decode(data, 32).pixels for data in content])
    np.save(tmp_path / "image.npy", decoded)
    there = np.ones(len(paths), bool)
    found = duplicates.find_clusters(tmp_path / "image.npy", there, quiet)
    first_of = {data: place for place, data in reversed(list(enumerate(content)))}
    assert found.tolist() == [first_of[data] for data in content]
    assert 30 < len(paths) - len(first_of) < 120


def test_the_sample_is_read_without_a_loss(written, tmp_path):
    examples, counts = read(written)
    assert len(examples) == counts["read"] == 300
    assert not [reason for reason in counts if reason.startswith("skipped")]
    config = Data(dataset="hatefulmemes", dir=str(written))
    assert DATASETS["hatefulmemes"].locate(config, tmp_path).edition == "sample"
    assert not (tmp_path / "sample").exists()
    small(tmp_path / "data")
    config = Data(dataset="hatefulmemes", dir=str(tmp_path))
    assert hatefulmemes.READER.locate(config, tmp_path).edition == "official"
