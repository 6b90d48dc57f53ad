"""The random augmentation of training rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ccu_jax.config.schema import Train
from ccu_jax.models.augmentation import UNKNOWN, augment, drop_modalities
from ccu_jax.train.program import State
from ccu_jax.train.step import _row_keys
from tests import toy
from tests.models.conftest import NUM_ROWS


@pytest.fixture(scope="module")
def augmented():
    config = Train(word_dropout=0.5, modality_dropout=0.9, shift=2)

    @jax.jit
    def run(rows, seed):
        keys = jax.random.split(jax.random.key(seed), NUM_ROWS)
        return augment(rows, keys, config)

    return run


def test_augmentation_depends_on_the_keys_and_not_on_other_rows(augmented, example):
    first, other = (augmented(example, seed) for seed in (0, 1))
    reordered = {key: np.concatenate([x[:1], x[:0:-1]]) for key, x in example.items()}
    again = augmented(reordered, 0)
    for name, value in first.items():
        np.testing.assert_array_equal(value[0], again[name][0])
    for name in ("image", "text", "has_image"):
        assert np.any(first[name] != other[name]), name
    assert first["image"].min() >= 0 and first["image"].max() <= 1
    np.testing.assert_array_equal(first["image_weight"], example["has_image"])
    np.testing.assert_array_equal(first["text_weight"], example["has_text"])


def test_dropped_words_become_unknown_but_padding_stays(augmented, example):
    text = np.asarray(augmented(example, 0)["text"])
    same, unknown = text == example["text"], text == UNKNOWN
    assert (same | unknown).all()
    assert (text[example["text"] == 0] == 0).all()
    assert (unknown & ~same).any() and (same & (text > 1)).any()


@pytest.mark.parametrize("flip", [False, True])
def test_rates_of_zero_change_nothing_and_flips_mirror(example, flip):
    changes = toy.NO_AUGMENTATION | {"modality_dropout": 0.0, "flip": flip}
    config = dataclasses.replace(Train(), **changes)
    keys = jax.random.split(jax.random.key(0), NUM_ROWS)
    found = jax.jit(lambda rows: augment(rows, keys, config))(example)
    for name in ("text", "has_image", "has_text"):
        np.testing.assert_array_equal(found[name], example[name])
    plain = example["image"] / 255.0
    is_same = np.abs(found["image"] - plain).max(axis=(1, 2, 3)) < 1e-5
    is_mirrored = np.abs(found["image"] - plain[:, :, ::-1]).max(axis=(1, 2, 3)) < 1e-5
    assert (is_same | is_mirrored).all() and is_same.any()
    assert is_same.all() != flip


def test_modality_dropout_never_hides_the_only_modality():
    rows = {
        "has_image": jnp.array([True, True, False, False] * 50),
        "has_text": jnp.array([True, False, True, False] * 50),
        "key": jax.random.split(jax.random.key(0), 200),
    }
    has_image, has_text = (np.asarray(rows[name]) for name in ("has_image", "has_text"))
    found = drop_modalities(rows, 0.8)
    image, text = (np.asarray(found[name]) for name in ("has_image", "has_text"))
    both = has_image & has_text
    np.testing.assert_array_equal(image[~both], has_image[~both])
    np.testing.assert_array_equal(text[~both], has_text[~both])
    assert (image | text)[both].all()
    assert 0.6 < (~(image & text)[both]).mean() < 0.95
    assert np.any(~image[both]) and np.any(~text[both])


@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_row_keys_do_not_depend_on_the_number_of_devices(num_devices):
    key = jax.random.key(5)

    def keys(step, part):
        state = State(jnp.int32(step), {}, (), (), jax.random.key_data(key))
        draw = jax.vmap(
            lambda _: jax.random.key_data(_row_keys(state, part, 8 // num_devices)),
            axis_name="devices",
        )
        return np.asarray(draw(jnp.arange(num_devices))).reshape(8, -1)

    part_key = jax.random.fold_in(jax.random.fold_in(key, 3), sum(b"retain"))
    expected = jax.vmap(jax.random.fold_in, (None, 0))(part_key, jnp.arange(8))
    np.testing.assert_array_equal(keys(3, "retain"), jax.random.key_data(expected))
    found = np.concatenate([keys(3, "retain"), keys(3, "unlearn"), keys(4, "retain")])
    assert len(np.unique(found, axis=0)) == 24
