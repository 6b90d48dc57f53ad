"""Predictions of one model on all splits: how they are computed, stored and scored."""

import io
import pathlib
from typing import Any, NamedTuple

import numpy as np

from ccu_jax.data.dataset import Dataset
from ccu_jax.distributed.device_tables import Table
from ccu_jax.errors import UserError
from ccu_jax.evaluate.forward import Forward
from ccu_jax.evaluate.ridge import probe_margin
from ccu_jax.metrics.classification import (
    auc,
    best_constant_score,
    multi_label_scores,
    single_label_scores,
)
from ccu_jax.metrics.membership import log_likelihood
from ccu_jax.models import VIEWS, Params
from ccu_jax.storage.files import write_atomically
from ccu_jax.unlearn_sets.splits import Sets

SPLITS = ("retain", "unlearn", "unseen", "validation", "test")
# A model has collapsed if its score is at most the first multiple of that of the best
# constant prediction, while the original's is above the second multiple.
_COLLAPSE_RATIO, _TRAINED_RATIO = 1.05, 1.2
# Fields that have another name in stored files.
_STORED_NAMES = {"split": "of", "trunk_probe": "white"}


class Predictions(NamedTuple):
    """Predictions of one model on the N rows of all splits.

    Predictions from a missing image or text are meaningless (see `has_modalities`).
    Rows of one group are not independent.
    """

    logits: dict[str, np.ndarray]  # of each view, `[N, K]`
    pair: np.ndarray  # `[N]`, cosine of the image and text embeddings
    labels: np.ndarray  # `[N, K]`
    split: np.ndarray  # `[N]`, split names
    id: np.ndarray  # `[N]`, row ids
    has_image: np.ndarray  # bool `[N]`
    has_text: np.ndarray  # bool `[N]`
    multi_label: bool
    trunk_probe: np.ndarray  # `[N]`, `ridge.probe_margin` of the trunk's features
    group: np.ndarray  # `[N]`, group numbers

    def has_modalities(self, view: str) -> np.ndarray:
        """Returns a mask `[N]` of the rows that have the modalities a view needs."""
        return {
            "image": self.has_image,
            "text": self.has_text,
            "fused": self.has_image | self.has_text,
            "pair": self.has_image & self.has_text,
            "white": self.has_image,
        }[view]


def predict_all_splits(
    forward: Forward, params: Params, table: Table, data: Dataset, sets: Sets
) -> Predictions:
    """Predicts the rows of all splits in one forward pass.

    `table` (see `Forward.compute_outputs`) and `data` contain all rows of the data set.
    """
    rows = np.concatenate([getattr(sets, name) for name in SPLITS])
    outputs = forward.compute_outputs(params, table, rows)
    split = np.repeat(SPLITS, [len(getattr(sets, name)) for name in SPLITS])
    labels, has_image = data.labels[rows], data.has_image[rows]
    is_fitted = (split == "retain") & has_image
    return Predictions(
        logits={view: outputs[view] for view in VIEWS},
        pair=np.sum(outputs["z_image"] * outputs["z_text"], axis=-1),
        labels=labels,
        split=split,
        id=data.id[rows],
        has_image=has_image,
        has_text=data.has_text[rows],
        multi_label=data.multi_label,
        trunk_probe=probe_margin(
            outputs["pooled"], labels, is_fitted, data.multi_label
        ),
        group=np.unique(data.group[rows], return_inverse=True)[1].astype(np.int32),
    )


def save_predictions(path: pathlib.Path, predictions: Predictions) -> None:
    """Writes predictions to an `.npz` file, atomically."""
    file = io.BytesIO()
    arrays: dict[str, Any] = predictions._asdict()
    logits = arrays.pop("logits")
    stored = {f"logits_{view}": x for view, x in logits.items()}
    stored |= {_STORED_NAMES.get(name, name): x for name, x in arrays.items()}
    np.savez(file, **stored)
    write_atomically(path, file.getvalue())


