"""Content of the sample editions: official layouts, and classes that can be learned."""

import collections
import hashlib
import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.kernel_ridge import KernelRidge
from sklearn.metrics import roc_auc_score

from ccu_jax.config.schema import Data
from ccu_jax.data import near_duplicates
from ccu_jax.data.preparation.images import decode
from ccu_jax.data.readers.base import MARKER
from ccu_jax.data.readers.fashion200k import (
    CATEGORIES,
    FOLDERS,
    LABEL_FILES,
    SUB_CATEGORIES,
)
from ccu_jax.data.readers.mmimdb import GENRES
from ccu_jax.data.samples import editions
from tests.data.readers.layouts import ignore_progress, read_rows

NAMES = ("mmimdb", "fashion200k", "hatefulmemes", "medical", "satellite")
NUM_ROWS = dict(zip(NAMES, (40, 800, 300, 400, 400), strict=True))


@pytest.fixture(scope="module")
def edition(request, tmp_path_factory):
    """The folder of a sample edition, not to be changed."""
    root = tmp_path_factory.mktemp("samples") / request.param
    editions.write_if_missing(
        request.param, root, NUM_ROWS[request.param], 3, ignore_progress
    )
    return root


@pytest.fixture(scope="module")
def rows(edition):
    dataset = edition.name if edition.name not in ("medical", "satellite") else "pairs"
    config = Data(dataset=dataset, dir=str(edition), mask_category_words=True)
    return read_rows(config)


def for_editions(*names):
    return pytest.mark.parametrize("edition", names, indirect=True, scope="module")


@for_editions(*NUM_ROWS)
def test_all_rows_are_used(edition, rows):
    _, examples, counts = rows
    assert counts["read"] == len(examples) == NUM_ROWS[edition.name]
    assert not [name for name in counts if name.startswith(("skipped", "ignored"))]


@for_editions("fashion200k", "hatefulmemes", "medical", "satellite")
def test_images_are_equal_or_clearly_different(edition, rows, tmp_path):
    content = [example.image for example in rows.examples.values()]
    np.save(tmp_path / "image.npy", np.stack([decode(c, 48).pixels for c in content]))
    has_image = np.ones(len(content), bool)
    clusters = near_duplicates.find_clusters(
        tmp_path / "image.npy", has_image, ignore_progress
    )
    first_row = {data: row for row, data in reversed(list(enumerate(content)))}
    assert clusters.tolist() == [first_row[data] for data in content]
    num_copies = len(content) - len(first_row)
    assert 30 < num_copies < 120 if edition.name == "hatefulmemes" else num_copies == 0


@for_editions("fashion200k", "medical", "satellite")
def test_image_and_text_each_predict_the_labels_but_not_perfectly(edition, rows):
    examples = list(rows.examples.values())
    labels = np.array([[k in e.labels for k in rows.source.classes] for e in examples])
    _, group = np.unique([e.group for e in examples], return_inverse=True)
    train = group % 3 > 0  # groups stay together; a third of the rows to test on
    texts = [example.text for example in examples]
    counter = CountVectorizer(ngram_range=(1, 2), token_pattern=r"\S+", binary=True)
    words = counter.fit_transform(texts).toarray()
    pixels = np.stack([decode(example.image, 12).pixels / 255 for example in examples])
    edges = [np.diff(pixels, axis=axis).reshape(len(pixels), -1) for axis in (1, 2)]
    for view in (words, np.concatenate([pixels.reshape(len(pixels), -1), *edges], 1)):
        features = view - view.mean(axis=0)
        ridge = KernelRidge(alpha=0.05 * (features**2).sum() / len(features))
        ridge.fit(features[train], labels[train] - labels.mean(axis=0))
        auc = roc_auc_score(labels[~train], ridge.predict(features[~train]))
        assert 0.6 < auc < 0.97


# Format, mode, and range of the sides in pixels.
IMAGES = {
    "mmimdb": ("JPEG", "RGB", 90, 193),
    "fashion200k": ("JPEG", "RGB", 60, 100),
    "hatefulmemes": ("PNG", "RGB", 100, 140),
    "medical": ("JPEG", "L", 72, 96),
    "satellite": ("JPEG", "RGB", 64, 80),
}


@for_editions(*IMAGES)
def test_images_are_small(edition, rows):
    format_, mode, min_side, max_side = IMAGES[edition.name]
    for example in rows.examples.values():
        with Image.open(io.BytesIO(example.image)) as image:
            assert (image.format, image.mode) == (format_, mode)
            assert all(min_side <= side <= max_side for side in image.size)


# --- one edition each -----------------------------------------------------------------


# Published tables rest on these editions: with another digest, none can be repeated.
DIGESTS = {"mmimdb": "5f523602f3fb6287", "hatefulmemes": "681427ca315a3f4d"}


@for_editions(*DIGESTS)
def test_editions_of_published_tables_are_unchanged(edition):
    texts = hashlib.sha256()
    for path in sorted(edition.rglob("*.json*")):
        texts.update(path.read_bytes())
    assert texts.hexdigest()[:16] == DIGESTS[edition.name]


