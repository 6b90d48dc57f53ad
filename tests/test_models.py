"""What each view of the classifier may depend on, and the changes to training rows."""

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest

from ccu_jax import augment
from ccu_jax.config import Train
from ccu_jax.errors import UserError
from ccu_jax.models import TAIL, TEXT, VIEWS, towers, unit
from ccu_jax.step import State, _row_keys

ROWS = 12


@pytest.fixture(scope="module")
def model():
    return problems.model(problems.config(model={"tail_blocks": 1}))


@pytest.fixture(scope="module")
def apply(model):
    return jax.jit(model.apply)


@pytest.fixture(scope="module")
def params(model):
    return model.init(jax.random.key(0))


@pytest.fixture(scope="module")
def example():
    data = problems.dataset(ROWS)
    return {name: np.asarray(getattr(data, name)) for name in problems.TABLE}


def other_pictures(example):
    return example | {"image": 255 - example["image"]}


def other_texts(example):
    return example | {"text": np.where(example["text"] > 1, 13 - example["text"], 1)}


@pytest.mark.parametrize(
    "has, change", [("has_image", other_pictures), ("has_text", other_texts)]
)
def test_the_fused_view_ignores_what_a_row_does_not_have(
    apply, params, example, has, change
):
    example = example | {has: np.arange(ROWS) % 2 == 0}
    before = np.asarray(apply(params, example).fused)
    after = np.asarray(apply(params, change(example)).fused)
    np.testing.assert_array_equal(after[1::2], before[1::2])
    assert (np.abs(after[::2] - before[::2]).max(axis=1) > 1e-6).all()


def test_tokens_that_look_at_a_block_get_what_they_would_get_inside():
    block = towers.Block(heads=2, dtype=jnp.float32)
    x = jax.random.normal(jax.random.key(0), (3, 5, 8))
    mask = jnp.arange(5)[None, :] < jnp.array([[5], [3], [1]])
    params = block.init(jax.random.key(1), x, mask)
    whole = block.apply(params, x, mask)
    part = block.apply(params, x, mask, x[:, 1:3])
    np.testing.assert_allclose(part, whole[:, 1:3], atol=1e-6)


def test_each_view_of_one_modality_ignores_the_other(apply, params, example):
    before = apply(params, example)
    of_picture, of_text = ("image", "z_image", "h_image"), ("text", "z_text", "h_text")
    for change, moved, still in (
        (other_pictures, of_picture, of_text),
        (other_texts, of_text, of_picture),
    ):
        after = apply(params, change(example))
        for name in still:
            np.testing.assert_array_equal(getattr(after, name), getattr(before, name))
        for name in moved:
            assert np.abs(getattr(after, name) - getattr(before, name)).max() > 1e-5


def test_no_gradient_leads_from_a_view_to_the_other_modality(model, params, example):
    def total(params, view):
        return (getattr(model.apply(params, example), view) ** 2).sum()

    gradients = jax.jit(
        lambda params: {view: jax.grad(total)(params, view) for view in VIEWS}
    )(params)

    def reached(view):
        return {part for part, tree in gradients[view].items() if any_in(tree)}

    def any_in(tree):
        return any(np.any(x) for x in jax.tree.leaves(tree))

    assert reached("image") == {"image_trunk", "image_tail", "image_head"}
    assert reached("text") == {"text", "text_head"}
    fused = {"image_trunk", "image_tail", "text", "fused_head"}
    assert reached("fused") == fused


def test_cached_features_give_the_same_outputs_as_the_pictures(
    model, apply, params, example
):
    expected = apply(params, example)
    cached = {key: value for key, value in example.items() if key != "image"}
    cached["features"] = jax.jit(model.trunk)(params, example["image"])
    found = apply(params, cached)
    del cached["text"]
    without_text = apply(params, {**cached, "h_text": expected.h_text})
    for name, value in expected._asdict().items():
        np.testing.assert_allclose(getattr(found, name), value, atol=1e-6)
        np.testing.assert_allclose(getattr(without_text, name), value, atol=1e-6)


