"""The stop rule and the rewinding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ccu_jax.config.schema import Run, Train
from ccu_jax.methods import METHODS, optimizers, stopping
from ccu_jax.metrics import classification
from ccu_jax.models import TAIL
from ccu_jax.train.program import Program
from tests import toy
from tests.toy import make_loop, trees_equal


@pytest.mark.parametrize("multi_label", [False, True])
def test_score_is_accuracy_or_micro_f1(multi_label):
    data = toy.make_dataset(90, multi_label=multi_label)
    rng = np.random.default_rng(0)
    logits = data.labels + 0.7 * rng.normal(size=data.labels.shape)
    logits -= 0.5 * multi_label
    rows = data.has_image
    score_fn, name = classification.single_label_scores, "accuracy"
    if multi_label:
        score_fn, name = classification.multi_label_scores, "micro_f1"
    expected = score_fn(logits[rows], data.labels[rows])[name]
    found = stopping.compute_score(logits, data.labels, rows, multi_label)
    assert float(found) == pytest.approx(expected)


# --- the stop rule --------------------------------------------------------------------


def image_accuracy(problem, params, rows):
    params = {**problem.params, **params}
    rows = rows[np.asarray(problem.table["has_image"])[rows]]
    logits = problem.forward.compute_outputs(params, problem.table, rows)["image"]
    labels = np.asarray(problem.table["labels"])[rows]
    return (np.asarray(logits).argmax(1) == labels.argmax(1)).mean()


CONFIGS = {
    "ccu": {"steps": 40, "stop": True, "learning_rate": 5e-2, "inverse_contrast": 5.0},
    "gradient_ascent_stop": {"epochs": 40.0, "learning_rate": 2e-2, "check_every": 2},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_method_stops_as_soon_as_the_rule_holds(name, tmp_path, problem, run_method):
    sets = problem.sets
    loop = make_loop(problem, Run(checkpoint_steps=5, steps_per_call=5))
    run = functools.partial(run_method, name, loop=loop, changes={name: CONFIGS[name]})
    labels = np.array(problem.table["labels"])
    labels[sets.unlearn] = np.roll(labels[sets.unlearn], 1, axis=1)
    unlearned = {**problem.table, "labels": problem.executor.replicate(labels)}
    outcome, _ = run(tmp_path / "unlearned", table=unlearned)
    assert outcome.steps == 0
    assert set(outcome.params) == set(TAIL if name == "ccu" else problem.params)
    for module, tree in outcome.params.items():
        assert trees_equal(tree, problem.params[module])
    if name == "ccu":  # without the rule it does not stop
        outcome, _ = run_method("ccu", tmp_path, table=unlearned)
        assert outcome.steps == 3

    outcome, changed = run(tmp_path / "memorized")
    accuracy = functools.partial(image_accuracy, changed)
    assert accuracy(problem.params, sets.unlearn) == 1
    assert accuracy(problem.params, sets.validation) == 0
    assert 0 < outcome.steps < METHODS[name](changed).steps
    assert outcome.steps % changed.method_config.check_every == 0
    unlearn, heldout = (
        accuracy(outcome.params, rows) for rows in (sets.unlearn, sets.validation)
    )
    assert unlearn <= heldout


def test_monitored_rows_are_subsampled(monkeypatch, problem):
    monkeypatch.setattr(stopping, "MAX_ROWS", 5)
    has_image = np.asarray(problem.table["has_image"])
    assert has_image[problem.sets.unlearn].sum() > 5
    for table in stopping.make_monitored_tables(problem).values():
        assert 0 < np.asarray(table["has_image"]).sum() <= 5


# --- rewinding ------------------------------------------------------------------------

RATE = 0.1


def make_climb(steps, num_checkpoints, heldout, problem):
    """Returns a rewinding program whose weight grows by the learning rate each step.

    The unlearn score is the weight, the held-out score `heldout` times the weight.
    """
    program = Program(
        params={"w": jnp.float32(0), "heldout": jnp.float32(heldout)},
        frozen=(),
        loss=lambda params, frozen, aux, batch, step: (-params["w"], {}),
        optimizer=optimizers.scale_by_learning_rate("rest"),
        optimizer_inputs=optimizers.make_optimizer_inputs(RATE, steps, Train()),
        table={"x": jnp.zeros(20)},
        plan={"rows": problem.plan_batches(np.arange(20), 4, steps, "rows")},
    )
    return stopping.add_rewind(problem, program, num_checkpoints)


def test_rewinding_selects_the_checkpoint_nearest_to_the_heldout_score(
    tmp_path, problem, monkeypatch
):
    def make_score_fn(problem):
        return lambda params, _: (params["w"], params["heldout"] * params["w"])

    monkeypatch.setattr(stopping, "make_score_fn", make_score_fn)
    monkeypatch.setattr(stopping, "make_monitored_tables", lambda problem: {})
    # One loop, because executables must be shared between lengths.
    loop = make_loop(problem, Run(steps_per_call=4))
    for steps, num_checkpoints in [(10, 4), (12, 4), (7, 1), (5, 5), (14, 4)]:
        inputs = optimizers.make_optimizer_inputs(RATE, steps, Train())
        rates = [float(inputs["rate"]["rest"].rate_at(step)) for step in range(steps)]
        every = -(-steps // num_checkpoints)
        # The original, at checkpoint 0, is never selected.
        ends = [min(i * every, steps) for i in range(1, num_checkpoints + 1)]
        weights = np.cumsum(rates)[np.array(ends) - 1]
        for weight in weights:
            heldout = weight / weights[-1]
            climb = functools.partial(make_climb, steps, num_checkpoints, heldout)
            folder = tmp_path / f"{steps} {num_checkpoints} {heldout}"
            outcome = loop.run("climb", climb, problem, folder, toy.NullStage())
            assert float(outcome.params["w"]) == pytest.approx(weight, abs=1e-6)
            # A step with learning rate 0 follows the last checkpoint.
            assert outcome.steps == every * num_checkpoints + 1


def test_scrub_with_rewinding_keeps_a_checkpoint_per_epoch(problem):
    config = toy.make_config(scrub_rewind={"epochs": 2, "ascent_epochs": 1})
    program = METHODS["scrub_rewind"](problem._replace(config=config))
    # Slot 0 is the original.
    assert all(len(x) == 3 for x in jax.tree.leaves(program.aux["checkpoints"]))
    assert program.steps == 2 * program.refresh_every + 1
