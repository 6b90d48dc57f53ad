"""A model of a finished run, to be used: pictures and texts in, probabilities out."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from ccu_jax import data, models
from ccu_jax.config.schema import Config, from_json
from ccu_jax.data.preparation import images as pictures
from ccu_jax.data.preparation import prepare
from ccu_jax.data.readers.base import SkipExample
from ccu_jax.data.tokenizer import encode, load_tokenizer
from ccu_jax.errors import UserError, user_error_for
from ccu_jax.models import VIEWS
from ccu_jax.runs import results as rows
from ccu_jax.storage.records import read_record
from ccu_jax.train import checkpoint

_BATCH = 64  # rows of one pass: one shape, so that it is compiled once


class Classifier(NamedTuple):
    """What `load` gives; `params` and `model` are for those who want more of it."""

    classes: tuple[str, ...]  # K names
    multi_label: bool
    params: models.Params
    model: models.Model
    tokenizer: object
    config: Config

    def probabilities(
        self,
        images: Sequence[bytes | str | pathlib.Path | None],
        texts: Sequence[str | None],
    ) -> dict[str, np.ndarray]:
        """What the model says of N rows, by view: `[N, K]`, in 0..1.

        With one label the probabilities of a row sum to one; with several each label
        has its own.

        Args:
            images: encoded pictures or the paths of their files; None: there is none.
            texts: N as well; None: there is none. A view of what a row does not have
                means nothing.

        Raises:
            UserError: a picture that cannot be read, or other numbers of both.
        """
        if len(images) != len(texts):
            raise UserError(f"{len(images)} pictures and {len(texts)} texts: give both")
        config = self.config.data
        squares = [_square(image, config) for image in images]
        blank = np.zeros((config.image_size, config.image_size, 3), np.uint8)
        columns = {
            "image": np.stack([blank, *(blank if s is None else s for s in squares)]),
            "text": encode(self.tokenizer, [None, *texts], config.text_length),
            "has_image": np.array([False, *(s is not None for s in squares)]),
            "has_text": np.array([False, *(t is not None for t in texts)]),
        }
        found = {view: [np.zeros((0, len(self.classes)))] for view in VIEWS}
        run = jax.jit(self.model.apply)
        for start in range(0, len(images), _BATCH):
            # Row 0 is blank, and fills up the last batch.
            of = np.arange(start + 1, start + _BATCH + 1)
            of[of > len(images)] = 0
            out = run(self.params, {name: x[of] for name, x in columns.items()})
            for view in VIEWS:
                said = np.asarray(getattr(out, view), np.float64)[of > 0]
                found[view].append(_probabilities(said, self.multi_label))
        return {view: np.concatenate(parts) for view, parts in found.items()}


def load(
    workdir: str | pathlib.Path, method: str = "ccu_plus", seed: int = 0
) -> Classifier:
    """A model that a run has left in its working folder.

    Args:
        workdir: of a run.
        method: which of its models; `original` is the one before unlearning.
        seed: of the run.

    Raises:
        UserError: there is no such model, it has diverged, or its files are damaged.
    """
    workdir = pathlib.Path(workdir).expanduser()
    if not rows.result_path(workdir, seed, method).exists():
        there = sorted(path.stem for path in (workdir / "stages").glob("*.json"))
        raise UserError(
            f"{workdir} holds no finished {method} of seed {seed}; there are: "
            + (", ".join(there) or "none")
        )
    if why := rows.load_result(rows.result_path(workdir, seed, method)).get("diverged"):
        raise UserError(f"{method} of seed {seed} has diverged ({why}): load another")
    try:
        tree = read_record(workdir / "config.json")
    except (OSError, ValueError) as error:
        raise UserError(f"{workdir / 'config.json'} cannot be read: {error}") from None
    config = from_json(tree)
    stored = data.load_prepared(config.data, workdir)
    model = models.build(
        config.model,
        classes=len(stored.classes),
        vocabulary=stored.vocabulary,
        image_size=config.data.image_size,
        text_length=config.data.text_length,
    )
    folder = workdir / "checkpoints" / f"{method}-{seed}" / "params"
    told: list[str] = []
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    try:
        saved = checkpoint.restore(folder, shapes, told.append)
    except Exception as error:
        if (why := user_error_for(error)) is None:
            raise
        raise UserError(f"the checkpoint in {folder} cannot be read: {why}") from error
    if saved is None:
        if stored.purged and method == "original":
            why = "was purged with the pictures"
        else:
            why = "is missing or damaged" + (f" ({told[0]})" if told else "")
            if not stored.purged:
                record = rows.result_path(workdir, seed, method)
                why += f": remove {record}, and the run's command trains it again"
        raise UserError(f"the checkpoint in {folder} {why}")
    return Classifier(
        classes=stored.classes,
        multi_label=stored.multi_label,
        params=saved.tree,
        model=model,
        tokenizer=load_tokenizer(prepare.folders(workdir).data / "tokenizer.json"),
        config=config,
    )


def _square(image, config):
    """The picture `[S, S, 3]` as the model was trained on it, or None."""
    if image is None:
        return None
    try:
        content = (
            image if isinstance(image, bytes) else pathlib.Path(image).read_bytes()
        )
        return pictures.decode(content, config.image_size, config.crop_margins).pixels
    except (OSError, SkipExample) as error:
        name = "a picture" if isinstance(image, bytes) else str(image)
        raise UserError(f"{name} cannot be used: {error}") from None


def _probabilities(logits, multi_label):
    if multi_label:
        return 1 / (1 + np.exp(-np.clip(logits, -500, 500)))
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    return odds / odds.sum(axis=1, keepdims=True)
