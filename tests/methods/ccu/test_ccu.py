"""CCU: every objective of it counts, and planted memory of pictures goes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ccu_jax.distributed import executors as parallel
from ccu_jax.distributed.device_tables import gather_rows
from ccu_jax.evaluate import predictions
from ccu_jax.methods import METHODS
from ccu_jax.models import TAIL
from tests import toy
from tests.toy import (
    NullStage,
    make_loop,
    merge_shards,
    on_one_device,
    problem_and_loop,
)

BOTH = ("pair_dissociation", "retention", "separation")
WEIGHTS = {
    "ccu": ("inverse_contrast", *BOTH),
    "ccu_plus": (
        "target_match",
        "match_confidence",
        "task_loss",
        "heldout_retention",
        *BOTH,
    ),
    "ccu_gated": ("gated_push", "task_loss", "heldout_retention", *BOTH),
}


def terms_of(name, **weights):
    """`(params) -> the weighted objectives by name` on the first batch, and params."""
    problem, _ = problem_and_loop()
    problem = problem._replace(config=toy.make_config(**{name: weights}))
    program = METHODS[name](problem)
    # The targets' place is taken by the labels, for nothing was refreshed yet; all rows
    # are surer than they should be.
    aux = program.aux
    if name != "ccu":
        labels = merge_shards(program.sharded_tables["unlearn"])["labels"]
        low = {view: x - 9 for view, x in aux["targets"].confidence.items()}
        by_view = {"image": labels, "fused": labels}
        new = aux["targets"]._replace(probability=by_view, confidence=low)
        aux = {**aux, "targets": new}
    parts = {part: merge_shards(x) for part, x in program.sharded_tables.items()}

    def terms(params):
        batch = {}
        for part, plan in program.plan.items():
            keys = jax.random.split(jax.random.key(0), plan.shape[1])
            batch[part] = gather_rows(parts[part], {"rows": plan[0]}) | {"key": keys}
        loss, terms = program.loss(params, program.frozen, aux, batch, jnp.int32(0))
        return {**terms, "loss": loss}

    # The original itself for both: right after the start the shrunken tail says little.
    return on_one_device(terms), {part: problem.params[part] for part in TAIL}


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_objective_pulls_at_the_result_and_can_be_switched_off(name):
    terms, params = terms_of(name)
    # At a place near the original, where retention has something to hold on to.
    params = jax.tree.map(lambda x: 1.1 * x + 0.01, params)
    values, gradients = jax.jit(lambda p: (terms(p), jax.jacrev(terms)(p)))(params)
    assert set(values) == {*WEIGHTS[name], "loss"}
    total = sum(values[term] for term in WEIGHTS[name])
    assert float(values["loss"]) == pytest.approx(float(total), rel=1e-5)
    for term in WEIGHTS[name]:
        size = optax.tree.norm(gradients[term])
        assert np.isfinite(size) and size > 1e-4, term
        off, _ = terms_of(name, **{term: 0.0})
        assert set(jax.eval_shape(off, params)) == set(values) - {term}
    none, _ = terms_of(name, **dict.fromkeys(WEIGHTS[name], 0.0))
    values = jax.jit(none)(params)
    assert {key: float(x) for key, x in values.items()} == {"loss": 0.0}


def test_a_weight_of_an_objective_scales_it():
    plain, params = terms_of("ccu")
    params = jax.tree.map(lambda x: 1.1 * x + 0.01, params)
    scaled, _ = terms_of(
        "ccu",
        inverse_contrast=2.0,
        pair_dissociation=6.0,
        retention=2.0,
        separation=2.0,
        pull=0.5,
    )
    once, twice = jax.jit(lambda p: (plain(p), scaled(p)))(params)
    for term in ("pair_dissociation", "retention", "separation"):
        assert float(twice[term]) == pytest.approx(2 * float(once[term]), rel=1e-4)
    assert (
        abs(float(twice["inverse_contrast"]) - 2 * float(once["inverse_contrast"]))
        > 1e-3
    )


PLAIN = {"shift": 0, "zoom": 0.0, "tint": 0.0, "flip": False, "word_dropout": 0.0}
PLANTED = {
    "model": {"image_width": 32, "text_width": 16, "dropout": 0.0},
    "train": {"epochs": 60, "batch": 40, "learning_rate": 5e-3, "weight_decay": 0.0}
    | toy.NO_AUGMENTATION,
    "ccu_plus": {"steps": 120, "batch": 64, "unlearn_batch": 32, "heldout_batch": 32},
    "run": {"steps_per_call": 40},
}


@pytest.mark.slow
def test_ccu_plus_takes_the_memory_of_pictures_away_and_leaves_the_texts(tmp_path):
    data, executor = toy.make_memorizable_dataset(), parallel.vmap(1)
    settings = toy.make_config(**PLANTED)
    loop = None
    names = ("original", "ccu_plus")
    attack = {name: [] for name in names}
    accuracy = {name: [] for name in names}
    for seed in range(3):
        problem = toy.make_problem(
            executor, data, settings, seed=seed, rule="random:0.25"
        )
        solved, loop = {}, loop or make_loop(problem)
        for name in names:
            folder = tmp_path / f"{name}-{seed}"
            outcome = loop.run(name, METHODS[name], problem, folder, NullStage())
            params = {**problem.params, **outcome.params}
            problem = problem._replace(params=params)
            outputs = predictions.predict_all_splits(
                problem.forward, params, problem.table, data, problem.sets
            )
            solved[name] = outputs
            attack[name].append(predictions.attack_auc(outputs))
            scores = predictions.compute_scores(outputs)
            accuracy[name].append(
                {k: x["image"]["accuracy"] for k, x in scores.items()}
            )
        np.testing.assert_array_equal(
            solved["ccu_plus"].logits["text"], solved["original"].logits["text"]
        )

    def mean(told, name):
        return np.mean([of[name] for of in told])

    # Of several seeds: one of them may be far off, by luck or even by rounding.
    before, after = (attack[name] for name in names)
    for view in ("image", "fused", "pair"):
        assert mean(before, view) > 0.75, view
        assert 0.25 < mean(after, view) < mean(before, view) - 0.15, view
    assert abs(mean(after, "image") - 0.5) < 0.18
    before, after = (accuracy[name] for name in names)
    assert mean(before, "unlearn") > mean(before, "unseen") + 0.4
    assert mean(after, "unlearn") < mean(before, "unlearn") - 0.15
    new = [
        np.mean([mean(of, name) for name in ("unseen", "test")])
        for of in (before, after)
    ]
    assert new[1] > new[0] - 0.1
    assert mean(after, "retain") > 0.9
