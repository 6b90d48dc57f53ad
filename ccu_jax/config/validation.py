"""Validates trees of dataclasses against their type annotations.

Annotations include ranges and choices: `Annotated[float, Range(0, 1)]`,
`Literal["a", "b"]`. The module is independent of any particular configuration.
"""

import contextlib
import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

from ccu_jax.errors import UserError


class Range(NamedTuple):
    """The interval from `low` to `high`; either bound may be excluded."""

    low: float
    high: float = math.inf
    exclude_low: bool = False
    exclude_high: bool = False

    def __contains__(self, value: Any) -> bool:
        """Returns whether a number lies in the range."""
        above = value > self.low if self.exclude_low else value >= self.low
        below = value < self.high if self.exclude_high else value <= self.high
        return above and below

    def __str__(self) -> str:
        """Returns the words that follow "must be" in messages, such as "at least 1"."""
        low = f"{'above' if self.exclude_low else 'at least'} {self.low}"
        if math.isinf(self.high):
            return low
        return f"{low} and {'below' if self.exclude_high else 'at most'} {self.high}"


Count = Annotated[int, Range(1)]
NonNegativeInt = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, exclude_low=True)]
NonNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
FractionBelow1 = Annotated[float, Range(0, 1, exclude_high=True)]


def suggest(wrong: str, names: Iterable[str]) -> str:
    """Returns "did you mean X?" for the closest valid name, if any, and all names."""
    names = sorted(names)
    near = difflib.get_close_matches(wrong, names, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}choose from: {', '.join(names) or 'none'}"


def field_type(tree: type, key: str) -> Any:
    """Returns the type annotation of a field of nested dataclasses.

    Args:
        tree: The outermost dataclass.
        key: The dotted key of the field: `train.epochs`.

    Raises:
        UserError: `key` is unknown, or names a section.
    """
    type_, parent = tree, ""
    for name in key.split("."):
        if not dataclasses.is_dataclass(type_):
            raise UserError(f"{key}: {parent} has no fields; set {parent} itself")
        type_ = _find_annotation(type_, name, parent)
        parent = f"{parent}.{name}".lstrip(".")
    if dataclasses.is_dataclass(type_):
        names = ", ".join(f"{key}.{field.name}" for field in dataclasses.fields(type_))
        raise UserError(f"{key}: is a section; set one of its fields: {names}")
    return type_


@functools.cache
def annotations(section: type) -> dict[str, Any]:
    """Returns the type annotation of each field of a dataclass, with its range."""
    return typing.get_type_hints(section, include_extras=True)


def _find_annotation(section: type, name: str, parent: str) -> Any:
    """Returns the annotation of a field; raises UserError for an unknown name."""
    fields = annotations(section)
    if name not in fields:
        key = f"{parent}.{name}".lstrip(".")
        raise UserError(f"{key}: unknown key {name!r}; {suggest(name, fields)}")
    return fields[name]


def parse(text: str, annotation: Any) -> Any:
    """Parses text as the annotated type; returns invalid text as is, for `validate`."""
    type_, _, is_optional = _split_annotation(annotation)
    if is_optional and text.lower() in ("none", "null"):
        return None
    if typing.get_origin(type_) is tuple:
        item_type = typing.get_args(type_)[0]
        items = text.split(",") if text else []
        return tuple(parse(item.strip(), item_type) for item in items)
    if type_ is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if type_ in (int, float):
        with contextlib.suppress(ValueError):
            return type_(text)
    return text


def validate(value: Any, annotation: Any, key: str) -> Any:
    """Checks a value against an annotation and converts it to the annotated type.

    Args:
        value: Plain data: dicts, lists and scalars.
        annotation: A dataclass, int, float, bool, str, or a `Literal` of strings;
            `tuple[X, ...]` or `X | None` of these; a number `Annotated` with a `Range`.
        key: The dotted key of the field, for messages; empty for the whole tree.

    Raises:
        UserError: An unknown key, a wrong type, or a value out of its range.
    """
    type_, range_, is_optional = _split_annotation(annotation)
    if is_optional and value is None:
        return None
    if dataclasses.is_dataclass(type_) and isinstance(value, Mapping):
        prefix = f"{key}." if key else ""
        fields = {
            name: validate(item, _find_annotation(type_, name, key), prefix + name)
            for name, item in value.items()
        }
        return type_(**fields)
    if typing.get_origin(type_) is Literal:
        choices = typing.get_args(type_)
        if value not in choices:
            raise UserError(f"{key}={value!r}: {suggest(str(value), choices)}")
        return value
    if typing.get_origin(type_) is tuple and isinstance(value, list | tuple):
        item_type = typing.get_args(type_)[0]
        return tuple(validate(item, item_type, key) for item in value)
    if type_ is float and type(value) in (int, float) and math.isfinite(value):
        value = float(value)
    elif type(value) is not type_ or type_ not in (int, bool, str):
        expected = _describe_type(type_) + (" or none" if is_optional else "")
        raise UserError(f"{key}: {value!r} is not {expected}")
    if range_ is not None and value not in range_:
        number = f"{value:g}" if type_ is float else value
        raise UserError(f"{key}={number}: must be {range_} (--set {key}=...)")
    return value


def _split_annotation(annotation: Any) -> tuple[Any, Range | None, bool]:
    """Returns the type of an annotation, its range, and whether it allows None."""
    is_optional = isinstance(annotation, types.UnionType)
    if is_optional:
        (annotation,) = set(typing.get_args(annotation)) - {types.NoneType}
    if typing.get_origin(annotation) is Annotated:
        type_, range_ = typing.get_args(annotation)
        return type_, range_, is_optional
    return annotation, None, is_optional


def _describe_type(type_: Any) -> str:
    if dataclasses.is_dataclass(type_):
        return "a section"
    if typing.get_origin(type_) is tuple:
        return "a list"
    names = {int: "a whole number", float: "a number", bool: "true or false"}
    return names.get(type_, "a string")
