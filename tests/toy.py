"""Toy data sets, configurations and problems in memory, and helpers to run methods."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
from PIL import Image

from ccu_jax import models
from ccu_jax.config.schema import Ccu, Config, Data, Model, Run, Train
from ccu_jax.data import Dataset
from ccu_jax.distributed import executors
from ccu_jax.evaluate import feature_store
from ccu_jax.evaluate.forward import Forward
from ccu_jax.methods import METHODS, REFERENCES, Problem
from ccu_jax.runs.context import RunContext
from ccu_jax.runs.progress import NullStage, Reporter
from ccu_jax.train.loop import Loop
from ccu_jax.train.step import send_batches
from ccu_jax.unlearn_sets import splits

IMAGE_SIZE, TEXT_LENGTH, VOCABULARY, CLASSES = 8, 5, 12, 3
# Training without augmentation.
NO_AUGMENTATION: dict[str, Any] = {"shift": 0, "zoom": 0.0, "tint": 0.0, "flip": False}
NO_AUGMENTATION |= {"word_dropout": 0.0}
TABLE_COLUMNS = ("image", "text", "labels", "has_image", "has_text")


def make_dataset(
    num_rows=56, *, multi_label=False, seed=0, per_group=1, has_both=False
) -> Dataset:
    """Returns rows whose image and text both depend a little on their labels.

    Of 7 groups of `per_group` rows, 5 are training, 1 validation and 1 test data. With
    `has_both`, no row lacks its image or its text.
    """
    rng = np.random.default_rng(seed)
    labels = np.eye(CLASSES, dtype=np.float32)[np.arange(num_rows) % CLASSES]
    if multi_label:
        labels = (rng.random((num_rows, CLASSES)) < 0.5).astype(np.float32)
        labels[np.arange(num_rows), rng.integers(CLASSES, size=num_rows)] = 1
    size = (IMAGE_SIZE, IMAGE_SIZE, 3)
    patterns = rng.random((CLASSES, *size)).reshape(CLASSES, -1)
    mixed = labels @ patterns / labels.sum(1, keepdims=True)
    image = 100 * mixed.reshape(num_rows, *size) + 155 * rng.random((num_rows, *size))
    text = rng.integers(2, VOCABULARY, (num_rows, TEXT_LENGTH))
    text[:, 0] = 2 + labels.argmax(1)
    for row, end in enumerate(rng.integers(2, TEXT_LENGTH + 1, num_rows)):
        text[row, end:] = 0
    has_image = (np.arange(num_rows) % 9 != 4) | has_both
    has_text = (np.arange(num_rows) % 11 != 5) | has_both
    image[~has_image] = 0
    text[~has_text] = [1, *[0] * (TEXT_LENGTH - 1)]
    group = np.arange(num_rows) // per_group
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
        id=np.array([f"row{i}" for i in range(num_rows)]),
        group=np.array([f"group{g}" for g in group]),
        split=split,
        cluster=np.arange(num_rows),
        vocabulary=VOCABULARY,
        counts={"read": num_rows, "used": num_rows},
        fingerprint=f"toy{seed}",
    )


def make_memorizable_dataset(rows=560) -> Dataset:
    """Returns rows whose image shows its class or, often, a wrong one, with noise.

    The label of an image of a wrong class is only known to a model that memorized it.
    """
    data = make_dataset(rows, has_both=True, seed=2)
    rng = np.random.default_rng(3)
    colors = rng.random((CLASSES, 1, 1, 3)) - 0.5
    classes = data.labels.argmax(1)
    visible = np.where(rng.random(rows) < 0.3, (classes + 1) % 3, classes)
    image = 0.5 + 0.3 * colors[visible] + 0.3 * rng.normal(size=data.image.shape)
    # With informative texts, the fused view would hardly need the images.
    text = data.text.copy()
    text[:, 0] = 2 + rng.integers(CLASSES, size=rows)
    return data._replace(image=(255 * image.clip(0, 1)).astype(np.uint8), text=text)


def random_labels(rng, rows, multi_label):
    """Returns random labels `[rows, K]`; single labels have balanced classes."""
    if not multi_label:
        return np.eye(CLASSES)[rng.permutation(np.arange(rows) % CLASSES)]
    x = (rng.random((rows, CLASSES)) < 0.4) * 1.0
    x[np.arange(rows), rng.integers(CLASSES, size=rows)] = 1
    return x


def make_config(**sections) -> Config:
    """Returns a small configuration; `ccu={"steps": 9}` changes fields of a section."""
    batches = {"batch": 16, "learning_rate": 1e-2}
    widths = {"image_width": 8, "text_width": 8, "embed_dim": 6, "heads": 2}
    tiny = {
        "model": Model(patch=4, image_depth=2, text_depth=1, **widths),
        "train": Train(epochs=2, shift=1, **batches),
        "ccu": Ccu(steps=3, batch=16, unlearn_batch=8, check_every=1, stop=False),
        "run": Run(steps_per_call=2, evaluate_batch=32),
    }
    small = {"steps": 3, "epochs": 4, "ascent_epochs": 1, "repair_steps": 2}
    small |= {"repeats": 2, "unlearn_batch": 8, "heldout_batch": 8, "refresh_every": 2}
    small |= {"shrink": 0.4, "alpha": 1.0, "fisher_threshold": 1.0, **batches}
    for name in set(METHODS) - set(tiny) - set(REFERENCES):
        section = getattr(Config(), name)
        fields = {key: type(x) for key, x in vars(section).items()}
        own = {key: fields[key](x) for key, x in small.items() if key in fields}
        if "ascent_epochs" in own:  # larger requests then have the same padded size
            own["epochs"] = 2
        tiny[name] = dataclasses.replace(section, **own)
    for section, fields in sections.items():
        tiny[section] = dataclasses.replace(tiny[section], **fields)
    return Config(name="toy", **tiny)


def build_model(config: Config) -> models.Model:
    """Returns a classifier of the rows of `make_dataset`."""
    sizes = {"num_classes": CLASSES, "vocab_size": VOCABULARY}
    sizes |= {"image_size": IMAGE_SIZE, "text_length": TEXT_LENGTH}
    return models.build(config.model, **sizes)


def make_problem(
    executor, data=None, settings=None, *, seed=0, rule="random:0.2"
) -> Problem:
    """Returns a problem whose original has random parameters."""
    data = make_dataset() if data is None else data
    settings = settings or make_config()
    model = build_model(settings)
    table = {name: np.asarray(getattr(data, name)) for name in TABLE_COLUMNS}
    return Problem(
        config=settings,
        model=model,
        forward=Forward(model, executor, settings.run.evaluate_batch),
        executor=executor,
        table=executor.replicate(table),
        sets=splits.draw_sets(data, rule, 0, 0.2),
        multi_label=data.multi_label,
        params=executor.replicate(model.init(jax.random.key(7))),
        seed=seed,
    )


def make_compute_fn(problem):
    """Returns a function from rows to the columns of the problem's feature store."""
    return feature_store.make_compute_fn(
        problem.forward, problem.params, problem.table, problem.seed
    )


