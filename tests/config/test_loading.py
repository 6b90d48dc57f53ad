"""Configurations load by name or from a file; mistakes are named with their line."""

import json

import pytest

from ccu_jax.config import loading
from ccu_jax.config.loading import apply_tuned, load_config
from ccu_jax.config.schema import Config, differing_keys, to_json
from ccu_jax.errors import UserError


def _rejection(function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_overrides_apply_in_order_and_leave_the_rest_alone():
    plain = load_config("tiny")
    overrides = ["train.epochs=3", " train.epochs = 7 ", "seeds=5,6", "data.dir=a=b"]
    config = load_config("tiny", overrides)
    assert (config.train.epochs, config.seeds, config.data.dir) == (7, (5, 6), "a=b")
    changed = differing_keys(to_json(plain), to_json(config))
    assert set(changed) == {"data.dir", "train.epochs", "seeds"}


@pytest.mark.parametrize(
    "name, overrides, words",
    [
        ("tiny", ["train.epochs"], ["KEY=VALUE"]),
        ("tiny", ["train.epochs=0"], ["train.epochs=0: must be at least 1"]),
        ("tiny", ["name=../x"], ["name"]),
        ("mmimbd", [], ["did you mean 'mmimdb'?", "clipart"]),
        ("no/such.py", [], ["no such file"]),
    ],
)
def test_an_unknown_name_or_invalid_override_is_rejected(name, overrides, words):
    message = _rejection(load_config, name, overrides)
    assert all(word in message for word in words), message


_HEAD = "from ccu_jax.config import Config, Train\n\n"


@pytest.mark.parametrize(
    "text, place, words",
    [
        ("config = Config(\n", ":3", ["SyntaxError"]),
        ("x = 1 / 0\n", ":3", ["ZeroDivisionError"]),
        ("raise ValueError('a\\nb')\n", ":3", ["ValueError: a b"]),
        ("import no_such_module\n", ":3", ["no_such_module"]),
        ("raise SystemExit(3)\n", ":3", ["SystemExit"]),
        ("", ":1", ["no `config`", "config = Config(...)"]),
        ("config = {}\n", ":3", ["found a dict"]),
        (
            "config = Config(\n    train=Train(epoch=3),\n)\n",
            ":4",
            ["Train has no field 'epoch'", "did you mean 'epochs'?", "batch"],
        ),
        ("config = Config(train=Train(epochs='3'))\n", "", ["train.epochs: '3'"]),
        ("config = Config(train=Train(epochs=0))\n", "", ["train.epochs=0"]),
    ],
)
def test_an_error_in_a_config_file_is_reported_with_its_place(
    tmp_path, text, place, words
):
    path = tmp_path / "own.py"
    path.write_text(_HEAD + text)
    message = _rejection(load_config, str(path))
    assert message.startswith(f"{path}{place}: ")
    assert all(word in message for word in words), message


def test_a_config_file_may_extend_another_and_is_named_after_its_file(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "import dataclasses\n"
        "from ccu_jax.config.loading import load_config\n"
        "config = dataclasses.replace(load_config('tiny'), name='', seeds=[1, 2])\n"
    )
    config = load_config(str(path))
    assert (config.name, config.seeds) == ("own", (1, 2))
    assert [entry.name for entry in tmp_path.iterdir()] == ["own.py"]


def test_settings_of_a_tuning_run_are_applied(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "_find_config_folder", lambda: tmp_path)
    path = tmp_path / "tuned" / "own.json"
    path.parent.mkdir()
    plain = Config(name="own")
    winners = {"scrub": {"learning_rate": 0.25, "epochs": 7}, "finetune": {}}
    path.write_text(json.dumps({"winners": winners}))
    config = apply_tuned(plain, "own")
    assert (config.scrub.learning_rate, config.scrub.epochs) == (0.25, 7)
    assert config.finetune == plain.finetune
    path.write_text(json.dumps({"winners": {"scrub": {"epoch": 7}}}))
    assert "epoch" in _rejection(apply_tuned, plain, "own")
    for text in ("{", "{}", '{"winners": 3}'):
        path.write_text(text)
        assert "not a valid tuning.json" in _rejection(apply_tuned, plain, "own")
    assert "not a valid tuning.json" in _rejection(apply_tuned, plain, "nowhere")
