"""Finds the rows of a named group, or of the ids in a file."""

import collections
import difflib
import pathlib

import numpy as np

from ccu_jax.config.validation import suggest
from ccu_jax.data import Dataset
from ccu_jax.errors import UserError

_MAX_EXAMPLES = 3  # ids or groups in a message
_MAX_LISTED_GROUPS = 20


def find_group_rows(data: Dataset, name: str) -> np.ndarray:
    """Returns the training rows of a group; raises UserError if there are none."""
    rows = np.flatnonzero(data.group == name)
    is_train = data.split == "train"
    if is_train[rows].any():
        return rows[is_train[rows]]
    if len(rows):
        raise UserError(
            f"unlearn rule group:{name}: this group has validation or test rows only; "
            "choose a group with training rows"
        )
    hint = _suggest_groups(name, data.group[is_train])
    raise UserError(f"unlearn rule group:{name}: no such group; {hint}")


def _suggest_groups(wrong: str, groups: np.ndarray) -> str:
    """Returns a hint with similar group names, or with all if there are few."""
    names = np.unique(groups).tolist()
    if len(names) <= _MAX_LISTED_GROUPS:
        return suggest(wrong, names)
    similar = difflib.get_close_matches(wrong, names, n=_MAX_EXAMPLES, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, similar))}? " if similar else ""
    return f"{hint}there are {len(names):,} groups, such as {names[0]!r}"


def find_id_rows(data: Dataset, file: str) -> list[int]:
    """Returns the training rows with the ids in a file, in file order.

    Raises UserError if the file cannot be read, or if an id is repeated, unknown or
    that of a validation or test row.
    """
    path = pathlib.Path(file).expanduser()
    ids = read_ids(path)
    row_by_id = {id_: row for row, id_ in enumerate(data.id.tolist())}
    train_ids = set(data.id[data.split == "train"].tolist())
    repeated = [i for i, count in collections.Counter(ids).items() if count > 1]
    examples_by_problem = {
        "more than once; list each once": repeated,
        f"which the data set {data.name} does not have; correct or remove them": [
            i for i in ids if i not in row_by_id
        ],
        "which are validation or test rows; remove them": [
            i for i in ids if i not in train_ids
        ],
    }
    for problem, examples in examples_by_problem.items():
        if examples:
            names = ", ".join(map(repr, examples[:_MAX_EXAMPLES]))
            if len(examples) > _MAX_EXAMPLES:
                names += f" and {len(examples) - _MAX_EXAMPLES} more"
            raise UserError(f"unlearn ids: {path} lists {names} {problem}")
    return [row_by_id[i] for i in ids]


def read_ids(path: pathlib.Path) -> list[str]:
    """Reads a file with one id per line; raises UserError if it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"unlearn ids: cannot read {path}: {reason}; pass a UTF-8 file of ids"
        ) from None
    ids = [line.strip() for line in lines]
    # A comment starts with a hash and a space, while an id may start with a hash.
    return [i for i in ids if i and not f"{i} ".startswith("# ")]
