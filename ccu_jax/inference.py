"""Loads a trained or unlearned model of a finished run and predicts with it."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from tokenizers import Tokenizer

from ccu_jax import data, models
from ccu_jax.config.schema import Config, Data, from_json
from ccu_jax.data.preparation import images as image_decoding
from ccu_jax.data.preparation.prepare import data_paths
from ccu_jax.data.readers.base import SkipExample
from ccu_jax.data.tokenizer import encode, load_tokenizer
from ccu_jax.errors import UserError, user_error_for
from ccu_jax.models import VIEWS
from ccu_jax.runs import results
from ccu_jax.storage.records import read_record
from ccu_jax.train import checkpoint

Image = bytes | str | pathlib.Path  # encoded bytes, or the path of an image file
_BATCH = 64  # rows of one forward pass; a fixed shape, so that it compiles once


class Classifier(NamedTuple):
    """A trained or unlearned model of a run with its tokenizer and configuration."""

    classes: tuple[str, ...]  # K names
    multi_label: bool
    params: models.Params
    model: models.Model
    tokenizer: Tokenizer
    config: Config

    def predict_probabilities(
        self, images: Sequence[Image | None], texts: Sequence[str | None]
    ) -> dict[str, np.ndarray]:
        """Predicts the class probabilities of N rows; None is a missing image or text.

        Returns:
            Probabilities `[N, K]` by view; they sum to one per row unless the data set
            is multi-label. They are meaningless for rows without the view's modality.

        Raises:
            UserError: an image is unreadable, or there are not as many texts as images.
        """
        if len(images) != len(texts):
            raise UserError(
                f"{len(images)} images but {len(texts)} texts; pass one of each per "
                "row, None for a missing one"
            )
        config = self.config.data
        decoded = [_decode_image(image, config) for image in images]
        blank = np.zeros((config.image_size, config.image_size, 3), np.uint8)
        # Row 0 is empty and pads the last batch.
        columns = {
            "image": np.stack([blank, *(blank if x is None else x for x in decoded)]),
            "text": encode(self.tokenizer, [None, *texts], config.text_length),
            "has_image": np.array([False, *(x is not None for x in decoded)]),
            "has_text": np.array([False, *(text is not None for text in texts)]),
        }
        batches = {view: [np.zeros((0, len(self.classes)))] for view in VIEWS}
        apply = jax.jit(self.model.apply)
        for start in range(0, len(images), _BATCH):
            rows = np.arange(start + 1, start + _BATCH + 1)
            rows[rows > len(images)] = 0
            outputs = apply(self.params, {name: x[rows] for name, x in columns.items()})
            for view in VIEWS:
                logits = np.asarray(getattr(outputs, view), np.float64)[rows > 0]
                batches[view].append(_to_probabilities(logits, self.multi_label))
        return {view: np.concatenate(parts) for view, parts in batches.items()}


def load_classifier(
    workdir: str | pathlib.Path, method: str = "ccu_plus", seed: int = 0
) -> Classifier:
    """Loads the model of a method from a run's folder; `original`: before unlearning.

    Raises:
        UserError: the model does not exist or has diverged, or its files are damaged.
    """
    workdir = pathlib.Path(workdir).expanduser()
    if not workdir.is_dir():
        raise UserError(f"workdir: no folder {workdir.absolute()}; correct the path")
    result_path = results.result_path(workdir, seed, method)
    if not result_path.exists():
        finished = sorted(path.stem for path in (workdir / "stages").glob("*.json"))
        raise UserError(
            f"{workdir}: no finished model {method} of seed {seed}; choose from: "
            + (", ".join(finished) or "none")
        )
    if reason := results.load_result(result_path).get("diverged"):
        raise UserError(
            f"{method} of seed {seed} has diverged ({reason}); choose another model"
        )
    try:
        config = from_json(read_record(workdir / "config.json"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{workdir / 'config.json'}: unreadable ({error}); pass the folder of a run"
        ) from None
    stored = data.load_prepared(config.data, workdir)
    model = models.build(
        config.model,
        num_classes=len(stored.classes),
        vocab_size=stored.vocabulary,
        image_size=config.data.image_size,
        text_length=config.data.text_length,
    )
    return Classifier(
        classes=stored.classes,
        multi_label=stored.multi_label,
        params=_restore_params(workdir, method, seed, model, stored.purged),
        model=model,
        tokenizer=load_tokenizer(data_paths(workdir).data / "tokenizer.json"),
        config=config,
    )


def _restore_params(
    workdir: pathlib.Path, method: str, seed: int, model: models.Model, is_purged: bool
) -> models.Params:
    folder = workdir / "checkpoints" / f"{method}-{seed}" / "params"
    warnings: list[str] = []
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    try:
        restored = checkpoint.restore(folder, shapes, warnings.append)
    except Exception as error:
        if (reason := user_error_for(error)) is None:
            raise
        raise UserError(f"{folder}: unreadable checkpoint ({reason})") from error
    if restored is not None:
        return restored.tree
    if is_purged and method == "original":
        raise UserError(
            f"{folder}: the checkpoint was removed by --purge; choose another model"
        )
    detail = f" ({warnings[0]})" if warnings else ""
    message = f"{folder}: missing or damaged checkpoint{detail}"
    if not is_purged:
        stage = results.result_path(workdir, seed, method)
        message += f"; remove {stage} and rerun the command of the run to retrain"
    raise UserError(message)


def _decode_image(image: Image | None, config: Data) -> np.ndarray | None:
    """Decodes an image to pixels `[S, S, 3]` as in training; None stays None."""
    if image is None:
        return None
    try:
        data = image if isinstance(image, bytes) else pathlib.Path(image).read_bytes()
        image_size, crop_margins = config.image_size, config.crop_margins
        return image_decoding.decode(data, image_size, crop_margins).pixels
    except (OSError, SkipExample) as error:
        name = "image" if isinstance(image, bytes) else str(image)
        raise UserError(
            f"{name}: unusable ({error}); pass a readable image file or its bytes"
        ) from None


def _to_probabilities(logits: np.ndarray, multi_label: bool) -> np.ndarray:
    if multi_label:
        return 1 / (1 + np.exp(-np.clip(logits, -500, 500)))
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    return odds / odds.sum(axis=1, keepdims=True)
