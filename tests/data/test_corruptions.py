"""Realistic conditions: each does what it says, to training rows, and is told."""

import dataclasses

import numpy as np
import pytest

from ccu_jax.config.schema import Corruptions
from ccu_jax.data import corruptions
from tests import toy


@pytest.fixture(params=[False, True], ids=["one label", "labels"])
def data(request):
    return toy.make_dataset(700, multi_label=request.param)


def changed(before, after):
    """Which rows `[N]` differ in any of the columns."""
    names = ("text", "labels", "has_image", "has_text", "split")
    differs = [
        (getattr(before, name) != getattr(after, name)).reshape(len(before.id), -1)
        for name in names
    ]
    return np.concatenate(differs, axis=1).any(axis=1)


def test_nothing_asked_for_is_nothing_done(data):
    same, told = corruptions.apply(data, Corruptions())
    assert same is data and told == {}


@pytest.mark.parametrize(
    "name",
    ["missing_image", "missing_text", "incomplete", "noisy_labels", "noisy_text"],
)
def test_each_befalls_its_share_of_the_training_rows_and_no_other(data, name):
    config = Corruptions(**{name: 0.2})
    new, told = corruptions.apply(data, config)
    hit = changed(data, new)
    assert (data.split[hit] == "train").all()
    train = (data.split == "train").sum()
    assert told == {name: {"share": 0.2, "rows": round(0.2 * train)}, "seed": 0}
    # Another row may happen to have the same text.
    least = 0.9 if name == "noisy_text" else 1.0
    assert least * round(0.2 * train) <= hit.sum() <= round(0.2 * train)
    again, _ = corruptions.apply(data, config)
    other, _ = corruptions.apply(data, dataclasses.replace(config, seed=1))
    assert not changed(new, again).any() and changed(new, other).any()


def test_no_row_loses_its_only_modality(data):
    config = Corruptions(missing_image=0.6, missing_text=0.6, incomplete=0.5)
    new, _ = corruptions.apply(data, config)
    before = data.has_image | data.has_text
    np.testing.assert_array_equal((new.has_image | new.has_text)[before], True)


def test_missing_rows_are_counted_where_there_are_not_enough(data):
    _, told = corruptions.apply(data, Corruptions(missing_image=1.0))
    whole = data.has_image & data.has_text & (data.split == "train")
    assert told["missing_image"]["rows"] == whole.sum()


def test_incomplete_rows_lose_picture_text_or_label(data):
    new, _ = corruptions.apply(data, Corruptions(incomplete=0.9))
    lost = {
        "picture": data.has_image & ~new.has_image,
        "text": data.has_text & ~new.has_text,
        "label": new.split == corruptions.DROPPED,
    }
    assert all(rows.sum() > 50 for rows in lost.values())
    assert np.sum([rows for rows in lost.values()], axis=0).max() == 1


def test_noisy_labels_are_labels_of_another_row_that_differ(data):
    new, _ = corruptions.apply(data, Corruptions(noisy_labels=0.3))
    hit = (new.labels != data.labels).any(axis=1)
    seen = {tuple(row) for row in data.labels[data.split == "train"]}
    assert hit.any() and {tuple(row) for row in new.labels[hit]} <= seen


def test_noisy_texts_are_texts_that_go_round(data):
    new, _ = corruptions.apply(data, Corruptions(noisy_text=0.5))
    assert sorted(map(tuple, new.text)) == sorted(map(tuple, data.text))
    assert (new.has_text == data.has_text).all()


def test_an_order_is_an_order_of_the_rows_and_is_told(data):
    assert corruptions.stream_positions(data, "shuffled") is None
    np.testing.assert_array_equal(
        corruptions.stream_positions(data, "stored"), np.arange(700)
    )
    place = corruptions.stream_positions(data, "by_class")
    first = data.labels.argmax(axis=1)[np.argsort(place)]
    assert (np.diff(first) >= 0).all() and sorted(place) == list(range(700))
    _, told = corruptions.apply(data, Corruptions(order="by_class", window=9))
    assert told == {"order": "by_class", "window": 9, "seed": 0}
