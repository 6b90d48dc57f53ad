"""Configurations load, typos are refused, and nothing is lost on the way to JSON."""

import dataclasses
import json
import math

import pytest

from ccu_jax.config import validation as typed
from ccu_jax.config.loading import available_configs, load_config
from ccu_jax.config.schema import (
    Config,
    differing_keys,
    from_json,
    replace_value,
    to_json,
)
from ccu_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class _Inner:
    size: tuple[int, float] = (1, 2.0)
    rate: float = 0.5


@dataclasses.dataclass(frozen=True)
class _Tree:
    """Every kind of field there may be."""

    inner: _Inner = dataclasses.field(default_factory=_Inner)
    count: int = 1
    flag: bool = False
    text: str = ""
    maybe: str | None = None
    perhaps: float | None = None
    names: tuple[str, ...] = ()
    numbers: tuple[int, ...] = (0,)


def _set(key, text):
    kind = typed.field_type(_Tree, key)
    value = typed.parse(text, kind, key)
    return typed.validate(value, kind, key)


def _refusal(call, *args):
    with pytest.raises(UserError) as caught:
        call(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


def _file(tmp_path, text):
    path = tmp_path / "own.py"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", available_configs())
def test_every_config_loads_and_is_called_like_its_file(name):
    config = load_config(name)
    assert config.name == name
    assert config.methods and config.seeds


def test_the_configs_are_found():
    assert {"mmimdb", "clipart", "tiny"} <= set(available_configs())


@pytest.mark.parametrize("name", available_configs())
def test_a_config_survives_json(name):
    config = load_config(name)
    text = json.dumps(to_json(config), allow_nan=False)
    again = from_json(json.loads(text))
    assert again == config
    assert to_json(again) == to_json(config)


def test_every_field_of_the_tree_can_be_set_to_its_own_value():
    def leaves(tree, above=""):
        for name, value in tree.items():
            if isinstance(value, dict):
                yield from leaves(value, f"{above}{name}.")
            else:
                yield above + name, value

    tree = to_json(load_config("tiny"))
    for key, value in leaves(tree):
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        again = load_config("tiny", [f"{key}={text}"])
        assert differing_keys(tree, to_json(again)) == []


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("count", "3", 3),
        ("count", "-3", -3),
        ("inner.rate", "3", 3.0),
        ("inner.rate", "1e-3", 1e-3),
        ("inner.size", "4,5", (4, 5.0)),
        ("flag", "true", True),
        ("flag", "False", False),
        ("text", "a = b, c", "a = b, c"),
        ("text", "none", "none"),
        ("maybe", "none", None),
        ("maybe", "null", None),
        ("maybe", "nothing", "nothing"),
        ("perhaps", "None", None),
        ("perhaps", "2", 2.0),
        ("names", "a, b", ("a", "b")),
        ("names", "", ()),
        ("numbers", "7", (7,)),
    ],
)
def test_text_becomes_a_value_of_the_fields_type(key, text, value):
    found = _set(key, text)
    assert found == value
    assert type(found) is type(value)
    if isinstance(value, tuple):
        assert [type(item) for item in found] == [type(item) for item in value]


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("count", "3.5"),
        ("count", "true"),
        ("count", ""),
        ("inner.rate", "fast"),
        ("inner.rate", "nan"),
        ("inner.rate", "inf"),
        ("inner.size", "4"),
        ("inner.size", "4,5,6"),
        ("flag", "1"),
        ("flag", "yes"),
        ("perhaps", "some"),
        ("numbers", "1,,2"),
        ("numbers", "1,b"),
    ],
)
def test_text_of_the_wrong_type_is_refused_by_name(key, text):
    assert _refusal(_set, key, text).startswith(key)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (True, int),
        (1, bool),
        (1, str),
        ("1", int),
        ("ab", tuple[str, ...]),
        (1, _Inner),
    ],
)
def test_a_value_of_a_related_type_is_refused(value, kind):
    assert "key" in _refusal(typed.validate, value, kind, "key")


