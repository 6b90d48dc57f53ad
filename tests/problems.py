"""Tiny problems in memory: rows, a configuration, a model and everything about them."""

import dataclasses

import jax
import numpy as np

from ccu_jax import models
from ccu_jax.config.schema import Ccu, Config, Model, Run, Train
from ccu_jax.data import Dataset
from ccu_jax.evaluate.forward import Forward
from ccu_jax.methods import METHODS, REFERENCES, Problem
from ccu_jax.train.step import send_rows
from ccu_jax.unlearn_sets import splits as unlearn_set

SIDE, LENGTH, WORDS, CLASSES = 8, 5, 12, 3
# Training that changes no picture and no text.
PLAIN = {"shift": 0, "zoom": 0.0, "tint": 0.0, "flip": False, "word_dropout": 0.0}
TABLE = ("image", "text", "labels", "has_image", "has_text")


def dataset(rows=56, *, multi_label=False, seed=0, per_group=1, whole=False) -> Dataset:
    """Rows whose picture and text both tell a little of their labels.

    Args:
        rows: N; 5 of 7 are for training, 1 each for validation and test.
        multi_label: whether rows have several labels.
        seed: of everything random.
        per_group: rows that share a group; all of one split.
        whole: whether every row has both a picture and a text.
    """
    rng = np.random.default_rng(seed)
    if multi_label:
        labels = (rng.random((rows, CLASSES)) < 0.5).astype(np.float32)
        labels[np.arange(rows), rng.integers(CLASSES, size=rows)] = 1
    else:
        labels = np.eye(CLASSES, dtype=np.float32)[np.arange(rows) % CLASSES]
    look = rng.random((CLASSES, SIDE, SIDE, 3))
    shown = labels @ look.reshape(CLASSES, -1) / labels.sum(1, keepdims=True)
    image = 100 * shown.reshape(rows, SIDE, SIDE, 3) + 155 * rng.random(
        (rows, SIDE, SIDE, 3)
    )
    text = rng.integers(2, WORDS, (rows, LENGTH))
    text[:, 0] = 2 + labels.argmax(1)
    for row, end in enumerate(rng.integers(2, LENGTH + 1, rows)):
        text[row, end:] = 0
    has_image = np.arange(rows) % 9 != 4
    has_text = np.arange(rows) % 11 != 5
    if whole:
        has_image[:] = has_text[:] = True
    image[~has_image] = 0
    text[~has_text] = [1, *[0] * (LENGTH - 1)]
    group = np.arange(rows) // per_group
    split = np.array([*["train"] * 5, "validation", "test"])[group % 7]
    return Dataset(
        name="toy",
        edition="own",
        classes=("red", "green", "blue"),
        multi_label=multi_label,
        metric="micro_f1" if multi_label else "accuracy",
        image=image.astype(np.uint8),
        text=text.astype(np.int32),
        labels=labels,
        has_image=has_image,
        has_text=has_text,
        id=np.array([f"row{i}" for i in range(rows)]),
        group=np.array([f"group{g}" for g in group]),
        split=split,
        cluster=np.arange(rows),
        vocabulary=WORDS,
        counts={"read": rows, "used": rows},
        fingerprint=f"toy{seed}",
    )


def planted(rows=560) -> Dataset:
    """Rows whose picture shows a class, often a wrong one, and a pattern of its own.

    Only who has seen a picture can know the label of one that shows a wrong class.
    """
    data = dataset(rows, whole=True, seed=2)
    rng = np.random.default_rng(3)
    look = rng.random((CLASSES, 1, 1, 3)) - 0.5
    classes = data.labels.argmax(1)
    shown = np.where(rng.random(rows) < 0.3, (classes + 1) % 3, classes)
    image = 0.5 + 0.3 * look[shown] + 0.3 * rng.normal(size=data.image.shape)
    # Texts that say nothing: else the fused view would hardly need the pictures.
    text = data.text.copy()
    text[:, 0] = 2 + rng.integers(CLASSES, size=rows)
    return data._replace(image=(255 * image.clip(0, 1)).astype(np.uint8), text=text)


def labels(rng, rows, multi_label):
    """Labels `[rows, K]`; of single ones each class about as often as the others."""
    if not multi_label:
        return np.eye(CLASSES)[rng.permutation(np.arange(rows) % CLASSES)]
    x = (rng.random((rows, CLASSES)) < 0.4) * 1.0
    x[np.arange(rows), rng.integers(CLASSES, size=rows)] = 1
    return x


def config(**sections) -> Config:
    """Everything small: `config(ccu={"steps": 9})` changes fields of a section."""
    batches = {"batch": 16, "learning_rate": 1e-2}
    tiny = {
        "model": Model(
            patch=4,
            image_width=8,
            image_depth=2,
            text_width=8,
            text_depth=1,
            heads=2,
            embed_dim=6,
        ),
        "train": Train(epochs=2, shift=1, **batches),
        "ccu": Ccu(steps=3, batch=16, unlearn_batch=8, check_every=1, stop=False),
        "run": Run(steps_per_call=2, evaluate_batch=32),
    }
    small = {
        "steps": 3,
        "epochs": 4,
        "ascent_epochs": 1,
        "repair_steps": 2,
        "repeats": 2,
        "unlearn_batch": 8,
        "heldout_batch": 8,
        "refresh_every": 2,
        "shrink": 0.4,
        "select": 1.0,
        **batches,
    }
    usual = Config()
    for name in METHODS:
        if name not in tiny and name not in REFERENCES:
            section = getattr(usual, name)
            fields = {f.name: f.type for f in dataclasses.fields(section)}
            own = {key: fields[key](x) for key, x in small.items() if key in fields}
            if (
                "ascent_epochs" in own
            ):  # its plan shall be of one size for some more rows
                own["epochs"] = 2
            tiny[name] = dataclasses.replace(section, **own)
    for section, fields in sections.items():
        tiny[section] = dataclasses.replace(tiny[section], **fields)
    return Config(name="toy", **tiny)


def model(config: Config) -> models.Model:
    """The classifier of these rows."""
    return models.build(
        config.model,
        classes=CLASSES,
        vocabulary=WORDS,
        image_size=SIDE,
        text_length=LENGTH,
    )


def problem(
    executor, data=None, settings=None, *, seed=0, rule="random:0.2"
) -> Problem:
    """A problem whose original is a model with random parameters."""
    data = dataset() if data is None else data
    settings = settings or config()
    made = model(settings)
    table = {name: np.asarray(getattr(data, name)) for name in TABLE}
    return Problem(
        config=settings,
        model=made,
        forward=Forward(made, executor, settings.run.evaluate_batch),
        executor=executor,
        table=executor.replicate(table),
        sets=unlearn_set.draw(data, rule, 0, 0.2),
        multi_label=data.multi_label,
        params=executor.replicate(made.init(jax.random.key(7))),
        seed=seed,
    )


def share(executor, program, steps=slice(None)):
    """What each device gets for these steps of a program, as the loop gives it."""
    index = {
        name: send_rows(
            executor,
            {} if name in program.sharded_tables else program.table,
            plan[steps],
            1,
        )
        for name, plan in program.plan.items()
    }
    return {"sharded_tables": program.sharded_tables, "index": index}
