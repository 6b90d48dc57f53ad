"""Configurations by name or from a file, which is Python: `config = Config(...)`."""

import dataclasses
import json
import pathlib
import re
import runpy
import traceback
from collections.abc import Sequence

from ccu_jax.config import schema as configs
from ccu_jax.config.schema import Config, from_json, replace, to_json
from ccu_jax.config.validation import closest, field_kind, parse
from ccu_jax.errors import UserError


def load(name_or_path: str, overrides: Sequence[str] = ()) -> Config:
    """Loads a configuration by name (`mmimdb`) or from a file (`my/own.py`).

    Args:
        name_or_path: A file of `configs/` without its `.py`, or a path ending in `.py`.
        overrides: Fields to set afterwards, as text: `train.epochs=3`.

    Raises:
        UserError: an unknown name or key, a value of the wrong type, or a file that
            fails, with its line.
    """
    config = _execute(_find(name_or_path))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"{override!r} sets nothing; write key=value")
        key, text = key.strip(), text.strip()
        config = replace(config, key, parse(text, field_kind(Config, key), key))
    # The name becomes a folder's name, so it must not lead anywhere else.
    if not re.fullmatch(r"\w[\w.-]*", config.name):
        raise UserError(f"name: {config.name!r} has more than letters, digits, '.-_'")
    return config


def tuned(config: Config, name: str) -> Config:
    """Returns a configuration with the settings that `--tune` found for each method.

    Args:
        config: What the settings are put into.
        name: A file of `configs/tuned/` without its `.json`: the `tuning.json` of a
            run with `--tune`, whose `winners` count.

    Raises:
        UserError: there is no such file, or it names settings that there are not.
    """
    path = _folder() / "tuned" / f"{name}.json"
    try:
        winners = json.loads(path.read_text(encoding="utf-8"))["winners"]
        settings = {
            f"{method}.{key}": value
            for method, keys in winners.items()
            for key, value in keys.items()
        }
    except (OSError, ValueError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} is no tuning.json of a run with --tune: {reason}"
        ) from None
    for key, value in settings.items():
        config = replace(config, key, value)
    return config


def available() -> dict[str, pathlib.Path]:
    """Returns the configurations that come with the package: name -> file."""
    found = sorted(_folder().glob("*.py"))
    return {f.stem: f for f in found if not f.stem.startswith("_")}


def _folder() -> pathlib.Path:
    """Returns the folder of configurations: beside the package in a checkout.

    Installed from a wheel it lies in the package.
    """
    here = pathlib.Path(__file__).resolve().parent.parent
    folders = [here / "configs", here.parent / "configs"]
    return next((f for f in folders if f.is_dir()), folders[0])


def _find(name_or_path: str) -> pathlib.Path:
    if name_or_path.endswith(".py"):
        path = pathlib.Path(name_or_path).expanduser()
        if not path.is_file():
            raise UserError(f"config {name_or_path!r}: there is no such file")
        return path
    known = available()
    if name_or_path not in known:
        raise UserError(
            f"there is no config {name_or_path!r}; {closest(name_or_path, known)}; "
            "or give a path that ends in .py"
        )
    return known[name_or_path]


def _execute(path: pathlib.Path) -> Config:
    """Runs a config file and checks what it made."""
    try:
        config = runpy.run_path(str(path), run_name="ccu_jax_config").get("config")
    except (Exception, SystemExit) as error:
        where = f"{path}:{_line(error, str(path))}"
        reason = error if isinstance(error, UserError) else _explain(error)
        raise UserError(f"{where}: {reason}") from error
    if not isinstance(config, Config):
        what = "no `config`" if config is None else f"a {type(config).__name__}"
        text = path.read_text(encoding="utf-8", errors="replace")
        lines = [
            n for n, s in enumerate(text.splitlines(), 1) if s.startswith("config")
        ]
        raise UserError(
            f"{path}:{lines[-1] if lines else 1}: found {what}; the file must set "
            "`config = Config(...)` from ccu_jax.config"
        )
    try:
        config = from_json(to_json(config))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return config if config.name else dataclasses.replace(config, name=path.stem)


def _line(error: BaseException, path: str) -> int:
    """Returns the line of the file at which it failed."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return error.lineno or 1
    frames = traceback.extract_tb(error.__traceback__)
    return next((f.lineno for f in reversed(frames) if f.filename == path), 1) or 1


def _explain(error: BaseException) -> str:
    message = f"{type(error).__name__}: {error}"
    found = re.search(r"(\w+)\.__init__\(\) got an unexpected .* '(\w+)'", str(error))
    if found and dataclasses.is_dataclass(kind := getattr(configs, found[1], None)):
        names = [f.name for f in dataclasses.fields(kind)]
        message = f"{found[1]} has no field {found[2]!r}; {closest(found[2], names)}"
    return " ".join(message.split())
