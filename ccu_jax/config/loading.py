"""Loads configurations by name or from Python files that set `config = Config(...)`."""

import dataclasses
import json
import pathlib
import re
import runpy
import traceback
from collections.abc import Sequence

from ccu_jax.config import schema
from ccu_jax.config.schema import Config, from_json, replace_value, to_json
from ccu_jax.config.validation import field_type, parse, suggest
from ccu_jax.errors import UserError


def load_config(name_or_path: str, overrides: Sequence[str] = ()) -> Config:
    """Loads a configuration by name (`mmimdb`) or from a file (`my/own.py`).

    Args:
        name_or_path: The name of a file in `configs/`, or a path ending in `.py`.
        overrides: Fields to set afterwards, as `KEY=VALUE`: `train.epochs=3`.

    Raises:
        UserError: An unknown name or key, an invalid value, or an error in the file,
            with its line.
    """
    config = _run_file(_find_config(name_or_path))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(
                f"--set {override}: not of the form KEY=VALUE, such as train.epochs=3"
            )
        key, text = key.strip(), text.strip()
        config = replace_value(config, key, parse(text, field_type(Config, key)))
    # The name becomes the name of a folder, so it must not contain a path.
    if not re.fullmatch(r"\w[\w.-]*", config.name):
        raise UserError(
            f"name: {config.name!r} is not a folder name; use letters, digits, '.-_'"
        )
    return config


def apply_tuned(config: Config, name: str) -> Config:
    """Returns a copy of the configuration with the settings that `--tune` chose.

    `name` is the stem of a JSON file in `configs/tuned/`: a copy of the `tuning.json`
    of a `--tune` run, whose `winners` are applied.

    Raises UserError if the file is missing or contains invalid settings.
    """
    path = _find_config_folder() / "tuned" / f"{name}.json"
    try:
        winners = json.loads(path.read_text(encoding="utf-8"))["winners"]
        settings = {
            f"{method}.{key}": value
            for method, fields in winners.items()
            for key, value in fields.items()
        }
    except (OSError, ValueError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path}: not a valid tuning.json ({reason}); copy that of a --tune run"
        ) from None
    for key, value in settings.items():
        config = replace_value(config, key, value)
    return config


def available_configs() -> dict[str, pathlib.Path]:
    """Returns the path of each configuration in `configs/`, by name."""
    files = sorted(_find_config_folder().glob("*.py"))
    return {file.stem: file for file in files if not file.stem.startswith("_")}


def _find_config_folder() -> pathlib.Path:
    """Returns `configs/`: next to the package in a checkout, inside if installed."""
    package = pathlib.Path(__file__).resolve().parent.parent
    folders = [package / "configs", package.parent / "configs"]
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def _find_config(name_or_path: str) -> pathlib.Path:
    if name_or_path.endswith(".py"):
        path = pathlib.Path(name_or_path).expanduser()
        if not path.is_file():
            raise UserError(f"config {name_or_path!r}: no such file; correct the path")
        return path
    configs = available_configs()
    if name_or_path not in configs:
        raise UserError(
            f"config {name_or_path!r}: unknown name; "
            f"{suggest(name_or_path, configs)}; or pass a path that ends in .py"
        )
    return configs[name_or_path]


def _run_file(path: pathlib.Path) -> Config:
    """Runs a config file, validates its `config` and fills in a missing name."""
    try:
        config = runpy.run_path(str(path), run_name="ccu_jax_config").get("config")
    except (Exception, SystemExit) as error:
        place = f"{path}:{_find_failing_line(error, str(path))}"
        reason = error if isinstance(error, UserError) else _describe_error(error)
        raise UserError(f"{place}: {reason}") from error
    if not isinstance(config, Config):
        value = "no `config`" if config is None else f"a {type(config).__name__}"
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        numbers = [n for n, line in enumerate(lines, 1) if line.startswith("config")]
        raise UserError(
            f"{path}:{numbers[-1] if numbers else 1}: found {value}; set "
            "`config = Config(...)` from ccu_jax.config"
        )
    try:
        config = from_json(to_json(config))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return config if config.name else dataclasses.replace(config, name=path.stem)


def _find_failing_line(error: BaseException, path: str) -> int:
    """Returns the line of the config file in which an error occurred, or 1."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return error.lineno or 1
    frames = traceback.extract_tb(error.__traceback__)
    lines = (frame.lineno for frame in reversed(frames) if frame.filename == path)
    return next(lines, 1) or 1


def _describe_error(error: BaseException) -> str:
    """Describes an error in a config file in one line, with the closest field name."""
    message = f"{type(error).__name__}: {error}"
    match = re.search(r"(\w+)\.__init__\(\) got an unexpected .* '(\w+)'", str(error))
    section = getattr(schema, match[1], None) if match else None
    if match and dataclasses.is_dataclass(section):
        names = [field.name for field in dataclasses.fields(section)]
        message = f"{match[1]} has no field {match[2]!r}; {suggest(match[2], names)}"
    return " ".join(message.split())