def with_stored_features(problem):
    """Returns the problem with the features of its original in memory."""
    rows = np.arange(len(problem.table["labels"]))
    columns = make_compute_fn(problem)(rows)
    store = feature_store.FeatureStore(columns, np.ones(len(rows), bool))
    return problem._replace(store=store)


def make_context(problem, data, workdir, loop=None, **unlearn) -> RunContext:
    """Returns the context of a run; `unlearn` changes `config.unlearn`."""
    reporter = Reporter(workdir, is_active=False)
    reporter.warn = fail_on_warning
    section = dataclasses.replace(problem.config.unlearn, **unlearn)
    return RunContext(
        config=dataclasses.replace(problem.config, unlearn=section),
        workdir=workdir,
        reporter=reporter,
        executor=problem.executor,
        data=data,
        corruptions={},
        model=problem.model,
        forward=problem.forward,
        loop=loop or make_loop(problem),
        table=problem.table,
    )


def step_inputs_of(executor, program, steps=slice(None)):
    """Returns the inputs of some steps of a program, by default of all."""
    start, stop, _ = steps.indices(program.steps)
    return send_batches(program, executor, start, stop - start)


def fail_on_warning(text):
    raise AssertionError(text)


def with_fitted_labels(problem):
    """Makes the original right on all rows but held-out ones, by changing the labels.

    Otherwise a stop rule could end a run before its first step.
    """
    rows = np.arange(len(problem.table["labels"]))

    def image_logits():
        return problem.forward.compute_outputs(problem.params, problem.table, rows)[
            "image"
        ]

    # Balances the predicted classes.
    head = problem.params["image_head"]
    head = {**head, "bias": head["bias"] - np.median(image_logits(), axis=0)}
    problem = problem._replace(params={**problem.params, "image_head": head})
    is_heldout = np.isin(rows, problem.sets.validation)
    logits = image_logits()
    if problem.multi_label:
        labels = np.where(is_heldout[:, None], logits <= 0, logits > 0)
    else:
        labels = np.eye(CLASSES)[(logits.argmax(1) + is_heldout) % CLASSES]
    labels = problem.executor.replicate(labels.astype(np.float32))
    return problem._replace(table={**problem.table, "labels": labels})