def test_pictures_may_be_bytes_or_fractions(model, params, example):
    trunk = jax.jit(model.trunk)
    as_bytes = trunk(params, example["image"])
    as_floats = trunk(params, (example["image"] / 255).astype(np.float32))
    np.testing.assert_allclose(as_bytes, as_floats, atol=1e-5)


def test_what_padding_tokens_are_does_not_matter(apply, params, example):
    assert (example["text"] == 0).any()
    before = apply(params, example)
    table = params["text"]["tokens"]["embedding"]
    text = {**params["text"], "tokens": {"embedding": table.at[0].set(9.0)}}
    after = apply({**params, "text": text}, example)
    np.testing.assert_array_equal(after.h_text, before.h_text)
    text = {**params["text"], "tokens": {"embedding": table.at[2:].mul(-1.0)}}
    assert np.any(apply({**params, "text": text}, example).h_text != before.h_text)


def test_a_row_without_any_token_or_picture_stays_finite(apply, params, example):
    blank = {key: np.zeros_like(value) for key, value in example.items()}
    for value in apply(params, blank):
        assert np.isfinite(value).all()


def test_embeddings_have_length_1_and_zeros_a_finite_gradient(apply, params, example):
    out = apply(params, example)
    for z in (out.z_image, out.z_text):
        np.testing.assert_allclose(jnp.linalg.norm(z, axis=1), 1, rtol=1e-5)
    gradient = jax.grad(lambda x: unit(x).sum())(jnp.zeros((1, 3)))
    assert np.isfinite(gradient).all()


def test_the_parts_are_those_that_methods_name(params):
    assert {*TAIL, *TEXT, "image_trunk"} == set(params)


def test_dropout_belongs_to_rows_and_is_off_without_keys(model, apply, params, example):
    keys = jax.random.split(jax.random.key(1), ROWS)
    plain, dropped = apply(params, example), apply(params, example, keys=keys)
    assert np.any(plain.h_image != dropped.h_image)
    np.testing.assert_array_equal(plain.h_image, apply(params, example).h_image)
    turned = {key: np.roll(value, 5, axis=0) for key, value in example.items()}
    again = apply(params, turned, keys=jnp.roll(keys, 5))
    expected = np.roll(dropped.h_image, 5, axis=0)
    np.testing.assert_allclose(again.h_image, expected, atol=1e-6)
    # What stays is scaled up, so that its mean is what it was.
    kept = dropped.h_image != 0
    share = 1 - problems.config().model.dropout
    np.testing.assert_allclose(
        dropped.h_image[kept], plain.h_image[kept] / share, atol=1e-5
    )


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"patch": 5}, "model.patch=5"),
        ({"image_width": 9}, "model.image_width=9"),
        ({"text_width": 7}, "model.text_width=7"),
        ({"tail_blocks": 3}, "model.tail_blocks=3"),
        ({"tail_blocks": -1}, "model.tail_blocks=-1"),
        ({"dtype": "float8"}, "model.dtype='float8'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(fields, named):
    with pytest.raises(UserError, match=named):
        problems.model(problems.config(model=fields))


def test_bfloat16_runs_and_is_near_float32(apply, params, example):
    half = problems.model(problems.config(model={"dtype": "bfloat16"}))
    out, full = jax.jit(half.apply)(params, example), apply(params, example)
    for name, value in out._asdict().items():
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, getattr(full, name), atol=0.05)
    assert np.any(out.image != full.image)


# --- changes to training rows ---------------------------------------------------------


@pytest.fixture(scope="module")
def augmented():
    config = Train(word_dropout=0.5, modality_dropout=0.9, shift=2)
    run = jax.jit(lambda rows, keys: augment.augment(rows, keys, config))
    return lambda rows, seed: run(rows, jax.random.split(jax.random.key(seed), ROWS))


def test_the_same_key_gives_the_same_row_and_another_key_another(augmented, example):
    first, again, other = (augmented(example, seed) for seed in (0, 0, 1))
    for name, value in first.items():
        np.testing.assert_array_equal(value, again[name])
    for name in ("image", "text", "has_image"):
        assert np.any(first[name] != other[name]), name
    assert first["image"].min() >= 0 and first["image"].max() <= 1


