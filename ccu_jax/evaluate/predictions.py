"""Stored outputs of one model on all splits, their scores and attacks."""

import io
import pathlib
from typing import NamedTuple

import numpy as np

from ccu_jax.errors import UserError
from ccu_jax.evaluate.forward import Forward
from ccu_jax.evaluate.ridge import white_box
from ccu_jax.metrics.classification import (
    auc,
    guessing,
    multi_label_scores,
    single_label_scores,
)
from ccu_jax.metrics.membership import confidence
from ccu_jax.models import VIEWS

SETS = ("retain", "unlearn", "unseen", "validation", "test")
_LATER = ("white", "group")  # columns that files of older runs lack
# Above guessing by so little, a model tells nothing; an original by so much, something.
_GUESSES, _KNOWS = 1.05, 1.2


class Results(NamedTuple):
    """The stored outputs of one model on the rows of all sets.

    `logits` of each view `[N, K]`, `pair` `[N]` the cosine of picture and text,
    `white` `[N]` what the trunk's features tell of the labels (`white_box`),
    `labels` `[N, K]`, `of` `[N]` the name of each row's set, `id` `[N]`, `has_image`,
    `has_text` `[N]`: what a row really has, the other's outputs mean nothing, `group`
    `[N]` numbers of rows that the data set says go together.
    """

    logits: dict[str, np.ndarray]
    pair: np.ndarray
    labels: np.ndarray
    of: np.ndarray
    id: np.ndarray
    has_image: np.ndarray
    has_text: np.ndarray
    multi_label: bool
    # None of runs before these were stored.
    white: np.ndarray | None = None
    group: np.ndarray | None = None

    def shown(self, view: str) -> np.ndarray:
        """Which rows `[N]` a view can be asked of."""
        return {
            "image": self.has_image,
            "text": self.has_text,
            "fused": self.has_image | self.has_text,
            "pair": self.has_image & self.has_text,
            "white": self.has_image,
        }[view]


def results(forward: Forward, params, table, data, sets) -> Results:
    """One forward pass over the rows of all sets."""
    rows = np.concatenate([getattr(sets, name) for name in SETS])
    out = forward.outputs(params, table, rows)
    of = np.repeat(SETS, [len(getattr(sets, name)) for name in SETS])
    known = (of == "retain") & data.has_image[rows]
    return Results(
        logits={view: out[view] for view in VIEWS},
        pair=np.sum(out["z_image"] * out["z_text"], axis=-1),
        labels=data.labels[rows],
        of=of,
        id=data.id[rows],
        has_image=data.has_image[rows],
        has_text=data.has_text[rows],
        multi_label=data.multi_label,
        white=white_box(out["pooled"], data.labels[rows], known, data.multi_label),
        group=np.unique(data.group[rows], return_inverse=True)[1].astype(np.int32),
    )


def scores(outputs: Results) -> dict[str, dict[str, dict[str, float]]]:
    """Scores of each set and view: `{set: {view: {score: value}}}`.

    Of the rows that have what the view looks at; a view of no row has no scores, nor
    has a model that says no numbers.
    """
    measure = multi_label_scores if outputs.multi_label else single_label_scores

    def of(name, view):
        rows = (outputs.of == name) & outputs.shown(view)
        logits = outputs.logits[view][rows]
        if not len(logits) or not np.isfinite(logits).all():
            return {}
        return measure(logits, outputs.labels[rows])

    return {name: {view: of(name, view) for view in VIEWS} for name in SETS}


def to_bytes(outputs: Results) -> bytes:
    """The outputs as the content of one `.npz` file that needs no pickle to be read."""
    file = io.BytesIO()
    more = {name: getattr(outputs, name) for name in _LATER}
    np.savez(
        file,
        **{f"logits_{view}": x for view, x in outputs.logits.items()},
        pair=outputs.pair,
        labels=outputs.labels,
        of=outputs.of,
        id=outputs.id,
        has_image=outputs.has_image,
        has_text=outputs.has_text,
        multi_label=outputs.multi_label,
        **{name: column for name, column in more.items() if column is not None},
    )
    return file.getvalue()


def load(path: pathlib.Path) -> Results:
    """Read a file of what `to_bytes` gave.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        # Opened here: of a damaged one, NumPy leaves its own open.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            return Results(
                logits={view: file[f"logits_{view}"] for view in VIEWS},
                pair=file["pair"],
                labels=file["labels"],
                of=file["of"],
                id=file["id"],
                has_image=file["has_image"],
                has_text=file["has_text"],
                multi_label=bool(file["multi_label"]),
                **{name: file[name] if name in file else None for name in _LATER},
            )
    except Exception as error:  # noqa: BLE001  NumPy and zipfile raise many kinds
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise
        # Outputs go with the record of their stage, others are files of their own.
        record = path.parent.parent / "stages" / f"{path.stem}.json"
        remove = record if path.parent.name == "outputs" else path
        raise UserError(
            f"{path} is missing or damaged: remove {remove} to make it again"
        ) from None


def attack_auc(outputs: Results) -> dict[str, float | None]:
    """AUC of the loss-threshold attack (Yeom et al. 2018) by view, `unseen` as control.

    `pair` attacks the cosine between a row's picture and its text, `white` what the
    trunk's features tell (`evaluate.white_box`): it needs the weights, the others need
    only what the model says. Pictures were to be forgotten, so rows without one are no
    members; None where no row is left, or a value is not finite.
    """

    def value(view, rows):
        if view in ("pair", "white"):
            return getattr(outputs, view)[rows]
        logits, labels = outputs.logits[view][rows], outputs.labels[rows]
        if not np.isfinite(logits).all():
            return np.full(len(logits), np.nan)
        return confidence(logits, labels, outputs.multi_label)

    def attack(view):
        rows = outputs.shown(view) & outputs.has_image
        unlearn, unseen = (
            value(view, rows & (outputs.of == name)) for name in ("unlearn", "unseen")
        )
        told = len(unlearn) and len(unseen)
        if not told or not np.isfinite([*unlearn, *unseen]).all():
            return None
        return auc(unlearn, unseen)

    views = (*VIEWS, "pair", *(() if outputs.white is None else ("white",)))
    return {view: attack(view) for view in views}


def collapse(outputs: Results, original: Results) -> str | None:
    """What is wrong with a model that has fallen apart, or None.

    It says no numbers, or its fused test score, accuracy or micro F1, is that of the
    best single answer to every row, although the original's was not.
    """
    rows = (outputs.of == "test") & outputs.shown("fused")
    logits, labels = outputs.logits["fused"][rows], outputs.labels[rows]
    if not all(np.isfinite(x).all() for x in outputs.logits.values()):
        return "what it says are no numbers"
    if not len(logits):
        return None
    name = "micro_f1" if outputs.multi_label else "accuracy"
    measure = multi_label_scores if outputs.multi_label else single_label_scores
    score = measure(logits, labels)[name]
    before = measure(original.logits["fused"][rows], labels)[name]
    guess = guessing(labels, outputs.multi_label)
    if score > _GUESSES * guess or before <= _KNOWS * guess:
        return None
    return f"collapsed: its fused test {name} is {score:.3f}, that of guessing"
