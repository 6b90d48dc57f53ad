"""Properties that every method must have.

By default they run for a few methods, one of each kind; `pytest -m table` runs them for
all methods.
"""

import collections
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ccu_jax.config.schema import Config
from ccu_jax.distributed import executors
from ccu_jax.evaluate.forward import Forward
from ccu_jax.methods import METHODS, REFERENCES
from ccu_jax.methods.ccu import closed_loop
from ccu_jax.models import TAIL, TEXT
from tests import toy
from tests.toy import make_loop, trees_equal

HEADS = ("image_projection", "image_head", "fused_head")
# The modules of methods that do not train all.
TRAINED = {
    **dict.fromkeys(("cf_head", "eu_head"), HEADS),
    **dict.fromkeys(("cf_tail", "eu_tail"), TAIL),
    **dict.fromkeys(("ccu", "ccu_no_stop", "ccu_gated", "ccu_plus"), TAIL),
    "ccu_plus_full": (*TAIL, "image_trunk"),
}
PROJECTIONS = ("image_projection", "text_projection")
CLOSED = ("ssd",)  # without steps
# Parameters without gradient of the unlearn set's loss stay the same to the bit.
MASKED = (*CLOSED, "salun", "salun_stop")
# Modules that the loss does not depend on; weight decay still changes them.
UNUSED = {
    **dict.fromkeys(
        ("gradient_ascent", "gradient_ascent_stop", "delete", *MASKED),
        (*PROJECTIONS, "text_head"),
    ),
    **dict.fromkeys(("bad_teacher", "bad_teacher_stop"), PROJECTIONS),
    "multidelete": (*PROJECTIONS, "image_head", "text_head"),
}
FAST = ("original", "ccu", "ccu_plus", "ssd", "scrub_rewind")
SLOW = ("neggrad_plus", "scrub", "salun", "gradient_ascent_stop", "ccu_plus_full")
UNLEARNING = [name for name in METHODS if name not in REFERENCES]


def each_method(fast=FAST, slow=SLOW, names=tuple(METHODS)):
    """Parametrizes a test; methods that are neither fast nor slow have mark `table`."""
    marks = dict.fromkeys(slow, pytest.mark.slow) | dict.fromkeys(fast, ())
    return pytest.mark.parametrize(
        "name", [pytest.param(n, marks=marks.get(n, pytest.mark.table)) for n in names]
    )


def assert_trained(name, problem, outcome):
    """Checks that all trained modules changed, except those masked by the method."""
    start = problem.params if name in CLOSED else METHODS[name](problem).params
    for module in outcome.params:
        is_same = name in MASKED and module in UNUSED[name]
        assert trees_equal(outcome.params[module], start[module]) == is_same, module


@each_method()
def test_run_changes_only_trained_modules(name, tmp_path, problem, run_method):
    original = jax.device_get(problem.params)
    outcome, problem = run_method(name, tmp_path)
    trained = set(TRAINED.get(name, original))
    assert set(outcome.params) == trained
    assert trees_equal(problem.params, original)
    assert_trained(name, problem, outcome)
    if trained.isdisjoint(TEXT):
        rows = problem.sets.unlearn
        before, after = (
            problem.forward.compute_outputs(
                {**problem.params, **params}, problem.table, rows
            )
            for params in ({}, outcome.params)
        )
        for output in ("text", "z_text", "h_text"):
            assert trees_equal(before[output], after[output]), output
        for output in ("image", "fused", "z_image"):
            assert not trees_equal(before[output], after[output]), output


@each_method()
def test_results_depend_on_the_seed_only(name, tmp_path, run_method):
    first, again, other = (
        run_method(name, tmp_path, seed=seed)[0] for seed in (0, 0, 1)
    )
    assert trees_equal(first.params, again.params)
    for module in first.params:
        # Weight decay alone depends on the number of steps, not on the seed.
        decays = module in UNUSED.get(name, ()) and first.steps == other.steps
        is_same = name in CLOSED or decays
        assert trees_equal(first.params[module], other.params[module]) == is_same


@each_method(fast=("ssd",), slow=("original", "ccu_plus", "salun", "scrub_rewind"))
def test_learning_rate_of_zero_changes_nothing(name, tmp_path, problem, run_method):
    sections = {n if hasattr(Config(), n) else "train" for n in METHODS}
    changes = {n: {"learning_rate": 0.0} for n in sections - set(CLOSED)}
    changes["ssd"] = {"alpha": 1e30}
    loop = make_loop(problem)
    outcome, problem = run_method(name, tmp_path, changes=changes, loop=loop)
    expected = {module: problem.params[module] for module in outcome.params}
    fresh = problem.model.init(problem.make_key("fresh"))
    if name in REFERENCES:
        expected = problem.model.init(problem.make_key("init"))
    if name.startswith("eu_"):
        expected = {module: fresh[module] for module in expected}
    if getattr(getattr(problem.config, name, None), "shrink", 1.0) < 1:
        original, fresh = ({m: x[m] for m in TAIL} for x in (expected, fresh))
        mixed = jax.tree.map(lambda a, b: 0.4 * a + 0.6 * b, original, fresh)
        expected = METHODS[name](problem).params
        chex.assert_trees_all_close({m: expected[m] for m in TAIL}, mixed, atol=1e-6)
    assert trees_equal(outcome.params, expected)


