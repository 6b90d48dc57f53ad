"""Every method x every property that all of them must have, in one process.

Of a few methods, one for each way of working, in every run of the tests; of all of them
with `pytest -m table`.
"""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ccu_jax.config.schema import Config
from ccu_jax.distributed import executors as parallel
from ccu_jax.evaluate import predictions
from ccu_jax.evaluate.forward import Forward
from ccu_jax.methods import METHODS, REFERENCES
from ccu_jax.methods.ccu import closed_loop
from ccu_jax.models import TAIL, TEXT
from tests import toy
from tests.toy import (
    TRACE_COUNTS,
    NullStage,
    count_traces,
    make_loop,
    merge_shards,
    problem_and_loop,
    run_method,
    scaled_hyperparameters,
    trees_equal,
    with_fitted_labels,
)

HEADS = ("image_projection", "image_head", "fused_head")
# What a method trains, where it is not every part.
TRAINED = {
    **dict.fromkeys(("cf_head", "eu_head"), HEADS),
    **dict.fromkeys(("cf_tail", "eu_tail"), TAIL),
    **dict.fromkeys(("ccu", "ccu_no_stop", "ccu_gated", "ccu_plus"), TAIL),
    "ccu_plus_full": (*TAIL, "image_trunk"),
}
PROJECTIONS = ("image_projection", "text_projection")
CLOSED = ("ssd",)  # they make no steps
# They leave alone to the bit what no gradient of the unlearn set's loss leads to.
STILL = (*CLOSED, "salun", "salun_stop")
# Parts that nothing a method looks at hangs on: they only decay, whatever is drawn.
UNSEEN = {
    **dict.fromkeys(
        ("gradient_ascent", "gradient_ascent_stop", "delete", *STILL),
        (*PROJECTIONS, "text_head"),
    ),
    **dict.fromkeys(("bad_teacher", "bad_teacher_stop"), PROJECTIONS),
    "multidelete": (*PROJECTIONS, "image_head", "text_head"),
}
# They draw nothing from the seed where they look at all rows.
DETERMINED = ("ssd",)
FAST = ("original", "ccu", "ccu_plus", "ssd", "scrub_rewind")
SLOW = ("neggrad_plus", "scrub", "salun", "gradient_ascent_stop", "ccu_plus_full")


def these(fast=FAST, slow=SLOW, of=tuple(METHODS)):
    """The methods as parameters of a test: the rest of them is for the whole table."""
    marks = dict.fromkeys(slow, pytest.mark.slow) | dict.fromkeys(fast, ())
    return pytest.mark.parametrize(
        "name",
        [pytest.param(n, marks=marks.get(n, pytest.mark.table)) for n in of],
    )


def test_the_table_knows_every_method():
    for names in (TRAINED, UNSEEN, CLOSED, FAST, SLOW):
        assert set(names) <= set(METHODS)


@these()
def test_a_run_changes_what_it_trains_and_nothing_else(name, tmp_path):
    original = jax.device_get(problem_and_loop()[0].params)
    outcome, problem = run_method(name, tmp_path)
    trained = set(TRAINED.get(name, original))
    assert set(outcome.params) == trained
    # The original is used again by the next method.
    assert trees_equal(problem.params, original)
    start = original if name in CLOSED else METHODS[name](problem).params
    for part in trained:
        stays = name in STILL and part in UNSEEN[name]
        assert trees_equal(outcome.params[part], start[part]) == stays, part
        assert jax.tree.structure(outcome.params[part]) == jax.tree.structure(
            original[part]
        )
    params = {**problem.params, **outcome.params}
    for part in set(original) - trained:
        assert trees_equal(params[part], original[part]), part
    if trained.isdisjoint(TEXT):
        rows = problem.sets.unlearn
        before = problem.forward.outputs(problem.params, problem.table, rows)
        after = problem.forward.outputs(params, problem.table, rows)
        for out in ("text", "z_text", "h_text"):
            assert trees_equal(before[out], after[out]), out
        for out in ("image", "fused", "z_image"):
            assert not trees_equal(before[out], after[out]), out


@these()
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(name, tmp_path):
    first, again, other = (
        run_method(name, tmp_path, seed=seed)[0] for seed in (0, 0, 1)
    )
    assert trees_equal(first.params, again.params)
    for part in first.params:
        # What only decays does so for as long as the run lasts.
        decays = part in UNSEEN.get(name, ()) and first.steps == other.steps
        hangs = name not in DETERMINED and not decays
        assert trees_equal(first.params[part], other.params[part]) != hangs, part


@these()
def test_a_program_is_traced_once_for_all_its_calls_and_seeds(name, tmp_path):
    problem, _ = problem_and_loop()
    if name not in CLOSED:
        program = METHODS[name](problem)
        if program.is_fully_sharded:
            assert program.steps < problem.config.run.checkpoint_steps, "one call"
        else:
            # Two calls of the compiled steps at least, the last not always full.
            assert problem.config.run.steps_per_call < program.steps
    for seed in (0, 1, 2):
        run_method(name, tmp_path, seed=seed)
    # In all tests of this file together.
    assert TRACE_COUNTS[name] == (name not in CLOSED)
    if name in CLOSED:
        assert (
            problem.forward.compile_cached("gradients squared=True", None)._cache_size()
            == 1
        )


