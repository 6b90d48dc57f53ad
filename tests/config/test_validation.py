"""Values are checked against the types, ranges and choices of dataclass fields."""

import dataclasses
import re
from typing import Literal

import pytest

from ccu_jax.config import validation
from ccu_jax.config.validation import Count, Fraction, Range, field_type, validate
from ccu_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class _Section:
    rate: float = 0.5
    fraction: Fraction = 0.5


@dataclasses.dataclass(frozen=True)
class _Tree:
    """One field of every type that is supported."""

    section: _Section = _Section()
    integer: int = 1
    count: Count = 1
    flag: bool = False
    text: str = ""
    optional: str | None = None
    choice: Literal["red", "blue"] = "red"
    names: tuple[str, ...] = ()
    numbers: tuple[Count, ...] = (1,)


def _set(key, text):
    annotation = field_type(_Tree, key)
    return validate(validation.parse(text, annotation), annotation, key)


@pytest.mark.parametrize(
    "key, text, value",
    [
        ("integer", "3", 3),
        ("integer", "-3", -3),
        ("section.rate", "3", 3.0),
        ("section.rate", "1e-3", 1e-3),
        ("section.fraction", "1", 1.0),
        ("flag", "true", True),
        ("flag", "False", False),
        ("text", "a = b, c", "a = b, c"),
        ("text", "none", "none"),
        ("optional", "none", None),
        ("optional", "null", None),
        ("optional", "nothing", "nothing"),
        ("choice", "blue", "blue"),
        ("names", "a, b", ("a", "b")),
        ("names", "", ()),
        ("numbers", "7", (7,)),
    ],
)
def test_text_becomes_a_value_of_the_type_of_the_field(key, text, value):
    result = _set(key, text)
    assert result == value
    assert type(result) is type(value)
    if isinstance(value, tuple):
        assert [*map(type, result)] == [*map(type, value)]


@pytest.mark.parametrize(
    "key, text, words",
    [
        *(("integer", text, "whole number") for text in ("3.5", "true", "")),
        *(("section.rate", text, "a number") for text in ("fast", "nan", "inf")),
        ("section.fraction", "1.5", "=1.5: must be at least 0 and at most 1 (--set "),
        *(("flag", text, "true or false") for text in ("1", "yes")),
        ("choice", "bleu", "='bleu': did you mean 'blue'? choose from: blue, red"),
        *(("numbers", text, "whole number") for text in ("1,,2", "1,b")),
        ("numbers", "1,0", "=0: must be at least 1"),
    ],
)
def test_invalid_text_is_rejected_with_the_key(key, text, words):
    with pytest.raises(UserError, match=f"^{key}.*{re.escape(words)}"):
        _set(key, text)


@pytest.mark.parametrize(
    "value, type_",
    [
        (True, int),
        (1, bool),
        (1, str),
        ("1", int),
        (float("nan"), float),
        ("ab", tuple[str, ...]),
        (1, _Section),
        ([], Literal["red"]),
    ],
)
def test_a_value_of_a_related_type_is_rejected(value, type_):
    with pytest.raises(UserError, match="key"):
        validate(value, type_, "key")


def test_a_whole_number_in_a_float_field_becomes_a_float():
    assert type(validate(1, float, "key")) is float


@pytest.mark.parametrize(
    "range_, inside, outside, words",
    [
        (Range(0), (0, 9e9), (-1,), "at least 0"),
        (Range(0, 1), (0, 1), (-0.1, 1.1), "at least 0 and at most 1"),
        (Range(0, exclude_low=True), (1e-9,), (0,), "above 0"),
        (Range(0, 1, exclude_high=True), (0,), (1,), "at least 0 and below 1"),
    ],
)
def test_a_range_includes_its_ends_unless_excluded(range_, inside, outside, words):
    assert all(value in range_ for value in inside)
    assert not any(value in range_ for value in outside)
    assert str(range_) == words


@pytest.mark.parametrize(
    "key, words",
    [
        ("sektion.rate", "sektion: unknown key 'sektion'; did you mean 'section'?"),
        ("section.rat", "section.rat: unknown key 'rat'; did you mean 'rate'?"),
        ("section", "section: is a section; set one of its fields: section.rate"),
        ("count.x", "count.x: count has no fields; set count itself"),
        ("", "unknown key ''"),
    ],
)
def test_a_key_that_leads_to_no_field_is_rejected(key, words):
    with pytest.raises(UserError, match=re.escape(words)):
        field_type(_Tree, key)
