"""Rows that are named one by one: a group, or a file of ids."""

import collections
import difflib
import pathlib

import numpy as np

from ccu_jax.config.validation import suggest
from ccu_jax.errors import UserError


def rows_of_group(data, name: str) -> np.ndarray:
    """The training rows of a group.

    Raises:
        UserError: there are none.
    """
    rows = np.flatnonzero(data.group == name)
    train = data.split == "train"
    if train[rows].any():
        return rows[train[rows]]
    if len(rows):
        raise UserError(
            f"unlearn rule group:{name}: the model is not trained on this group "
            "(validation or test rows): there is nothing to forget"
        )
    raise UserError(
        f"unlearn rule group:{name}: no such group; {_suggest_groups(name, data.group[train])}"
    )


def _suggest_groups(wrong, groups, most=3, few=20) -> str:
    """The groups that may have been meant; all where there are few, one if none is."""
    names = np.unique(groups).tolist()
    if len(names) <= few:
        return suggest(wrong, names)
    meant = difflib.get_close_matches(wrong, names, n=most, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, meant))}? " if meant else ""
    return f"{hint}there are {len(names):,}, {names[0]!r} for one"


def rows_of_ids(data, file: str) -> list[int]:
    """The training rows whose ids are in a file.

    Raises:
        UserError: the file, or an id in it, is not as it should be.
    """
    path = pathlib.Path(file).expanduser()
    ids = read_ids(path)
    twice = [i for i, times in collections.Counter(ids).items() if times > 1]
    if twice:
        raise UserError(
            f"unlearn ids: {path} lists {_format_some(twice)} more than once: list each once"
        )
    where = dict(zip(data.id.tolist(), range(len(data.id)), strict=True))
    missing = [i for i in ids if i not in where]
    if missing:
        raise UserError(
            f"unlearn ids: {path} lists {_format_some(missing)}, which the data set "
            f"{data.name} does not have: correct or remove them"
        )
    foreign = [i for i in ids if data.split[where[i]] != "train"]
    if foreign:
        raise UserError(
            f"unlearn ids: {path} lists {_format_some(foreign)}, which the model is not "
            "trained on (validation or test rows): remove them"
        )
    return [where[i] for i in ids]


def read_ids(path: pathlib.Path) -> list[str]:
    """The ids in a file, one a line.

    Raises:
        UserError: it cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"unlearn ids: cannot read {path}: {error}") from None
    ids = [line.strip() for line in lines]
    # An id may itself begin with a hash sign: a comment has a space after it.
    return [i for i in ids if i and not f"{i} ".startswith("# ")]


def _format_some(items, most=3):
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(repr(i) for i in items[:most]) + more