@these(
    fast=("ccu", "scrub_rewind"),
    slow=(),
    of=[n for n in METHODS if n not in REFERENCES],
)
def test_other_weights_and_rates_need_no_other_program(name, tmp_path):
    traces = collections.Counter()
    problem, _ = problem_and_loop()
    loop = make_loop(problem)
    numbers = scaled_hyperparameters(getattr(problem.config, name))
    changed = problem._replace(config=toy.make_config(**{name: numbers}))
    first, second = (
        loop.run(name, count_traces(name, traces), of, tmp_path / "none", NullStage())
        for of in (problem, changed)
    )
    assert traces[name] == (name not in CLOSED)
    for part in set(first.params) - set(UNSEEN.get(name, ())):
        assert not trees_equal(first.params[part], second.params[part]), part
    apart = make_loop(problem).run(
        name, METHODS[name], changed, tmp_path / "none", NullStage()
    )
    assert trees_equal(second.params, apart.params)


@these(fast=("ssd",), slow=("original", "ccu_plus", "salun", "scrub_rewind"))
def test_a_learning_rate_of_zero_changes_nothing(name, tmp_path):
    still = {"learning_rate": 0.0}
    sections = [n if hasattr(Config(), n) else "train" for n in METHODS]
    changes = dict.fromkeys(set(sections) - set(CLOSED), still)
    # Which takes no steps: as if no weight mattered to the unlearn set.
    changes["ssd"] = {"alpha": 1e30}
    problem, _ = problem_and_loop()
    outcome, problem = run_method(
        name, tmp_path, changes=changes, loop=make_loop(problem)
    )
    if name in REFERENCES:
        expected = problem.model.init(problem.make_key("init"))
    else:
        expected = {part: problem.params[part] for part in outcome.params}
    fresh = problem.model.init(problem.make_key("fresh"))
    if name.startswith("eu_"):
        expected = {part: fresh[part] for part in expected}
    if getattr(getattr(problem.config, name, None), "shrink", 1.0) < 1:
        shrunken = METHODS[name](problem).params
        for part in TAIL:
            jax.tree.map(
                lambda x, old, new: np.testing.assert_allclose(
                    x, 0.4 * old + 0.6 * new, atol=1e-6
                ),
                *(tree[part] for tree in (shrunken, expected, fresh)),
            )
        expected = shrunken
    assert trees_equal(outcome.params, expected)


def requests(problem):
    """Seeds, and sets of other sizes and with other rows that have no picture."""
    sets, bare = problem.sets, np.zeros(0, int)
    fewer = sets._replace(
        unlearn=sets.unlearn[:-2],
        retain=np.sort(np.concatenate([sets.retain[5:], sets.unlearn[-2:]])),
        validation=sets.validation[1:],
    )
    for seed, chosen, now_bare in (
        (0, sets, bare),
        (1, fewer, bare),
        (2, sets, sets.unlearn[:1]),
        (3, fewer, sets.retain[3:4]),
    ):
        has = np.array(problem.table["has_image"])
        has[now_bare] = False
        table = {**problem.table, "has_image": problem.executor.replicate(has)}
        yield {"seed": seed, "sets": chosen, "table": table}


@these()
def test_seeds_and_requests_of_other_sizes_share_one_program(
    name, tmp_path, monkeypatch
):
    problem, _ = problem_and_loop()
    loop = make_loop(problem)
    forward = Forward(problem.model, problem.executor, 32)
    traces, plans = collections.Counter(), []

    def prepare(*args, **kwargs):
        traces["targets"] += 1
        return prepare_it(*args, **kwargs)

    prepare_it = closed_loop.fit_prior
    monkeypatch.setattr(closed_loop, "fit_prior", prepare)
    for request in requests(problem):
        changed = problem._replace(forward=forward, method=name, **request)
        method = count_traces(name, traces)
        folder = tmp_path / f"none-{request['seed']}"
        outcome = loop.run(name, method, changed, folder, NullStage())
        assert outcome.diverged is None
        plan = method(changed).plan or {"none": np.array(request["seed"])}
        plans.append({len(set(rows.ravel())) for rows in plan.values()})
    # What was compiled for another request has come to what its own would.
    alone = make_loop(problem).run(name, METHODS[name], changed, folder, NullStage())
    assert trees_equal(outcome.params, alone.params)
    if name in CLOSED:
        assert forward.compile_cached("gradients squared=True", None)._cache_size() == 1
        return
    # The methods could tell the requests apart.
    assert plans[0] != plans[1]
    assert traces[name] == 1
    forms = ("ccu_plus", "ccu_gated", "ccu_plus_full")
    assert traces["targets"] == (name in forms)


