"""Relearning counts the steps until a model knows the unlearned images again."""

import jax
import numpy as np
import pytest

from ccu_jax.audits.model_probes import MAX_RELEARNING_STEPS, relearn
from ccu_jax.distributed.executors import EXECUTORS
from ccu_jax.methods import METHODS
from ccu_jax.runs.progress import NullStage
from tests import toy


def test_a_model_that_knows_the_images_needs_no_steps(make_run, tmp_path):
    config = toy.make_config(train={**toy.NO_AUGMENTATION, "epochs": 30})
    data = toy.make_memorizable_dataset(280)
    problem = toy.make_problem(EXECUTORS["vmap"](), data, config)
    ctx, _ = make_run(problem, data)
    original = METHODS["original"]
    outcome = ctx.loop.run("original", original, problem, tmp_path / "o", NullStage())
    trained = outcome.params
    problem = problem._replace(params=trained)
    untrained = problem.model.init(jax.random.key(99))
    folder = tmp_path / "relearn"

    def steps_of(params, **options):
        record = relearn(ctx, problem, params, folder, **options)
        return [record[name] for name in ("min_steps", "steps", "max_steps")]

    assert steps_of(trained) == [0, 0, 0]
    low, median, _ = steps_of(untrained)
    assert low is None or 3 < low <= (median or MAX_RELEARNING_STEPS)
    # Three times the original's score is never reached.
    assert steps_of(untrained, tolerance=-2.0) == [None, None, None]
    broken = problem._replace(params=jax.tree.map(lambda x: x * np.nan, trained))
    assert relearn(ctx, broken, trained, folder)["steps"] is None
    assert not folder.exists()


@pytest.mark.parametrize("executor", ["pmap"])
def test_relearning_uses_the_f1_score_of_several_labels(make_run, tmp_path, executor):
    data = toy.make_dataset(140, multi_label=True)
    problem = toy.make_problem(EXECUTORS[executor](), data)
    ctx, _ = make_run(problem, data)
    params = problem.model.init(jax.random.key(1))
    problem = problem._replace(params=params)
    assert relearn(ctx, problem, params, tmp_path / "relearn")["steps"] == 0