@for_editions("mmimdb")
def test_movies_have_the_official_layout(edition):
    names = {path.name for path in edition.iterdir()}
    assert names == {MARKER, "dataset", "split.json"}
    splits = json.loads((edition / "split.json").read_text("ascii"))
    sizes = {name: len(ids) for name, ids in splits.items()}
    assert sizes == {"train": 24, "dev": 4, "test": 12}
    ids = {id_ for ids in splits.values() for id_ in ids}
    assert all(re.fullmatch("[0-9]{7}", id_) for id_ in ids)
    names = {f"{id_}.{ending}" for id_ in ids for ending in ("json", "jpeg")}
    assert {path.name for path in (edition / "dataset").iterdir()} == names
    paths = (edition / "dataset").glob("*.json")
    movies = [json.loads(path.read_text("ascii")) for path in paths]
    for movie in movies:
        assert 1 <= len(movie["genres"]) <= 3 and set(movie["genres"]) <= set(GENRES)
        assert 1 <= len(movie["plot"]) <= 4
    assert len({tuple(movie) for movie in movies}) > 20  # sets of keys
    longest = [m["plot"][0] == max(m["plot"], key=len) for m in movies]
    assert 0 < sum(longest) < 40


@for_editions("fashion200k")
def test_clothes_have_the_official_layout_and_proportions(edition):
    assert {p.name for p in (edition / "labels").iterdir()} == set(LABEL_FILES)
    titles, views, subs = {}, collections.defaultdict(list), set()
    sizes, is_named = collections.Counter(), collections.defaultdict(list)
    for name, (category, split) in LABEL_FILES.items():
        for line in (edition / "labels" / name).read_text("ascii").splitlines():
            path, score, title = line.split("\t")
            assert re.fullmatch(r"-[0-9]+\.[0-9]{6}", score)
            _, folder, sub, product, file = path.split("/")
            assert FOLDERS[folder] == category and sub in SUB_CATEGORIES[category]
            assert re.fullmatch("[0-9]{7,8}", product)
            view = re.fullmatch(rf"{product}_([0-9])\.jpeg", file)
            assert view
            views[product, name].append(int(view[1]))
            assert titles.setdefault(product, title) == title == title.lower()
            assert 3 <= len(title.split()) <= 11
            subs.add(sub)
            sizes[category, split] += 1
            is_named[category].append(category in title.split())
    assert len(views) == len(titles)  # no product in two label files
    assert all(1 <= len(v) <= 5 and v == sorted(set(v)) for v in views.values())
    assert 0 < sum(v != list(range(len(v))) for v in views.values()) < len(views)
    assert len(subs) >= 28
    official = dict(zip(CATEGORIES, (59.1, 27.1, 31.6, 35.1, 48.8), strict=True))
    for category, thousands in official.items():
        test, train = (sizes[category, split] for split in ("test", "train"))
        assert abs((test + train) / 800 - thousands / 201.7) < 0.01
        expected = 0.1 if category == "dress" else 0.165
        assert abs(test / (test + train) - expected) < 0.03
    assert np.mean(is_named["dress"]) > np.mean(is_named["pants"]) > 0.6


def read_memes(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@for_editions("hatefulmemes")
def test_memes_have_the_official_layout_and_proportions(edition):
    lists = {p.stem: read_memes(p) for p in (edition / "data").glob("*.jsonl")}
    fractions = {n: np.mean([r["label"] for r in rows]) for n, rows in lists.items()}
    expected = {"train": 0.36, "dev_seen": 0.5, "test_seen": 0.5}
    expected |= {"dev_unseen": 0.37, "test_unseen": 0.37}
    assert fractions == pytest.approx(expected, abs=0.09)
    phase_1 = rb'\{"id":\d{4,5},"img":"img\\/\d{5}\.png","label":[01],'
    assert re.match(phase_1, (edition / "data" / "train.jsonl").read_bytes())
    phase_2 = rb'\{"id": "\d{5}", "img": "img/\d{5}\.png", "label": [01], '
    assert re.match(phase_2, (edition / "data" / "dev_seen.jsonl").read_bytes())
    ids = {name: {int(row["id"]) for row in rows} for name, rows in lists.items()}
    shared = len(ids["dev_seen"] & ids["dev_unseen"]) / len(ids["dev_seen"])
    assert shared == pytest.approx(0.8, abs=0.1)
    for row in (row for rows in lists.values() for row in rows):
        assert row["img"] == f"img/{int(row['id']):05d}.png"
        assert row["text"] == row["text"].lower().strip()


@for_editions("hatefulmemes")
def test_label_of_a_meme_needs_its_image_and_its_text(edition):
    rows = read_memes(edition / "data" / "train.jsonl")
    images = [(edition / "data" / row["img"]).read_bytes() for row in rows]
    texts = [row["text"] for row in rows]
    for view in (images, texts):
        labels = collections.defaultdict(set)
        for row, value in zip(rows, view, strict=True):
            labels[value].add(row["label"])
        num_ambiguous = sum(len(found) == 2 for found in labels.values())
        assert num_ambiguous > 0.15 * len(labels)
    assert len(set(zip(images, texts, strict=True))) == len(rows)


@for_editions("medical", "satellite")
def test_pairs_have_groups_and_splits(edition, rows):
    source, examples, _ = rows
    assert len(source.classes) == 8
    splits = collections.Counter(e.split for e in examples.values())
    assert abs(splits["train"] - 260) < 10
    assert abs(splits["validation"] - 60) < 10
    sizes = collections.Counter(example.group for example in examples.values())
    assert max(sizes.values()) == (3 if source.multi_label else 4)
    if source.multi_label:
        num_without_label = sum(not example.labels for example in examples.values())
        assert 20 < num_without_label < 140
