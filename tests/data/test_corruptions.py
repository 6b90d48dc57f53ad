"""Corruptions change the requested fraction of training rows and nothing else."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from ccu_jax.config.schema import Corruptions
from ccu_jax.data import corruptions
from tests import toy


@pytest.fixture(params=[False, True], ids=["single-label", "multi-label"])
def data(request):
    return toy.make_dataset(700, multi_label=request.param)


def changed_rows(before, after):
    """Returns bool [N]: the rows that differ in any column."""
    columns = ("text", "labels", "has_image", "has_text", "split")
    differs = [
        (getattr(before, name) != getattr(after, name)).reshape(len(before.id), -1)
        for name in columns
    ]
    return np.concatenate(differs, axis=1).any(axis=1)


def test_defaults_change_nothing(data):
    corrupted, record = corruptions.apply(data, Corruptions())
    assert corrupted is data
    assert record == {}


@pytest.mark.parametrize(
    "name",
    ["missing_image", "missing_text", "incomplete", "noisy_labels", "noisy_text"],
)
def test_corruption_changes_its_fraction_of_the_training_rows(data, name):
    fraction: dict[str, Any] = {name: 0.2}
    config = Corruptions(**fraction)
    corrupted, record = corruptions.apply(data, config)
    is_changed = changed_rows(data, corrupted)
    assert (data.split[is_changed] == "train").all()
    expected = round(0.2 * (data.split == "train").sum())
    assert record == {name: {"share": 0.2, "rows": expected}, "seed": 0}
    # Another row's text may happen to be the same.
    min_fraction = 0.9 if name == "noisy_text" else 1.0
    assert min_fraction * expected <= is_changed.sum() <= expected
    again, _ = corruptions.apply(data, config)
    assert not changed_rows(corrupted, again).any()
    reseeded, _ = corruptions.apply(data, dataclasses.replace(config, seed=1))
    assert changed_rows(corrupted, reseeded).any()


def test_no_row_loses_its_only_modality(data):
    config = Corruptions(missing_image=0.6, missing_text=0.6, incomplete=0.5)
    corrupted, _ = corruptions.apply(data, config)
    before = data.has_image | data.has_text
    after = corrupted.has_image | corrupted.has_text
    np.testing.assert_array_equal(after[before], True)


def test_number_of_rows_is_reported_if_fewer_have_both_modalities(data):
    _, record = corruptions.apply(data, Corruptions(missing_image=1.0))
    has_both = data.has_image & data.has_text & (data.split == "train")
    assert record["missing_image"]["rows"] == has_both.sum()


def test_incomplete_rows_lose_image_text_or_label(data):
    corrupted, _ = corruptions.apply(data, Corruptions(incomplete=0.9))
    lost = [
        data.has_image & ~corrupted.has_image,
        data.has_text & ~corrupted.has_text,
        corrupted.split == corruptions.DROPPED,
    ]
    assert all(rows.sum() > 50 for rows in lost)
    assert np.sum(lost, axis=0).max() == 1


def test_noisy_labels_are_labels_of_other_training_rows(data):
    corrupted, _ = corruptions.apply(data, Corruptions(noisy_labels=0.3))
    is_changed = (corrupted.labels != data.labels).any(axis=1)
    possible = {tuple(row) for row in data.labels[data.split == "train"]}
    assert is_changed.any()
    assert {tuple(row) for row in corrupted.labels[is_changed]} <= possible


def test_noisy_texts_are_a_permutation_of_the_texts(data):
    corrupted, _ = corruptions.apply(data, Corruptions(noisy_text=0.5))
    assert sorted(map(tuple, corrupted.text)) == sorted(map(tuple, data.text))
    np.testing.assert_array_equal(corrupted.has_text, data.has_text)


def test_stream_positions_follow_the_requested_order(data):
    assert corruptions.stream_positions(data, "shuffled") is None
    stored = corruptions.stream_positions(data, "stored")
    np.testing.assert_array_equal(stored, np.arange(700))
    positions = corruptions.stream_positions(data, "by_class")
    assert positions is not None
    assert sorted(positions) == list(range(700))
    labels = data.labels.argmax(axis=1)[np.argsort(positions)]
    assert (np.diff(labels) >= 0).all()
    _, record = corruptions.apply(data, Corruptions(order="by_class", window=9))
    assert record == {"order": "by_class", "window": 9, "seed": 0}
