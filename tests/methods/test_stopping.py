"""Methods stop once the unlearn set looks like held-out rows, or go back to that."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ccu_jax.config.schema import Run
from ccu_jax.methods import METHODS, optimizers, stopping
from ccu_jax.metrics import classification
from ccu_jax.models import TAIL
from ccu_jax.train.program import Program
from tests import toy
from tests.toy import NullStage, make_loop, problem_and_loop, run_method, trees_equal


@pytest.mark.parametrize("multi_label", [False, True])
def test_the_stop_rule_goes_by_accuracy_or_micro_f1(multi_label):
    data = toy.make_dataset(90, multi_label=multi_label)
    rng = np.random.default_rng(0)
    logits = data.labels + 0.7 * rng.normal(size=data.labels.shape)
    logits -= 0.5 * multi_label
    seen = data.has_image
    measure = (
        classification.multi_label_scores
        if multi_label
        else classification.single_label_scores
    )
    expected = measure(logits[seen], data.labels[seen])
    found = stopping.score(logits, data.labels, seen, multi_label)
    score = "micro_f1" if multi_label else "accuracy"
    assert float(found) == pytest.approx(expected[score])


# --- the stop rule --------------------------------------------------------------------


def told_apart(known, unknown):
    """A table that the original is right of on rows `known`, and wrong on `unknown`."""
    problem, _ = problem_and_loop()
    every = np.arange(len(problem.table["labels"]))
    out = problem.forward.outputs(problem.params, problem.table, every)
    best = np.asarray(out["image"]).argmax(1)
    best[unknown] = (best[unknown] + 1) % toy.CLASSES
    labels = np.eye(toy.CLASSES, dtype=np.float32)[best]
    has_image = np.ones(len(every), bool)
    table = {**problem.table, "labels": labels, "has_image": has_image}
    return problem.executor.replicate(table)


def image_accuracy(problem, params, rows):
    out = problem.forward.outputs({**problem.params, **params}, problem.table, rows)
    guess = np.asarray(out["image"]).argmax(1)
    return (guess == np.asarray(problem.table["labels"])[rows].argmax(1)).mean()


RUNS = {
    "ccu": {"steps": 40, "stop": True, "learning_rate": 5e-2, "inverse_contrast": 5.0},
    "gradient_ascent_stop": {"epochs": 40.0, "learning_rate": 2e-2, "check_every": 2},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_method_stops_by_its_rule_as_soon_as_it_holds(name, tmp_path):
    problem, _ = problem_and_loop()
    sets = problem.sets
    # One compiled program for all: many steps in calls of 5.
    loop = make_loop(problem, Run(checkpoint_steps=5, steps_per_call=5))
    solve = functools.partial(run_method, name, loop=loop, changes={name: RUNS[name]})
    forgotten = told_apart(sets.validation, sets.unlearn)
    outcome, _ = solve(tmp_path / "forgotten", table=forgotten)
    assert outcome.steps == 0
    assert trees_equal(
        outcome.params, {part: problem.params[part] for part in outcome.params}
    )
    assert set(outcome.params) == set(TAIL if name == "ccu" else problem.params)

    remembered = told_apart(sets.unlearn, sets.validation)
    outcome, changed = solve(tmp_path / "remembered", table=remembered)
    accuracy = functools.partial(image_accuracy, changed)
    assert accuracy(problem.params, sets.unlearn) == 1
    assert accuracy(problem.params, sets.validation) == 0
    most = METHODS[name](changed).steps
    assert 0 < outcome.steps < most, "it stopped because of what it saw, in mid-run"
    assert outcome.steps % changed.method_config.check_every == 0
    assert accuracy(outcome.params, sets.unlearn) <= accuracy(
        outcome.params, sets.validation
    )


def test_a_method_stops_only_when_it_is_asked_to(tmp_path):
    sets = problem_and_loop()[0].sets
    forgotten = told_apart(sets.validation, sets.unlearn)
    outcome, _ = run_method("ccu", tmp_path, table=forgotten)
    assert outcome.steps == 3


def test_no_more_rows_are_looked_at_than_are_needed(monkeypatch):
    problem, _ = problem_and_loop()
    monkeypatch.setattr(stopping, "MAX_ROWS", 5)
    changed = problem._replace(method="gradient_ascent_stop")
    has = np.asarray(problem.table["has_image"])
    assert has[problem.sets.unlearn].sum() > 5
    parts = stopping.monitored_tables(changed)
    for part in parts.values():
        assert 0 < np.asarray(part["has_image"]).sum() <= 5


# --- rewinding ------------------------------------------------------------------------

RATE = 0.1


def climb(problem, steps, looks, held):
    """A program whose one weight climbs by `RATE` times a cosine, with rewinding.

    The score of the unlearn set is the weight itself, that of held-out rows `held`
    times the weight.
    """
    plan = {"rows": problem.plan_batches(np.arange(20), 4, steps, "rows")}
    program = Program(
        params={"w": jnp.float32(0), "held": jnp.float32(held)},
        frozen=(),
        loss=lambda params, frozen, aux, batch, step: (-params["w"], {}),
        optimizer=optax.chain(optimizers.scale_by_learning_rate()),
        optimizer_inputs={"rate": {"all": optimizers.cosine_schedule(RATE, steps)}},
        table={"x": jnp.zeros(20)},
        plan=plan,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            stopping,
            "make_score_fn",
            lambda problem: lambda x, _: (x["w"], x["held"] * x["w"]),
        )
        patch.setattr(stopping, "monitored_tables", lambda problem: {})
        return stopping.with_rewind(problem, program, looks)


def heights(steps, looks):
    """The weight at each look, the last of them after the last step."""
    rates = [
        float(optimizers.cosine_schedule(RATE, steps).rate_at(step))
        for step in range(steps)
    ]
    every = -(-steps // looks)
    places = [min(place * every, steps) for place in range(looks + 1)]
    return np.concatenate([[0.0], np.cumsum(rates)])[places]


@pytest.mark.parametrize("steps, looks", [(10, 4), (12, 4), (7, 1), (5, 5)])
def test_rewinding_takes_the_look_that_is_nearest_to_held_out_rows(
    steps, looks, tmp_path
):
    problem, _ = problem_and_loop()
    loop = make_loop(problem, Run(steps_per_call=4))
    at = heights(steps, looks)
    # The first look is at the original, which is never taken.
    for wanted, height in list(enumerate(at))[1:]:
        # What held-out rows score at the last look is what counts.
        held = height / at[-1]
        outcome = loop.run(
            "climb",
            lambda problem, held=held: climb(problem, steps, looks, held),
            problem,
            tmp_path / str(wanted),
            NullStage(),
        )
        assert float(outcome.params["w"]) == pytest.approx(height, abs=1e-6), wanted
        # Beyond the last step stands one whose rate is zero, for the last look.
        assert outcome.steps == -(-steps // looks) * looks + 1


def test_rewinding_of_other_lengths_is_what_it_is_alone(tmp_path):
    problem, _ = problem_and_loop()
    loop = make_loop(problem, Run(steps_per_call=4))
    for steps in (10, 14, 6):
        at = heights(steps, 3)
        outcome = loop.run(
            "climb",
            lambda problem, s=steps, h=at: climb(problem, s, 3, h[2] / h[-1]),
            problem,
            tmp_path / "none",
            NullStage(),
        )
        assert float(outcome.params["w"]) == pytest.approx(at[2], abs=1e-6), steps


def test_scrub_with_rewinding_looks_at_the_end_of_every_epoch(tmp_path):
    settings = {
        "scrub_rewind": {"epochs": 2, "ascent_epochs": 1, "learning_rate": 2e-2}
    }
    outcome, problem = run_method("scrub_rewind", tmp_path, changes=settings)
    program = METHODS["scrub_rewind"](problem)
    assert all(len(x) == 3 for x in jax.tree.leaves(program.aux["checkpoints"]))
    assert program.steps == 2 * program.refresh_every + 1

    def apart(params):
        score = functools.partial(image_accuracy, problem, params)
        return abs(score(problem.sets.unlearn) - score(problem.sets.validation))

    assert apart(outcome.params) < apart({})
