"""One row of a user's own pairs: what its line says, checked."""

import re
from typing import Any, NamedTuple

from ccu_jax.data.readers.base import SkipExample
from ccu_jax.data.readers.pairs_index import SPLIT_NAMES, Entry, slashed
from ccu_jax.data.readers.untrusted_files import clean_text

_LONGEST = 512  # characters of an id, group or label
# A terminal obeys U+0080 to U+009F as it does the first 32 characters, and to Python
# U+2028 and U+2029 are ends of lines.
_IMPOSSIBLE = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class Row(NamedTuple):
    """A checked row; `split` is "" where nothing names one."""

    line: int
    id: str
    group: str
    image: str | None  # path below the root
    text: str | None
    labels: tuple[str, ...]
    split: str
    text_file: str | None = None  # path below the root, instead of `text`
    notes: tuple[str, ...] = ()


def checked(entry: Entry) -> Row:
    """The row of an entry; raises SkipExample."""
    fields = entry.fields
    image = slashed(_word(fields, "image") or "")
    id_ = _word(fields, "id") or image
    if not id_:
        raise SkipExample("neither id nor image names the row")
    group = _word(fields, "group") or id_
    for name, value in (("id", id_), ("group", group)):
        if len(value) > _LONGEST:
            raise SkipExample(f"{name} too long")
    if f"{id_} ".startswith("# "):
        raise SkipExample("id begins as a comment in a list of ids does")
    split = (_word(fields, "split") or "").casefold()
    if split and split not in SPLIT_NAMES:
        raise SkipExample("split unknown")
    text, notes = clean_text(_string(fields, "text"))
    labels = _labels(fields)
    if not (image or text or entry.text_file):
        raise SkipExample("neither image nor text")
    return Row(
        line=entry.line,
        id=id_,
        group=group,
        image=image or None,
        text=text,
        labels=labels,
        split=SPLIT_NAMES.get(split, ""),
        text_file=entry.text_file,
        notes=notes,
    )


def _labels(fields: dict[str, Any]) -> tuple[str, ...]:
    labels = fields.get("labels")
    if labels is None:
        if not (label := _word(fields, "label")):
            raise SkipExample("no label")
        labels = [label]
    if not isinstance(labels, list) or None in labels:
        raise SkipExample("labels are no list of strings")
    words = [_word({"label": label}, "label") for label in labels]
    if any(len(word) > _LONGEST for word in words if word):
        raise SkipExample("label too long")
    return tuple(dict.fromkeys(word for word in words if word))


def _string(fields: dict[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)  # ids and labels are often written as numbers
    if value is not None and not isinstance(value, str):
        raise SkipExample(f"{name} is no string")
    return value


def _word(fields: dict[str, Any], name: str) -> str | None:
    """A string that must come through lists, files and tables as it is."""
    value = (_string(fields, name) or "").strip()
    if _IMPOSSIBLE.search(value):
        raise SkipExample(f"{name} has an impossible character")
    return value or None