def test_rows_are_changed_one_by_one(augmented, example):
    # The same picture, text and key at two places; all else differs.
    alone = augmented(example, 0)
    changed = {key: value.copy() for key, value in example.items()}
    for value in changed.values():
        value[1:] = value[1:][::-1]
    together = augmented(changed, 0)
    for name in ("image", "text", "has_image", "has_text"):
        np.testing.assert_array_equal(together[name][0], alone[name][0])


def test_words_become_unknown_but_padding_stays(augmented, example):
    text = np.asarray(augmented(example, 0)["text"])
    same, unknown = text == example["text"], text == augment.UNKNOWN
    assert (same | unknown).all()
    assert (text[example["text"] == 0] == 0).all()
    assert (unknown & ~same).any() and (same & (text > 1)).any()


def test_nothing_changes_at_rate_zero(example):
    still = Train(
        shift=0, zoom=0.0, tint=0.0, flip=False, word_dropout=0.0, modality_dropout=0.0
    )
    keys = jax.random.split(jax.random.key(0), ROWS)
    out = jax.jit(lambda rows: augment.augment(rows, keys, still))(example)
    np.testing.assert_allclose(out["image"], example["image"] / 255.0, atol=1e-6)
    for name in ("text", "has_image", "has_text"):
        np.testing.assert_array_equal(out[name], example[name])


def test_a_flip_mirrors_the_picture(example):
    flip = Train(shift=0, zoom=0.0, tint=0.0, word_dropout=0.0)
    keys = jax.random.split(jax.random.key(0), ROWS)
    out = jax.jit(lambda rows: augment.augment(rows, keys, flip)["image"])(example)
    plain = example["image"] / 255.0
    mirrored = np.abs(out - plain[:, :, ::-1]).max(axis=(1, 2, 3)) < 1e-5
    same = np.abs(out - plain).max(axis=(1, 2, 3)) < 1e-5
    assert (mirrored | same).all() and mirrored.any() and same.any()


def test_hiding_never_hides_the_only_modality(augmented):
    has_image = np.array([True, True, False, False] * 50)
    has_text = np.array([True, False, True, False] * 50)
    keys = jax.random.split(jax.random.key(0), 200)
    see, read = augment.hide(has_image, has_text, keys, 0.8)
    both = has_image & has_text
    np.testing.assert_array_equal(see[~both], has_image[~both])
    np.testing.assert_array_equal(read[~both], has_text[~both])
    assert (see | read)[both].all()
    hidden = ~(see & read)[both]
    assert 0.6 < hidden.mean() < 0.95
    assert np.any(~see[both]) and np.any(~read[both])
    see, read = augment.hide(has_image, has_text, keys, 0.0)
    np.testing.assert_array_equal(see, has_image)
    np.testing.assert_array_equal(read, has_text)


def test_augmentation_says_what_there_really_is(augmented, example):
    out = augmented(example, 0)
    np.testing.assert_array_equal(out["image_weight"], example["has_image"])
    np.testing.assert_array_equal(out["text_weight"], example["has_text"])


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_keys_of_rows_do_not_depend_on_the_number_of_devices(devices):
    def draw(step, part, _):
        state = State(step, (), (), (), jax.random.key_data(jax.random.key(5)))
        return jax.random.key_data(_row_keys(state, part, 8 // devices))

    def keys(step, part):
        step = jnp.int32(step)
        shares = jnp.arange(devices)
        mapped = jax.vmap(lambda i: draw(step, part, i), axis_name="devices")
        return np.asarray(mapped(shares)).reshape(8, -1)

    key = jax.random.fold_in(jax.random.key(5), 3)
    key = jax.random.fold_in(key, sum(b"retain"))
    expected = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(8))
    np.testing.assert_array_equal(keys(3, "retain"), jax.random.key_data(expected))
    others = np.concatenate([keys(3, "retain"), keys(3, "unlearn"), keys(4, "retain")])
    assert len(np.unique(others, axis=0)) == 24
