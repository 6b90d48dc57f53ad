"""A section's numbers are data of a program; whether they are zero is part of it."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ccu_jax.config.methods import CcuPlus
from ccu_jax.methods import METHODS, REFERENCES
from ccu_jax.methods.hyperparameters import Hyperparameters
from tests import toy
from tests.toy import (
    NullStage,
    count_traces,
    make_loop,
    problem_and_loop,
    scaled_hyperparameters,
    trees_equal,
)


def test_real_numbers_are_leaves_and_zeros_are_part_of_the_structure():
    section = CcuPlus(pair_dissociation=10.0, gated_push=0.0)
    tree = Hyperparameters.from_config(section)
    real = {k: x for k, x in dataclasses.asdict(section).items() if type(x) is float}
    leaves = sorted(float(x) for x in jax.tree.leaves(tree))
    assert leaves == pytest.approx(sorted(x for x in real.values() if x))
    for name, x in real.items():
        assert float(getattr(tree, name)) == pytest.approx(x), name
        assert tree.is_active(name) == (x != 0), name
    other = Hyperparameters.from_config(
        dataclasses.replace(section, pair_dissociation=3.0, learning_rate=0.5)
    )
    assert jax.tree.structure(other) == jax.tree.structure(tree)
    for changed in ({"pair_dissociation": 0.0}, {"gated_push": 1.0}):
        apart = Hyperparameters.from_config(dataclasses.replace(section, **changed))
        assert jax.tree.structure(apart) != jax.tree.structure(tree), changed


def test_only_its_real_numbers_can_be_asked_for():
    tree = Hyperparameters.from_config(CcuPlus())
    for name in ("steps", "train_trunk", "nothing", "_hidden"):
        with pytest.raises(AttributeError, match=name):
            getattr(tree, name)
    # A misspelt weight must not be taken for one that is zero.
    with pytest.raises(AttributeError, match="pairs"):
        tree.is_active("pairs")


def test_a_section_goes_through_every_transformation_of_jax():
    tree, other = (
        Hyperparameters.from_config(CcuPlus(pair_dissociation=2.0)),
        Hyperparameters.from_config(CcuPlus(pair_dissociation=5.0)),
    )
    traces = []

    @jax.jit
    def weighted(section, x):
        traces.append(section.is_active("gated_push"))
        return section.pair_dissociation * x + (
            section.gated_push * x if section.is_active("gated_push") else 0.0
        )

    assert float(weighted(tree, jnp.float32(3))) == 6
    assert float(weighted(other, jnp.float32(3))) == 15
    assert traces == [False]
    gated = Hyperparameters.from_config(CcuPlus(pair_dissociation=2.0, gated_push=1.0))
    assert float(weighted(gated, jnp.float32(3))) == 9 and traces == [False, True]
    doubled = jax.tree.map(lambda x: 2 * x, tree)
    assert float(doubled.pair_dissociation) == 4 and doubled.gated_push == 0.0
    assert trees_equal(jax.device_get(jax.device_put(tree)), tree)


@pytest.mark.parametrize("field", ["learning_rate", "pair_dissociation", "temperature"])
def test_a_run_with_another_weight_or_rate_compiles_nothing(field, tmp_path):
    problem, _ = problem_and_loop()
    loop, traces = kept(), TRACES
    old = getattr(problem.config.ccu, field)
    config = toy.make_config(ccu={field: 1.5 * old})
    outcomes = [
        loop.run("ccu", count_traces("ccu", traces), of, tmp_path / "none", NullStage())
        for of in (problem, problem._replace(config=config))
    ]
    assert traces["ccu"] == 1 and outcomes[1].seconds["compile"] < 1
    assert not trees_equal(outcomes[0].params, outcomes[1].params)


TRACES = collections.Counter()
LOOPS = []


def kept():
    """One loop for the tests of this file."""
    if not LOOPS:
        LOOPS.append(make_loop(problem_and_loop()[0]))
    return LOOPS[0]


@pytest.mark.parametrize("name", [n for n in METHODS if n not in REFERENCES])
def test_every_number_of_every_section_is_used_as_data(name):
    """Programs for other numbers have the same structure, down to the optimizer's."""
    problem, _ = problem_and_loop()
    numbers = scaled_hyperparameters(getattr(problem.config, name))
    changed = toy.make_config(**{name: numbers})
    one, other = (
        METHODS[name](problem._replace(config=config))
        for config in (problem.config, changed)
    )

    def shapes(program):
        given = program.frozen, program.optimizer_inputs, program.params, program.aux
        leaves, structure = jax.tree.flatten(given)
        return structure, [(np.shape(x), jnp.result_type(x)) for x in leaves]

    assert shapes(one) == shapes(other)
