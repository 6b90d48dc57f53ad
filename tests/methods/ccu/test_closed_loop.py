"""Every objective of CCU has an effect, and memorized images are unlearned."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ccu_jax.distributed import executors
from ccu_jax.evaluate import predictions
from ccu_jax.methods import METHODS
from ccu_jax.models import TAIL
from tests import toy
from tests.methods.test_finetuning import first_batch

SHARED = ("pair_dissociation", "retention", "separation")
CLOSED_LOOP = ("task_loss", "heldout_retention", *SHARED)
WEIGHTS = {
    "ccu": ("inverse_contrast", *SHARED),
    "ccu_plus": ("target_match", "match_confidence", *CLOSED_LOOP),
    "ccu_gated": ("gated_push", *CLOSED_LOOP),
}


def make_terms(problem, name, **weights):
    """Returns a function from parameters to the loss terms of the first batch."""
    problem = problem._replace(config=toy.make_config(**{name: weights}))
    program = METHODS[name](problem)
    assert program.loss is not None and program.plan is not None
    aux, batch = program.aux, first_batch(program)
    if name != "ccu":
        # Labels replace the targets, and all rows are above their target confidence.
        targets = aux["targets"]
        labels = toy.merge_shards(program.sharded_tables["unlearn"])["labels"]
        targets = targets._replace(
            probability=dict.fromkeys(targets.bias, labels),
            confidence={view: x - 9 for view, x in targets.confidence.items()},
        )
        aux = {**aux, "targets": targets}

    def terms(params):
        loss, terms = program.loss(params, program.frozen, aux, batch, jnp.int32(0))
        return {**terms, "loss": loss}

    return toy.on_one_device(terms)


@pytest.fixture(scope="module")
def params(problem):
    """Parameters near the original, where retention has a gradient."""
    trained = {module: problem.params[module] for module in TAIL}
    return jax.tree.map(lambda x: 1.1 * x + 0.01, trained)


@pytest.mark.parametrize("name", WEIGHTS)
def test_each_objective_has_a_gradient_and_can_be_switched_off(problem, name, params):
    terms = make_terms(problem, name)
    values, gradients = jax.jit(lambda p: (terms(p), jax.jacrev(terms)(p)))(params)
    assert set(values) == {*WEIGHTS[name], "loss"}
    total = sum(values[term] for term in WEIGHTS[name])
    assert float(values["loss"]) == pytest.approx(float(total), rel=1e-5)
    for term in WEIGHTS[name]:
        norm = optax.tree.norm(gradients[term])
        assert np.isfinite(norm) and norm > 1e-4, term
        without = jax.eval_shape(make_terms(problem, name, **{term: 0.0}), params)
        assert set(without) == set(values) - {term}
    without_all = make_terms(problem, name, **dict.fromkeys(WEIGHTS[name], 0.0))
    nothing = jax.jit(without_all)(params)
    assert {key: float(x) for key, x in nothing.items()} == {"loss": 0.0}


CONFIG = {
    "model": {"image_width": 32, "text_width": 16, "dropout": 0.0},
    "train": {"epochs": 60, "batch": 40, "learning_rate": 5e-3, "weight_decay": 0.0}
    | toy.NO_AUGMENTATION,
    "ccu_plus": {"steps": 120, "batch": 64, "unlearn_batch": 32, "heldout_batch": 32},
    "run": {"steps_per_call": 40},
}


@pytest.mark.slow
def test_ccu_plus_unlearns_memorized_images_but_not_texts(tmp_path):
    data, names = toy.make_memorizable_dataset(), ("original", "ccu_plus")
    config, loop = toy.make_config(**CONFIG), None
    attack, accuracy = ({name: [] for name in names} for _ in range(2))
    for seed in range(3):
        problem = toy.make_problem(
            executors.vmap(1), data, config, seed=seed, rule="random:0.25"
        )
        loop = loop or toy.make_loop(problem)
        text_logits = []
        for name in names:
            folder = tmp_path / f"{name}-{seed}"
            outcome = loop.run(name, METHODS[name], problem, folder, toy.NullStage())
            params = {**problem.original, **outcome.params}
            problem = problem._replace(params=params)
            found = predictions.predict_all_splits(
                problem.forward, params, problem.table, data, problem.sets
            )
            text_logits.append(found.logits["text"])
            attack[name].append(predictions.attack_auc(found))
            scores = predictions.compute_scores(found)
            accuracy[name].append(
                {split: x["image"]["accuracy"] for split, x in scores.items()}
            )
        np.testing.assert_array_equal(text_logits[0], text_logits[1])

    def mean(values, key):
        return np.mean([x[key] for x in values])

    # Means over seeds, because a single run may be far off, even by rounding.
    before, after = attack.values()
    for view in ("image", "fused", "pair"):
        assert mean(before, view) > 0.75, view
        assert 0.25 < mean(after, view) < mean(before, view) - 0.15, view
    assert abs(mean(after, "image") - 0.5) < 0.18
    before, after = accuracy.values()
    assert mean(before, "unlearn") > mean(before, "unseen") + 0.4
    assert mean(after, "unlearn") < mean(before, "unlearn") - 0.15
    unseen_before, unseen_after = (
        mean(x, "unseen") + mean(x, "test") for x in (before, after)
    )
    assert unseen_after / 2 > unseen_before / 2 - 0.1
    assert mean(after, "retain") > 0.9