def test_overrides_are_applied_in_order_and_leave_the_rest_alone():
    plain = load_config("tiny")
    config = load_config(
        "tiny", ["train.epochs=3", " train.epochs = 7 ", "seeds=5,6", "data.dir=a=b"]
    )
    assert (config.train.epochs, config.seeds, config.data.dir) == (7, (5, 6), "a=b")
    changed = differing_keys(to_json(plain), to_json(config))
    assert set(changed) == {"data.dir", "train.epochs", "seeds"}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epoch=3", ["'epoch'", "did you mean 'epochs'?", "learning_rate"]),
        ("trian.epochs=3", ["'trian'", "did you mean 'train'?", "model"]),
        ("train=3", ["train is a section", "train.epochs"]),
        ("train.epochs.x=3", ["train.epochs is a value"]),
        ("train.epochs", ["key=value"]),
        ("=3", ["has no key ''"]),
        ("name=../x", ["name"]),
    ],
)
def test_a_wrong_override_is_refused_with_the_right_ones_listed(override, words):
    message = _refusal(load_config, "tiny", [override])
    assert all(word in message for word in words), message


def test_an_unknown_name_is_refused_with_the_right_ones_listed():
    message = _refusal(load_config, "mmimbd")
    assert "did you mean 'mmimdb'?" in message and "clipart" in message
    assert "no such file" in _refusal(load_config, "no/such.py")


_HEAD = "from ccu_jax.config import Config, Train\n\n"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (_HEAD + "config = Config(\n", 3, ["SyntaxError"]),
        (_HEAD + "x = 1 / 0\n", 3, ["ZeroDivisionError"]),
        (_HEAD + "raise ValueError('a\\nb')\n", 3, ["ValueError: a b"]),
        (_HEAD + "import no_such_module\n", 3, ["no_such_module"]),
        (_HEAD + "raise SystemExit(3)\n", 3, ["SystemExit"]),
        (_HEAD, 1, ["no `config`", "config = Config(...)"]),
        (_HEAD + "config = {}\n", 3, ["found a dict"]),
        (
            _HEAD + "config = Config(\n    train=Train(epoch=3),\n)\n",
            4,
            ["Train has no field 'epoch'", "did you mean 'epochs'?", "batch"],
        ),
    ],
)
def test_a_broken_config_file_is_refused_with_its_line(tmp_path, text, line, words):
    path = _file(tmp_path, text)
    message = _refusal(load_config, path)
    assert message.startswith(f"{path}:{line}: ")
    assert all(word in message for word in words), message


def test_a_wrong_type_inside_a_config_file_is_refused(tmp_path):
    path = _file(tmp_path, _HEAD + "config = Config(train=Train(epochs='3'))\n")
    message = _refusal(load_config, path)
    assert path in message and "train.epochs" in message


def test_a_config_file_may_build_on_another_and_is_named_after_its_file(tmp_path):
    path = _file(
        tmp_path,
        "import dataclasses\n"
        "from ccu_jax.config.loading import load_config\n"
        "config = dataclasses.replace(load_config('tiny'), name='', seeds=[1, 2])\n",
    )
    config = load_config(path)
    assert (config.name, config.seeds) == ("own", (1, 2))
    assert [entry.name for entry in tmp_path.iterdir()] == ["own.py"]


def test_json_with_an_unknown_key_or_a_wrong_type_is_refused():
    tree = to_json(Config())
    tree["train"]["epocs"] = 3
    assert "did you mean 'epochs'?" in _refusal(from_json, tree)
    assert "train.epochs" in _refusal(from_json, {"train": {"epochs": 3.5}})
    assert _refusal(from_json, {"train": 3}).startswith("train")


def test_the_difference_names_dotted_keys_on_either_side():
    a = {"x": 1, "s": {"y": [1, 2], "z": 1}, "old": 1}
    b = {"x": 1, "s": {"y": [1, 3], "z": 1.0}, "new": None}
    assert differing_keys(a, b) == ["s.y", "s.z", "old", "new"]
    assert differing_keys(a, a) == []


def test_a_whole_number_in_a_float_field_becomes_a_float():
    config = replace_value(Config(), "train.learning_rate", 1)
    assert type(config.train.learning_rate) is float
    with pytest.raises(UserError):
        replace_value(Config(), "train.learning_rate", math.nan)
