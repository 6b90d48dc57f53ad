"""Dataclass trees whose values are checked against the annotations of their fields.

Knows no configuration of this project: that is `config.py`.
"""

import contextlib
import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from ccu_jax.errors import UserError


def closest(wrong: str, right: Iterable[str]) -> str:
    """Returns a list of the right names for an error, the closest one first."""
    right = sorted(right)
    near = difflib.get_close_matches(wrong, right, n=1, cutoff=0.6)
    meant = f"did you mean {near[0]!r}? " if near else ""
    return f"{meant}there are: {', '.join(right) or 'none'}"


def field_kind(tree: type, key: str) -> Any:
    """Returns the annotation of the field `key` (`train.epochs`) of a dataclass.

    Raises:
        UserError: there is no such field, or it is a whole section.
    """
    kind, above = tree, ""
    for name in key.split("."):
        if not dataclasses.is_dataclass(kind):
            raise UserError(f"{key}: {above} is a value, not a section")
        kind = _field_of(kind, name, above)
        above = f"{above}.{name}" if above else name
    if dataclasses.is_dataclass(kind):
        names = ", ".join(f"{key}.{f.name}" for f in dataclasses.fields(kind))
        raise UserError(f"{key} is a section; set one of its fields: {names}")
    return kind


# A configuration is read field by field, and each field asks for all kinds anew.
_kinds = functools.cache(typing.get_type_hints)


def _field_of(section: Any, name: str, above: str) -> Any:
    kinds = _kinds(section)
    if name not in kinds:
        where = f"section {above!r}" if above else "the configuration"
        raise UserError(f"{where} has no key {name!r}; {closest(name, kinds)}")
    return kinds[name]


def parse(text: str, kind: Any, key: str) -> Any:
    """Reads the text of one value as its annotation says.

    Raises:
        UserError: a tuple of fixed length with another number of items.
    """
    optional, kind = _without_none(kind)
    if optional and text.lower() in ("none", "null"):
        return None
    if typing.get_origin(kind) is tuple:
        items = text.split(",") if text else []
        kinds = typing.get_args(kind)
        kinds = kinds[:1] * len(items) if kinds[-1] is Ellipsis else kinds
        if len(kinds) != len(items):
            raise UserError(f"{key}: {text!r} is not {_describe(kind)}")
        return tuple(
            parse(i.strip(), k, key) for i, k in zip(items, kinds, strict=True)
        )
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text  # a str, or something that `conform` refuses


def conform(value: Any, kind: Any, key: str) -> Any:
    """Returns `value` as the annotation `kind` wants it.

    Args:
        value: Plain data: dicts, lists, scalars.
        kind: A dataclass, int, float, bool, str, a tuple of these, or `... | None`.
        key: What to call the value in an error.

    Raises:
        UserError: an unknown key or a value of the wrong type.
    """
    optional, kind = _without_none(kind)
    if optional and value is None:
        return None
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        prefix = f"{key}." if key else ""
        return kind(
            **{
                name: conform(item, _field_of(kind, name, key), prefix + name)
                for name, item in value.items()
            }
        )
    if typing.get_origin(kind) is tuple and isinstance(value, list | tuple):
        kinds = typing.get_args(kind)
        kinds = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
        if len(kinds) == len(value):
            pairs = zip(value, kinds, strict=True)
            return tuple(
                conform(item, k, f"{key}[{n}]") for n, (item, k) in enumerate(pairs)
            )
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if type(value) is kind and kind in (int, bool, str):
        return value
    wanted = _describe(kind) + (" or none" if optional else "")
    raise UserError(f"{key}: {value!r} is not {wanted}")


def _without_none(kind: Any) -> tuple[bool, Any]:
    """Splits `X | None` into (True, X)."""
    if isinstance(kind, types.UnionType):
        (kind,) = (k for k in typing.get_args(kind) if k is not types.NoneType)
        return True, kind
    return False, kind


def _describe(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false"}
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        if kinds[-1] is Ellipsis:
            return f"a list ({_describe(kinds[0])}, and so on)"
        return f"a list of {len(kinds)}: {', '.join(_describe(k) for k in kinds)}"
    if dataclasses.is_dataclass(kind):
        return "a section"
    return names.get(kind, "a text")