def make_requests(problem, name):
    """Yields requests of other seeds, sizes, rows without image, hyperparameters."""
    sets, none = problem.sets, np.zeros(0, int)
    fewer = sets._replace(
        unlearn=sets.unlearn[:-2],
        retain=np.sort(np.concatenate([sets.retain[5:], sets.unlearn[-2:]])),
        validation=sets.validation[1:],
    )
    for seed, chosen, without_image in (
        (0, sets, none),
        (1, fewer, none),
        (2, sets, sets.unlearn[:1]),
        (3, fewer, sets.retain[3:4]),
    ):
        has_image = np.array(problem.table["has_image"])
        has_image[without_image] = False
        has_image = problem.executor.replicate(has_image)
        table = {**problem.table, "has_image": has_image}
        request = problem._replace(method=name, seed=seed, sets=chosen, table=table)
        yield request
    if name in UNLEARNING:
        numbers = toy.scaled_hyperparameters(request.method_config)
        yield request._replace(config=toy.make_config(**{name: numbers}))


@each_method()
def test_all_requests_share_an_executable(name, tmp_path, monkeypatch, problem):
    loop = make_loop(problem)
    problem = problem._replace(forward=Forward(problem.model, problem.executor, 32))
    traces, plans, outcomes = collections.Counter(), [], []
    fit_prior = mock.Mock(wraps=closed_loop.fit_prior)
    monkeypatch.setattr(closed_loop, "fit_prior", fit_prior)
    for request in make_requests(problem, name):
        outcome, _ = toy.run_method(request, loop, name, tmp_path, traces=traces)
        outcomes.append(outcome.params)
        plan = METHODS[name](request).plan or {"none": np.array(request.seed)}
        plans.append({len(set(rows.ravel())) for rows in plan.values()})
    # The shared executable computes what an executable of this request would.
    expected, _ = toy.run_method(request, make_loop(problem), name, tmp_path)
    assert trees_equal(outcomes[-1], expected.params)
    if name in UNLEARNING:
        for module in set(expected.params) - set(UNUSED.get(name, ())):
            assert not trees_equal(outcomes[-2][module], outcomes[-1][module]), module
    if name in CLOSED:
        key = "gradients squared=True"
        assert problem.forward.compile_cached(key, None)._cache_size() == 1
        return
    assert plans[0] != plans[1], "requests differ"
    assert traces[name] == 1
    is_closed_loop = name in ("ccu_plus", "ccu_gated", "ccu_plus_full")
    assert fit_prior.call_count == is_closed_loop


def test_methods_on_images_use_only_rows_they_may_learn_from(problem):
    sets = problem.sets
    use_both = ("original", "retrain_visual", "retrain_visual_2")
    use_both += ("scrub", "scrub_rewind", "sfron")
    for name in set(METHODS) - set(CLOSED):
        program = METHODS[name](problem)
        if program.is_fully_sharded:
            continue
        for part, plan in program.plan.items():
            splits = ("retain",) if part == "rows" else (part,)
            splits = ("retain", "unlearn") if name in use_both else splits
            rows = np.concatenate([getattr(sets, split) for split in splits])
            assert set(plan.ravel()) <= set(rows), (name, part)
            assert plan.shape[1] == (8 if part == "unlearn" else 16)
            assert plan.dtype == np.int32


@pytest.mark.parametrize("name", TRAINED)
def test_programs_on_cached_features_have_their_modules_and_rows(name, problem):
    sets, program = problem.sets, METHODS[name](problem)
    assert tuple(program.params) == TRAINED[name]
    frozen = program.frozen["modules"]
    assert set(frozen) == set(problem.params) - set(TRAINED[name])
    for module, tree in (program.params | frozen).items():
        is_original = module in frozen or not name.startswith(("eu_", "ccu_"))
        if is_original or name.startswith("eu_"):
            same = trees_equal(tree, problem.params[module])
            assert same == is_original, module
    has_image = np.asarray(problem.table["has_image"])
    splits = {"unlearn": sets.unlearn, "held": sets.validation, "retain": sets.retain}
    rows = {part: split[has_image[split]] for part, split in splits.items()}
    expected = set(rows)
    if name.startswith(("cf_", "eu_")):
        expected = {"retain"}
    elif name in ("ccu", "ccu_no_stop"):
        expected = {"retain", "unlearn"}
    assert program.is_fully_sharded and set(program.plan) == expected
    for part, plan in program.plan.items():
        assert set(plan.ravel()) <= set(range(len(rows[part])))
    assert expected <= set(program.sharded_tables) <= set(rows)
    for part, shards in program.sharded_tables.items():
        table, num_rows = toy.merge_shards(shards), len(rows[part])
        assert table["has_image"][:num_rows].all()
        np.testing.assert_array_equal(table["row"][:num_rows], np.arange(num_rows))
        for column in {"labels", "image"} & set(table):
            original = np.asarray(problem.table[column])[rows[part]]
            np.testing.assert_array_equal(table[column][:num_rows], original)
        for column, x in table.items():
            assert not x[num_rows:].any(), column


@pytest.mark.parametrize("multi_label, dtype", [(True, "float32"), (False, "bfloat16")])
@each_method(fast=(), slow=("neggrad_plus", "scrub", "ccu", "ccu_plus"))
def test_multiple_labels_and_bfloat16(name, multi_label, dtype, tmp_path):
    data = toy.make_dataset(multi_label=multi_label)
    config = toy.make_config(model={"dtype": dtype}, ccu={"stop": True})
    problem = toy.make_problem(executors.vmap(2), data, config)
    problem = toy.with_fitted_labels(problem)
    if name in TRAINED and name != "ccu_plus_full":
        for table in METHODS[name](problem).sharded_tables.values():
            assert table["features"].dtype == jnp.dtype(dtype)
    outcome, _ = toy.run_method(problem, make_loop(problem), name, tmp_path)
    assert outcome.steps > 0 or name in CLOSED
    assert_trained(name, problem, outcome)
    for x in jax.tree.leaves(outcome.params):
        assert x.dtype == jnp.float32 and np.isfinite(x).all()
