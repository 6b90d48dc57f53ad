"""One forward pass over rows, and scores as pure functions of what it gives."""

import io
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
import scipy.stats

from ccu_jax.data.batches import OnHost, plan_single_pass
from ccu_jax.distributed.executors import Executor
from ccu_jax.errors import UserError
from ccu_jax.models import VIEWS, Model
from ccu_jax.train.step import everywhere, gather, on_devices, rows_of

SETS = ("retain", "unlearn", "unseen", "validation", "test")
_LATER = ("white", "group")  # columns that files of older runs lack


class Forward:
    """Runs a model over rows of a table, over all devices, compiled once per use.

    Args:
        model: the classifier.
        executor: where it runs.
        batch: rows of one pass over all devices, rounded up to fill them.
    """

    def __init__(self, model: Model, executor: Executor, batch: int):  # noqa: D107
        self._model, self._executor = model, executor
        self._batch = -(-batch // executor.devices) * executor.devices
        self._compiled = {}

    def outputs(self, params, table, rows) -> dict[str, np.ndarray]:
        """What `Model.apply` gives for `rows` of `table`: arrays `[len(rows), ...]`.

        And `pooled`, the trunk's features as one vector for each row.

        The table has pictures and texts, or what `encode` gave for them; either way
        the heads are one program, so that equal features give equal bits.
        """
        encoded = "features" in table
        names = ("has_image", "has_text", *(("features", "h_text") if encoded else ()))

        def given(batch):
            columns = {name: _take(table[name], batch) for name in names}
            columns = self._executor.place(columns)
            return columns if encoded else columns | self._encoded(params, table, batch)

        heads = self.once("heads", self._heads)
        every = self._executor.shard(np.arange(self._batch, dtype=np.int32))
        return self._passes(
            rows, lambda batch: heads((), (params, given(batch)), {"rows": every})[1]
        )

    def encode(self, params, table, rows) -> dict[str, np.ndarray]:
        """What trunk and text branch give: `features` and `h_text` of the rows."""
        return self._passes(rows, lambda batch: self._encoded(params, table, batch))

    def once(self, name: str, fn):
        """A per-device function (`Executor.run`), compiled once for all its calls."""
        if name not in self._compiled:
            self._compiled[name] = self._executor.run(fn)
        return self._compiled[name]

    def _passes(self, rows, one):
        plan, counted = plan_single_pass(rows, self._batch)
        pieces = jax.device_get([one(batch) for batch in plan])
        # What fills up the last batch stands at its end.
        return jax.tree.map(lambda *x: np.concatenate(x)[: counted.sum()], *pieces)

    def _encoded(self, params, table, batch):
        table = {name: table[name] for name in ("image", "text")}
        index = rows_of(self._executor, table, batch)
        encode = self.once("encode", self._encode)
        return encode((), (params, on_devices(table)), index)[1]

    def _encode(self, state, resident, index):
        params, table = resident
        rows = gather(table, index)
        said = {
            "features": self._model.trunk(params, rows["image"]),
            "h_text": self._model.read(params, rows["text"]),
        }
        return state, everywhere(said)

    def _heads(self, state, resident, index):
        params, columns = resident
        rows = gather(columns, index)
        out = self._model.apply(params, rows)._asdict()
        return state, everywhere(out | {"pooled": pool(rows["features"])})


def pool(features):
    """Trunk features `[N, P, W]` to `[N, 2 W]`: class token and mean of the others."""
    features = features.astype(np.float32)
    numpy = jnp if isinstance(features, jax.Array) else np
    return numpy.concatenate([features[:, 0], features[:, 1:].mean(axis=1)], axis=1)


def _take(column, rows):
    """Rows of a column, wherever it is, on the host."""
    return column.take(rows) if isinstance(column, OnHost) else np.asarray(column)[rows]


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


def white_box(features, labels, known, multi_label: bool, strength: float = 1.0):
    """What features tell of each row's labels to somebody who has the weights, `[N]`.

    A ridge regression is fitted on the rows `known` (of the retain set); what is told
    is its margin, or with several labels its confidence. A trunk that has learned a
    picture puts it where its labels are: the attack of this value sees what heads that
    were unlearned no longer say.

    Args:
        features: `[N, F]`.
        labels: `[N, K]`.
        known: `[N]`, which rows the ridge is fitted on.
        multi_label: whether rows have several labels.
        strength: of the ridge, relative to the features' mean variance.
    """
    x, y = np.asarray(features, np.float64), np.asarray(labels, np.float64)
    if not known.any() or not np.isfinite(x).all():
        return np.full(len(x), np.nan)
    x, prior = x - x[known].mean(0), y[known].mean(0)
    gram = x[known].T @ x[known]
    gram += max(strength * np.trace(gram) / len(gram), 1e-12) * np.eye(len(gram))
    told = x @ np.linalg.solve(gram, x[known].T @ (y[known] - prior)) + prior
    if multi_label:
        told = scipy.special.logit(np.clip(told, 0.02, 0.98))
        return -np.logaddexp(0, np.where(y > 0, -told, told)).sum(axis=1)
    other = np.where(y > 0, -np.inf, told).max(axis=1)
    return (told * y).sum(axis=1) - other


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


def single_label_scores(logits, labels) -> dict[str, float]:
    """Accuracy, and the F1 score averaged over classes, of `[N, K]` logits.

    With two classes also "auroc", how well the second class is told from the first,
    where there are rows of both.
    """
    predicted = np.eye(labels.shape[1])[logits.argmax(axis=1)]
    found = {
        "accuracy": float((predicted * labels).sum(axis=1).mean()),
        "macro_f1": float(_f1(predicted, labels, axis=0).mean()),
    }
    if labels.shape[1] == 2:
        second = labels[:, 1] > 0
        if second.any() and not second.all():
            # In double precision: rows must not be tied by rounding.
            score = logits[:, 1].astype(np.float64) - logits[:, 0]
            found["auroc"] = auc(score[second], score[~second])
    return found


def multi_label_scores(logits, labels) -> dict[str, float]:
    """F1 scores of `[N, K]` logits at probability 0.5, averaged in the four usual ways.

    A class or row without true and predicted labels counts 0, as in scikit-learn.
    """
    predicted = (logits > 0).astype(np.float64)
    per_class = _f1(predicted, labels, axis=0)
    frequency = labels.sum(axis=0)
    return {
        "micro_f1": float(_f1(predicted.ravel(), labels.ravel(), axis=0)),
        "macro_f1": float(per_class.mean()),
        "weighted_f1": float((per_class * frequency).sum() / max(frequency.sum(), 1)),
        "samples_f1": float(_f1(predicted, labels, axis=1).mean()),
    }


def auc(positives, negatives) -> float:
    """Chance that a positive's value exceeds a negative's, ties counting half.

    The area under the ROC curve (Mann & Whitney 1947). 0.5 tells nothing, and below 0.5
    tells as much as above.
    """
    count = len(positives)
    rank = scipy.stats.rankdata(np.concatenate([positives, negatives]))[:count].sum()
    return float((rank - count * (count + 1) / 2) / (count * len(negatives)))


def _f1(predicted, labels, axis):
    both = (predicted * labels).sum(axis=axis)
    return 2 * both / np.maximum(predicted.sum(axis=axis) + labels.sum(axis=axis), 1)


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
