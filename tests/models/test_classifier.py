"""What each view of the classifier may depend on, and the changes to training rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ccu_jax.config.schema import Train
from ccu_jax.errors import UserError
from ccu_jax.models import TAIL, TEXT, VIEWS, towers, unit
from ccu_jax.models import augmentation as augment
from ccu_jax.train.program import State
from ccu_jax.train.step import _row_keys
from tests import toy

ROWS = 12


@pytest.fixture(scope="module", params=[0, 1], ids=["whole trunk", "tail block"])
def sizes(request):
    """With a trunk that ends before the last feed-forward layer, or the last block."""
    return {"tail_blocks": request.param}


@pytest.fixture(scope="module")
def model(sizes):
    return toy.build_model(toy.make_config(model=sizes))


@pytest.fixture(scope="module")
def apply(model):
    return jax.jit(model.apply)


@pytest.fixture(scope="module")
def params(model):
    return model.init(jax.random.key(0))


@pytest.fixture(scope="module")
def example():
    data = toy.make_dataset(ROWS)
    return {name: np.asarray(getattr(data, name)) for name in toy.TABLE_COLUMNS}


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
    h_text = jax.jit(model.encode_text)(params, example["text"])
    without_text = apply(params, {**cached, "h_text": h_text})
    for name, value in expected._asdict().items():
        np.testing.assert_allclose(getattr(found, name), value, atol=1e-6)
        np.testing.assert_allclose(getattr(without_text, name), value, atol=1e-6)


@pytest.mark.parametrize("tail_blocks, tokens", [(0, 2), (1, 5), (2, 5)])
def test_a_trunk_gives_two_tokens_or_those_that_a_tail_of_blocks_looks_at(
    tail_blocks, tokens, example
):
    model = toy.build_model(toy.make_config(model={"tail_blocks": tail_blocks}))
    params = model.init(jax.random.key(0))
    features = jax.eval_shape(model.trunk, params, example["image"])
    assert features.shape == (ROWS, tokens, 8)
    blocks = {name for name in params["image_tail"] if name.startswith("block")}
    assert len(blocks) == tail_blocks
    assert ("feed_forward" in params["image_tail"]) == (tail_blocks == 0)


def test_where_the_trunk_ends_does_not_change_what_the_model_says(example):
    """The last block is all the tail's, or its first half the trunk's."""
    late, early = (
        toy.build_model(toy.make_config(model={"tail_blocks": blocks}))
        for blocks in (0, 1)
    )
    params = early.init(jax.random.key(0))
    tail = dict(params["image_tail"])
    block = tail.pop("block_0")
    moved = {
        "image_trunk": {**params["image_trunk"], "attention": block["attention"]},
        "image_tail": {**tail, "feed_forward": block["feed_forward"]},
    }
    expected = jax.jit(early.apply)(params, example)
    found = jax.jit(late.apply)({**params, **moved}, example)
    for name, value in expected._asdict().items():
        np.testing.assert_allclose(getattr(found, name), value, atol=1e-6)


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
    share = 1 - toy.make_config().model.dropout
    np.testing.assert_allclose(
        dropped.h_image[kept], plain.h_image[kept] / share, atol=1e-5
    )


def test_rows_may_be_kept_from_dropout_to_the_bit(apply, params, example):
    keys, drop = jax.random.split(jax.random.key(1), ROWS), np.arange(ROWS) % 3 == 0
    plain, dropped = apply(params, example), apply(params, example, keys=keys)
    some = apply(params, example, keys=keys, use_dropout=drop)
    for name, value in some._asdict().items():
        np.testing.assert_array_equal(value[drop], getattr(dropped, name)[drop])
        np.testing.assert_array_equal(value[~drop], getattr(plain, name)[~drop])


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"patch": 5}, "model.patch=5"),
        ({"image_width": 9}, "model.image_width=9"),
        ({"text_width": 7}, "model.text_width=7"),
        ({"tail_blocks": 3}, "model.tail_blocks=3"),
        ({"tail_blocks": -1}, "model.tail_blocks=-1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(fields, named):
    with pytest.raises(UserError, match=named):
        toy.build_model(toy.make_config(model=fields))


def test_bfloat16_runs_and_is_near_float32(sizes, apply, params, example):
    half = toy.build_model(toy.make_config(model={"dtype": "bfloat16", **sizes}))
    out, full = jax.jit(half.apply)(params, example), apply(params, example)
    for name, value in out._asdict().items():
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, getattr(full, name), atol=0.05)
    assert np.any(out.image != full.image)


# --- attention, edges, rematerialisation ----------------------------------------------


def attention_inputs(dtype=jnp.float32, rows=5, queries=3, tokens=7, heads=2, size=4):
    keys = jax.random.split(jax.random.key(2), 3)
    counts = (queries, tokens, tokens)
    return [
        2 * jax.random.normal(key, (rows, count, heads, size), dtype)
        for key, count in zip(keys, counts, strict=True)
    ]


# Rows that may look at all tokens, at some, at one, at none.
MASK = jnp.arange(7)[None, :] < jnp.array([7, 4, 1, 0, 2])[:, None]


def usual_attention(query, key, value, mask=None):
    bias = None if mask is None else jnp.where(mask, 0.0, -1e9)[:, None, None, :]
    mixed = jax.nn.dot_product_attention(query, key, value, bias=bias)
    return mixed.transpose(0, 2, 1, 3)


@pytest.mark.parametrize("mask", [None, MASK, ~MASK], ids=["all", "first", "last"])
def test_attention_is_that_of_jax_with_its_gradients(mask):
    inputs = attention_inputs()

    def both(attend):
        def total(*inputs):
            mixed = attend(*inputs, mask)
            return (mixed * jnp.cos(jnp.arange(mixed.size)).reshape(mixed.shape)).sum()

        return jax.jit(attend)(*inputs, mask), jax.jit(jax.grad(total, (0, 1, 2)))(
            *inputs
        )

    found, gradients = both(towers.attend)
    expected, others = both(usual_attention)
    assert found.shape == (5, 2, 3, 4)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    for one, other in zip(gradients, others, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_row_that_may_look_at_nothing_has_finite_attention_and_gradients():
    inputs = attention_inputs()

    def total(*inputs):
        return (towers.attend(*inputs, jnp.zeros((5, 7), bool)) ** 2).sum()

    value, gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2)))(*inputs)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((value, gradients)))
    # With nothing to choose by, it is the mean.
    found = towers.attend(*inputs, jnp.zeros((5, 7), bool))
    mean = jnp.broadcast_to(inputs[2].mean(1)[:, :, None], found.shape)
    np.testing.assert_allclose(found, mean, atol=1e-6)


def test_tokens_that_may_not_be_looked_at_get_no_weight_and_no_gradient():
    query, key, value = attention_inputs()

    def attend(key, value):
        return towers.attend(query, key, value, MASK)

    hidden = ~MASK[:, :, None, None] & MASK.any(1)[:, None, None, None]
    changed = attend(*(jnp.where(hidden, 30.0, x) for x in (key, value)))
    np.testing.assert_array_equal(changed, attend(key, value))
    gradients = jax.grad(lambda *x: (attend(*x) ** 2).sum(), (0, 1))(key, value)
    for gradient in gradients:
        assert not jnp.where(hidden, gradient, 0.0).any()
        assert jnp.where(hidden, 0.0, gradient).any()


def test_attention_with_large_scores_stays_finite():
    query, key, value = attention_inputs()
    mixed = towers.attend(1e3 * query, 1e3 * key, value, MASK)
    expected = usual_attention(1e3 * query, 1e3 * key, value, MASK)
    np.testing.assert_allclose(mixed, expected, atol=1e-5)


def test_attention_in_bfloat16_is_near_that_in_float32():
    half = attention_inputs(jnp.bfloat16)
    found = towers.attend(*half, MASK)
    assert found.dtype == jnp.bfloat16
    full = towers.attend(*(x.astype(jnp.float32) for x in half), MASK)
    np.testing.assert_allclose(found.astype(jnp.float32), full, atol=0.02, rtol=0.02)


def edges_by_hand(x, cell, bins):
    """Histograms of edge directions, as they were first written down."""
    y = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    dx = (y[:, 1:-1, 2:] - y[:, 1:-1, :-2]).sum(-1)
    dy = (y[:, 2:, 1:-1] - y[:, :-2, 1:-1]).sum(-1)
    strength = np.sqrt(dx * dx + dy * dy + 1e-6)
    angle = np.arange(bins) * np.pi / bins
    along = np.abs(dx[..., None] * np.cos(angle) + dy[..., None] * np.sin(angle))
    h = strength[..., None] * (along / strength[..., None]) ** bins
    rows, side = len(x), x.shape[1] // cell
    h = h.reshape(rows, side, cell, side, cell, bins).sum((2, 4))
    return np.sqrt(h / cell + 1e-6)


@pytest.mark.parametrize("cell, bins", [(1, 8), (2, 8), (4, 8), (3, 8), (4, 4)])
def test_edge_histograms_are_those_of_the_plain_formula(cell, bins):
    x = np.random.default_rng(0).normal(size=(3, 12, 12, 3))
    x[1] = 0.7  # without any edge
    x[2, :, 6:] = -x[2, :, 6:].mean()
    found = jax.jit(towers.edge_histograms, static_argnums=(1, 2))(
        x.astype(np.float32), cell, bins
    )
    np.testing.assert_allclose(found, edges_by_hand(x, cell, bins), atol=1e-5)
    gradient = jax.grad(lambda x: towers.edge_histograms(x, cell, bins).sum())(
        x.astype(np.float32)
    )
    assert np.isfinite(gradient).all()


@pytest.fixture(scope="module", params=[0, 2], ids=["whole trunk", "tail blocks"])
def plain_and_remat(request):
    """A deep classifier whose blocks keep what they computed, and one that does not."""
    fields = {"image_depth": 4, "text_depth": 2, "tail_blocks": request.param}
    return [
        toy.build_model(toy.make_config(model={**fields, "remat": remat}))
        for remat in (False, True)
    ]


def test_what_is_computed_once_more_is_the_same(plain_and_remat, example):
    params = plain_and_remat[0].init(jax.random.key(0))
    others = plain_and_remat[1].init(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, params, others)

    def solved(model):
        def total(params):
            out = model.apply(params, example)
            return (out.fused**2).sum() + (out.z_image * out.z_text).sum(), out

        return jax.jit(jax.grad(total, has_aux=True))(params)

    (gradient, out), (again, same) = (solved(model) for model in plain_and_remat)
    for one, other in zip(out, same, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    for one, other in zip(
        jax.tree.leaves(gradient), jax.tree.leaves(again), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_with_rematerialisation_far_less_is_kept_for_the_gradient(
    plain_and_remat, example
):
    """What the way back is given, besides the parameters that are there anyway."""

    def kept(model):
        params = jax.eval_shape(model.init, jax.random.key(0))

        def way_back(params):
            return jax.vjp(lambda params: model.apply(params, example).fused, params)[1]

        shapes = jax.tree.leaves(jax.eval_shape(way_back, params))
        weights = jax.tree.leaves(params)
        return sum(x.size * x.dtype.itemsize for x in shapes) - sum(
            x.size * x.dtype.itemsize for x in weights
        )

    plain, remat = (kept(model) for model in plain_and_remat)
    assert 0 < remat < 0.5 * plain


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
    see, read = augment.drop_modalities(has_image, has_text, keys, 0.8)
    both = has_image & has_text
    np.testing.assert_array_equal(see[~both], has_image[~both])
    np.testing.assert_array_equal(read[~both], has_text[~both])
    assert (see | read)[both].all()
    hidden = ~(see & read)[both]
    assert 0.6 < hidden.mean() < 0.95
    assert np.any(~see[both]) and np.any(~read[both])
    see, read = augment.drop_modalities(has_image, has_text, keys, 0.0)
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