ALLOWED = {
    "original": ("retain", "unlearn"),
    "retrain_visual": ("retain", "unlearn"),
    "retrain_visual_2": ("retain", "unlearn"),
    "scrub": ("retain", "unlearn"),
    "scrub_rewind": ("retain", "unlearn"),
    "sfron": ("retain", "unlearn"),
}


def test_the_rows_of_each_method_are_those_it_may_learn_from():
    problem, _ = problem_and_loop()
    sets = problem.sets
    for name in set(METHODS) - set(CLOSED):
        program = METHODS[name](problem)
        if program.is_fully_sharded:
            continue
        for part, plan in program.plan.items():
            of = ALLOWED.get(name, ("retain",)) if part == "rows" else (part,)
            rows = {row for each in of for row in getattr(sets, each)}
            assert set(plan.ravel()) <= rows, (name, part)
            assert plan.shape[1] == (8 if part == "unlearn" else 16)
            assert plan.dtype == np.int32


PARTS = {
    **dict.fromkeys(("cf_head", "cf_tail", "eu_head", "eu_tail"), ("retain",)),
    **dict.fromkeys(("ccu", "ccu_no_stop"), ("retain", "unlearn")),
}


@pytest.mark.parametrize("name", TRAINED)
def test_methods_on_parts_look_at_rows_with_a_picture_alone(name):
    problem, _ = problem_and_loop()
    sets = problem.sets
    program = METHODS[name](problem)
    has = np.asarray(problem.table["has_image"])
    every = ("unlearn", "validation", "retain")
    unlearn, held, retain = (getattr(sets, of)[has[getattr(sets, of)]] for of in every)
    rows = {"unlearn": unlearn, "held": held, "retain": retain}
    expected = PARTS.get(name, tuple(rows))
    assert program.is_fully_sharded and set(program.plan) == set(expected)
    for part, plan in program.plan.items():
        assert set(plan.ravel()) <= set(range(len(rows[part])))
    assert set(expected) <= set(program.sharded_tables) <= set(rows)
    for part, cut in program.sharded_tables.items():
        table, of = merge_shards(cut), rows[part]
        labels = np.asarray(problem.table["labels"])[of]
        np.testing.assert_array_equal(table["labels"][: len(of)], labels)
        np.testing.assert_array_equal(table["row"], np.arange(len(table["row"])))
        # What fills up a table is known by that it has no picture.
        assert table["has_image"].tolist() == [
            place < len(of) for place in range(len(table["row"]))
        ]
        for column, x in table.items():
            assert column == "row" or not x[len(of) :].any(), column
        if "image" in table:
            image = np.asarray(problem.table["image"])[of]
            np.testing.assert_array_equal(table["image"][: len(of)], image)


@these(fast=(), slow=("neggrad_plus", "scrub", "ccu", "ccu_plus"))
def test_rows_may_have_several_labels(name, tmp_path):
    data, executor = toy.make_dataset(multi_label=True), parallel.vmap(1)
    settings = toy.make_config(ccu={"stop": True})
    problem = with_fitted_labels(toy.make_problem(executor, data, settings))
    outcome = make_loop(problem).run(
        name, METHODS[name], problem, tmp_path / "none", NullStage()
    )
    assert outcome.diverged is None and (outcome.steps > 0 or name in CLOSED)
    start = problem.params if name in CLOSED else METHODS[name](problem).params
    for part in outcome.params:
        stays = name in STILL and part in UNSEEN[name]
        assert trees_equal(outcome.params[part], start[part]) == stays, part
    params = {**problem.params, **outcome.params}
    found = predictions.predict_all_splits(
        problem.forward, params, problem.table, data, problem.sets
    )
    assert "micro_f1" in predictions.compute_scores(found)["test"]["fused"]


@these(fast=(), slow=("original", "ccu", "ccu_plus"))
def test_methods_run_in_bfloat16_also_on_features_of_that_kind(name, tmp_path):
    settings = toy.make_config(model={"dtype": "bfloat16"}, ccu={"stop": True})
    problem = with_fitted_labels(toy.make_problem(parallel.vmap(2), settings=settings))
    program = METHODS[name](problem)
    if name in TRAINED and name != "ccu_plus_full":
        kinds = {
            part: x["features"].dtype for part, x in program.sharded_tables.items()
        }
        assert set(kinds.values()) == {jnp.dtype("bfloat16")}
    outcome = make_loop(problem).run(
        name, METHODS[name], problem, tmp_path / "none", NullStage()
    )
    assert outcome.diverged is None
    start = problem.params if name in CLOSED else program.params
    for part, tree in outcome.params.items():
        stays = name in STILL and part in UNSEEN[name]
        assert trees_equal(tree, start[part]) == stays, part
        for x in jax.tree.leaves(tree):
            assert x.dtype == jnp.float32 and np.isfinite(x).all()
