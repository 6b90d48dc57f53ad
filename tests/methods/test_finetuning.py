"""Methods from the literature do what their papers say, and only in what they train."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from ccu_jax import objectives
from ccu_jax.distributed import executors as parallel
from ccu_jax.distributed.device_tables import gather_replicated, gather_rows
from ccu_jax.methods import METHODS, distillation, reference
from ccu_jax.methods import finetuning as baselines
from ccu_jax.methods.last_layers import LAYERS
from ccu_jax.models import VISUAL, Outputs
from tests import toy
from tests.distributed.test_executors import EXECUTORS
from tests.toy import NullStage, make_loop, on_one_device, problem_and_loop, trees_equal

BOTH = pytest.mark.parametrize("multi_label", [False, True], ids=["single", "multi"])


@functools.cache
def bench_of(multi_label):
    data = toy.make_dataset(multi_label=multi_label)
    return toy.make_problem(parallel.vmap(1), data)


def first_batch(problem, program):
    """The rows of the first step, with keys of their own."""
    batch = {}
    for number, (part, plan) in enumerate(sorted(program.plan.items())):
        keys = jax.random.split(jax.random.key(number), plan.shape[1])
        batch[part] = gather_rows(program.table, {"rows": plan[0]}) | {"key": keys}
    return batch


# --- losses ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "multi_label", [False, pytest.param(True, marks=pytest.mark.table)]
)
def test_one_pass_of_neggrad_plus_has_the_loss_and_gradient_of_two(multi_label):
    problem = bench_of(multi_label)
    config, model = problem.config.neggrad_plus, problem.model
    program = METHODS["neggrad_plus"](problem)
    task = reference.make_augmented_task_loss(problem)
    guess = 4 * np.log(2) if multi_label else np.log(toy.CLASSES)
    batch = first_batch(problem, program)

    def two_passes(params):
        keep = task(params, batch["retain"])
        rows = batch["unlearn"]
        out = model.apply(params, rows)
        forget = 0.0
        for view in VISUAL:
            each = objectives.cross_entropy_rows(
                getattr(out, view), rows["labels"], multi_label=multi_label
            )
            each = jnp.minimum(each, config.loss_cap * guess)
            forget += objectives.mean(each, rows["has_image"])
        return config.retain_weight * keep - (1 - config.retain_weight) * forget

    def solved(loss):
        return jax.jit(jax.value_and_grad(on_one_device(loss)))(params)

    # Twice as far out: some rows are beyond the ceiling.
    params = jax.tree.map(lambda x: 2 * x, problem.params)
    value, gradient = solved(
        lambda params: program.loss(params, program.frozen, (), batch, jnp.int32(0))[0]
    )
    expected, others = solved(two_passes)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    for one, other in zip(
        jax.tree.leaves(gradient), jax.tree.leaves(others), strict=True
    ):
        most = max(np.abs(other).max(), 1.0)
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * most)


class Saying:
    """In the place of a model: its parameters are what it says, row by row."""

    def __init__(self, problem):
        rng = np.random.default_rng(0)
        size = problem.table["labels"].shape
        self.params = {"image_head": {v: rng.normal(size=size) for v in VISUAL}}

    def apply(self, params, rows, **_):
        said = {v: x[rows["row"]] for v, x in params["image_head"].items()}
        other = dict.fromkeys(Outputs._fields, None)
        return Outputs(**other | said)


def target_of_delete(problem):
    """What the original says, the gradient of DELETE at no opinion; of which rows."""
    saying = Saying(problem)
    row = jnp.arange(len(problem.table["labels"]))
    changed = problem._replace(
        model=saying, params=saying.params, table={**problem.table, "row": row}
    )
    program = METHODS["delete"](changed)
    batch = first_batch(changed, program)

    def loss(params):
        return program.loss(params, program.frozen, (), batch, 0)[0]

    zeros = jax.tree.map(jnp.zeros_like, saying.params)
    slope = jax.grad(on_one_device(loss))(zeros)["image_head"]
    rows = np.asarray(batch["unlearn"]["row"])
    seen = rows[np.asarray(problem.table["has_image"])[rows]]
    rows, times = np.unique(seen, return_counts=True)
    # As if each row counted once, and by itself.
    scale = (len(seen) / times)[:, None]
    slope = {view: scale * np.asarray(x)[rows] for view, x in slope.items()}
    said = {view: x[rows] for view, x in saying.params["image_head"].items()}
    return said, slope, rows


def test_delete_leads_to_what_the_original_says_but_for_the_truth():
    problem = bench_of(False)
    said, slope, rows = target_of_delete(problem)
    true = np.asarray(problem.table["labels"])[rows].argmax(1)
    for view in VISUAL:
        # The gradient of a cross-entropy: what is said, evenly here, less its target.
        target = 1 / toy.CLASSES - slope[view]
        left = np.array(said[view])
        left[np.arange(len(rows)), true] = -np.inf
        np.testing.assert_allclose(
            target, scipy.special.softmax(left, axis=1), atol=1e-5
        )
        assert (target.argmax(1) != true).all()


def test_delete_leads_labels_to_how_common_they_are():
    problem = bench_of(True)
    said, slope, rows = target_of_delete(problem)
    labels = np.asarray(problem.table["labels"])
    common = labels[problem.sets.retain].mean(0)
    for view in VISUAL:
        target = 1 / 2 - toy.CLASSES / 4 * slope[view]
        plain = scipy.special.expit(said[view])
        expected = np.where(labels[rows] > 0, common, plain)
        np.testing.assert_allclose(target, expected, atol=1e-5)


@pytest.mark.parametrize("name", EXECUTORS)
def test_a_text_of_another_row_is_that_of_the_next_on_any_number_of_devices(name):
    executor = EXECUTORS[name]()
    text = np.arange(48, dtype=np.int32).reshape(16, 3)
    rows = {"text": text, "has_text": np.arange(16) % 3 > 0}

    def fn(state, _, share):
        return state, gather_replicated(distillation._texts_of_next_rows(share))

    _, found = executor.compile(fn)((), (), jax.tree.map(executor.shard, rows))
    assert set(found) == {"text", "has_text"}
    for name, x in found.items():
        np.testing.assert_array_equal(x, np.roll(rows[name], -1, axis=0))


# --- labels ---------------------------------------------------------------------------


def test_wrong_labels_are_never_the_true_ones_and_any_other():
    data = toy.make_dataset(420)
    problem = toy.make_problem(parallel.vmap(1), data)._replace(method="random_label")
    wrong, rows = baselines.draw_wrong_labels(problem), problem.sets.unlearn
    true = np.asarray(problem.table["labels"])
    assert wrong.shape == true.shape and wrong.dtype == true.dtype
    np.testing.assert_array_equal(wrong.sum(1), 1)
    pairs = set(zip(true[rows].argmax(1), wrong[rows].argmax(1), strict=True))
    every = range(toy.CLASSES)
    assert pairs == {(a, b) for a in every for b in every if a != b}
    rest = np.setdiff1d(np.arange(len(true)), rows)
    np.testing.assert_array_equal(wrong[rest], true[rest])
    other = baselines.draw_wrong_labels(problem._replace(seed=1))
    assert (other != wrong).any()


def test_several_wrong_labels_are_those_of_a_row_that_is_kept():
    problem = bench_of(True)._replace(method="random_label")
    wrong, sets = baselines.draw_wrong_labels(problem), problem.sets
    true = np.asarray(problem.table["labels"])
    kept = {tuple(x) for x in true[sets.retain]}
    assert {tuple(x) for x in wrong[sets.unlearn]} <= kept
    assert (wrong[sets.unlearn] != true[sets.unlearn]).any()
    rest = np.setdiff1d(np.arange(len(true)), sets.unlearn)
    np.testing.assert_array_equal(wrong[rest], true[rest])


# --- layers ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cf_head", "cf_tail", "eu_head", "eu_tail"])
def test_the_last_layers_are_trained_on_or_anew_and_the_others_stay(name):
    problem, _ = problem_and_loop()
    program = METHODS[name](problem)
    parts = LAYERS[name[3:]]
    assert tuple(program.params) == parts
    assert set(program.frozen["modules"]) == set(problem.params) - set(parts)
    for part, tree in program.frozen["modules"].items():
        assert trees_equal(tree, problem.params[part]), part
    for part, tree in program.params.items():
        assert trees_equal(tree, problem.params[part]) == name.startswith("cf_"), part
    if name.startswith("eu_"):
        other = METHODS[name](problem._replace(seed=1)).params
        assert not any(
            trees_equal(x, program.params[part]) for part, x in other.items()
        )


# --- what comes of them ---------------------------------------------------------------

SETTINGS = {
    "model": {"image_width": 16, "text_width": 16, "dropout": 0.0},
    "train": {"epochs": 40, "batch": 40, "learning_rate": 5e-3, "weight_decay": 0.0}
    | toy.NO_AUGMENTATION,
    "gradient_ascent": {"epochs": 5.0, "learning_rate": 1e-3},
    "neggrad_plus": {"epochs": 3.0, "retain_weight": 0.5, "learning_rate": 3e-3},
    "random_label": {"epochs": 3.0, "unlearn_weight": 1.0, "learning_rate": 2e-3},
    "contrastive_unlearning": {
        "epochs": 2.0,
        "contrast_weight": 0.5,
        "learning_rate": 2e-3,
    },
    "run": {"steps_per_call": 40},
}


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A problem whose original knows pictures by heart, and a loop."""
    data = toy.make_memorizable_dataset(280)
    settings = toy.make_config(**SETTINGS)
    problem = toy.make_problem(parallel.vmap(1), data, settings, rule="random:0.25")
    loop, folder = make_loop(problem), tmp_path_factory.mktemp("none") / "none"
    outcome = loop.run("original", METHODS["original"], problem, folder, NullStage())
    problem = problem._replace(params=problem.executor.replicate(outcome.params))
    assert sureness(problem, {}, "unlearn") > 0.8
    return problem, loop


def sureness(problem, params, of):
    """Mean probability of the true class by the picture alone."""
    rows = getattr(problem.sets, of)
    params = {**problem.params, **params}
    said = problem.forward.outputs(params, problem.table, rows)["image"]
    true = np.asarray(problem.table["labels"])[rows] > 0
    return scipy.special.softmax(said, axis=1)[true].mean()


@pytest.mark.parametrize(
    "name",
    ["gradient_ascent", "neggrad_plus", "random_label", "contrastive_unlearning"],
)
def test_a_method_is_less_sure_of_what_it_has_forgotten(name, learned, tmp_path):
    problem, loop = learned
    outcome = loop.run(name, METHODS[name], problem, tmp_path / "none", NullStage())
    assert outcome.diverged is None
    before, after = (
        {of: sureness(problem, params, of) for of in ("unlearn", "retain")}
        for params in ({}, outcome.params)
    )
    assert after["unlearn"] < before["unlearn"] - 0.2
    # Who looks at the retain set at all keeps more of it than of what is forgotten.
    if name != "gradient_ascent":
        lost = {of: before[of] - after[of] for of in before}
        assert lost["retain"] < lost["unlearn"] - 0.05
