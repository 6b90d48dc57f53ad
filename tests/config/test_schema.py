"""The tree of sections survives JSON, and every number has a range."""

import dataclasses
import json

import pytest

from ccu_jax.config import Config
from ccu_jax.config.loading import available_configs, load_config
from ccu_jax.config.schema import differing_keys, from_json, to_json
from ccu_jax.config.validation import annotations
from ccu_jax.data import DATASETS
from ccu_jax.errors import UserError
from ccu_jax.methods import METHODS


@pytest.mark.parametrize("name", available_configs())
def test_every_config_is_valid_and_survives_json(name):
    config = load_config(name)
    assert config.name == name and config.seeds
    assert config.methods and set(config.methods) <= set(METHODS)
    assert config.data.dataset in DATASETS
    restored = from_json(json.loads(json.dumps(to_json(config), allow_nan=False)))
    assert restored == config and to_json(restored) == to_json(config)


def _leaves(tree, prefix=""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def test_every_field_can_be_set_to_its_own_value():
    tree = to_json(load_config("tiny"))
    for key, value in _leaves(tree):
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        assert to_json(load_config("tiny", [f"{key}={text}"])) == tree


def test_every_number_has_a_range():
    for section in [Config, *annotations(Config).values()]:
        if dataclasses.is_dataclass(section):
            assert not {int, float} & set(annotations(section).values()), section


def test_an_unknown_key_or_invalid_value_in_json_is_rejected():
    for broken, words in (
        ({"train": {"epocs": 3}}, "train.epocs: unknown key .*did you mean 'epochs'"),
        ({"train": {"epochs": 3.5}}, "train.epochs: 3.5"),
        ({"train": {"epochs": 0}}, "train.epochs=0: must be at least 1"),
        ({"train": 3}, "train: 3 is not a section"),
        ({"seeds": [0, -1]}, "seeds=-1: must be at least 0 and at most 2147483647"),
    ):
        with pytest.raises(UserError, match=words):
            from_json(broken)


def test_differing_keys_are_dotted_and_cover_both_sides():
    a = {"x": 1, "s": {"y": [1, 2], "z": 1}, "old": 1}
    b = {"x": 1, "s": {"y": [1, 3], "z": 1.0}, "new": None}
    assert differing_keys(a, b) == ["s.y", "s.z", "old", "new"]
    assert differing_keys(a, a) == []
