"""What each view of the classifier depends on."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ccu_jax.errors import UserError
from ccu_jax.models import TAIL, TEXT, l2_normalize
from tests import toy
from tests.models.conftest import NUM_ROWS


def build(**fields):
    return toy.build_model(toy.make_config(model=fields))


@pytest.fixture(scope="module", params=[0, 1], ids=["pooled trunk", "tail block"])
def model(request):
    return build(tail_blocks=request.param)


@pytest.fixture(scope="module")
def apply(model):
    return jax.jit(model.apply)


@pytest.fixture(scope="module")
def params(model):
    return model.init(jax.random.key(0))


def other_images(example):
    return example | {"image": 255 - example["image"]}


def other_texts(example):
    return example | {"text": np.where(example["text"] > 1, 13 - example["text"], 1)}


assert_same_outputs = functools.partial(chex.assert_trees_all_close, atol=1e-5)


@pytest.mark.parametrize(
    "has, change", [("has_image", other_images), ("has_text", other_texts)]
)
def test_fused_view_ignores_missing_modality(apply, params, example, has, change):
    example = example | {has: np.arange(NUM_ROWS) % 2 == 0}
    before = np.asarray(apply(params, example).fused)
    after = np.asarray(apply(params, change(example)).fused)
    np.testing.assert_array_equal(after[1::2], before[1::2])
    assert (np.abs(after[::2] - before[::2]).max(axis=1) > 1e-6).all()


def test_unimodal_views_ignore_the_other_modality(apply, params, example):
    before = apply(params, example)
    of_image, of_text = ("image", "z_image", "h_image"), ("text", "z_text", "h_text")
    for change, changed in ((other_images, of_image), (other_texts, of_text)):
        after = apply(params, change(example))
        for name in (*of_image, *of_text):
            change_size = np.abs(getattr(after, name) - getattr(before, name)).max()
            assert change_size > 1e-5 if name in changed else change_size == 0, name


def test_gradients_of_views_reach_only_their_modules(model, params, example):
    def reached_modules(view):
        def total(params):
            return (getattr(model.apply(params, example), view) ** 2).sum()

        gradient = jax.jit(jax.grad(total))(params)
        return {name for name, tree in gradient.items() if optax.tree.norm(tree) > 0}

    assert set(params) == {*TAIL, *TEXT, "image_trunk"}
    assert reached_modules("image") == {"image_trunk", "image_tail", "image_head"}
    assert reached_modules("text") == {"text", "text_head"}
    fused = {"image_trunk", "image_tail", "text", "fused_head"}
    assert reached_modules("fused") == fused


def test_cached_features_give_the_same_outputs(model, apply, params, example):
    expected = apply(params, example)
    cached = {key: value for key, value in example.items() if key != "image"}
    # Images may also be floats in [0, 1].
    floats = (example["image"] / 255).astype(np.float32)
    cached["features"] = jax.jit(model.trunk)(params, floats)
    assert_same_outputs(apply(params, cached), expected)
    cached["h_text"] = jax.jit(model.encode_text)(params, cached.pop("text"))
    assert_same_outputs(apply(params, cached), expected)


@pytest.mark.parametrize("tail_blocks, num_tokens", [(0, 2), (1, 5), (2, 5)])
def test_trunk_returns_pooled_or_all_tokens(tail_blocks, num_tokens, example):
    model = build(tail_blocks=tail_blocks)
    params = model.init(jax.random.key(0))
    features = jax.eval_shape(model.trunk, params, example["image"])
    assert features.shape == (NUM_ROWS, num_tokens, 8)
    blocks = {name for name in params["image_tail"] if name.startswith("block")}
    assert len(blocks) == tail_blocks
    assert ("feed_forward" in params["image_tail"]) == (tail_blocks == 0)


def test_split_of_last_block_does_not_change_outputs(example):
    pooled, full = build(tail_blocks=0), build(tail_blocks=1)
    params = full.init(jax.random.key(0))
    tail = dict(params["image_tail"])
    block = tail.pop("block_0")
    moved = {
        "image_trunk": {**params["image_trunk"], "attention": block["attention"]},
        "image_tail": {**tail, "feed_forward": block["feed_forward"]},
    }
    expected = jax.jit(full.apply)(params, example)
    assert_same_outputs(jax.jit(pooled.apply)({**params, **moved}, example), expected)


def test_padding_tokens_do_not_matter(apply, params, example):
    def h_text(embedding):
        text = {**params["text"], "tokens": {"embedding": embedding}}
        return apply({**params, "text": text}, example).h_text

    assert (example["text"] == 0).any()
    table = params["text"]["tokens"]["embedding"]
    np.testing.assert_array_equal(h_text(table.at[0].set(9.0)), h_text(table))
    assert np.any(h_text(table.at[2:].mul(-1.0)) != h_text(table))


def test_embeddings_have_unit_length_and_empty_rows_are_finite(apply, params, example):
    outputs = apply(params, example)
    for z in (outputs.z_image, outputs.z_text):
        np.testing.assert_allclose(jnp.linalg.norm(z, axis=1), 1, rtol=1e-5)
    empty = {key: np.zeros_like(value) for key, value in example.items()}
    assert all(np.isfinite(value).all() for value in apply(params, empty))
    gradient = jax.grad(lambda x: l2_normalize(x).sum())(jnp.zeros((1, 3)))
    assert np.isfinite(gradient).all()


def test_dropout_depends_on_row_keys_only(apply, params, example):
    keys = jax.random.split(jax.random.key(1), NUM_ROWS)
    plain, dropped = apply(params, example), apply(params, example, keys=keys)
    rolled = {key: np.roll(value, 5, axis=0) for key, value in example.items()}
    again = apply(params, rolled, keys=jnp.roll(keys, 5))
    expected = np.roll(dropped.h_image, 5, axis=0)
    np.testing.assert_allclose(again.h_image, expected, atol=1e-6)
    # Remaining features are scaled up to preserve the mean.
    remaining = np.asarray(dropped.h_image != 0)
    assert not remaining.all()
    scale = 1 / (1 - toy.make_config().model.dropout)
    np.testing.assert_allclose(
        dropped.h_image[remaining], plain.h_image[remaining] * scale, atol=1e-5
    )
    # Rows without dropout are the same to the bit.
    use = np.arange(NUM_ROWS) % 3 == 0
    some = apply(params, example, keys=keys, use_dropout=use)
    expected = jax.tree.map(lambda a, b: np.where(use[:, None], a, b), dropped, plain)
    assert toy.trees_equal(some, expected)


@pytest.mark.parametrize(
    "setting",
    ["patch=5", "image_width=9", "text_width=7", "tail_blocks=3", "tail_blocks=-1"],
)
def test_inconsistent_sizes_are_errors(setting):
    name, _, size = setting.partition("=")
    with pytest.raises(UserError, match=f"model.{setting}"):
        build(**{name: int(size)})


@pytest.mark.parametrize("tail_blocks", [0, 1])
def test_bfloat16_is_close_to_float32(tail_blocks, example):
    full = build(tail_blocks=tail_blocks)
    half = build(tail_blocks=tail_blocks, dtype="bfloat16")
    params = full.init(jax.random.key(0))
    expected, found = (jax.jit(x.apply)(params, example) for x in (full, half))
    assert all(x.dtype == jnp.float32 for x in found)
    chex.assert_trees_all_close(found, expected, atol=0.05)
    assert np.any(found.image != expected.image)


def num_bytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("tail_blocks", [0, 2])
def test_rematerialization_saves_memory_and_changes_no_value(tail_blocks, example):
    def evaluate(remat):
        """Returns the bytes kept for the backward pass, and gradient and outputs."""
        model = build(image_depth=4, text_depth=2, tail_blocks=tail_blocks, remat=remat)
        params = model.init(jax.random.key(0))

        def total(params):
            out = model.apply(params, example)
            return (out.fused**2).sum() + (out.z_image * out.z_text).sum(), out

        backward = jax.eval_shape(lambda p: jax.vjp(total, p, has_aux=True)[1], params)
        size = num_bytes(backward) - num_bytes(params)
        return size, (params, jax.jit(jax.grad(total, has_aux=True))(params))

    (plain_size, plain), (remat_size, remat) = evaluate(False), evaluate(True)
    assert 0 < remat_size < 0.5 * plain_size
    chex.assert_trees_all_close(plain, remat, rtol=1e-5, atol=1e-5)