def make_loop(problem, config=None):
    """Returns a loop that has compiled nothing yet."""
    return Loop(config or problem.config.run, problem.executor, fail_on_warning)


def count_traces(name, traces):
    """Returns a method whose loss counts how often it is traced."""

    def method(problem):
        program = METHODS[name](problem)
        if program.loss is None:
            return program

        def loss(*args):
            traces[name] += 1
            return program.loss(*args)

        return program._replace(loss=loss)

    return method


def run_method(
    problem, shared_loop, name, folder, changes=None, loop=None, traces=None, **fields
):
    """Runs a method; returns the outcome and the problem with the changed fields."""
    problem = problem._replace(**fields)
    if changes:
        problem = problem._replace(config=make_config(**changes))
    method = METHODS[name] if traces is None else count_traces(name, traces)
    loop = loop or shared_loop
    outcome = loop.run(name, method, problem, folder / "none", NullStage())
    assert outcome.diverged is None
    return outcome, problem._replace(method=name)


def scaled_hyperparameters(config):
    """Returns 3/4 of all nonzero real numbers of a method's configuration.

    Except for those on which the shapes of its program depend.
    """
    numbers = {k: x for k, x in vars(config).items() if isinstance(x, float) and x}
    numbers.pop("epochs", None)
    if numbers.get("saliency_fraction") == 1:
        del numbers["saliency_fraction"]
    return {name: 0.75 * x for name, x in numbers.items()}


def trees_equal(a, b):
    """Returns whether two trees are the same to the bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def merge_shards(table):
    """Returns all rows of a sharded table."""
    return {name: np.asarray(x).reshape(-1, *x.shape[2:]) for name, x in table.items()}


def on_one_device(fn):
    """Turns a per-device function into one of whole arrays, on a single device."""
    return jax.vmap(fn, None, None, axis_name=executors.AXIS, axis_size=1)


def write_pairs(folder, rows=80):
    """Writes a data set of image-text pairs in two classes; returns its configuration.

    A tenth of the rows has no image, another tenth no text.
    """
    folder.mkdir()
    rng, lines = np.random.default_rng(0), []
    for row in range(rows):
        entry = {"id": f"row{row}", "label": "cat" if row % 2 else "dog"}
        if row % 10 != 7:
            pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{row}.png")
            entry["image"] = f"{row}.png"
        if row % 10 != 8:
            entry["text"] = f"text of {row}"
        splits = ["train", "train", "train", "validation", "test"]
        lines.append(json.dumps({**entry, "split": splits[row // 2 % 5]}) + "\n")
    (folder / "pairs.jsonl").write_text("".join(lines))
    return Data(dir=str(folder), image_size=8, text_length=6, vocabulary=120)