def load_predictions(path: pathlib.Path) -> Predictions:
    """Reads predictions that `save_predictions` has written.

    Raises UserError if the file is missing or damaged.
    """
    names = [name for name in Predictions._fields if name != "logits"]
    try:
        # Opened here because NumPy does not close a damaged file.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            fields = {name: file[_STORED_NAMES.get(name, name)] for name in names}
            fields["multi_label"] = bool(fields["multi_label"])
            logits = {view: file[f"logits_{view}"] for view in VIEWS}
            return Predictions(logits=logits, **fields)
    except Exception as error:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise
        # Predictions in outputs/ are rebuilt with their stage, others on their own.
        record = path.parent.parent / "stages" / f"{path.stem}.json"
        remove = record if path.parent.name == "outputs" else path
        raise UserError(
            f"{path}: missing or damaged; remove {remove} and rerun the same command"
        ) from None


def compute_scores(predictions: Predictions) -> dict[str, dict[str, dict[str, float]]]:
    """Scores each split and view on the rows that have the view's modalities.

    Returns `{split: {view: {name: score}}}`, with no scores if there is no such row or
    a logit is not finite.
    """
    p = predictions

    def score(split, view):
        rows = (p.split == split) & p.has_modalities(view)
        logits = p.logits[view][rows]
        if not len(logits) or not np.isfinite(logits).all():
            return {}
        return _score_logits(logits, p.labels[rows], p.multi_label)

    return {split: {view: score(split, view) for view in VIEWS} for split in SPLITS}


def attack_auc(predictions: Predictions) -> dict[str, float | None]:
    """Returns the AUC of the loss-threshold attack (Yeom et al. 2018) by view.

    Members are the rows of the unlearn set that have an image, non-members those of the
    `unseen` split. `pair` attacks the cosine of image and text, `white` (white-box) the
    linear probe of the trunk, which needs the weights; the others need predictions.
    None if either side is empty or a value is not finite.
    """
    p = predictions

    def signal(view, split):
        rows = p.has_modalities(view) & p.has_image & (p.split == split)
        if view not in VIEWS:
            return (p.pair if view == "pair" else p.trunk_probe)[rows]
        logits = p.logits[view][rows]
        if not np.isfinite(logits).all():
            return np.full(len(logits), np.nan)
        return log_likelihood(logits, p.labels[rows], p.multi_label)

    def attack(view):
        signals = [signal(view, split) for split in ("unlearn", "unseen")]
        has_both = all(len(x) and np.isfinite(x).all() for x in signals)
        return auc(*signals) if has_both else None

    return {view: attack(view) for view in (*VIEWS, "pair", "white")}


def describe_collapse(predictions: Predictions, original: Predictions) -> str | None:
    """Describes how a model has collapsed, or returns None if it has not.

    A model has collapsed if a logit is not finite, or if its fused test score (accuracy
    or micro F1) is that of the best constant prediction and the original's is higher.
    """
    p = predictions
    rows = (p.split == "test") & p.has_modalities("fused")
    logits, labels = p.logits["fused"][rows], p.labels[rows]
    if not all(np.isfinite(x).all() for x in p.logits.values()):
        return "logits are not finite"
    if not len(logits):
        return None
    name = "micro_f1" if p.multi_label else "accuracy"
    score, original_score = (
        _score_logits(x, labels, p.multi_label)[name]
        for x in (logits, original.logits["fused"][rows])
    )
    chance = best_constant_score(labels, p.multi_label)
    if score > _COLLAPSE_RATIO * chance or original_score <= _TRAINED_RATIO * chance:
        return None
    return f"collapsed: fused test {name} {score:.3f} is at chance level"


def _score_logits(logits, labels, multi_label: bool) -> dict[str, float]:
    return (multi_label_scores if multi_label else single_label_scores)(logits, labels)
