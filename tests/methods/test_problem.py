"""Hyperparameters are inputs of a program; whether they are zero is part of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ccu_jax.config.method_defaults import CcuPlus
from ccu_jax.methods import METHODS
from ccu_jax.methods.problem import Hyperparameters
from tests import toy
from tests.methods.test_methods import UNLEARNING


def hyperparameters(**fields):
    return Hyperparameters.from_config(CcuPlus(**fields))


def test_nonzero_values_are_leaves_and_zeros_are_structure():
    config = CcuPlus(pair_dissociation=10.0, gated_push=0.0)
    hp = Hyperparameters.from_config(config)
    real = {k: x for k, x in dataclasses.asdict(config).items() if type(x) is float}
    leaves = sorted(float(x) for x in jax.tree.leaves(hp))
    assert leaves == pytest.approx(sorted(x for x in real.values() if x))
    for name, x in real.items():
        assert float(getattr(hp, name)) == pytest.approx(x), name
        assert hp.is_active(name) == (x != 0), name
    other = hyperparameters(pair_dissociation=3.0, learning_rate=0.5)
    assert jax.tree.structure(other) == jax.tree.structure(hp)
    for changed in ({"pair_dissociation": 0.0}, {"gated_push": 1.0}):
        other = hyperparameters(**changed)
        assert jax.tree.structure(other) != jax.tree.structure(hp), changed


def test_other_names_are_errors():
    hp = hyperparameters()
    for name in ("steps", "train_trunk", "nothing", "_hidden"):
        with pytest.raises(AttributeError, match=name):
            getattr(hp, name)
    # A misspelt weight must not count as zero.
    with pytest.raises(AttributeError, match="pairs"):
        hp.is_active("pairs")


@pytest.mark.parametrize("name", UNLEARNING)
def test_programs_of_other_hyperparameters_have_the_same_structure(name, problem):
    numbers = toy.scaled_hyperparameters(getattr(problem.config, name))
    changed = toy.make_config(**{name: numbers})

    def structure(config):
        program = METHODS[name](problem._replace(config=config))
        arrays = program.frozen, program.optimizer_inputs, program.params, program.aux
        leaves, structure = jax.tree.flatten(arrays)
        return structure, [(np.shape(x), jnp.result_type(x)) for x in leaves]

    assert structure(problem.config) == structure(changed)
